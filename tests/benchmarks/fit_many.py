"""K trials of LoRA trained in one forward pass on stacked factors, next to the same K runs one after another.

    python tests/benchmarks/fit_many.py [--rounds 4] [--steps 2] [--threads 1 2]

One base serves all trials: K x B rows pass through it, each block of B rows through the factors and the head of its
own trial, as a bank serves them. One backward pass gives all gradients; each trial has its own clip and its own AdamW
at its own rate. Both ways take turns in one process, and the CPU seconds of the process stand next to the wall time, as
the machine may have other work. The weights of both after 20 steps of four trials are compared in float64 and float32:
AdamW divides by the size of a gradient, so that one that is nothing but rounding moves a weight as far as any other.

The idea: Yan et al. 2025 (PLoRA), arXiv:2508.02932.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from machine import describe_machine
from torch import nn
from torch.nn.functional import cross_entropy

from inlay import METHODS, ImageView, load_base, load_images, load_processor

RESULTS = Path(__file__).parent / "results"
WIDTH, CLIP, CHECKED_STEPS, COMPARED = 8, 1.0, 20, 4
BATCHES, COUNTS = (32, 8), (1, 2, 4, 8)
Batch = dict[str, torch.Tensor]


class StackedLora(nn.Module):
    """A frozen linear layer with K pairs of factors; `factors` are set before each pass: (K, r, in) and (K, out, r)."""

    def __init__(self, base: nn.Linear, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.factors: tuple[torch.Tensor, torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (K B) N in
        down, up = self.factors
        result = self.base(x)
        hidden = torch.bmm(x.reshape(len(down), -1, x.shape[-1]), down.mT)  # K (B N) r
        total = torch.baddbmm(result.view(len(down), -1, result.shape[-1]), hidden, up.mT, alpha=self.scale)
        return total.view(result.shape)


class StackedHead(nn.Module):
    """K heads; `factors` are set before each pass: (K, classes, in) and (K, classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: tuple[torch.Tensor, torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (K B) in
        weight, bias = self.factors
        return torch.baddbmm(bias[:, None], x.view(len(weight), -1, x.shape[-1]), weight.mT).flatten(0, 1)


class Trials:
    """K trials of LoRA on one base, with their first values, which both ways start from."""

    def __init__(self, labels: tuple[str, ...], count: int, dtype: torch.dtype = torch.float32) -> None:
        self.rates = [3e-3 * 10 ** (0.5 * (k % 4 - 2)) for k in range(count)]
        self.labels, self.dtype = labels, dtype
        self.starts = []
        for k in range(count):
            model = self.build_alone(k)
            self.starts.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})

    def build_alone(self, seed: int) -> nn.Module:
        """One trial as METHODS makes it."""
        torch.manual_seed(seed)
        return METHODS["lora"].adapt(self.load_base(), WIDTH).to(self.dtype).train()

    def load_base(self) -> Any:
        """The frozen base with a new head."""
        return load_base("builtin:vit-tiny", labels=self.labels).to(self.dtype)


class Alone:
    """The K trials one after another, each by torch's fused AdamW, as `fit` trains them."""

    def __init__(self, trials: Trials) -> None:
        self.trials, self.runs = trials, []
        for k, rate in enumerate(trials.rates):
            model = trials.build_alone(k)
            trained = [p for p in model.parameters() if p.requires_grad]
            self.runs.append((model, trained, torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)))

    def take_steps(self, batches: list[Batch]) -> None:
        for model, trained, optimizer in self.runs:
            for batch in batches:
                model(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, CLIP)
                optimizer.step()
                optimizer.zero_grad()

    def weights(self) -> list[dict[str, torch.Tensor]]:
        return [{n: p.detach() for n, p in model.named_parameters() if p.requires_grad} for model, *_ in self.runs]


class Together:
    """The K trials in one pass. Their values are the rows of one matrix, so that clip and AdamW are few kernels."""

    def __init__(self, trials: Trials) -> None:
        self.names = list(trials.starts[0])
        self.shapes = [trials.starts[0][name].shape for name in self.names]
        rows = [torch.cat([start[name].flatten() for name in self.names]) for start in trials.starts]
        self.values = torch.stack(rows).requires_grad_(True)  # K P
        self.model: Any = trials.load_base().train()
        self.layers = self._stack_layers(trials.build_alone(0))
        # a fused AdamW for each row, at its own rate
        self.rows = [nn.Parameter(row) for row in self.values.detach()]
        groups = [{"params": [row], "lr": rate} for row, rate in zip(self.rows, trials.rates, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)

    def _stack_layers(self, model: nn.Module) -> list[tuple[Any, int, int]]:
        """The stacked layers in the place of the base's, each with the places of its factors among the names."""
        found = []
        for name, module in model.get_base_model().named_modules():
            prefix = f"base_model.model.{name}."
            if isinstance(module, peft.tuners.lora.LoraLayer):
                stacked: Any = StackedLora(self.model.get_submodule(name), module.scaling["default"])
                keys = [f"{prefix}{factor}.default.weight" for factor in ("lora_A", "lora_B")]
            elif name == "classifier":
                stacked = StackedHead()
                keys = [f"{prefix}modules_to_save.default.{leaf}" for leaf in ("weight", "bias")]
            else:
                continue
            self.model.set_submodule(name, stacked)
            found.append((stacked, *(self.names.index(key) for key in keys)))
        return found

    def take_steps(self, batches: list[Batch]) -> None:
        count = len(self.values)
        for batch in batches:
            parts = self.values.split([shape.numel() for shape in self.shapes], dim=1)
            for layer, first, second in self.layers:
                layer.factors = tuple(parts[i].view(count, *self.shapes[i]) for i in (first, second))
            pixels = batch["pixel_values"].repeat(count, 1, 1, 1)  # (K B) C H W
            logits = self.model(pixel_values=pixels).logits
            each = cross_entropy(logits, batch["labels"].repeat(count), reduction="none")
            each.view(count, -1).mean(1).sum().backward()
            gradient = self.values.grad
            assert gradient is not None
            norms = gradient.norm(dim=1, keepdim=True)
            gradient.mul_((CLIP / (norms + 1e-6)).clamp(max=1.0))
            for row, own in zip(self.rows, gradient, strict=True):
                row.grad = own
            self.optimizer.step()
            self.values.grad = None

    def weights(self) -> list[dict[str, torch.Tensor]]:
        sizes = [shape.numel() for shape in self.shapes]
        return [
            {n: part.view(shape) for n, part, shape in zip(self.names, row.split(sizes), self.shapes, strict=True)}
            for row in self.values.detach()
        ]


def draw_batches(size: int) -> tuple[tuple[str, ...], list[Batch]]:
    """Batches of digits, decoded once."""
    data = load_images("builtin:digits")
    view = ImageView(data.train, load_processor("builtin:vit-tiny"))
    items = [view[i] for i in range(CHECKED_STEPS * size)]
    batch = torch.utils.data.default_collate
    return data.labels, [batch(items[i : i + size]) for i in range(0, len(items), size)]


def compare_weights(labels: tuple[str, ...], batches: list[Batch], count: int, dtype: torch.dtype) -> float:
    """The largest difference of a weight between both ways after 20 steps."""
    trials = Trials(labels, count, dtype)
    alone, together = Alone(trials), Together(trials)
    for way in (alone, together):
        way.take_steps([{**batch, "pixel_values": batch["pixel_values"].to(dtype)} for batch in batches])
    pairs = zip(alone.weights(), together.weights(), strict=True)
    return max(float((one[name] - other[name]).abs().max()) for one, other in pairs for name in one)


def time_both(
    labels: tuple[str, ...], batches: list[Batch], count: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Steps of a trial per second of wall time and of CPU time, by turns; the first turn is a warm-up."""
    trials = Trials(labels, count)
    ways: dict[str, Callable[[list[Batch]], None]] = {
        "alone": Alone(trials).take_steps,
        "together": Together(trials).take_steps,
    }
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in ways}
    for turn in range(rounds + 1):
        for name, take_steps in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            take_steps(batches)
            spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            for clock in spent if turn else ():
                found[name][clock].append(count * len(batches) / spent[clock])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="of a turn")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for size in BATCHES:
            labels, batches = draw_batches(size)
            for count in COUNTS:
                speeds = time_both(labels, batches[: options.steps], count, options.rounds)
                row: dict[str, Any] = {"threads": threads, "batch": size, "trials": count, "rounds": options.rounds}
                if threads == options.threads[0] and count == COMPARED:
                    row["difference_float64"] = compare_weights(labels, batches, count, torch.float64)
                    row["difference_float32"] = compare_weights(labels, batches, count, torch.float32)
                for clock in ("wall", "cpu"):
                    pairs = zip(speeds["alone"][clock], speeds["together"][clock], strict=True)
                    ratios = [together / alone for alone, together in pairs]
                    row |= {f"{way}_{clock}": statistics.median(speeds[way][clock]) for way in speeds}
                    row |= {f"ratio_{clock}": statistics.median(ratios), f"spread_{clock}": [min(ratios), max(ratios)]}
                rows.append(row)
                print(json.dumps(row), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    found = {"machine": describe_machine(), "rows": rows}
    (options.out / "fit_many.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "fit_many.md").write_text(format_table(rows))


def format_table(rows: list[dict[str, Any]]) -> str:
    """Steps of a trial per second, and their ratio within a turn."""
    lines = [
        "| threads | batch | trials | alone, steps/s | together, steps/s | ratio (range) | ratio of CPU time "
        "| difference, float64 | float32 |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row["spread_wall"]
        differences = [f"{row[key]:.0e}" if key in row else "" for key in ("difference_float64", "difference_float32")]
        lines.append(
            f"| {row['threads']} | {row['batch']} | {row['trials']} | {row['alone_wall']:.1f} | "
            f"{row['together_wall']:.1f} | {row['ratio_wall']:.2f} ({low:.2f} to {high:.2f}) | {row['ratio_cpu']:.2f} "
            f"| {' | '.join(differences)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""CPU time of a step of `fit` next to a bare PyTorch loop and transformers.Trainer: the same model and batches.

    python tests/benchmarks/fit_speed.py [--rounds 5] [--threads 1] [--sizes tiny small base]

The three take turns in one process, round by round, in a rotating order, so that a machine that slows down slows all of
them; the figures are ratios within a round, of CPU time and of wall time. Loading, start-up and saving are outside the
timed part for all three. On a GPU the CPU time is what the host does, and the wall time counts.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import set_seed
from machine import describe_machine, tell_machine
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from inlay import TrainConfig, fit
from inlay.bases.sites import head_modules, lora_targets
from inlay.train.sampler import SeededDataset, SeededSampler

RESULTS = Path(__file__).parent / "results" / "fit_speed.json"
RATE, SEED, CLASSES = 2e-3, 0, 10


@dataclass(frozen=True)
class Size:
    """A ViT, and the steps it is timed in."""

    width: int
    layers: int
    heads: int
    image: int
    patch: int
    batch: int
    steps: int


SIZES = {
    "tiny": Size(64, 4, 4, 32, 4, 32, 30),  # that of builtin:vit-tiny
    "one image": Size(64, 4, 4, 32, 4, 1, 60),
    "small": Size(192, 12, 3, 64, 8, 16, 6),
    "base": Size(768, 12, 12, 224, 16, 1, 3),
}


class Items(Dataset):
    """Random images, made once, so that what is timed is the loop and not a decoder."""

    def __init__(self, size: Size, count: int = 64) -> None:
        generator = torch.Generator().manual_seed(SEED)
        images = torch.randn(count, 3, size.image, size.image, generator=generator)
        self.items = [{"pixel_values": image, "labels": i % CLASSES} for i, image in enumerate(images)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def new_model(size: Size) -> torch.nn.Module:
    set_seed(SEED)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=4 * size.width,
            image_size=size.image,
            patch_size=size.patch,
            num_labels=CLASSES,
        )
    ).requires_grad_(False)
    return get_peft_model(
        model,
        LoraConfig(r=8, lora_alpha=16, target_modules=lora_targets(model), modules_to_save=head_modules(model)),
    )


@dataclass
class Timing:
    """Seconds a step, and the last loss."""

    cpu: float
    wall: float
    loss: float


class Watch:
    """CPU and wall time between two moments."""

    def start(self) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.cpu, self.wall = time.process_time() - self.cpu, time.perf_counter() - self.wall


def bare(model: torch.nn.Module, items: Items, size: Size) -> Timing:
    """The loop that one would write by hand."""
    device, steps, watch = "cuda" if torch.cuda.is_available() else "cpu", size.steps, Watch()
    model.to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    scheduler = transformers.get_scheduler("cosine", optimizer, round(0.1 * steps), steps)
    loader = DataLoader(SeededDataset(items, SEED), batch_sampler=SeededSampler(len(items), size.batch, steps, SEED))
    model.train()
    watch.start()
    for batch in loader:
        loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        last = loss.item()
    watch.stop()
    return Timing(watch.cpu / steps, watch.wall / steps, last)


class TrainerWatch(TrainerCallback, Watch):
    """Time from the first step's begin to the last step's end."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.stop()


def trainer(model: torch.nn.Module, items: Items, size: Size) -> Timing:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=size.steps,
            per_device_train_batch_size=size.batch,
            learning_rate=RATE,
            weight_decay=0.0,
            lr_scheduler_type="cosine",
            warmup_steps=round(0.1 * size.steps),
            max_grad_norm=1.0,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            seed=SEED,
        )
        watch = TrainerWatch()
        run = Trainer(model=model, args=arguments, train_dataset=items, callbacks=[watch])
        run.pop_callback(transformers.trainer_callback.PrinterCallback)
        run.train()
        loss = run.state.log_history[-2]["loss"]
        return Timing(watch.cpu / size.steps, watch.wall / size.steps, loss)


class FitWatch(Watch):
    """From before the first step to after the last: `fit` calls it."""

    def begin(self, folder: Path) -> None:
        self.start()

    def evaluated(self, step: int) -> None:
        self.stop()


def ours(model: torch.nn.Module, items: Items, size: Size) -> Timing:
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            output_dir=folder + "/run",
            epochs=size.steps * size.batch / len(items),
            batch_size=size.batch,
            learning_rate=RATE,
            seed=SEED,
            workers=0,
            eval_every=size.steps,
        )
        watch = FitWatch()
        fit(model, items, None, config, callback=watch)
        log = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
        return Timing(watch.cpu / size.steps, watch.wall / size.steps, log[-1]["loss"])


LOOPS = (bare, ours, trainer)


def measure(size: Size, rounds: int) -> dict[str, Any]:
    items = Items(size)
    found: dict[str, list[Timing]] = {loop.__name__: [] for loop in LOOPS}
    for round_ in range(rounds + 1):
        for loop in LOOPS[round_ % 3 :] + LOOPS[: round_ % 3]:
            timing = loop(new_model(size), items, size)
            if round_:  # the first one warms up: imports, thread pools, allocator
                found[loop.__name__].append(timing)
    losses = {name: timings[-1].loss for name, timings in found.items()}
    assert abs(losses["bare"] - losses["ours"]) < 1e-5, f"the loops do not train alike: {losses}"

    def ratio(name: str, kind: str) -> dict[str, float]:
        pairs = zip(found[name], found["ours"], strict=True)
        values = sorted(getattr(theirs, kind) / getattr(own, kind) for theirs, own in pairs)
        return {"median": round(statistics.median(values), 4), "min": round(values[0], 4), "max": round(values[-1], 4)}

    return {
        **{
            f"{kind}_ms_a_step": {
                name: round(1e3 * statistics.median(getattr(timing, kind) for timing in timings), 2)
                for name, timings in found.items()
            }
            for kind in ("cpu", "wall")
        },
        **{
            f"speed_of_ours_over_{name}": {kind: ratio(name, kind) for kind in ("cpu", "wall")}
            for name in ("bare", "trainer")
        },
        "batch": size.batch,
        "steps": size.steps,
        "rounds": rounds,
    }


def write_table(result: dict[str, Any]) -> str:
    lines = [
        f"{tell_machine(result['machine'])}. Above 1 `fit` is faster. "
        "Median (smallest to largest) of the ratios within a round.",
        "",
        "| ViT | batch | rounds | bare, CPU ms | over bare, CPU time | over bare, wall time | over Trainer, CPU time |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["sizes"].items():
        shown = [
            "{median:.3f} ({min:.3f} to {max:.3f})".format(**row[f"speed_of_ours_over_{peer}"][kind])
            for peer, kind in (("bare", "cpu"), ("bare", "wall"), ("trainer", "cpu"))
        ]
        cells = [name, row["batch"], row["rounds"], row["cpu_ms_a_step"]["bare"], *shown]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "sizes": {},
        "machine": describe_machine("accelerate", device="cuda" if torch.cuda.is_available() else "cpu"),
    }
    for name in arguments.sizes:
        result["sizes"][name] = measure(SIZES[name], arguments.rounds)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
        RESULTS.with_suffix(".md").write_text(write_table(result))
    print(write_table(result))


if __name__ == "__main__":
    main()

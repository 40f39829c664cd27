"""What an adapter adds to the time of a forward pass, and what is left of that when it is merged.

    python tests/benchmarks/adapter_latency.py [--rounds 7]

A ViT of base size with random weights, and builtin:vit-tiny. `bottleneck-linear` is RepAdapter (Luo et al. 2023,
arXiv:2302.08106), a bottleneck without activation, which folds into the next layer; `bottleneck` has an activation and
does not fold (Houlsby et al. 2019); both after attention and MLP, LoRA on every linear layer of the blocks. All widths
are 8, all numbers random. States take turns, round by round, on one thread; figures are CPU time, ratios those within a
round.
`difference` is that of the logits, merged to unmerged, relative to the largest of what the adapter changes.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from inlay import METHODS, load_base
from inlay.measure import count_macs
from inlay.methods._peft import merge_keeping_weights

RESULTS = Path(__file__).parent / "results" / "adapter_latency"
WIDTH, STD = 8, 0.03
MERGED = ("lora", "bottleneck-linear")


def make_bases() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    large = ViTForImageClassification(ViTConfig(num_labels=10)).requires_grad_(False).eval()
    return {"ViT-B/16, 224 x 224": large, "builtin:vit-tiny, 32 x 32": load_base("builtin:vit-tiny")}


def make_states(base: nn.Module) -> dict[str, nn.Module]:
    """The base, each adapter in a copy of it, and those that merge merged into another copy."""
    states = {"base": base}
    for method in ("bottleneck", *MERGED):
        torch.manual_seed(1)
        model = METHODS[method].adapt(copy.deepcopy(base), WIDTH).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * STD)
        states[method] = model
        if method in MERGED:
            states[f"{method}, merged"], _ = merge_keeping_weights(copy.deepcopy(model))
    return states


@torch.inference_mode()
def take_turns(states: dict[str, nn.Module], pixels: Tensor, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds by state; the first of `rounds` + 1 turns is a warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in states}
    order = list(states)
    for i in range(rounds + 1):
        for name in order[i % len(order) :] + order[: i % len(order)]:
            begun = time.process_time()
            states[name](pixel_values=pixels)
            taken[name].append(1000 * (time.process_time() - begun))
    return {name: turns[1:] for name, turns in taken.items()}


@torch.inference_mode()
def compare_outputs(states: dict[str, nn.Module], pixels: Tensor, method: str) -> float:
    base, unmerged, merged = (states[n](pixel_values=pixels).logits for n in ("base", method, f"{method}, merged"))
    return float((merged - unmerged).abs().max() / (unmerged - base).abs().max())


def measure(states: dict[str, nn.Module], pixels: Tensor, rounds: int) -> list[dict[str, Any]]:
    taken = take_turns(states, pixels, rounds)
    rows = []
    for name, turns in taken.items():
        ratios = [turn / plain for turn, plain in zip(turns, taken["base"], strict=True)]
        low, *_, high = statistics.quantiles(ratios, n=10)
        method = name.removesuffix(", merged")
        rows.append(
            {
                "state": name,
                "batch": len(pixels),
                "cpu_ms": round(statistics.median(turns), 2),
                "to_base": round(statistics.median(ratios), 3),
                "to_base_p10_p90": [round(low, 3), round(high, 3)],
                "mmacs": round(count_macs(states[name], {"pixel_values": pixels[:1]}) / 1e6, 2),
                "difference": float(f"{compare_outputs(states, pixels, method):.1g}") if name != method else None,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="Of the large base at batch 1; others in proportion.")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, base in make_bases().items():
        states, side = make_states(base), base.config.image_size
        tiny = side == 32
        for batch, times in ((1, 10 * rounds), (16, 2 * rounds)) if tiny else ((1, rounds), (4, 1 + rounds // 2)):
            pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
            found.setdefault(name, []).extend(measure(states, pixels, times))
        print(json.dumps(found[name], indent=2))
    result = {"width": WIDTH, "std": STD, "rounds": rounds, "machine": describe_machine(), "rows": found}
    RESULTS.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    heading = "| base | batch | state | MMACs an image | CPU ms | to the base (p10 to p90) | difference |"
    lines = [heading, "|---|---:|---|---:|---:|---:|---:|"]
    for name, rows in found.items():
        for row in rows:
            low, high = row["to_base_p10_p90"]
            ratio = f"{row['to_base']:.2f} ({low:.2f} to {high:.2f})" if row["state"] != "base" else "1"
            cells = [
                name,
                row["batch"],
                row["state"],
                f"{row['mmacs']:,}",
                row["cpu_ms"],
                ratio,
                row["difference"] or "-",
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

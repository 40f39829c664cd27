"""Classifiers made of convolutions with their kernels channels last, as `inlay predict` holds them on a CPU.

    OMP_NUM_THREADS=1 python tests/benchmarks/channels_last.py [--rounds 7]

Inference in float32 next to the same weights as they are stored, by turns on one thread. `difference` is the largest of
a logit relative to the largest logit; the golden check allows 0.02.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import describe_machine, tell_machine

from inlay import load_base

RESULTS = Path(__file__).parent / "results" / "channels_last"


def make_models() -> dict[str, tuple[Any, int, int]]:
    """Model, side of an image, and images in a batch; of those that are not embedded the weights are random."""
    torch.manual_seed(0)
    small = transformers.ResNetConfig(depths=[2, 2, 2, 2], layer_type="basic", hidden_sizes=[64, 128, 256, 512])
    mobilenet = transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config())
    names = [f"builtin:{name}-tiny" for name in ("mobilenet", "shufflenet", "squeezenet")]
    return {
        **{name: (load_base(name, device="cpu"), 32, 32) for name in names},
        "ResNet-18": (transformers.ResNetForImageClassification(small), 224, 4),
        "ResNet-50": (transformers.ResNetForImageClassification(transformers.ResNetConfig()), 224, 4),
        "ConvNeXt-T": (transformers.ConvNextForImageClassification(transformers.ConvNextConfig()), 224, 4),
        "MobileNetV2": (mobilenet, 224, 8),
        "MobileNetV2, one image": (mobilenet, 224, 1),
    }


@torch.inference_mode()
def measure(model: Any, side: int, images: int, rounds: int) -> dict[str, float]:
    """CPU time of a batch as stored, and the ratio within a round."""
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(1))
    ways = [model.eval(), copy.deepcopy(model).to(memory_format=torch.channels_last)]
    times, logits = [], [way(pixel_values=pixels).logits for way in ways]
    for _ in range(rounds):
        pair = []
        for way in ways:
            begun = time.process_time()
            way(pixel_values=pixels)
            pair.append(time.process_time() - begun)
        times.append(pair)
    ratios = sorted(last / stored for stored, last in times)
    return {
        "cpu_ms": round(1e3 * statistics.median(stored for stored, _ in times), 1),
        "ratio": round(statistics.median(ratios), 3),
        "min": round(ratios[0], 3),
        "max": round(ratios[-1], 3),
        "difference": float(f"{float((logits[0] - logits[1]).abs().max() / logits[0].abs().max()):.1e}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = {}
    for name, (model, side, images) in make_models().items():
        rows[name] = {"side": side, "images": images, **measure(model, side, images, rounds)}
        print(name, rows[name], flush=True)
    result = {"rounds": rounds, "machine": describe_machine(), "rows": rows}
    RESULTS.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    lines = [
        "| model | images | as stored, CPU ms | channels last, ratio | largest difference |",
        "|---|---|---:|---:|---:|",
    ]
    for name, row in rows.items():
        ratio = f"{row['ratio']:.2f} ({row['min']:.2f} to {row['max']:.2f})"
        size = f"{row['images']} of {row['side']} pixels"
        lines.append(f"| {name} | {size} | {row['cpu_ms']} | {ratio} | {row['difference']:.1e} |")
    told = f"Median of {rounds} rounds (smallest and largest). {tell_machine(result['machine'])}."
    RESULTS.with_suffix(".md").write_text("\n".join([*lines, "", told, ""]))


if __name__ == "__main__":
    main()

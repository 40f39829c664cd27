"""Epochs per second with frozen blocks run once (`cache_frozen`) beside the plain way: same fit, data and settings.

    python tests/benchmarks/frozen_blocks.py [--rounds 3] [--threads 2] [--sizes tiny small]

A ViT of 12 blocks with random weights, of which the last 2, the final norm and the head are trained, on photos (JPEG,
decoded by the loader's workers in every epoch of the plain way). The two ways take turns in one process. An epoch is
timed from the end of one evaluation to the end of the next; the first is left out, as it holds start-up and, in the
short way, the one pass through the frozen blocks: its time is given beside. No checkpoints are written on the way:
their cost does not depend on the number of photos.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from inlay import ImageView, TrainConfig, fit, load_images

sys.path.insert(0, str(Path(__file__).parents[1]))
from places import SHARED

RESULTS = Path(__file__).parent / "results" / "frozen_blocks.json"
# Name: hidden size, heads, batch, photos for training, photos for validation. Those of DeiT-Ti, DeiT-S and ViT-B.
SIZES = {"tiny": (192, 3, 32, 96, 24), "small": (384, 6, 16, 48, 12), "base": (768, 12, 8, 32, 8)}
EPOCHS = {"plain": 3, "memory": 6}  # the first one is not counted


class Clock:
    """A metric that notes when each evaluation ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def add_batch(self, **batch: Any) -> None:
        """Nothing to keep."""

    def compute(self) -> dict[str, float]:
        """Note the time; the score is always the same, so the best weights are written once."""
        self.times.append(time.perf_counter())
        return {"score": 0.0}


def new_model(size: str, labels: int) -> torch.nn.Module:
    """A ViT whose first ten blocks are frozen."""
    torch.manual_seed(0)
    hidden, heads, *_ = SIZES[size]
    config = ViTConfig(
        hidden_size=hidden, num_attention_heads=heads, intermediate_size=4 * hidden, num_hidden_layers=12,
        num_labels=labels,
    )  # fmt: skip
    model = ViTForImageClassification(config).requires_grad_(False)
    for part in (*model.vit.layers[-2:], model.vit.layernorm, model.classifier):
        part.requires_grad_(True)
    return model


def epochs(way: str, size: str, data: Any) -> tuple[list[float], list[float], float]:
    """Seconds of each epoch after the first, all losses, and seconds until the end of the first epoch."""
    batch, train, validation = SIZES[size][2:]
    processor, clock = ViTImageProcessor(), Clock()
    views = [
        ImageView(rows.select(range(0, len(rows), len(rows) // count)[:count]), processor)
        for rows, count in ((data.train, train), (data.validation, validation))
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            output_dir=folder + "/run", epochs=EPOCHS[way], batch_size=batch, learning_rate=3e-4, schedule="constant",
            warmup=0.0, save_every=10**6, cache_frozen="no" if way == "plain" else "memory",
        )  # fmt: skip
        begun = time.perf_counter()
        fit(new_model(size, len(data.labels)), *views, config, metrics=[clock])
        log = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
    seconds = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    return seconds, [row["loss"] for row in log if "gradient_norm" in row], clock.times[0] - begun


def compare(size: str, data: Any, rounds: int) -> dict[str, Any]:
    """Both ways by turns; the ratio is within a round."""
    speeds: dict[str, list[float]] = {"plain": [], "memory": []}
    first: dict[str, list[float]] = {"plain": [], "memory": []}
    ratios, apart = [], 0.0
    for _ in range(rounds):
        losses = {}
        for way in speeds:
            seconds, losses[way], start = epochs(way, size, data)
            speeds[way].append(1 / statistics.median(seconds))
            first[way].append(start)
        ratios.append(speeds["memory"][-1] / speeds["plain"][-1])
        pairs = zip(losses["plain"], losses["memory"], strict=False)  # the short way takes more steps
        apart = max(apart, *(abs(a - b) for a, b in pairs))
    return {
        "epochs_per_second": {way: round(statistics.median(values), 4) for way, values in speeds.items()},
        "ratio": {
            "median": round(statistics.median(ratios), 2),
            "min": round(min(ratios), 2),
            "max": round(max(ratios), 2),
        },
        "first_epoch_s": {way: round(statistics.median(values), 2) for way, values in first.items()},
        "largest_difference_of_losses": apart,
        "batch": SIZES[size][2],
        "photos": SIZES[size][3:],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    photos = SHARED / "flowers5" / "dev"
    data = load_images(str(photos) if photos.is_dir() else "builtin:shapes")
    result = {
        "blocks": "12, of which the last 2 are trained",
        "data": "flowers5/dev" if photos.is_dir() else "builtin:shapes",
        "sizes": {size: compare(size, data, arguments.rounds) for size in arguments.sizes},
        "rounds": arguments.rounds,
        "machine": describe_machine(device="cuda" if torch.cuda.is_available() else "cpu"),
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

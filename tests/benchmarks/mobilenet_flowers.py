"""Ways to adapt a convolutional network with real pre-training: quality with its spread, and what each costs.

    python tests/benchmarks/mobilenet_flowers.py                      # all methods: hours on one core; resumes
    python tests/benchmarks/mobilenet_flowers.py --methods lora norm  # some of them

MobileNetV2 1.0 with ImageNet weights (../shared/data/mobilenet_imagenet) learns five flowers (../shared/data/flowers5)
from 640 photos. 160 others of the same folder choose the best evaluation of each run, and, with seed 0, the best of
four learning rates of each method. The scores are those of three seeds at that rate, on photos that chose nothing:
`heldout` where it is there, else `dev/val`. One more run, with seed 0, has the rate that `fit` chooses by itself. A run
is stored in the JSON of the results as soon as it is done, and not repeated.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import set_seed
from machine import describe_machine
from PIL import Image

from inlay import TrainConfig, fit, load_base, load_processor
from inlay.bases.learning_rate import scale_rate
from inlay.files.atomic import write_json
from inlay.measure.costs import cost
from inlay.methods import METHODS
from inlay.tasks.metrics import Accuracy

sys.path.insert(0, str(Path(__file__).parents[1]))
from places import SHARED

RESULTS = Path(__file__).parent / "results" / "mobilenet_flowers.json"
BASE, DATA = SHARED / "mobilenet_imagenet" / "hf" / "mobilenet_v2_1.0_224", SHARED / "flowers5"
NAMES = ("lora", "lora-conv", "conv-adapter", "ssf", "bottleneck-mlp", "bias", "norm", "partial", "probe", "full")
FACTORS = (0.1, 0.3, 1, 3)  # of each method's rate on the embedded bases
EMBEDDED = {"ssf": 0.03}  # where that was another than METHODS has now
WIDTH, SIDE, BATCH = 8, 128, 32
KEPT = ("trainable_parameters", "mmacs", "base_mmacs", "latency_ms", "base_latency_ms")


class Photos(torch.utils.data.Dataset[dict[str, Any]]):
    """Photos in memory, SIDE pixels square; in training half of them are mirrored."""

    def __init__(self, paths: list[Path], labels: list[str], mirror: bool = False) -> None:
        images = [Image.open(path).convert("RGB") for path in paths]
        size = {"size": {"shortest_edge": round(SIDE * 8 / 7)}, "crop_size": {"height": SIDE, "width": SIDE}}
        self.pixels = load_processor(BASE)(images, return_tensors="pt", **size)["pixel_values"]
        self.labels = [labels.index(path.parent.name) for path in paths]
        self.mirror = mirror

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        row = int(index[0] if isinstance(index, tuple) else index)
        mirrored = self.mirror and bool(torch.rand(()) < 0.5)
        return {
            "pixel_values": self.pixels[row].flip(-1) if mirrored else self.pixels[row],
            "labels": self.labels[row],
        }


def load_photos() -> tuple[list[str], Photos, Photos, Photos, str]:
    """Class names; training, validation and test photos; the folder of the last."""
    labels = sorted(path.name for path in (DATA / "dev" / "train").iterdir())
    files = [path for label in labels for path in sorted((DATA / "dev" / "train" / label).iterdir())]
    test = DATA / "heldout" if (DATA / "heldout").is_dir() else DATA / "dev" / "val"
    unseen = [path for label in labels for path in sorted((test / label).iterdir())]
    train = [path for i, path in enumerate(files) if i % 5]
    views = Photos(train, labels, mirror=True), Photos(files[::5], labels), Photos(unseen, labels)
    return labels, *views, str(test.relative_to(SHARED))


def train_once(
    method: str, rate: float, seed: int, epochs: float, labels: list[str], photos: tuple[Photos, Photos, Photos]
) -> dict[str, Any]:
    """One run: accuracy on the validation and test photos, and what the model with its adapter costs per photo."""
    train, validation, test = photos
    set_seed(seed)
    model = METHODS[method].adapt(load_base(BASE, labels=labels), WIDTH)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            f"{folder}/run", epochs=epochs, batch_size=BATCH, learning_rate=rate, seed=seed, workers=0,
            eval_every=round(epochs * len(train) / BATCH / 3),
        )  # fmt: skip
        result = fit(model, train, validation, config, metrics=[Accuracy()])
    with torch.inference_mode():
        said = torch.cat([model(pixel_values=pixels).logits.argmax(-1) for pixels in test.pixels.split(BATCH)])
    costs = cost(model, {"pixel_values": test.pixels[:1]})
    return {
        "validation": result.metrics["accuracy"],
        "test": float((said == torch.tensor(test.labels)).float().mean()),
        "loss": result.metrics["loss"],
        **{key: costs[key] for key in KEPT if key in costs},
        "steps_per_second": result.steps_per_second,
    }


def choose_rate(runs: dict[str, Any], method: str) -> float | None:
    """The rate of the best validation accuracy with seed 0, among equals that of the least loss; None: not all done."""
    found = {rate: runs.get(f"{method} {rate:g} 0") for rate in list_rates(method)}
    if not all(found.values()):
        return None
    return max(found, key=lambda rate: (found[rate]["validation"], -found[rate]["loss"]))


def list_rates(method: str) -> list[float]:
    """The four learning rates of a method."""
    rate = EMBEDDED.get(method, METHODS[method].learning_rate)
    return [float(f"{factor * rate:.3g}") for factor in FACTORS]


@cache
def default_rate(method: str) -> float:
    """The rate that `fit` takes on this base where none is given."""
    return float(f"{scale_rate(METHODS[method].learning_rate, load_base(BASE)):.3g}")


def make_table(runs: dict[str, Any], seeds: list[int], said: str) -> str:
    """The results of the methods that are done."""
    lines = [
        "| method | test accuracy | validation | learning rate | at the default rate | trained parameters | MMACs | "
        "latency ms | base's ms |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method in (name for name in NAMES if name in METHODS):
        rate = choose_rate(runs, method)
        own = [runs.get(f"{method} {rate:g} {seed}") for seed in seeds] if rate else [None]
        if not all(own):
            continue
        test, validation = ([100 * run[key] for run in own] for key in ("test", "validation"))
        row, base = own[0], statistics.median(run.get("base_latency_ms", run["latency_ms"]) for run in own)
        default = runs.get(f"{method} {default_rate(method):g} {seeds[0]}")
        untuned = f"{100 * default['test']:.1f} ({default_rate(method):g})" if default else ""
        edge = " (edge)" if rate in (list_rates(method)[0], list_rates(method)[-1]) else ""
        lines.append(
            f"| {method} | {statistics.mean(test):.1f} ± {statistics.stdev(test) if test[1:] else 0:.1f} | "
            f"{statistics.mean(validation):.1f} | {rate:g}{edge} | {untuned} | "
            f"{row['trainable_parameters']:,} | "
            f"{row['mmacs']:.1f} | {statistics.median(run['latency_ms'] for run in own):.1f} | {base:.1f} |"
        )
    return f"{said}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, and write the tables after each run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--methods", nargs="+", default=[name for name in NAMES if name in METHODS])
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    torch.set_num_threads(1)  # as the figures were measured
    labels, *photos, unseen = load_photos()
    train, validation, test = photos
    said = (
        f"{len(train)} training and {len(validation)} validation photos of {SIDE} x {SIDE} pixels, {len(test)} of "
        f"{unseen} for the score; {asked.epochs:g} epochs in batches of {BATCH}, width {WIDTH}, seeds {asked.seeds}, "
        "adapters unmerged. Batch norms keep their statistics. A probe's head alone is trained: its cost is the "
        f"base's. CPU ({platform.machine()}), one thread, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}."
    )
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"runs": {}}
    runs = stored["runs"]
    for method in asked.methods:
        planned = [(rate, asked.seeds[0]) for rate in list_rates(method)] + [(None, seed) for seed in asked.seeds[1:]]
        planned += [(default_rate(method), asked.seeds[0])]
        for rate, seed in planned:
            rate = rate or choose_rate(runs, method)
            key = f"{method} {rate:g} {seed}"
            if key in runs:
                continue
            runs[key] = train_once(method, rate, seed, asked.epochs, labels, (train, validation, test))
            write_json(RESULTS, {"machine": describe_machine(), "said": said, "runs": runs})
            RESULTS.with_suffix(".md").write_text(make_table(runs, asked.seeds, said), encoding="utf-8")
            print(key, json.dumps(runs[key]), flush=True)
    print(make_table(runs, asked.seeds, said))


if __name__ == "__main__":
    main()

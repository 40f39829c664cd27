"""RandAugment and mixup in the training of a convolutional network with real pre-training, on flowers.

    python tests/benchmarks/augment_flowers.py [--epochs 5] [--seeds 0 1 2]

MobileNetV2 1.0 with ImageNet weights learns five flowers by LoRA at the rate that `mobilenet_flowers.py` found, from
the 640 training photos of that script, cropped and mirrored at random. The same photos as there choose the best
evaluation of a run, and score it. A run is stored in the results as soon as it is done, and not repeated.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import set_seed
from machine import describe_machine, tell_machine
from mobilenet_flowers import BASE, BATCH, DATA, SIDE, WIDTH

from inlay import ImageView, TrainConfig, fit, load_base, load_processor
from inlay.methods import METHODS
from inlay.tasks.images.augment import mix_images
from inlay.tasks.images.data import IMAGE
from inlay.tasks.images.loss import SmoothedClasses
from inlay.tasks.metrics import Accuracy

RESULTS = Path(__file__).parent / "results" / "augment_flowers"
WAYS: dict[str, dict[str, Any]] = {
    "crop and mirror": {},
    "RandAugment 9": {"randaugment": 9},
    "mixup 0.2": {"mixup": 0.2},
    "both": {"randaugment": 9, "mixup": 0.2},
}
METHOD, RATE = "lora", 0.0009


def make_rows(paths: list[Path], labels: list[str]) -> datasets.Dataset:
    """As `ImageData` has them."""
    features = datasets.Features({"image": IMAGE, "label": datasets.Value("int64")})
    images = [{"bytes": None, "path": str(path)} for path in paths]
    return datasets.Dataset.from_dict(
        {"image": images, "label": [labels.index(path.parent.name) for path in paths]}, features
    )


def train_once(parts: list[datasets.Dataset], labels: list[str], way: str, seed: int, epochs: float) -> dict[str, Any]:
    """One run."""
    processor = load_processor(BASE)
    processor.size, processor.crop_size = {"shortest_edge": round(SIDE * 8 / 7)}, {"height": SIDE, "width": SIDE}
    train = ImageView(parts[0], processor, "crop-flip", **WAYS[way])
    validation, test = (ImageView(rows, processor) for rows in parts[1:])
    set_seed(seed)
    model = METHODS[METHOD].adapt(load_base(BASE, labels=labels), WIDTH)
    mixes = bool(train.mixup)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            f"{folder}/run", epochs=epochs, batch_size=BATCH, learning_rate=RATE, seed=seed, workers=0,
            eval_every=round(epochs * len(train) / BATCH / 3),
        )  # fmt: skip
        result = fit(
            model,
            train,
            validation,
            config,
            metrics=[Accuracy()],
            collate=mix_images if mixes else None,
            loss=SmoothedClasses(0.0) if mixes else None,
        )
    with torch.inference_mode():
        items = [test[i] for i in range(len(test))]
        pixels, wanted = torch.stack([i["pixel_values"] for i in items]), torch.tensor([i["labels"] for i in items])
        said = torch.cat([model(pixel_values=part).logits.argmax(-1) for part in pixels.split(BATCH)])
    return {
        "validation": result.metrics["accuracy"],
        "test": float((said == wanted).float().mean()),
        "train_loss": result.history[-1]["train_loss"],
        "seconds": round(result.seconds, 1),
    }


def write(runs: dict[str, Any], epochs: float, seeds: list[int]) -> None:
    machine = describe_machine("pillow")
    RESULTS.with_suffix(".json").write_text(json.dumps({"machine": machine, "runs": runs}, indent=2) + "\n")
    lines = ["| training images | test accuracy | validation | last training loss |", "|---|---:|---:|---:|"]
    for way in WAYS:
        own = [runs[key] for seed in seeds if (key := f"{way}, {epochs:g} epochs, seed {seed}") in runs]
        if len(own) == len(seeds):
            test, validation, loss = ([run[key] for run in own] for key in ("test", "validation", "train_loss"))
            spread = f" ± {100 * statistics.stdev(test):.1f}" if len(own) > 1 else ""
            lines.append(
                f"| {way} | {100 * statistics.mean(test):.1f}{spread} | {100 * statistics.mean(validation):.1f} | "
                f"{statistics.mean(loss):.2f} |"
            )
    told = f"{epochs:g} epochs, " + ("one seed. " if len(seeds) == 1 else f"{len(seeds)} seeds: mean ± deviation. ")
    RESULTS.with_suffix(".md").write_text("\n".join([*lines, "", told + tell_machine(machine) + ".", ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    if not (BASE.is_dir() and DATA.is_dir()):
        sys.exit(f"{BASE} or {DATA} is not on this machine.")
    torch.set_num_threads(1)
    labels = sorted(path.name for path in (DATA / "dev" / "train").iterdir())
    files = [path for label in labels for path in sorted((DATA / "dev" / "train" / label).iterdir())]
    unseen = [path for label in labels for path in sorted((DATA / "dev" / "val" / label).iterdir())]
    parts = [make_rows(p, labels) for p in ([p for i, p in enumerate(files) if i % 5], files[::5], unseen)]
    path = RESULTS.with_suffix(".json")
    runs = json.loads(path.read_text())["runs"] if path.is_file() else {}
    for seed in arguments.seeds:
        for way in WAYS:
            key = f"{way}, {arguments.epochs:g} epochs, seed {seed}"
            if key not in runs:
                runs[key] = train_once(parts, labels, way, seed, arguments.epochs)
                print(key, runs[key], flush=True)
                write(runs, arguments.epochs, arguments.seeds)


if __name__ == "__main__":
    main()

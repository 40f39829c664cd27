"""What pruning costs and what healing brings back: every criterion, with and without compensation.

    nice python tests/benchmarks/pruning.py vit-tiny
    nice python tests/benchmarks/pruning.py mobilenet --base /path/to/mobilenet_v2 --data /path/to/flowers5/dev
    nice python tests/benchmarks/pruning.py vit-small --data /path/to/flowers5/dev --batch 16

`vit-tiny`: the embedded ViT, adapted to handwritten digits by LoRA. `mobilenet`: MobileNetV2 with ImageNet weights,
adapted to flowers by LoRA, on images of 128 pixels. `vit-small`: a ViT of the widths of ViT-S (384 features, 12 blocks,
6 heads; Touvron et al. 2021, arXiv:2012.12877), trained here on flowers alone, on images of 48 pixels in patches of 8:
what a CPU can do in an hour, and no more than that; or any ViT of `--base`, adapted to flowers by LoRA.

Data is in three parts: what is trained on and looked at by the criteria; what chooses the best step of the first
adaptation; and what every row is scored on, which chooses nothing.

Each row is a share of the multiply-accumulates, a criterion, and whether the next layer was fitted: the accuracy before
any training, after a LoRA of at most 5 % of the parameters, and after training all weights for as many steps. Then
there are the dense model, trained on for as many steps, and a model of the same size from scratch.

A run that is interrupted goes on where it was: each figure is written when it is there. `--columns before` scores all
rows before any training, which takes minutes; the other columns take hours.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from inlay import METHODS, ImageTask, TrainConfig, fit, heal, load_images, load_trained, prune, save_adapter
from inlay.compress.prune import TrainedModel
from inlay.tasks.images.view import ImageView
from inlay.tasks.metrics import Accuracy

RESULTS = Path(__file__).parent / "results" / "pruning"
SHARES = (0.7, 0.5, 0.3)
CRITERIA = ("random", "l1", "l2", "batchnorm", "apoz", "activation", "taylor", "thinet")
COLUMNS = ("before", "lora", "full")  # the training before the score
SEEDS = (0, 1)  # of the criterion random
SIDE = 48  # pixels of an image of the small ViT


def write_digits(folder: Path) -> Path:
    """The digits in three folders: 60 % to train on, 20 % that choose, 20 % that score."""
    from PIL import Image

    images, labels = load_digits(return_X_y=True)
    train, rest, train_labels, rest_labels = train_test_split(
        images, labels, test_size=0.4, random_state=0, stratify=labels
    )
    choose, score, choose_labels, score_labels = train_test_split(
        rest, rest_labels, test_size=0.5, random_state=0, stratify=rest_labels
    )
    parts = {"train": (train, train_labels), "validation": (choose, choose_labels), "test": (score, score_labels)}
    for part, (pixels, names) in parts.items():
        for i, (image, name) in enumerate(zip(pixels, names, strict=True)):
            path = folder / part / str(name) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image.reshape(8, 8) * 15.9375).astype("uint8")).resize((32, 32)).save(path)
    return folder


def link_flowers(folder: Path, data: Path) -> Path:
    """The flowers: four fifths of the training part to train on, one fifth that chooses; the validation part scores."""
    for label in sorted(path.name for path in (data / "train").iterdir() if path.is_dir()):
        files = sorted((data / "train" / label).iterdir())
        parts = {
            "train": [file for i, file in enumerate(files) if i % 5],
            "validation": files[::5],
            "test": sorted((data / "val" / label).iterdir()),
        }
        for part, chosen in parts.items():
            (folder / part / label).mkdir(parents=True, exist_ok=True)
            for file in chosen:
                link = folder / part / label / file.name
                if not link.exists():
                    link.symlink_to(file)
    return folder


def small_mobilenet(folder: Path, base: Path) -> Path:
    """The base with a processor for images of 128 pixels, a third of the work of 224."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base / name, folder / name)
    processor = {
        "image_processor_type": "MobileNetV2ImageProcessor",
        "size": {"shortest_edge": 144},
        "crop_size": {"height": 128, "width": 128},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def train_vit_small(folder: Path, data: Path, epochs: float = 40) -> TrainedModel:
    """A ViT of the widths of ViT-S from scratch, which stays in `folder`."""
    task = ImageTask(dataset=str(data), augment="crop-flip")
    if not (folder / "model.safetensors").is_file():
        size = {"height": SIDE, "width": SIDE}
        processor = ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        images = load_images(str(data))
        names = dict(enumerate(images.labels))
        torch.manual_seed(0)
        shape = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
        model = ViTForImageClassification(ViTConfig(image_size=SIDE, patch_size=8, id2label=names, **shape))
        config = TrainConfig(
            str(folder / "run"), epochs=epochs, learning_rate=5e-4, weight_decay=0.05, workers=0, precision="bf16"
        )
        views = ImageView(images.train, processor, task.augment), ImageView(images.validation, processor)
        fit(model, *views, config, metrics=[Accuracy()])
        processor.save_pretrained(folder)
        model.save_pretrained(folder)
    return load_trained(folder)


def adapt(base: str, data: Path, folder: Path, epochs: float) -> TrainedModel:
    """The base adapted by LoRA, which is folded into it."""
    task = ImageTask(model=base, dataset=str(data), augment="none")
    config = TrainConfig(output_dir=str(folder), epochs=epochs, workers=0, embedded_rate=METHODS["lora"].learning_rate)
    loaded = task.load(0)
    model = METHODS["lora"].adapt(task.base(loaded), 8)
    result = task.fit(model, loaded, config, task)
    metrics = {"dataset": str(data), "validation": result.metrics, "training": {"seed": 0}}
    return load_trained(save_adapter(model, folder / "adapter", processor=loaded.processor, metrics=metrics))


class Rows:
    """Figures that are computed once and kept in a file."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        stored = json.loads(path.read_text()) if path.is_file() else {}
        self.about, self.rows = about, stored.get("rows", {})

    def add(self, row: str, column: str, compute: Callable[[], float]) -> None:
        found = self.rows.setdefault(row, {})
        if column not in found:
            found[column] = compute()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({**self.about, "rows": self.rows}, indent=2) + "\n")
            write_table(self)
            print(row, column, found[column], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", choices=("vit-tiny", "mobilenet", "vit-small"))
    parser.add_argument("--base", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark_pruning"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="only these")
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=CRITERIA, help="only these")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=COLUMNS, help="only these")
    options = parser.parse_args()
    torch.set_num_threads(1)
    work = options.work / options.model
    if options.model == "vit-tiny":
        data = write_digits(work / "data")
        dense = adapt("builtin:vit-tiny", data, work / "lora", epochs=10)
    else:
        data = link_flowers(work / "data", options.data.resolve())
        base = small_mobilenet(work / "base", options.base) if options.model == "mobilenet" else options.base
        dense = adapt(str(base), data, work / "lora", epochs=8) if base else train_vit_small(work / "base", data)
    about = {
        "model": options.model,
        "steps": options.steps,
        "batch": options.batch,
        "machine": describe_machine(),
    }
    table = Rows(RESULTS.with_name(f"pruning_{options.model}.json"), about)
    measure(dense, str(data), table, options)


def score(trained: TrainedModel, data: str) -> float:
    return round(trained.score(data, split="test").scores["accuracy"].value, 4)


def measure(dense: TrainedModel, data: str, table: Rows, options: argparse.Namespace) -> None:
    """Every figure of the table that is not there yet."""
    steps, batch = options.steps, options.batch

    def train(trained: TrainedModel, way: Any, steps: int = steps) -> float:
        return score(heal(trained, data, way=way, steps=steps, batch_size=batch).trained, data)

    norms = any(isinstance(module, torch.nn.BatchNorm2d) for module in dense.model.modules())
    criteria = [name for name in options.criteria if name != "batchnorm" or norms]
    for column in options.columns:
        table.add("dense", column, partial(score, dense, data) if column == "before" else partial(train, dense, column))
    for share, criterion, compensate in product(options.shares, criteria, (False, True)):
        for seed in SEEDS if criterion == "random" else (0,):
            row = f"{share} {criterion}{f' {seed}' if seed else ''}{' + least squares' if compensate else ''}"
            missing = [column for column in options.columns if column not in table.rows.get(row, {})]
            if not missing:
                continue
            made = prune(dense, data, target=f"macs={share}", criterion=criterion, compensate=compensate, seed=seed)
            for cost in ("macs", "params"):
                table.add(row, cost, partial(share_of, made.facts, cost))
            for column in missing:
                whole = partial(score, made.trained, data)
                table.add(row, column, whole if column == "before" else partial(train, made.trained, column))
    for share in options.shares if "full" in options.columns else ():
        made = prune(dense, data, target=f"macs={share}", criterion="l1", scope="local")
        for column, count in (("full", steps), ("full, ten times the steps", 10 * steps)):
            table.add(f"{share} from scratch", column, partial(train, made.trained, "scratch", count))


def share_of(facts: dict[str, Any], cost: str) -> float:
    return round(facts["after"][cost] / facts["before"][cost], 4)


def write_table(table: Rows) -> None:
    columns = ("macs", "params", "before", "lora", "full", "full, ten times the steps")
    lines = [f"| {' | '.join(('share and criterion', *columns))} |", "|" + "---|" * (len(columns) + 1)]
    for name in sorted(table.rows, key=place_in_table):
        cells = [str(table.rows[name].get(column, "")) for column in columns]
        lines.append(f"| {' | '.join((name, *cells))} |")
    table.path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def place_in_table(name: str) -> tuple[float, int, str]:
    """The dense model, then by share, then by criterion, and last what was trained from scratch."""
    share, _, criterion = name.partition(" ")
    if not criterion:
        return 0.0, 0, name
    return -float(share) + 1, next((i for i, each in enumerate(CRITERIA) if criterion.startswith(each)), 99), name


if __name__ == "__main__":
    main()

"""Images per CPU second of `ImageView` next to a loader that is written as timm writes it, with and without workers.

    python tests/benchmarks/image_loading.py [--rounds 5] [--images 320] [--flowers FOLDER]

Both crop, resize and mirror images at random, and give float batches. They take turns, round by round, in a rotating
order; the figure is the ratio within a round. CPU time is that of the process and of its workers. Memory of freed
tensors is kept, as `fit` keeps it on a CPU, for all.
"""

import argparse
import json
import math
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from machine import describe_machine, tell_machine
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import ViTImageProcessorPil

from inlay import ImageView, load_images
from inlay.tasks.images.pixels import ProcessorSteps
from inlay.tasks.images.view import NormalisedBatches
from inlay.train.launch import _keep_freed_memory
from inlay.train.sampler import SeededDataset, SeededSampler

RESULTS = Path(__file__).parent / "results"
FLOWERS = Path(__file__).parents[3] / "shared" / "data" / "flowers5" / "dev" / "train"
BATCH, SEED = 32, 0
FEATURES = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})


class TimmDataset(Dataset):
    """timm's ImageDataset with RandomResizedCrop, RandomHorizontalFlip and ToNumpy: uint8 images, C H W."""

    def __init__(self, paths: list[str], processor: ViTImageProcessorPil) -> None:
        self.paths, self.side, self.resample = paths, processor.size["height"], processor.resample

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        with open(self.paths[index], "rb") as file:  # noqa: PTH123 - as timm's reader
            image = Image.open(file).convert("RGB")
        left, top, width, height = self.draw_box(*image.size)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.side, self.side), self.resample)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.moveaxis(np.array(image, dtype=np.uint8), -1, 0), 0

    def draw_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """RandomResizedCropAndInterpolation.get_params at the scale of inlay's crops."""
        for _ in range(10):
            area = random.uniform(0.7, 1.0) * width * height
            ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w <= width and h <= height:
                return random.randint(0, width - w), random.randint(0, height - h), w, h
        return 0, 0, width, height


def fast_collate(items: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """timm.data.loader.fast_collate."""
    batch = torch.zeros((len(items), *items[0][0].shape), dtype=torch.uint8)
    for i, (image, _) in enumerate(items):
        batch[i] += torch.from_numpy(image)
    return batch, torch.tensor([label for _, label in items], dtype=torch.int64)


class TimmLoader:
    """timm's DataLoader and PrefetchLoader, which normalises a batch."""

    def __init__(self, paths: list[str], processor: ViTImageProcessorPil, workers: int) -> None:
        data = TimmDataset(paths, processor)
        self.loader = DataLoader(data, BATCH, shuffle=True, num_workers=workers, collate_fn=fast_collate)
        self.mean, self.deviation = (
            torch.tensor([255 * value for value in values]).view(1, 3, 1, 1)
            for values in (processor.image_mean, processor.image_std)
        )

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch, _ in self.loader:
            yield batch.float().sub_(self.mean).div_(self.deviation)


class InlayLoader:
    """As `fit` loads a training split of `ImageTask`."""

    def __init__(self, paths: list[str], processor: ViTImageProcessorPil, workers: int) -> None:
        images = [{"bytes": None, "path": path} for path in paths]
        rows = datasets.Dataset.from_dict({"image": images, "label": [0] * len(paths)}, FEATURES)
        self.view = ImageView(rows, processor, "crop-flip").in_eight_bits()
        self.collate = NormalisedBatches(self.view.steps)
        order = SeededSampler(len(paths), BATCH, len(paths) // BATCH, SEED)
        self.loader = DataLoader(
            SeededDataset(self.view, SEED),
            batch_sampler=order,
            num_workers=workers,
            collate_fn=self.collate.stack,
        )

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in self.loader:
            yield self.collate.finish(batch)["pixel_values"]


class ProcessorLoader(InlayLoader):
    """As `InlayLoader`, with the image processor called for each image."""

    def __init__(self, paths: list[str], processor: ViTImageProcessorPil, workers: int) -> None:
        super().__init__(paths, processor, workers)
        self.view.steps = self.collate.steps = ProcessorSteps(processor)


LOADERS: dict[str, type[TimmLoader] | type[InlayLoader]] = {
    "inlay": InlayLoader,
    "timm": TimmLoader,
    "image processor": ProcessorLoader,
}


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def draw_photos(folder: Path, count: int, width: int, height: int) -> list[str]:
    """JPEGs as detailed as photos are: about 1.5 bits a pixel."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        layers = [
            Image.fromarray(rng.integers(0, 255, (height // n, width // n, 3), np.uint8)).resize((width, height), 3)
            for n in (128, 32, 8, 3)
        ]
        mixed = sum(w * np.asarray(layer, np.float32) for w, layer in zip((0.45, 0.3, 0.17, 0.08), layers, strict=True))
        Image.fromarray(mixed.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04}.jpg", quality=90)
    return sorted(map(str, folder.iterdir()))


def write_digits(folder: Path, count: int) -> list[str]:
    """Grey PNGs of 8 x 8 pixels."""
    rows = load_images("builtin:digits").train
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:04}.png").write_bytes(rows[i]["image"]["bytes"])
    return sorted(map(str, folder.iterdir()))


def measure(kind: type[TimmLoader] | type[InlayLoader], *arguments: Any) -> tuple[float, float]:
    """Images per CPU second and per second."""
    loader = kind(*arguments)
    count, used, begun = 0, cpu_seconds(), time.perf_counter()
    for batch in loader:
        count += len(batch)
    return count / (cpu_seconds() - used), count / (time.perf_counter() - begun)


def compare(paths: list[str], side: int, workers: int, rounds: int) -> dict[str, Any]:
    processor = ViTImageProcessorPil(size={"height": side, "width": side})
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LOADERS}
    names = list(LOADERS)
    for name in names:  # warm-up
        measure(LOADERS[name], paths[:BATCH], processor, 0)
    for round_ in range(rounds):
        for name in names[round_ % 3 :] + names[: round_ % 3]:
            found[name].append(measure(LOADERS[name], paths, processor, workers))

    def ratio(peer: str, which: int) -> dict[str, float]:
        values = sorted(ours[which] / other[which] for ours, other in zip(found["inlay"], found[peer], strict=True))
        return {"median": round(statistics.median(values), 3), "min": round(values[0], 3), "max": round(values[-1], 3)}

    return {
        "images_per_cpu_second": {
            name: round(statistics.median(one[0] for one in each), 1) for name, each in found.items()
        },
        "images_per_second": {
            name: round(statistics.median(one[1] for one in each), 1) for name, each in found.items()
        },
        "over_timm": ratio("timm", 0),
        "over_image_processor": ratio("image processor", 0),
        "over_timm_wall": ratio("timm", 1),
    }


def write(result: dict[str, Any]) -> None:
    (RESULTS / "image_loading.json").write_text(json.dumps(result, indent=2) + "\n")
    lines = [
        "| images | workers | inlay | timm-like | image processor | over timm-like | over image processor |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        speeds = " | ".join(f"{row['images_per_cpu_second'][name]:.0f}" for name in LOADERS)
        ratios = " | ".join(
            f"{one['median']:.2f} ({one['min']:.2f} to {one['max']:.2f})"
            for one in (row["over_timm"], row["over_image_processor"])
        )
        lines.append(f"| {row['images']} | {row['workers']} | {speeds} | {ratios} |")
    told = (
        f"Images per CPU second, median of {result['rounds']} rounds, and the ratio within a round (median, smallest "
        f"and largest); batch {BATCH}, to 224 x 224 pixels, digits to 32 x 32. {tell_machine(result['machine'])}."
    )
    (RESULTS / "image_loading.md").write_text("\n".join([*lines, "", told, ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--flowers", type=Path, default=FLOWERS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    _keep_freed_memory()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        kinds = {"digits, 8 x 8": write_digits(Path(temporary) / "digits", arguments.images)}
        if arguments.flowers.is_dir():
            kinds["flowers, 240 x 160"] = sorted(map(str, arguments.flowers.rglob("*.jpg")))[: arguments.images]
        for width, height in ((500, 375), (1024, 1024), (2048, 1536)):
            count = max(BATCH, min(arguments.images, arguments.images * 500 * 375 // (width * height)) // BATCH * BATCH)
            drawn = draw_photos(Path(temporary) / str(width), count, width, height)
            kinds[f"drawn, {width} x {height}"] = drawn
        for name, paths in kinds.items():
            for workers in (0, 2):
                side = 32 if name.startswith("digits") else 224
                rows.append({"images": name, "workers": workers, **compare(paths, side, workers, arguments.rounds)})
                print(json.dumps(rows[-1]), flush=True)
    result = {
        "rows": rows,
        "rounds": arguments.rounds,
        "images": arguments.images,
        "machine": describe_machine("pillow"),
    }
    write(result)


if __name__ == "__main__":
    main()

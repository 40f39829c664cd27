"""What fewer bits cost and keep: every mode of `inlay quantize` on ViTs and convolutional networks, in one run.

    python tests/benchmarks/int8.py [--only NAME ...]
    python tests/benchmarks/int8.py --table dense=FOLDER pruned=FOLDER healed=FOLDER --data builtin:digits
    python tests/benchmarks/int8.py --table dense=FOLDER ... --data FOLDER --split test --name int8_table_mobilenet

Speed is that of one input by turns, with one thread. Agreement and accuracy are of held-out images that calibrated
nothing. The ViTs of the sizes S and B have random weights: of them only the speed means something. MobileNetV2 with its
1,001 labels of ImageNet is asked about flowers and ten other photos, so its accuracy there is agreement too.

The table sets models side by side: as torch computes them, and the first and the last of them as graphs, in float32 and
in the mode that `quantize` chooses. Accuracy is that of all held-out examples, or of the split that is named:
`quantize` chooses by the validation split, so a test split is the fairer one where the data has it.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from machine import describe_machine
from PIL import Image
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from inlay import METHODS, ImageTask, TrainConfig, evaluate, export, load_exported, quantize, save_adapter
from inlay.adapters.tables import make_table
from inlay.bases.load import list_builtin_bases
from inlay.compress.card import PROBE_HEADER, format_probe
from inlay.compress.probe import time_by_turns
from inlay.compress.quantize import (
    Workshop,
    choose_modes,
    judge_modes,
    load_batches,
    measure_modes,
    split_rows,
)
from inlay.compress.source import Source, load_source
from inlay.measure.footprint import footprint
from inlay.measure.macs import count_macs
from inlay.tasks import find_task
from inlay.tasks.evaluation import SPLITS, Split
from inlay.tasks.images.processing import process_images

PACKAGES = ("onnx", "onnxruntime", "torchao")
RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).parents[3] / "shared" / "data"
FLOWERS, IMAGENET = SHARED / "flowers5" / "dev", SHARED / "mobilenet_imagenet"
MOBILENET = IMAGENET / "hf" / "mobilenet_v2_1.0_224"
DIGITS = Path(__file__).parents[2] / "adapters_hub" / "digits-lora-vit-tiny"
Batches = list[dict[str, Tensor]]
KEPT: list[Path] = []  # where trained adapters are kept, if anywhere
Case = tuple[Source, Batches, Batches]  # a model, what calibrates, and what judges


def vit_tiny(work: Path) -> Case:
    return on_data(load_source(DIGITS), "builtin:digits")


def vit_of_size(width: int, heads: int) -> Callable[[Path], Case]:
    """A ViT on images of 224 pixels with random weights, whose answers to noise are compared with its own."""

    def make(work: Path) -> Case:
        set_seed(0)
        size = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
        model = ViTForImageClassification(ViTConfig(**size, num_labels=1000)).eval()
        labels = [model.config.id2label[i] for i in range(1000)]
        source = Source(f"vit-{width}", model, find_task("image-classification"), ViTImageProcessorPil(), labels, {})
        noise = torch.randn(24, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        return source, ask(source, noise[:16]), ask(source, noise[16:])

    return make


def mobilenet_on_flowers(work: Path) -> Case:
    """With an adapter and a head for five flowers."""
    return on_data(load_source(train(str(MOBILENET), str(FLOWERS), work)), str(FLOWERS))


def mobilenet_on_imagenet(work: Path) -> Case:
    """As it was pre-trained, asked about 200 photos of flowers and ten others."""
    source = load_source(MOBILENET)
    photos = sorted(FLOWERS.glob("val/*/*.jpg")) + sorted((IMAGENET / "images").glob("*.*"))
    return (
        source,
        ask(source, read(source, sorted(FLOWERS.glob("train/*/*.jpg"))[::12])),
        ask(source, read(source, photos)),
    )


def builtin_network(name: str, data: str) -> Callable[[Path], Case]:
    def make(work: Path) -> Case:
        return on_data(load_source(train(name, data, work)), data)

    return make


CASES: dict[str, Callable[[Path], Case]] = {
    "vit-tiny, digits": vit_tiny,
    "ViT-S/16, random": vit_of_size(384, 6),
    "ViT-B/16, random": vit_of_size(768, 12),
    "MobileNetV2, flowers": mobilenet_on_flowers,
    "MobileNetV2, ImageNet": mobilenet_on_imagenet,
    "squeezenet-tiny, digits": builtin_network("builtin:squeezenet-tiny", "builtin:digits"),
    "shufflenet-tiny, digits": builtin_network("builtin:shufflenet-tiny", "builtin:digits"),
}
TABLE = {
    "model": "",
    "accuracy": ".4f",
    "parameters": ",",
    "mmacs": ".1f",
    "median_ms": ".3f",
    "cpu_ms": ".3f",
    "bytes": ",",
}
NEEDS = {"MobileNetV2, flowers": MOBILENET, "MobileNetV2, ImageNet": MOBILENET}


@dataclass
class Lora:
    """What is noted of the training."""

    rank: int = 8


def train(base: str, data: str, work: Path) -> Path:
    """An adapter and a new head, as a recipe trains them."""
    for folder in KEPT:
        work = folder / Path(base.removeprefix("builtin:")).name
        if (work / "adapter").is_dir():
            return work / "adapter"
    task = ImageTask(model=base, dataset=data)
    loaded = task.load(0)
    lora = METHODS["lora"]
    model = lora.adapt(task.base(loaded), 8)
    config = TrainConfig(str(work / "run"), epochs=3, learning_rate=lora.learning_rate, workers=0)
    result = task.fit(model, loaded, config, Lora())
    metrics = task.report(model, loaded, result).metrics
    return save_adapter(model, work / "adapter", processor=loaded.processor, metrics=metrics)


def on_data(source: Source, data: str) -> Case:
    calibration, held_out = (load_batches(source, data, n, 0, held_out=h) for n, h in ((64, False), (256, True)))
    return source, calibration, held_out


def read(source: Source, paths: list[Path]) -> Tensor:
    opened = [Image.open(path).convert("RGB") for path in paths]
    return torch.cat([process_images(source.processor, [image])["pixel_values"] for image in opened])


@torch.no_grad()
def ask(source: Source, pixels: Tensor) -> Batches:
    """Batches whose labels are what the model itself answers in float32."""
    return [
        {"pixel_values": part, "labels": source.model(pixel_values=part).logits.argmax(-1)} for part in pixels.split(8)
    ]


def probe(case: Case) -> list[dict[str, Any]]:
    """A row for each mode."""
    source, calibration, held_out = case
    with tempfile.TemporaryDirectory() as work:
        rows = split_rows(source, calibration)
        shop = Workshop(source, Path(work), rows[: len(rows) // 8 * 8])
        models, failed = shop.make_modes(choose_modes("auto", source))
        table = measure_modes(source, models, held_out)
        for row in table:
            row.bytes = shop.count_bytes(row.mode)
        judge_modes(table, 0.01, 0.95)
    return [row.to_dict() for row in [*table, *failed]]


def compare_models(folders: dict[str, str], data: str, split: Split | None) -> list[dict[str, Any]]:
    """A row for each model in torch, and two for the first and the last one as graphs."""
    rows, models = [], {}
    with tempfile.TemporaryDirectory() as work:
        for name, folder in folders.items():
            source = load_source(folder)
            models[name] = source.model
            rows.append(describe(name, source, data, split))
        for name in dict.fromkeys((next(iter(folders)), list(folders)[-1])):
            source, out = load_source(folders[name]), Path(work)
            made = [export(folders[name], out / f"{name}-graph")]
            made += [quantize(folders[name], out / f"{name}-few", calibrate=data).exported]
            for each in made:
                loaded, key = load_exported(each.folder), f"{name}, graph in {each.mode}"
                models[key] = loaded.model
                score = evaluate(loaded, data, split=split, resamples=1).scores["accuracy"].value
                rows.append({**describe(key, source, data, split), "accuracy": score, "bytes": each.bytes})
        batch = source.task.golden_inputs(source.model, source.processor)
        for row, speed in zip(rows, time_by_turns(models, batch).values(), strict=True):
            row |= {key: round(value, 4) for key, value in vars(speed).items()}
    return rows


def describe(name: str, source: Source, data: str, split: Split | None) -> dict[str, Any]:
    """Accuracy, parameters, multiply-accumulates and bytes of a model in torch."""
    size = footprint(source.model)
    batch = source.task.golden_inputs(source.model, source.processor)
    return {
        "model": name,
        "accuracy": evaluate(source, data, split=split, resamples=1).scores["accuracy"].value,
        "parameters": size.parameters,
        "mmacs": round(count_macs(source.model, batch) / 1e6, 3),
        "bytes": size.bytes_total,
    }


def write(name: str, content: dict[str, Any], text: str) -> None:
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    (RESULTS / f"{name}.md").write_text(text + "\n")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--table", nargs="+", metavar="NAME=FOLDER", help="Models side by side.")
    parser.add_argument("--data", default="builtin:digits", help="Of the table.")
    parser.add_argument("--split", choices=SPLITS, help="Of this data; default: what `inlay evaluate` scores.")
    parser.add_argument("--name", default="int8_table", help="Of the table's results.")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="Train adapters here, or take those of before.")
    arguments = parser.parse_args()
    KEPT.extend([arguments.keep] if arguments.keep else [])
    torch.set_num_threads(1)
    if arguments.table:
        folders = dict(each.split("=", 1) for each in arguments.table)
        rows = compare_models(folders, arguments.data, arguments.split)
        header = ("model", "accuracy", "parameters", "MACs, M", "latency, ms", "CPU, ms", "bytes")
        cells = [tuple(f"{row[key]:{form}}" for key, form in TABLE.items()) for row in rows]
        about = {"machine": describe_machine(*PACKAGES), "data": Path(arguments.data).name, "split": arguments.split}
        write(arguments.name, {**about, "rows": rows}, make_table(header, cells))
        return
    path = RESULTS / "int8.json"
    stored = json.loads(path.read_text()) if path.is_file() else {}
    found: dict[str, Any] = stored.get("models", {})
    machines: dict[str, Any] = stored.get("machines", {})  # a model can be measured on another day than its neighbours
    for name in arguments.only:
        lacks = (name in NEEDS and not NEEDS[name].exists()) or (
            "-tiny, digits" in name and f"builtin:{name.split(',')[0]}" not in list_builtin_bases()
        )
        if lacks:
            print(f"{name}: not here")
            continue
        with tempfile.TemporaryDirectory() as work:
            found[name], machines[name] = probe(CASES[name](Path(work))), describe_machine(*PACKAGES)
        if "random" in name:
            found[name] = [{**row, "agreement": None, "accuracy": None, "verdict": "speed only"} for row in found[name]]
        cells = [(model, *row) for model, rows in found.items() for row in format_probe(rows)]
        write("int8", {"machines": machines, "models": found}, make_table(("model", *PROBE_HEADER), cells))


if __name__ == "__main__":
    main()

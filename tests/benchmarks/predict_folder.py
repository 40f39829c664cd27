"""`predict` on a folder of images, with the next batches decoded in threads, next to one batch after the other.

    python tests/benchmarks/predict_folder.py [--rounds 5] [--images 200] [--flowers FOLDER] [--small]

The two take turns in one process, on builtin:vit-tiny and on a ViT-B with random weights.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from machine import describe_machine

from inlay import find_pictures, load_adapter, load_base, load_processor, predict, save_adapter
from inlay.methods import METHODS
from inlay.tasks.adapter import place_inputs
from inlay.tasks.image_decoding import open_for_processor
from inlay.tasks.images.processing import process_images

RESULTS = Path(__file__).parent / "results"
FLOWERS = Path(__file__).parents[3] / "shared" / "data" / "flowers5" / "dev" / "val"
BATCH = 32


def predict_in_turn(adapter: Any, files: list[str]) -> list[str]:
    """Each batch is decoded by the image processor, and then computed."""
    weight, found = next(adapter.model.parameters()), []
    for begin in range(0, len(files), BATCH):
        opened = [open_for_processor(file, adapter.processor) for file in files[begin : begin + BATCH]]
        with torch.inference_mode():
            logits = adapter.model(**place_inputs(process_images(adapter.processor, opened), weight)).logits
        found += [adapter.labels[k] for k in logits.argmax(-1)]
    return found


def predict_ahead(adapter: Any, files: list[str]) -> list[str]:
    """As `inlay predict` does it."""
    return [one.label for one in predict(adapter, files, top=1, batch_size=BATCH)]


def make_adapter(folder: Path, base: str) -> Any:
    labels = ["daisy", "dandelion", "roses", "sunflowers", "tulips"]
    model = METHODS["lora"].adapt(load_base(base, labels=labels), 4).eval()
    return load_adapter(save_adapter(model, folder / "adapter", processor=load_processor(base)))


def make_large_base(folder: Path) -> str:
    torch.manual_seed(0)
    transformers.ViTForImageClassification(transformers.ViTConfig()).save_pretrained(folder)
    transformers.ViTImageProcessorPil().save_pretrained(folder)
    return str(folder)


def measure(way: Any, adapter: Any, files: list[str]) -> SimpleNamespace:
    begun, used = time.perf_counter(), time.process_time()
    labels = way(adapter, files)
    return SimpleNamespace(seconds=time.perf_counter() - begun, cpu=time.process_time() - used, labels=labels)


def compare(adapter: Any, files: list[str], rounds: int) -> dict[str, Any]:
    ways = [predict_in_turn, predict_ahead]
    for way in ways:  # warm-up
        way(adapter, files[:BATCH])
    found: dict[str, list[SimpleNamespace]] = {way.__name__: [] for way in ways}
    for round_ in range(rounds):
        for way in ways if round_ % 2 else ways[::-1]:
            found[way.__name__].append(measure(way, adapter, files))
    assert len({tuple(one.labels) for each in found.values() for one in each}) == 1, "the answers differ"

    def ratio(what: str) -> dict[str, float]:
        pairs = zip(found["predict_ahead"], found["predict_in_turn"], strict=True)
        values = sorted(getattr(ahead, what) / getattr(turn, what) for ahead, turn in pairs)
        return {"median": round(statistics.median(values), 3), "min": round(values[0], 3), "max": round(values[-1], 3)}

    medians = {
        name: {what: round(statistics.median(getattr(one, what) for one in each), 2) for what in ("seconds", "cpu")}
        for name, each in found.items()
    }
    return {**medians, "images": len(files), "seconds_ratio": ratio("seconds"), "cpu_ratio": ratio("cpu")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--flowers", type=Path, default=FLOWERS)
    parser.add_argument("--small", action="store_true", help="builtin:vit-tiny only")
    arguments = parser.parse_args()
    files = find_pictures([str(arguments.flowers)])[: arguments.images]
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows["builtin:vit-tiny"] = compare(make_adapter(folder / "tiny", "builtin:vit-tiny"), files, arguments.rounds)
        if not arguments.small:
            large = make_adapter(folder / "large", make_large_base(folder / "base"))
            rows["ViT-B"] = compare(large, files[: 2 * BATCH], arguments.rounds)
    result = {
        "rows": rows,
        "rounds": arguments.rounds,
        "machine": describe_machine("pillow"),
    }
    (RESULTS / "predict_folder.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

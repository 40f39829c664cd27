"""Every rule on three trained tasks: accuracy on each, beside the single adapters.

    python tests/benchmarks/combine_rules.py [--epochs 5]

Three LoRAs of builtin:vit-tiny, on the digits 0 to 4, the digits 5 to 9, and shapes. Each rule makes one adapter of
them; a picture is classified among the labels of its own task. `error` is what cutting back to a width has cost.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import set_seed
from machine import describe_machine
from peft import LoraConfig, get_peft_model

from inlay import (
    ImageView,
    TrainConfig,
    combine,
    fit,
    load_adapter,
    load_base,
    load_images,
    load_processor,
    save_adapter,
)
from inlay.bases.sites import head_modules, lora_targets
from inlay.combine import RULES
from inlay.tasks.metrics import Accuracy

RESULTS = Path(__file__).parent / "results" / "combine_rules"
BASE = "builtin:vit-tiny"
SETTINGS: list[tuple[str, float, dict[str, Any]]] = [
    ("add", 1.0, {}),
    ("add", 0.5, {}),
    ("add", 0.5, {"width": 8}),
    ("average", 1.0, {}),
    ("task_arithmetic", 0.4, {}),
    ("ties", 1.0, {"density": 0.2}),
    ("ties", 1.0, {"density": 0.5}),
    ("dare", 0.5, {"density": 0.5}),
    ("magnitude", 0.5, {"density": 0.2}),
    ("knots", 1.0, {"density": 0.3}),
    ("knots", 0.7, {"density": 1.0}),
    ("zip", 1.0, {}),
    ("zip", 0.5, {}),
    ("zip", 0.33, {}),
]


def tasks() -> dict[str, tuple[Any, Any, list[str]]]:
    """Training rows, validation rows and labels."""
    digits, shapes = load_images("builtin:digits"), load_images("builtin:shapes")
    found = {}
    for name, kept in (("digits 0-4", range(5)), ("digits 5-9", range(5, 10))):
        splits = [_only(rows, kept) for rows in (digits.train, digits.validation)]
        found[name] = (*splits, [digits.labels[i] for i in kept])
    found["shapes"] = (shapes.train, shapes.validation, list(shapes.labels))
    return found


def _only(rows: datasets.Dataset, kept: range) -> datasets.Dataset:
    chosen = rows.select([i for i, label in enumerate(rows["label"][:]) if label in kept])
    columns = {"image": list(chosen["image"]), "label": [label - kept.start for label in chosen["label"]]}
    return datasets.Dataset.from_dict(columns)


def train(name: str, rows: Any, held: Any, labels: list[str], folder: Path, epochs: float) -> Path:
    set_seed(0)
    model, processor = load_base(BASE, labels=labels), load_processor(BASE)
    method = LoraConfig(r=8, lora_alpha=16, target_modules=lora_targets(model), modules_to_save=head_modules(model))
    model = get_peft_model(model, method)
    config = TrainConfig(output_dir=str(folder / f"{name}_run"), epochs=epochs, workers=0)
    fit(model, ImageView(rows, processor, "crop"), ImageView(held, processor), config, metrics=[Accuracy()])
    return save_adapter(model, folder / name, processor=processor)


def accuracy(adapter: Any, rows: Any, labels: list[str]) -> float:
    view, right = ImageView(rows, adapter.processor), 0
    own = torch.tensor([adapter.labels.index(label) for label in labels])
    for start in range(0, len(view), 64):
        items = [view[i] for i in range(start, min(start + 64, len(view)))]
        wanted = torch.tensor([item["labels"] for item in items])
        with torch.no_grad():
            logits = adapter.model(pixel_values=torch.stack([item["pixel_values"] for item in items])).logits
        right += int((logits[:, own].argmax(1) == wanted).sum())
    return right / len(view)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, default=5)
    options = parser.parse_args()
    data, rows = tasks(), []
    assert {rule for rule, _, _ in SETTINGS} == set(RULES), "every rule"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapters = {task: train(task, *own, folder, options.epochs) for task, own in data.items()}
        single = {task: accuracy(load_adapter(adapters[task]), own[1], own[2]) for task, own in data.items()}
        rows.append({"rule": "each adapter alone", "error": 0.0, **single})
        for rule, weight, more in SETTINGS:
            made = combine(dict.fromkeys(adapters.values(), weight), rule, out=folder / "sum", **more)
            adapter = load_adapter(made.folder)
            scores = {task: accuracy(adapter, own[1], own[2]) for task, own in data.items()}
            said = ", ".join([f"weights {weight:g}", *(f"{k} {v}" for k, v in more.items())])
            rank = made.widths["LORA"]
            rows.append({"rule": f"{rule} ({said})", "error": round(made.error, 4), "rank": rank, **scores})
    columns = ["rank", "error", *data, "mean"]
    lines = ["| rule | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        row["mean"] = sum(row[task] for task in data) / len(data)
        cells = [f"{row.get('rank', 8)}", f"{row['error']:.2g}", *(f"{row[task]:.3f}" for task in (*data, "mean"))]
        lines.append(f"| {row['rule']} | " + " | ".join(cells) + " |")
    RESULTS.with_suffix(".json").write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

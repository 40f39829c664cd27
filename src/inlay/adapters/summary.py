"""What an adapter is, in a few facts: for `inlay info` and for the index of a folder of adapters."""

from pathlib import Path
from typing import Any

from inlay.adapters.file import AdapterFile, read_adapter
from inlay.adapters.method_names import name_method, shorten_layer
from inlay.adapters.study import read_study


def summarise_adapter(folder: str | Path) -> dict[str, Any]:
    """Facts about one adapter folder, read and checked without loading a base.

    Raises:
        InlayError: As `read_adapter`.
    """
    file = read_adapter(folder)
    base = file.record.get("base", {})
    parameters = sum(_product(shape) for shape in file.shapes.values())
    return {
        "name": file.name,
        "folder": str(file.folder.resolve()),
        "method": describe_method(file),
        "base": file.base_name or "unknown",
        "revision": base.get("revision"),
        "task": file.record.get("task"),
        "labels": file.labels,
        "groups": {name: list(rows) for name, rows in file.groups.items()},
        "targets": _targets(file),
        "head": file.record.get("head"),
        "parameters": parameters,
        "file_kb": round(file.bytes_weights / 1000, 1),
        "dataset": dataset if isinstance(dataset := file.metrics.get("dataset"), str) else None,
        "validation": _measured(file, "validation"),
        "test": _measured(file, "test"),
        "cost": _measured(file, "cost"),
        "study": read_study(file.metrics),
        "from": " at ".join(file.origin[key] for key in ("repo", "commit") if key in file.origin),
        "trained_with": _measured(file, "versions"),
        "verified": "file whole, checksum right"
        if file.record
        else "saved by peft or by another program: no checksum, base or labels in it",
    }


def describe_method(file: AdapterFile) -> str:
    """Method and width, such as `LoRA r=8, alpha=16`."""
    width = {"r": "r", "lora_alpha": "alpha", "width": "width", "length": "length", "last": "last", "train": "train"}
    config = file.config
    said = [f"{short}={config[key]}" for key, short in width.items() if config.get(key) is not None]
    return f"{name_method(config)} {', '.join(said)}".strip()


def _measured(file: AdapterFile, what: str) -> dict[str, Any]:
    """A part of metrics.json, which may have been written by anyone."""
    found = file.metrics.get(what)
    return found if isinstance(found, dict) else {}


def _targets(file: AdapterFile) -> str:
    targets = file.config.get("target_modules")
    if isinstance(targets, str):
        return targets
    leaves = sorted({shorten_layer(name) for name in targets or []})
    return f"{', '.join(leaves)} ({len([k for k in file.shapes if '.lora_A.' in k]) or len(targets or [])} modules)"


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for axis in shape:
        total *= axis
    return total

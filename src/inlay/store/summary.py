"""What an adapter is, in a few facts: for `inlay info` and for the index of a folder of adapters."""

from pathlib import Path
from typing import Any

from inlay.store.file import AdapterFile, read_adapter
from inlay.store.method_names import method_name


def summary(folder: str | Path) -> dict[str, Any]:
    """Facts about one adapter folder, read and checked without loading a base.

    Raises:
        InlayError: As `read_adapter`.
    """
    file = read_adapter(folder)
    base = file.record.get("base", {})
    parameters = sum(_product(shape) for shape in file.shapes.values())
    return {
        "name": file.name,
        "method": method(file),
        "base": file.base_name or "unknown",
        "revision": base.get("revision"),
        "task": file.record.get("task"),
        "labels": file.labels,
        "targets": _targets(file),
        "head": file.record.get("head"),
        "parameters": parameters,
        "file_kb": round(file.bytes_weights / 1000, 1),
        "dataset": file.metrics.get("dataset"),
        "validation": file.metrics.get("validation", {}),
        "test": file.metrics.get("test") or {},
        "cost": file.metrics.get("cost", {}),
        "from": " at ".join(file.origin[key] for key in ("repo", "commit") if key in file.origin),
        "trained_with": file.metrics.get("versions", {}),
        "verified": "file whole, checksum right"
        if file.record
        else "saved by plain peft: no checksum, base or labels in it",
    }


def method(file: AdapterFile) -> str:
    """Method and width, such as `LoRA r=8, alpha=16`."""
    width = {"r": "r", "lora_alpha": "alpha", "width": "width", "length": "length", "last": "last", "train": "train"}
    config = file.config
    said = [f"{short}={config[key]}" for key, short in width.items() if config.get(key) is not None]
    return f"{method_name(config)} {', '.join(said)}".strip()


def _targets(file: AdapterFile) -> str:
    targets = file.config.get("target_modules")
    if isinstance(targets, str):
        return targets
    leaves = sorted({name.rpartition(".")[2] for name in targets or []})
    return f"{', '.join(leaves)} ({len([k for k in file.shapes if '.lora_A.' in k]) or len(targets or [])} modules)"


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for axis in shape:
        total *= axis
    return total

"""What an adapter is, in a few facts: for `inlay info` and for the index of a folder of adapters."""

from pathlib import Path
from typing import Any

from inlay.atomic import write_json
from inlay.errors import InlayError
from inlay.store.card import method_name
from inlay.store.file import CONFIG, AdapterFile, read_adapter


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
        "cost": file.metrics.get("cost", {}),
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


def write_index(folder: str | Path) -> list[dict[str, Any]]:
    """Write index.json and README.md of a folder of adapters; a broken adapter is listed with what is wrong.

    Raises:
        InlayError: The folder does not exist or holds no adapter.
    """
    folder = Path(folder)
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not found:
        raise InlayError(f"expected a folder of adapters, but {folder} holds none.")
    rows: list[dict[str, Any]] = []
    for path in found:
        try:
            facts = summary(path)
        except InlayError as error:
            rows.append({"name": path.name, "method": "broken", "base": "", "error": str(error)})
        else:
            keys = ("name", "task", "method", "base", "dataset", "parameters", "file_kb", "validation")
            rows.append({key: facts[key] for key in keys})
    write_json(folder / "index.json", rows)
    lines = ["# Adapters", "", "Written by `inlay index`. Each folder is one adapter, with its card.", ""]
    lines += [
        "| adapter | task | method | base | data | parameters | kB | validation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        scores = ", ".join(f"{k} {v:.4f}" for k, v in row.get("validation", {}).items()) or row.get("error", "")
        size = f"{row['parameters']:,} | {row['file_kb']}" if "parameters" in row else " | "
        lines.append(
            f"| [{row['name']}]({row['name']}) | {row.get('task') or ''} | {row['method']} | {row['base']} | "
            f"{row.get('dataset') or ''} | {size} | {scores} |"
        )
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return rows


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

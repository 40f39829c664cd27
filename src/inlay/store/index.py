"""A folder of adapters as a local hub: what is in it, as JSON, as a table and as a page; and what to find in it."""

import json
from pathlib import Path
from typing import Any

from inlay.atomic import replacing
from inlay.errors import InlayError
from inlay.store.file import CARD, CONFIG
from inlay.store.page import PAGE, page
from inlay.store.summary import summary

INDEX = "index.json"
_LISTED = ("name", "task", "method", "base", "dataset", "parameters", "file_kb", "validation")


def adapters_in(folder: Path) -> list[Path]:
    """The adapters of a folder: itself, or folders in it, by name.

    Raises:
        InlayError: It does not exist or holds none.
    """
    found = [folder] if (folder / CONFIG).is_file() else sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if not found:
        raise InlayError(f"expected an adapter or a folder of adapters, but {folder} holds none.")
    return found


def list_adapters(folder: str | Path) -> list[dict[str, Any]]:
    """One row an adapter, without loading any; a broken one is listed with what is wrong, under `error`.

    Raises:
        InlayError: The folder does not exist or holds no adapter.
    """
    rows: list[dict[str, Any]] = []
    for path in adapters_in(Path(folder)):
        try:
            facts = summary(path)
        except InlayError as error:
            rows.append(
                {"name": path.name, "method": "broken", "base": "", "error": str(error).replace(f"{path}/", "")}
            )
        else:
            rows.append({key: facts[key] for key in (*_LISTED, *["test"] * bool(facts["test"]))})
    return rows


def write_index(folder: str | Path) -> list[dict[str, Any]]:
    """Write index.json, README.md and index.html of a folder of adapters; its rows, as `list_adapters`.

    Raises:
        InlayError: The folder does not exist or holds no adapter.
    """
    folder = Path(folder)
    texts = index_texts(folder)
    for name, text in texts.items():
        with replacing(folder / name) as new:
            new.write_text(text, encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(texts[INDEX])
    return rows


def index_texts(folder: Path) -> dict[str, str]:
    """What `write_index` writes, by name."""
    rows = list_adapters(folder)
    lines = ["# Adapters", "", "Written by `inlay index`. Each folder is one adapter, with its card.", ""]
    lines += [
        "| adapter | task | method | base | data | parameters | kB | scores |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = f"{row['parameters']:,} | {row['file_kb']}" if "parameters" in row else " | "
        lines.append(
            f"| [{row['name']}]({row['name']}) | {row.get('task') or ''} | {row['method']} | {row['base']} | "
            f"{row.get('dataset') or ''} | {size} | {scores(row) or row.get('error', '')} |"
        )
    return {
        INDEX: json.dumps(rows, indent=2, ensure_ascii=False) + "\n",
        CARD: "\n".join(lines) + "\n",
        PAGE: page(folder, rows),
    }


def scores(row: dict[str, Any]) -> str:
    """Validation and test scores of a row, such as `loss 0.1306, accuracy 0.9721, test bleu 60.1`."""
    said = [(key, value, ".4f") for key, value in row.get("validation", {}).items()]
    said += [(f"test {key}", value, ".4g") for key, value in row.get("test", {}).items()]
    return ", ".join(f"{key} {value:{form}}" for key, value, form in said if isinstance(value, int | float))

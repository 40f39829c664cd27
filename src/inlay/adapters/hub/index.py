"""A folder of adapters as a local hub: what is in it, as JSON, as a table and as a page; and what to find in it."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

from inlay.adapters.file import CARD, CONFIG
from inlay.adapters.hub.page import PAGE, render_page
from inlay.adapters.summary import summarise_adapter
from inlay.adapters.tables import make_row
from inlay.errors import BadInput, DamagedFile, InlayError
from inlay.files.atomic import replacing
from inlay.files.outputs import check_output_file

INDEX = "index.json"
_SIGNS = {INDEX: '[\n  {\n    "name": ', CARD: "Written by `inlay index`.", PAGE: "const ROWS = ["}
_LISTED = ("name", "task", "method", "base", "dataset", "parameters", "file_kb", "validation")


def find_adapters(folder: Path) -> list[Path]:
    """The adapters of a folder: itself, or folders in it, by name.

    Raises:
        InlayError: It does not exist or holds none.
    """
    try:
        found = [folder] if (folder / CONFIG).is_file() else sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    except OSError as error:
        raise DamagedFile(f"{folder} cannot be read ({error.strerror}).") from None
    if not found:
        raise BadInput(f"{folder} holds no adapter; give an adapter, or a folder of adapters.")
    return found


def list_adapters(folder: str | Path) -> list[dict[str, Any]]:
    """One row an adapter, without loading any; a broken one is listed with what is wrong, under `error`.

    Raises:
        InlayError: The folder does not exist or holds no adapter.
    """
    rows: list[dict[str, Any]] = []
    for path in find_adapters(Path(folder)):
        try:
            facts = summarise_adapter(path)
        except InlayError as error:
            name = path.name.encode(errors="backslashreplace").decode()
            rows.append({"name": name, "method": "broken", "base": "", "error": str(error).replace(f"{path}/", "")})
        else:
            rows.append({key: facts[key] for key in (*_LISTED, *["test"] * bool(facts["test"]))})
    return rows


def write_index(folder: str | Path) -> list[dict[str, Any]]:
    """Write index.json, README.md and index.html of a folder of adapters; its rows, as `list_adapters`.

    Raises:
        InlayError: The folder does not exist, is an adapter or holds none, or has other files of these names.
    """
    folder = Path(folder)
    check_index(folder)
    if folder.is_dir():
        check_output_file(folder / INDEX)
    texts = render_index(folder)
    for name, text in texts.items():
        with replacing(folder / name) as new:
            new.write_text(text, encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(texts[INDEX])
    return rows


def check_index(folder: Path) -> None:
    """Raise InlayError if an index here would replace something else: a project's README, an adapter's card."""
    if (folder / CONFIG).is_file():
        raise BadInput(f"{folder} is an adapter itself; give the folder that it lies in.")
    for name, sign in _SIGNS.items():
        path = folder / name
        if path.exists() and not (path.is_file() and sign.encode() in path.read_bytes()):
            raise BadInput(f"{path} is not an index of adapters and would be overwritten; use another folder.")


def render_index(folder: Path) -> dict[str, str]:
    """What `write_index` writes, by name."""
    rows = list_adapters(folder)
    lines = ["# Adapters", "", "Written by `inlay index`. Each folder is one adapter, with its card.", ""]
    lines += [
        "| adapter | task | method | base | data | parameters | kB | scores |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        size = (f"{row['parameters']:,}", row["file_kb"]) if "parameters" in row else ("", "")
        made_of = (row.get("task") or "", row["method"], row["base"], row.get("dataset") or "")
        link = f"[{row['name']}]({quote(row['name'])})"
        lines.append(make_row(link, *made_of, *size, format_scores(row) or row.get("error", "")))
    return {
        INDEX: json.dumps(rows, indent=2, ensure_ascii=False) + "\n",
        CARD: "\n".join(lines) + "\n",
        PAGE: render_page(folder, rows),
    }


def format_scores(row: dict[str, Any]) -> str:
    """Validation and test scores of a row, such as `loss 0.1306, accuracy 0.9721, test bleu 60.1`."""
    said = [(key, value, ".4f") for key, value in row.get("validation", {}).items()]
    said += [(f"test {key}", value, ".4g") for key, value in row.get("test", {}).items()]
    return ", ".join(f"{key} {value:{form}}" for key, value, form in said if isinstance(value, int | float))

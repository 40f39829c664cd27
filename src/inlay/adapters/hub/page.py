"""A folder of adapters as one web page without a server: a table to sort and to filter, and each adapter's curve."""

import json
from pathlib import Path
from typing import Any

from inlay.adapters.curve import is_drawable
from inlay.adapters.file import read_adapter
from inlay.errors import InlayError

PAGE = "index.html"
_POINTS = 200  # of a curve; longer histories are thinned out


def render_page(folder: Path, rows: list[dict[str, Any]]) -> str:
    """The page for the rows of `list_adapters`; data and style are in it, curves are drawn from metrics.json."""
    data = [{**row, **_more(folder / row["name"])} for row in rows]
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&":  # names and labels come from anywhere, and must not end the script
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8").replace("[/* rows */]", text)


def _more(path: Path) -> dict[str, Any]:
    """What the page shows of an adapter next to its row."""
    try:
        file = read_adapter(path, digest=False)
    except InlayError:
        return {}
    history: list[dict[str, float]] = file.metrics["history"] if is_drawable(file.metrics.get("history")) else []
    return {
        "history": history[:: -(-len(history) // _POINTS) or 1],
        "plots": [plot.name for plot in sorted(path.glob("*.png"))],
        "cost": cost if isinstance(cost := file.metrics.get("cost"), dict) else {},
        "labels": file.labels[:20],
        "origin": file.origin.get("repo", ""),
        "commit": file.origin.get("commit", ""),
    }

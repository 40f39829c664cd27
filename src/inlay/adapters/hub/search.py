"""Adapters for a task or a base: in a local folder of them, and on the Hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from inlay.adapters.hub.exchange import retry_exchange
from inlay.adapters.hub.index import format_scores, list_adapters
from inlay.tasks import TASKS


def search(
    query: str, folder: str | Path | None = None, *, online: bool = True, limit: int = 20
) -> list[dict[str, Any]]:
    """Adapters that fit, those of the folder first, then those of the Hub, the most downloaded ones first.

    Args:
        query: The name of a task, a base (builtin:,
            or a Hub id), or a word of a name, method or data.
        folder: Of adapters; None, or one that is not there: the Hub only.
        online: Ask the Hub too.
        limit: Most rows of the Hub.

    Returns:
        Rows with name, where (`local` or `hub`), task, base, method and scores, as far as known; for `load_adapter`,
        `path` is the adapter's name.

    Raises:
        InlayError: The Hub cannot be asked; a folder without adapters.
    """
    rows = [_local(row, Path(folder)) for row in list_adapters(folder)] if folder and Path(folder).is_dir() else []
    found = [row for row in rows if _fits(row, query)]
    return found + (_on_hub(query, limit) if online else [])


def _local(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    said = {"task": "", "dataset": "", **row, "path": str(folder / row["name"]), "scores": format_scores(row)}
    return {key: "" if value is None else value for key, value in {**said, "where": "local"}.items()}


def _fits(row: dict[str, Any], query: str) -> bool:
    if query in TASKS:
        return bool(row["task"] == query)
    if "/" in query or query.startswith("builtin:"):
        return bool(row["base"] == query)
    return query.lower() in " ".join(row[key] for key in ("name", "task", "base", "method", "dataset")).lower()


def _on_hub(query: str, limit: int) -> list[dict[str, Any]]:
    asked: dict[str, Any] = {"filter": ["peft"], "search": query}
    if query in TASKS:
        asked = {"filter": ["peft"], "pipeline_tag": TASKS[query].hub_tag}
    elif query.startswith("builtin:"):
        asked = {"filter": ["peft", f"base:{query}"]}
    elif "/" in query:
        asked = {"filter": [f"base_model:adapter:{query}"]}
    models = retry_exchange(lambda: list(HfApi().list_models(**asked, sort="downloads", limit=limit)), query, None)
    return [_remote(model) for model in models]


def _remote(model: Any) -> dict[str, Any]:
    tags = model.tags or []
    bases = [
        tag.removeprefix(kind) for kind in ("base_model:adapter:", "base:") for tag in tags if tag.startswith(kind)
    ]
    said = f"{model.downloads:,} downloads" if model.downloads is not None else ""
    return {
        "name": model.id,
        "task": model.pipeline_tag or "",
        "base": bases[0] if bases else "",
        "method": ", ".join(tag for tag in tags if tag in ("lora", "ia3") or tag.startswith("inlay_")),
        "dataset": next((tag.removeprefix("dataset:") for tag in tags if tag.startswith("dataset:")), ""),
        "where": "hub",
        "path": model.id,
        "scores": said,
    }

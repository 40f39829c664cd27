"""The verbs of `inlay` that send, fetch and find adapters; cli.py puts them among the others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of adapters.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Of an adapter, or of folders of adapters.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Where on the Hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make it for your eyes alone.")] = False,
    license: Annotated[str | None, typer.Option(help="Of the adapter, on its card, such as apache-2.0.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
) -> None:
    """Send an adapter, or a folder of them, to the Hub as one commit, once it is seen to be whole.

    The token is the one of `hf auth login` or HF_TOKEN. Broken off, the same command goes on.
    """
    from inlay.store.hub import push_adapter

    print(push_adapter(folder, repo, private=private, license=license, dry_run=dry_run))


def pull(
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="On the Hub.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Where; default: the repository's name.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """Copy an adapter, or a folder of them, from the Hub, whole, and note its commit in origin.json."""
    from inlay.store.hub import pull_adapter

    pulled = pull_adapter(repo, out, revision=revision)
    print(f"{pulled.folder}: {pulled.repo} at {pulled.commit}")


def search(
    query: Annotated[str, typer.Argument(metavar="TASK|BASE", help="Or a word of a name, a method or the data.")],
    folder: Annotated[Path, typer.Option(help="A folder of adapters, searched too.")] = Path("adapters_hub"),
    limit: Annotated[int, typer.Option(help="Most rows of the Hub.")] = 20,
    as_json: Json = False,
) -> None:
    """List adapters for a task or a base: of a local folder, and of the Hub unless HF_HUB_OFFLINE=1."""
    from huggingface_hub import is_offline_mode

    from inlay.store.search import search as find

    online = not is_offline_mode()
    rows = find(query, folder, online=online, limit=limit)
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    _table(rows, ("path", "task", "method", "base", "dataset", "scores"))
    if not rows:
        print(f"nothing for {query!r} in {folder}{' and on the Hub' if online else ''}")
    if not online:
        print("the Hub was not asked: HF_HUB_OFFLINE is set")


def list_(folder: Folder = Path("adapters_hub"), as_json: Json = False) -> None:
    """List a folder of adapters: task, method, base, data, size, scores."""
    from inlay.store.index import list_adapters, scores

    rows = list_adapters(folder)
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    shown = [{**row, "kB": row.get("file_kb", ""), "scores": scores(row) or row.get("error", "")} for row in rows]
    _table(shown, ("name", "task", "method", "base", "dataset", "parameters", "kB", "scores"))


def index(folder: Folder = Path("adapters_hub")) -> None:
    """Write index.json, the table in README.md and the page index.html of a folder of adapters."""
    from inlay.store.index import write_index

    rows = write_index(folder)
    print(f"{folder}: {len(rows)} adapter{'s' * (len(rows) != 1)}")
    for row in rows:
        print(f"  {row['name']}: {row['method']} on {row['base']}")


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold", justify="right" if name in ("parameters", "kB") else "left")
    for row in rows:
        cells = (row.get(name) or "" for name in columns)
        table.add_row(*(f"{cell:,}" if isinstance(cell, int | float) else escape(str(cell)) for cell in cells))
    if rows:
        Console().print(table)


VERBS: dict[str, Callable[..., None]] = {"push": push, "pull": pull, "search": search, "list": list_, "index": index}

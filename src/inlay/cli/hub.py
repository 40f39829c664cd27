"""The verbs of `inlay` that push, pull, search and list adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from inlay.cli.show import JsonOption, printable

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of adapters.")]


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="An adapter, or a folder of adapters.")],
    repo: Annotated[
        str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub; created if it does not exist.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    license: Annotated[
        str | None, typer.Option(help="License of the adapter, for its card, such as apache-2.0.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent, and send nothing.")] = False,
) -> None:
    """Push an adapter, or a folder of adapters, to the Hub in one commit, after checking that it is complete.

    The token comes from `hf auth login` or HF_TOKEN. After an interruption the same command resumes.
    """
    from inlay.adapters.hub.repository import push_adapter

    print(push_adapter(folder, repo, private=private, license=license, dry_run=dry_run))


def pull(
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="Target folder; default: the repository's name."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """Download an adapter, or a folder of adapters, from the Hub, and record its commit in origin.json."""
    from inlay.adapters.hub.repository import pull_adapter

    pulled = pull_adapter(repo, out, revision=revision)
    print(f"{pulled.folder}: {pulled.repo} at {pulled.commit}")


def search(
    query: Annotated[
        str, typer.Argument(metavar="TASK|BASE", help="A task or base, or a word of a name, method or data set.")
    ],
    folder: Annotated[Path, typer.Option(help="A local folder of adapters to search too.")] = Path("adapters_hub"),
    limit: Annotated[int, typer.Option(min=1, help="Largest number of rows from the Hub.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """List adapters for a task or base: in a local folder, and on the Hub unless HF_HUB_OFFLINE=1."""
    from huggingface_hub import is_offline_mode

    from inlay.adapters.hub.search import search as find

    online = not is_offline_mode()
    rows = find(query, folder, online=False)
    if not as_json:
        _print_rows([{**row, "name": row["path"]} for row in rows])  # printed now, because the Hub may not answer
    remote = find(query, online=True, limit=limit) if online else []
    if as_json:
        print(json.dumps([*rows, *remote], indent=2, ensure_ascii=False))
        return
    _print_rows(remote)
    if not rows and not remote:
        print(f"nothing for {query!r} in {folder}{' or on the Hub' if online else ''}")
    if not online:
        print("the Hub was not asked: HF_HUB_OFFLINE is set")


def list_(folder: Folder = Path("adapters_hub"), as_json: JsonOption = False) -> None:
    """List a folder of adapters with task, method, base, data, size and scores."""
    from inlay.adapters.hub.index import format_scores, list_adapters

    rows = list_adapters(folder)
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    _print_rows([{**row, "scores": format_scores(row)} for row in rows])


def index(folder: Folder = Path("adapters_hub")) -> None:
    """Write index.json, the table in README.md and the page index.html of a folder of adapters."""
    from inlay.adapters.hub.index import write_index

    rows = write_index(folder)
    print(f"{folder}: {len(rows)} adapter{'s' * (len(rows) != 1)}")
    for row in rows:
        print(f"  {row['name']}: {row['method']} on {row['base']}")


def _print_rows(rows: list[dict[str, Any]]) -> None:
    """Print three lines per adapter, which fit any terminal: name and task; method, base and data; size and scores."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for row in rows:
        row = {key: printable(value) if isinstance(value, str) else value for key, value in row.items()}
        console.print(Text.assemble((row["name"], "bold"), f"  {row.get('task') or ''}"))
        if row.get("error"):
            console.print(Text(f"    broken: {row['error']}", "red"))
            continue
        data = f", data {row['dataset']}" if row.get("dataset") else ""
        console.print(Text(f"    {row['method'] or 'adapter'} on {row['base'] or 'an unknown base'}{data}"))
        size = f"{row['parameters']:,} parameters, {row['file_kb']} kB" if "parameters" in row else ""
        if size_and_scores := "; ".join(filter(None, (size, row["scores"]))):
            console.print(Text(f"    {size_and_scores}"))


VERBS: dict[str, Callable[..., None]] = {"push": push, "pull": pull, "search": search, "list": list_, "index": index}

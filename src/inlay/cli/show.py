"""What the verbs of the `inlay` command share: options, and how facts are printed."""

import json
from typing import Annotated, Any

import typer

from inlay.tasks.printing import printable

AdapterArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of an adapter, or its Hub id.")]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="Load it on this base (builtin:, folder or Hub id), not on its own.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...; default: the best that this machine has.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def show(facts: dict[str, Any], as_json: bool) -> None:
    """A table of facts, or JSON."""
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if value not in (None, "", [], {}):
            table.add_row(key.replace("_", " "), printable(_text(value)))
    Console().print(table, markup=False, highlight=False)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        lists = any(isinstance(v, list) for v in value.values())
        return (
            "; ".join(f"{k}: {_text(v)}" for k, v in value.items())
            if lists
            else ", ".join(f"{k} {_text(v)}" for k, v in value.items())
        )
    if isinstance(value, list):
        return printable(", ".join(map(str, value[:12]))) + (f" ... ({len(value)})" if len(value) > 12 else "")
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))

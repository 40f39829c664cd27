"""Options that the verbs of the `inlay` command share, and the printing of facts."""

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from inlay.tasks.printing import printable

if TYPE_CHECKING:
    from inlay.tasks.evaluation import Evaluation

ModelArgument = Annotated[
    str, typer.Argument(metavar="ADAPTER|MODEL", help="Folder of an adapter or a model, or Hub id of an adapter.")
]
AdapterArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of an adapter, or its Hub id.")]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", help="Base to load the adapter on (builtin:, folder or Hub id), instead of its own."),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...; default: the best that this machine has.")
]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"] | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Compute in float32, bfloat16, float16 or auto: bfloat16 where it is faster here and the adapter's golden "
        "output allows it; default: float32.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def show(facts: dict[str, Any], as_json: bool) -> None:
    """Print facts as a table or as JSON."""
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
            table.add_row(key.replace("_", " "), printable(_format_value(value)))
    Console().print(table, markup=False, highlight=False)


def show_scores(found: "Evaluation", as_json: bool) -> None:
    """Print scores as they describe themselves, or as JSON."""
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        print("\n".join(map(printable, str(found).split("\n"))))


def _format_value(value: Any) -> str:
    if isinstance(value, dict):
        if any(isinstance(v, list | dict) for v in value.values()):
            return "; ".join(f"{k}: {_format_value(v)}" for k, v in value.items())
        return ", ".join(f"{k} {_format_value(v)}" for k, v in value.items())
    if isinstance(value, list):
        return printable(", ".join(map(str, value[:12]))) + (f" ... ({len(value)})" if len(value) > 12 else "")
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))

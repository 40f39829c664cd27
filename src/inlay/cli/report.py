"""The verb `inlay report`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from inlay.cli.show import JsonOption


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="Folders that inlay compare has written, or below.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the report goes.")],
    anchors: Annotated[
        bool, typer.Option("--anchors", help="Show what others published of the same methods as well.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show one comparison or several: tables, plots for slides, pros and cons, and one page without a server."""
    from inlay.study.report import read_comparisons, save_comparison, write_terminal_table

    found = read_comparisons(folders)
    page = save_comparison(found, output, anchors=anchors)
    if as_json:
        print(json.dumps([each.to_dict() for each in found], indent=2, ensure_ascii=False))
        return
    for each in found:
        print(f"{write_terminal_table(each)}\n")
    print(f"report: {page}")


VERBS: dict[str, Callable[..., None]] = {"report": report}

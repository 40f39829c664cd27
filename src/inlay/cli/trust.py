"""The verbs of the `inlay` command for adapters from elsewhere: verify, import."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from inlay.cli.show import printable


def show_checks(adapter: str, base: str | None, device: str | None, as_json: bool) -> None:
    """Print what `verify` found, a line each, and leave with exit status 1 if anything failed."""
    from inlay.adapters.verify import verify

    checks = verify(adapter, base, device=device)
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2, ensure_ascii=False))
    else:
        for check in checks:
            print(printable(f"{check.what:<15}{check.result:<14}{check.remark}").rstrip())
    if any(check.result == "failed" for check in checks):
        raise typer.Exit(1)


def import_(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A folder or Hub id of peft, or a .safetensors, .bin, .pt or .pth file."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="The adapter: a new folder.")],
    base: Annotated[str | None, typer.Option(help="Its base, where the source does not name it.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Of loralib: the update is alpha / r times B A.")] = None,
    fused: Annotated[
        str | None, typer.Option(metavar="q,v", help="Of loralib's fused layers: which of q, k, v are adapted.")
    ] = None,
) -> None:
    """Convert an adapter of loralib, of Stable Diffusion's text encoder, or with names of an older transformers."""
    from inlay.adapters.convert.convert import import_adapter

    made = import_adapter(source, out, base=base, alpha=alpha, fused=fused.split(",") if fused else None)
    print(printable(f"{made.folder}: {made.form}, {made.layers} layers, {made.renamed} tensors renamed"))
    for left in made.left_out:
        print(printable(f"left out: {left}"))
    print(f"compared with: {made.checked}")


VERBS: dict[str, Callable[..., None]] = {"import": import_}

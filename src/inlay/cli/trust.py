"""The `inlay` command for what other sources made: the checks of `inlay info --verify`, and `inlay import`."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from inlay.cli.show import printable
from inlay.errors import BadInput


def show_checks(adapter: str, base: str | None, device: str | None, as_json: bool) -> None:
    """Print the result of each check on a line, and exit with status 1 if one of them failed."""
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
        typer.Argument(
            metavar="SOURCE", help="Folder or Hub id of a peft adapter, or a .safetensors, .bin, .pt or .pth file."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="New folder for the result.")],
    base: Annotated[str | None, typer.Option(help="Base of the adapter, if the source does not name it.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Where the file does not say it: the update is alpha / r times B A.")
    ] = None,
    fused: Annotated[
        str | None, typer.Option(metavar="q,v", help="For loralib's fused layers: which of q, k, v are adapted.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For torchvision's networks: the names of the classes, one a line."),
    ] = None,
) -> None:
    """Convert an adapter of another program, or torchvision's SqueezeNet or ShuffleNet v2.

    Adapters are those of loralib, of Stable Diffusion (diffusers, kohya, cloneofsimo), and of peft with names of an
    older transformers.
    """
    from inlay.adapters.convert.convert import import_adapter
    from inlay.adapters.convert.networks import holds_network, import_network, read_labels

    if holds_network(source):
        if given := [name for name, value in (("base", base), ("alpha", alpha), ("fused", fused)) if value is not None]:
            raise BadInput(f"{source} is a whole network, to which --{given[0]} does not apply; leave it out.")
        network = import_network(source, out, labels=None if labels is None else read_labels(labels))
        counts = f"{network.parameters:,} parameters, {network.labels} labels"
        print(printable(f"{network.folder}: {network.network}, {counts}"))
        return
    if labels is not None:
        raise BadInput(f"--labels is for torchvision's networks, and {source} is none; leave it out.")
    made = import_adapter(source, out, base=base, alpha=alpha, fused=fused.split(",") if fused else None)
    print(printable(f"{made.folder}: {made.form}, {made.layers} layers, {made.renamed} tensors renamed"))
    for name in made.left_out:
        print(printable(f"left out: {name}"))
    print(f"compared with: {made.checked}")


VERBS: dict[str, Callable[..., None]] = {"import": import_}

"""The verbs of `inlay` that make a model smaller or faster: export and quantize."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from inlay.cli.show import BaseOption, JsonOption, printable

SourceArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL|ADAPTER", help="Embedded base, folder of a model or an adapter, or Hub id."),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write.")]


def export(
    source: SourceArgument,
    output: OutputOption,
    format: Annotated[str, typer.Option(help="onnx is the only one.")] = "onnx",
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model, or an adapter merged into its base, as an ONNX graph that predict and evaluate take."""
    from inlay.compress.export import export as export_model

    made = export_model(source, output, base=base, format=format)  # type: ignore[arg-type]
    print(json.dumps(asdict(made), indent=2, default=str) if as_json else printable(str(made)))


def quantize(
    source: SourceArgument,
    output: OutputOption,
    calibrate: Annotated[
        str, typer.Option(metavar="DATA", help="Labelled data: training examples calibrate, held-out ones judge.")
    ],
    mode: Annotated[
        str, typer.Option(help="auto, a kind (dynamic, static, bfloat16, torchao), or a mode such as int8-dynamic.")
    ] = "auto",
    max_drop: Annotated[float, typer.Option(help="Largest drop of accuracy on held-out examples, 0 to 1.")] = 0.01,
    min_agreement: Annotated[
        float, typer.Option(help="Least share of held-out answers that are those of float32, 0 to 1.")
    ] = 0.95,
    examples: Annotated[int, typer.Option(help="How many examples calibrate.")] = 64,
    compare: Annotated[int, typer.Option(help="How many held-out examples are compared, at most.")] = 256,
    seed: Annotated[int, typer.Option(help="Chooses both.")] = 0,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Probe modes of fewer bits on this machine, and write the fastest that keeps the answers; nothing if none pays."""
    from inlay.compress.quantize import quantize as quantize_model

    made = quantize_model(
        source,
        output,
        calibrate=calibrate,
        base=base,
        mode=mode,
        max_drop=max_drop,
        min_agreement=min_agreement,
        examples=examples,
        compare=compare,
        seed=seed,
        show=None if as_json else lambda table: print("\n".join(map(printable, table.split("\n")))),
    )
    print(json.dumps(asdict(made), indent=2, default=str) if as_json else printable(str(made)))


VERBS: dict[str, Callable[..., None]] = {"export": export, "quantize": quantize}

"""The verbs of `inlay` that make one adapter of several, or a plain model of one and its base."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from inlay.cli.show import AdapterArgument, BaseOption, JsonOption, show
from inlay.errors import BadInput
from inlay.files.outputs import check_output_file


def merge(
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="The model: a new folder.")],
    base: BaseOption = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the stored weights: float32 (the default), bfloat16 or float16.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="8bit or 4bit: into what such a base stands for; stored so too without --dtype.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Save even if the stored model loses more than 5 % of the adapter.")
    ] = False,
) -> None:
    """Fold an adapter into its base, as a model that loads with only transformers, and say what that costs."""
    import math

    from inlay.combine.merge import merge as merge_adapter

    limits = {"limit": math.inf} if force else {}
    print(merge_adapter(adapter, out, base=base, dtype=dtype, quantize=quantize, **limits))  # type: ignore[arg-type]


def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER=WEIGHT...",
            help="Folders or Hub ids; weight 1 where none is given. Or a weight for each part of the base: "
            "dog=unet:1,text_encoder:0.5.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="The result; without it only the report is printed."),
    ] = None,
    rule: Annotated[
        str, typer.Option(help="add, average, task_arithmetic, ties, dare, magnitude, knots or zip.")
    ] = "add",
    width: Annotated[str | None, typer.Option(help="Largest rank or other width of the result, or auto.")] = None,
    error: Annotated[float, typer.Option(help="With --width auto: largest relative error of the update.")] = 0.01,
    density: Annotated[float, typer.Option(help="Share of entries that ties, dare, magnitude and knots keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of dare, and of the examples of --fit.")] = 0,
    heads: Annotated[
        str, typer.Option(help="auto, stack, average, or the name of the adapter whose head is kept.")
    ] = "auto",
    report: Annotated[Path | None, typer.Option(help="Write how the adapters agree, as .png, .json or .txt.")] = None,
    fit: Annotated[
        str | None, typer.Option(metavar="DATA", help="Labelled data, on which the weights are fitted.")
    ] = None,
    examples: Annotated[int, typer.Option(help="How many, for --fit.")] = 32,
    dense: Annotated[
        bool,
        typer.Option("--dense", help="Sum as a difference of the base's weights, for DoRA and others that do not add."),
    ] = False,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make one adapter of several, such as `combine a=1.0 b=-0.5 -o out`; say how they agree, and the error."""
    from inlay.combine import combine as combine_adapters
    from inlay.combine.heatmap import write_report
    from inlay.combine.report import overlap

    if report is not None:
        check_output_file(report)
    weights = dict(_parse_weight(text) for text in adapters)
    if len(weights) < len(adapters):
        raise BadInput(f"one adapter is named twice among {', '.join(adapters)}; give it once, with its whole weight.")
    if out is None:
        found = overlap(weights)
        if report is not None:
            write_report(found, report)
        print(found.to_json() if as_json else found)
        return
    made = combine_adapters(
        weights, rule, out=out, width=int(width) if width and width.isdecimal() else width,  # type: ignore[arg-type]
        error=error, density=density, seed=seed, heads=heads, report=report, fit=fit, examples=examples, dense=dense,
        base=base,
    )  # fmt: skip
    facts = {**asdict(made), "folder": str(made.folder)}
    if not as_json:
        facts.pop("errors")
        facts["error"] = "0: exact" if made.error == 0 else f"{made.error:.3g}"
    show(facts, as_json)


def _parse_weight(text: str) -> tuple[str, float | dict[str, float]]:
    """A folder and its weight, or its weight in each part of the base."""
    path, found, said = text.rpartition("=")
    if not found:
        return text, 1.0
    try:
        if ":" not in said:
            return path, float(said)
        rows = [row.split(":") for row in said.split(",")]
        weights = {part.strip(): float(number) for part, number in rows}
    except ValueError:
        raise BadInput(
            f"{text!r} must be ADAPTER=WEIGHT, such as runs/a=0.5, or with a weight for each part of the base, such as "
            "runs/a=unet:1,text_encoder:0.5."
        ) from None
    if len(weights) < len(rows):
        raise BadInput(f"one part is named twice in {text!r}; give it once.")
    return path, weights


VERBS: dict[str, Callable[..., None]] = {"merge": merge, "combine": combine}

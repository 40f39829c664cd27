"""The `inlay` command. Each verb parses, calls one function of the library and prints; imports wait until it runs."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from inlay import cli_hub, cli_trust
from inlay.cli_trust import printable
from inlay.errors import InlayError

app = typer.Typer(
    name="inlay",
    help="Adapters for Hugging Face models: look at them, use them, and see what works on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AdapterArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of an adapter, or its Hub id.")]
BaseOption = Annotated[
    str | None, typer.Option("--base", help="Load it on this base (builtin:, folder or Hub id), not on its own.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def info(
    adapter: AdapterArgument,
    base: BaseOption = None,
    check: Annotated[
        bool, typer.Option("--verify", help="Check all that can be checked; exit status 1 if anything failed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what an adapter is; with --base also whether it fits that base, checked by loading it."""
    if check:
        from inlay.cli_trust import show_checks

        show_checks(adapter, base, as_json)
        return
    from inlay.store.file import fetch
    from inlay.store.summary import summary

    facts = summary(fetch(adapter))
    if base is not None:
        from inlay.store.load import load_adapter

        loaded = load_adapter(adapter, base)
        off = "not stored" if loaded.deviation is None else f"deviation {loaded.deviation:.1e}"
        facts["fits"] = (
            f"{base}: yes, golden output {off}" if loaded.verified else f"{base}: it loads, but is unverified"
        )
    _show(facts, as_json)


@app.command()
def predict(
    adapter: AdapterArgument,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="Pictures or folders of them, to classify; a picture to find masks in; or prompts, to continue.",
        ),
    ],
    base: BaseOption = None,
    merge: Annotated[bool, typer.Option("--merge", help="Fold the adapter into its base first.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Pictures: classes to name for each.")] = 3,
    task: Annotated[
        str | None, typer.Option(help="Pictures: choose among the classes of this task of a combination alone.")
    ] = None,
    grid: Annotated[
        Path | None, typer.Option(help="Pictures: save a sheet of them and their labels under this name.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Prompts: longest text, in tokens.")] = 64,
    beams: Annotated[int, typer.Option(help="Prompts: beams of the search.")] = 1,
    temperature: Annotated[float, typer.Option(help="Prompts: of sampling; 0: no sampling.")] = 0.0,
    point: Annotated[
        list[str] | None, typer.Option(metavar="X,Y", help="Masks: a pixel of the object. Repeatable.")
    ] = None,
    negative: Annotated[
        list[str] | None, typer.Option(metavar="X,Y", help="Masks: a pixel outside of it. Repeatable.")
    ] = None,
    box: Annotated[
        list[str] | None, typer.Option(metavar="X0,Y0,X1,Y1", help="Masks: corners around an object. Repeatable.")
    ] = None,
    overlay: Annotated[Path | None, typer.Option(help="Masks: save the picture with them under this name.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Use an adapter: classify pictures, find masks, or continue prompts, whichever it was trained for."""
    from inlay.infer.images import draw_sheet, find_pictures
    from inlay.infer.images import predict as classify
    from inlay.infer.text import Decoding, generate
    from inlay.store.load import load_adapter, task_of_adapter

    kind = task_of_adapter(adapter)
    if kind == "mask-generation":
        from inlay.infer.masks import places

        asked = {"points": places(point, 2), "negatives": places(negative, 2), "boxes": places(box, 4)}
        _find_masks(load_adapter(adapter, base), merge, inputs, asked, overlay, as_json)
        return
    if kind == "text-generation":
        decoding = Decoding(max_new_tokens=max_new_tokens, beams=beams, temperature=temperature)
        loaded = load_adapter(adapter, base)
        loaded = loaded.merge() if merge else loaded
        texts = generate(loaded.model, loaded.processor, inputs, decoding)
        if as_json:
            rows = [{"prompt": prompt, "text": text} for prompt, text in zip(inputs, texts, strict=True)]
            print(json.dumps(rows, indent=2, ensure_ascii=False))
        else:
            print("\n".join(texts))
        return
    files = find_pictures(inputs)
    loaded = load_adapter(adapter, base)
    predictions = classify(loaded.merge() if merge else loaded, files, task=task, top=top)
    if grid is not None:
        draw_sheet(predictions, files, grid)
    if as_json:
        print(json.dumps([vars(p) for p in predictions], indent=2, ensure_ascii=False))
        return
    for p in predictions:
        named = "  ".join(
            f"{printable(label)} {value:.1%}" for label, value in zip(p.labels, p.probabilities, strict=True)
        )
        print(f"{p.source}: {named}")


@app.command()
def segment(
    adapter: AdapterArgument,
    scan: Annotated[Path, typer.Argument(metavar="SCAN", help="A .nii.gz, .nii or .npz file.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="MASK", help="The mask: a .nii.gz or .nii file.")],
    point: Annotated[
        list[str] | None, typer.Option(metavar="X,Y,Z[,LABEL]", help="A voxel of a class (default 1). Repeatable.")
    ] = None,
    negative: Annotated[list[str] | None, typer.Option(metavar="X,Y,Z", help="A voxel of none. Repeatable.")] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(metavar="X0,Y0,Z0,X1,Y1,Z1[,LABEL]", help="Corners around an object. Repeatable."),
    ] = None,
    base: BaseOption = None,
    overlap: Annotated[float, typer.Option(help="Share of a window that the next one covers too.")] = 0.5,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 1,
    flips: Annotated[bool, typer.Option("--flips", help="Average over mirrored windows: 8 times the work.")] = False,
    largest: Annotated[bool, typer.Option("--largest", help="Keep each class's largest component alone.")] = False,
    montage: Annotated[Path | None, typer.Option(help="Also draw three planes and slices: a .png file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also make a page to look through: an .html file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find an adapter's classes in a scan, and save them as a mask on its grid.

    Voxels are counted from 0 along the file's own axes, as nibabel indexes them; a label is a class's number or name.
    """
    from inlay.infer.montage import PICTURES, draw_montage
    from inlay.infer.viewer import PAGES, write_viewer
    from inlay.infer.volumes import MASKS, output_name
    from inlay.infer.volumes import segment as find
    from inlay.store.load import load_adapter

    for path, suffixes in ((out, MASKS), (montage, PICTURES), (html, PAGES)):
        if path is not None:
            output_name(path, suffixes)  # before all the work
    points = [_place(text, 3) for text in point or []] + [[*_place(text, 3)[:3], 0] for text in negative or []]
    boxes = [_place(text, 6) for text in box or []]
    found = find(
        load_adapter(adapter, base), scan, points=points, boxes=boxes, overlap=overlap, batch_size=batch_size,
        flips=flips, largest=largest,
    )  # fmt: skip
    facts: dict[str, Any] = {"mask": str(found.save(out))}
    if montage is not None or html is not None:
        from inlay.data.nifti import read_volume

        image, _ = read_volume(scan)
        if montage is not None:
            facts["montage"] = str(draw_montage(image, found, montage))
        if html is not None:
            facts["html"] = str(write_viewer(image, found, html))
    if as_json:
        print(json.dumps({**facts, "volumes_ml": found.volumes_ml}, indent=2, ensure_ascii=False))
        return
    for name, volume in found.volumes_ml.items():
        print(f"{name}: {volume:.4g} ml")
    for kind, written in facts.items():
        print(f"{kind}: {written}")


@app.command()
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
    force: Annotated[bool, typer.Option("--force", help="Save even where few bits lose much of the adapter.")] = False,
) -> None:
    """Fold an adapter into its base, as a model that loads with transformers alone, and say what that costs."""
    import math

    from inlay.combine.merge import merge as fold

    limits = {"limit": math.inf} if force else {}
    print(fold(adapter, out, base=base, dtype=dtype, quantize=quantize, **limits))  # type: ignore[arg-type]


@app.command()
def combine(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER=WEIGHT...", help="Folders or Hub ids; weight 1 where none is given.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="The result; without it: the report alone.")
    ] = None,
    rule: Annotated[str, typer.Option(help="add, average, task_arithmetic, ties, dare, magnitude or knots.")] = "add",
    width: Annotated[str | None, typer.Option(help="Largest rank or other width of the result, or auto.")] = None,
    error: Annotated[float, typer.Option(help="With --width auto: largest relative error of the update.")] = 0.01,
    density: Annotated[float, typer.Option(help="Share of entries that ties, dare, magnitude and knots keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of dare, and of the examples of --fit.")] = 0,
    heads: Annotated[
        str, typer.Option(help="auto, stack, average, or the name of the adapter whose head is kept.")
    ] = "auto",
    report: Annotated[Path | None, typer.Option(help="Where they meet, as .png, .json or .txt.")] = None,
    fit: Annotated[str | None, typer.Option(metavar="DATA", help="Fit the weights on some of these examples.")] = None,
    examples: Annotated[int, typer.Option(help="How many, for --fit.")] = 32,
    dense: Annotated[
        bool, typer.Option("--dense", help="A difference of the base's weights, for DoRA and such.")
    ] = False,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make one adapter of several, such as `combine a=1.0 b=-0.5 -o out`; say how they agree, and the error."""
    from inlay.combine import combine as join
    from inlay.combine.report import overlap, write_report

    weights = dict(_weighted(text) for text in adapters)
    if len(weights) < len(adapters):
        raise InlayError(f"expected different adapters, got {', '.join(adapters)}.")
    if out is None:
        found = overlap(weights)
        if report is not None:
            write_report(found, report)
        print(found.to_json() if as_json else found)
        return
    made = join(
        weights, rule, out=out, width=int(width) if width and width.isdecimal() else width,  # type: ignore[arg-type]
        error=error, density=density, seed=seed, heads=heads, report=report, fit=fit, examples=examples, dense=dense,
        base=base,
    )  # fmt: skip
    facts = {**asdict(made), "folder": str(made.folder)}
    if not as_json:
        facts.pop("errors")
        facts["error"] = "0: exact" if made.error == 0 else f"{made.error:.3g}"
    _show(facts, as_json)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Embedded base, local folder or Hub id.")],
    method: Annotated[str, typer.Option(help="Name in inlay.METHODS.")] = "lora",
    width: Annotated[int, typer.Option(help="Rank or other width of the adapter.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Examples of a step.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a text.")] = 128,
    labels: Annotated[int, typer.Option(help="Classes of an image classifier.")] = 10,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    quantize: Annotated[str | None, typer.Option(help="8bit or 4bit, for the frozen base.")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw or adamw8bit.")] = "adamw",
    precision: Annotated[str, typer.Option(help="Mixed precision: no, bf16 or fp16.")] = "no",
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing")] = False,
    accumulate: Annotated[int, typer.Option(help="Pieces in which a step is computed.")] = 1,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: what this machine has.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also take such steps here, and say what they take.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what memory a training step will take, from a base's config alone: will it fit?"""
    from inlay.plan import plan_base

    planned, peak = plan_base(
        model,
        method,
        width=width,
        batch_size=batch_size,
        length=length,
        labels=labels,
        dtype=dtype,  # type: ignore[arg-type]
        quantize=quantize,  # type: ignore[arg-type]
        optimizer=optimizer,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        gradient_checkpointing=gradient_checkpointing,
        accumulate=accumulate,
        device=device,
        measure=measure,
    )
    if as_json:
        print(json.dumps({**vars(planned), "fits": planned.fits, "measured": peak}, indent=2))
        return
    print(planned)
    if peak is not None:
        print(f"measured: {peak / 1e6:,.1f} MB, {planned.peak / peak:.3f} of it planned")


@app.command()
def audit(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Labelled scans: images/ and labels/, dataset.json or .npz files.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Say what is wrong with labelled scans before training on them; exit status 1 if there are errors."""
    from inlay.data.audit import audit as look

    report = look(folder)
    if as_json:
        print(json.dumps(asdict(report), indent=2, ensure_ascii=False))
    else:
        _list_findings(report)
    if report.errors:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has and what works on it: devices, precisions, 8-bit, image libraries."""
    from inlay.doctor import examine

    findings = examine()
    if as_json:
        print(json.dumps([vars(f) for f in findings], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in findings:
        mark = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}[finding.works]
        table.add_row(finding.what, mark, finding.remark)
    Console().print(table)


def _find_masks(
    loaded: Any, merge: bool, inputs: list[str], asked: dict[str, Any], overlay: Path | None, as_json: bool
) -> None:
    from inlay.infer.masks import draw_masks, predict_masks

    if len(inputs) != 1:
        raise InlayError(f"points and boxes belong to one picture, got {len(inputs)}; give one at a time.")
    found = predict_masks(loaded.merge() if merge else loaded, inputs[0], **asked)
    if overlay is not None:
        draw_masks(found, inputs[0], overlay, **asked)
    rows = [{"pixels": n, "foretold_iou": round(s, 4)} for n, s in zip(found.areas, found.scores, strict=True)]
    if as_json:
        print(json.dumps({"source": found.source, "masks": rows}, indent=2, ensure_ascii=False))
        return
    for k, row in enumerate(rows, 1):
        print(f"{found.source}: mask {k} of {row['pixels']:,} pixels, foretold IoU {row['foretold_iou']:.2f}")


def _weighted(text: str) -> tuple[str, float]:
    """A folder and its weight."""
    path, found, number = text.rpartition("=")
    try:
        return (path, float(number)) if found else (text, 1.0)
    except ValueError:
        raise InlayError(f"expected ADAPTER=WEIGHT, such as runs/a=0.5, but got {text!r}.") from None


def _place(text: str, size: int) -> list[Any]:
    """Numbers, and a label behind them or none."""
    words = [word.strip() for word in text.split(",")]
    try:
        if len(words) not in (size, size + 1):
            raise ValueError
        return [*map(float, words[:size]), *words[size:]]
    except ValueError:
        wanted = "x,y,z" if size == 3 else "x0,y0,z0,x1,y1,z1"
        raise InlayError(f"expected {wanted} and perhaps a label, but got {text!r}. Part them by commas.") from None


def _list_findings(report: Any) -> None:
    """A table of an audit's findings, errors first, and its summary."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in sorted(report.findings, key=lambda finding: finding.level != "error"):
        colour = "red" if finding.level == "error" else "yellow"
        file = finding.file.removeprefix(report.folder).lstrip("/") or report.folder
        table.add_row(f"[{colour}]{finding.level}[/]", escape(file), escape(finding.what))
    if report.findings:
        Console().print(table)
    print(report)


def _show(facts: dict[str, Any], as_json: bool) -> None:
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


for name, verb in {**cli_hub.VERBS, **cli_trust.VERBS}.items():
    app.command(name)(verb)


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit status 2."""
    try:
        app()
    except InlayError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `inlay ... | head`
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:  # a full disk, a folder without rights, a name too long
        print(f"error: {str(error.filename or 'the system')[:200]}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)

"""The verbs of `inlay` for scans: segment, audit."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from inlay.cli.models import load_adapter_in
from inlay.cli.show import AdapterArgument, BaseOption, DeviceOption, DtypeOption, JsonOption
from inlay.errors import BadInput


def segment(
    adapter: AdapterArgument,
    scan: Annotated[Path, typer.Argument(metavar="SCAN", help="A .nii.gz, .nii or .npz file.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="MASK", help="The mask: a .nii.gz or .nii file.")],
    channels: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=FILE]...", help="Channels in files of their own; SCAN is then NAME=FILE too."),
    ] = None,
    channel: Annotated[
        str | None, typer.Option(metavar="NAME", help="The channel that --montage and --html show; default: the first.")
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(metavar="X,Y,Z[,LABEL]", help="A voxel of a class (default: the first). Repeatable."),
    ] = None,
    negative: Annotated[list[str] | None, typer.Option(metavar="X,Y,Z", help="A voxel of none. Repeatable.")] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(metavar="X0,Y0,Z0,X1,Y1,Z1[,LABEL]", help="Corners around an object. Repeatable."),
    ] = None,
    base: BaseOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    overlap: Annotated[float, typer.Option(help="Share of a window that the next one covers too.")] = 0.5,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 1,
    flips: Annotated[
        bool, typer.Option("--flips", help="Average over windows mirrored as in training: 2 to 8 times the work.")
    ] = False,
    largest: Annotated[bool, typer.Option("--largest", help="Keep only each class's largest component.")] = False,
    montage: Annotated[Path | None, typer.Option(help="Also draw three planes and slices: a .png file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also make a page to look through: an .html file.")] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="MASK", help="A second mask, such as the reference, shown by --montage and --html."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find an adapter's classes in a scan, and save them as a mask on its grid.

    Voxels are counted from 0 along the file's own axes, as nibabel indexes them. A label is a class's number in the
    mask, or its name.
    """
    from inlay.tasks.volumes.montage import IMAGES, draw_montage
    from inlay.tasks.volumes.segment import MASKS, check_output, read_reference
    from inlay.tasks.volumes.segment import segment as find
    from inlay.tasks.volumes.viewer import PAGES, write_viewer

    source = name_channels([str(scan), *(channels or [])])
    for path, suffixes in ((out, MASKS), (montage, IMAGES), (html, PAGES)):
        if path is not None:
            for file in source.values() if isinstance(source, dict) else [source]:
                check_output(path, suffixes, file)  # before all the work
    if compare is not None and montage is None and html is None:
        raise BadInput("--compare shows a second mask in --montage or --html; give one of them.")
    if compare is not None and not compare.is_file():
        raise BadInput(f"--compare: '{compare}' is no file; give a mask on the scan's grid.")
    points = [_place(text, 3) for text in point or []] + [[*_place(text, 3)[:3], 0] for text in negative or []]
    boxes = [_place(text, 6) for text in box or []]
    loaded = load_adapter_in(adapter, base, device, dtype)
    shown = loaded.processor.find_channel(channel) if channel is not None else 0  # before all the work
    found = find(
        loaded, source, points=points, boxes=boxes, overlap=overlap,
        batch_size=batch_size, flips=flips, largest=largest,
    )  # fmt: skip
    facts: dict[str, Any] = {"mask": str(found.save(out))}
    if montage is not None or html is not None:
        image = loaded.processor.read_channel(source, shown)
        reference = None if compare is None else read_reference(compare, found)
        if montage is not None:
            facts["montage"] = str(draw_montage(image, found, montage, reference=reference))
        if html is not None:
            facts["html"] = str(write_viewer(image, found, html, reference=reference))
    if as_json:
        print(json.dumps({**facts, "volumes_ml": found.volumes_ml}, indent=2, ensure_ascii=False))
        return
    for name, volume in found.volumes_ml.items():
        print(f"{name}: {volume:.4g} ml")
    for kind, written in facts.items():
        print(f"{kind}: {written}")


def name_channels(words: Sequence[str]) -> str | dict[str, str]:
    """The scan that SCAN stands for: a file, or {channel: file} of NAME=FILE words.

    Raises:
        InlayError: Several words that are not all NAME=FILE, or a name that comes twice.
    """
    if len(words) == 1 and ("=" not in words[0] or Path(words[0]).exists()):
        return words[0]
    named: dict[str, str] = {}
    for word in words:
        name, sign, file = word.partition("=")
        if not (name and sign and file):
            raise BadInput(f"{word!r} must be NAME=FILE: give one file, or one for each channel with its name.")
        if name in named:
            raise BadInput(f"the channel {name} is given twice.")
        named[name] = file
    return named


def audit(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Labelled scans: images/ and labels/, dataset.json or .npz files.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Report what is wrong with labelled scans, before training on them; exit status 1 if there are errors."""
    from inlay.tasks.volumes.audit import audit as look

    report = look(folder)
    if as_json:
        print(json.dumps(asdict(report), indent=2, ensure_ascii=False))
    else:
        _list_findings(report)
    if report.errors:
        raise typer.Exit(1)


def _place(text: str, size: int) -> list[Any]:
    """Numbers, and a label behind them or none."""
    words = [word.strip() for word in text.split(",")]
    try:
        if len(words) not in (size, size + 1):
            raise ValueError
        return [*map(float, words[:size]), *words[size:]]
    except ValueError:
        wanted = "x,y,z" if size == 3 else "x0,y0,z0,x1,y1,z1"
        raise BadInput(f"{text!r} must be {wanted}, with commas, and may end with a label.") from None


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


VERBS: dict[str, Callable[..., None]] = {"segment": segment, "audit": audit}

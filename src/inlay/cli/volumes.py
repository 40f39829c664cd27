"""The verbs of `inlay` for scans: segment, audit, score."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from inlay.cli.models import find_channels, find_digest, load_ensemble
from inlay.cli.show import AdapterArgument, BaseOption, DeviceOption, DtypeOption, JsonOption, printable, show_scores
from inlay.errors import BadInput
from inlay.tasks.volumes.task import VolumeSegmentation

SCORE_OPTIONS = VolumeSegmentation.score_options


def segment(
    adapter: AdapterArgument,
    scan: Annotated[
        Path, typer.Argument(metavar="SCAN|FOLDER", help="A scan: a file or a DICOM folder; or a folder of scans.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="MASK|FOLDER",
            help="The mask (.nii.gz, .nrrd, .seg.nrrd, .mha, .mgz, or .dcm of a DICOM scan), or the folder of masks.",
        ),
    ],
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
        typer.Option(metavar="CORNERS", help="X0,Y0,Z0,X1,Y1,Z1[,LABEL] around an object. Repeatable."),
    ] = None,
    ensemble: Annotated[
        list[str] | None,
        typer.Option(metavar="ADAPTER", help="Average with the probabilities of this adapter too. Repeatable."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="A mask of the scan to correct; with points or boxes it changes only where they are."),
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
    probabilities: Annotated[
        bool,
        typer.Option(
            "--probabilities",
            help="Also save each class's probability: MASK_probabilities.nii.gz, or in probabilities/ of the folder.",
        ),
    ] = False,
    suffix: Annotated[
        str | None,
        typer.Option("--format", metavar="SUFFIX", help="Of the masks of a folder, such as nii; default: the scan's."),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace masks of a folder that other adapters, options or scans made."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find an adapter's classes in a scan, or in all scans of a folder, and save them as masks on their grids.

    Voxels are counted from 0 along the file's own axes, as nibabel indexes them. A label is a class's number in the
    mask, or its name. A folder's masks that are there already are left out, so that the command can be repeated;
    volumes.csv holds their volumes.
    """
    names = [adapter, *(ensemble or [])]
    one = {"--point": point, "--negative": negative, "--box": box, "--montage": montage, "--html": html}
    _refuse_options(
        scan,
        one | {"--mask": mask, "--compare": compare, "--channel": channel, "NAME=FILE": channels},
        {"--format": suffix, "--overwrite": overwrite},
    )
    if _is_folder_of_scans(scan):
        _segment_folder(
            names, scan, out, base=base, device=device, dtype=dtype, overlap=overlap, batch_size=batch_size,
            flips=flips, largest=largest, probabilities=probabilities, suffix=suffix, overwrite=overwrite,
            as_json=as_json,
        )  # fmt: skip
        return
    from inlay.tasks.volumes.formats import case_name
    from inlay.tasks.volumes.montage import IMAGES, draw_montage
    from inlay.tasks.volumes.segment import MASKS, check_output, read_reference
    from inlay.tasks.volumes.segment import segment as find
    from inlay.tasks.volumes.viewer import PAGES, write_viewer

    source = name_channels([str(scan), *(channels or [])])
    for path, suffixes in ((out, MASKS), (montage, IMAGES), (html, PAGES)):
        if path is not None:
            for file in source.values() if isinstance(source, dict) else [source]:
                check_output(path, suffixes, file)  # before all the work
    _check_comparison(compare, montage, html)
    points = [_place(text, 3) for text in point or []] + [[*_place(text, 3)[:3], 0] for text in negative or []]
    boxes = [_place(text, 6) for text in box or []]
    loaded, *others = load_ensemble(names, base, device, dtype)
    shown = loaded.processor.find_channel(channel) if channel is not None else 0  # before all the work
    found = find(
        loaded, source, ensemble=others, points=points, boxes=boxes, mask=mask, overlap=overlap,
        batch_size=batch_size, flips=flips, largest=largest, keep_probabilities=probabilities,
    )  # fmt: skip
    facts: dict[str, Any] = {"mask": str(found.save(out))}
    if probabilities:
        facts["probabilities"] = str(found.save_probabilities(out.with_name(f"{case_name(out)}_probabilities.nii.gz")))
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


def _is_folder_of_scans(path: Path) -> bool:
    """Whether a path is a folder, but not the slices of one DICOM series."""
    from inlay.tasks.volumes.formats import is_scan

    return path.is_dir() and not is_scan(path)


def _refuse_options(scan: Path, for_one: dict[str, Any], for_folder: dict[str, Any]) -> None:
    """Raise InlayError for an option of one scan where there is a folder, and the other way round."""
    wrong, wanted, got = (
        (for_one, "one scan", "a folder") if _is_folder_of_scans(scan) else (for_folder, "a folder of scans", "none")
    )
    for option, value in wrong.items():
        if value:
            raise BadInput(f"{option} is for {wanted}, and '{scan}' is {got}; leave it out.")


def _check_comparison(compare: Path | None, montage: Path | None, html: Path | None) -> None:
    if compare is not None and montage is None and html is None:
        raise BadInput("--compare shows a second mask in --montage or --html; give one of them.")
    if compare is not None and not compare.is_file():
        raise BadInput(f"--compare: '{compare}' is no file; give a mask on the scan's grid.")


def _segment_folder(
    names: Sequence[str],
    folder: Path,
    out: Path,
    *,
    base: str | None,
    device: str | None,
    dtype: str | None,
    overlap: float,
    batch_size: int,
    flips: bool,
    largest: bool,
    probabilities: bool,
    suffix: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Segment what a folder of masks lacks; exit status 1 if a scan could not be segmented, 130 after Ctrl-C."""
    from inlay.files.atomic import lock_folder
    from inlay.tasks.volumes.data import find_scans
    from inlay.tasks.volumes.folder import RECORD, VOLUMES, FolderWork

    made_by = {
        "adapters": [f"{Path(name).name} {find_digest(name)[:12]}" for name in names],
        "dtype": dtype or "float32",
        "overlap": overlap,
        "flips": flips,
        "largest": largest,
    }
    with lock_folder(out, wait_s=0):
        work = FolderWork.plan(
            find_scans(folder, find_channels(names[0])), out, made_by,
            suffix=None if suffix is None else f".{suffix.removeprefix('.')}", probabilities=probabilities,
            overwrite=overwrite,
        )  # fmt: skip
        pending = len(work.pending)
        try:
            if pending:
                adapters = load_ensemble(names, base, device, dtype)
                work.run(adapters, overlap=overlap, flips=flips, largest=largest, batch_size=batch_size)
        except KeyboardInterrupt:
            left = len(work.pending)
            print(f"stopped with {left} of {len(work.jobs)} scans to do; the same command goes on.", file=sys.stderr)
            raise typer.Exit(130) from None
    made = pending - len(work.failed)
    if as_json:
        facts = {"made": made, "there": len(work.jobs) - pending, "failed": work.failed, "scans": work.scans}
        print(json.dumps({"volumes": str(out / VOLUMES), "record": str(out / RECORD), **facts}, indent=2))
    else:
        there = f"; {len(work.jobs) - pending} were there already" if pending < len(work.jobs) else ""
        print(f"{made} scan{'s' * (made != 1)} segmented{there}.\nvolumes: {out / VOLUMES}")
        for name, why in work.failed.items():
            print(f"failed: {printable(name)}: {printable(why)}", file=sys.stderr)
    if work.failed:
        raise typer.Exit(1)


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


def score(
    masks: Annotated[Path, typer.Argument(metavar="MASKS", help="Folder of masks, one a case, made by anything.")],
    reference: Annotated[
        str, typer.Argument(metavar="LABELS", help="Folder of label maps of the same names, or labelled scans.")
    ],
    tolerance_mm: Annotated[float, typer.Option(help=SCORE_OPTIONS["tolerance_mm"].help)] = 1.0,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one row a case and class.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help=SCORE_OPTIONS["plot"].help)] = None,
    worst: Annotated[int | None, typer.Option(min=1, help=SCORE_OPTIONS["worst"].help)] = None,
    worst_folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help=SCORE_OPTIONS["worst_folder"].help)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Score masks against label maps without a model: all scores of `inlay evaluate`, with 95 % intervals."""
    from inlay.files.outputs import check_output_file
    from inlay.tasks.volumes.score_masks import score_masks

    if csv is not None:
        check_output_file(csv)
    found = score_masks(masks, reference, tolerance_mm=tolerance_mm, plot=plot, worst=worst, worst_folder=worst_folder)
    show_scores(found, as_json)
    if csv is not None:
        found.write_csv(csv)


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


VERBS: dict[str, Callable[..., None]] = {"segment": segment, "audit": audit, "score": score}

"""What is wrong with labelled scans, found before a training."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from inlay.errors import InlayError
from inlay.tasks.folds import Fold
from inlay.tasks.tables import list_first
from inlay.tasks.volumes.data import (
    Case,
    explain_channels,
    find_cases,
    hold_out_cases,
    most_common,
    name_classes,
    number_channels,
    read_labels,
)
from inlay.tasks.volumes.file_checks import explain_unreadable
from inlay.tasks.volumes.formats import READ
from inlay.tasks.volumes.grid import Triple, reorient_to_ras, spacing_of
from inlay.tasks.volumes.nifti import find_affine_conflict
from inlay.tasks.volumes.scan import find_strange_values, is_misplaced, read_image

UNEVEN = 2.0  # ratio of spacings along an axis that is worth a warning
RARE = 10  # cases from which a value in only one of them looks like a slip


@dataclass(frozen=True)
class Finding:
    """One fault, or what may be one, in a file."""

    level: Literal["error", "warning"]
    file: str
    what: str


@dataclass
class Audit:
    """What `audit` found.

    Attributes:
        folder: What was looked at.
        modality: As dataset.json says.
        cases: Pairs of image and label map.
        channels: Names of the channels of a scan.
        classes: By name the number of cases that have the class.
        shapes: Smallest and largest count of voxels along D, H, W.
        spacings_mm: Least, median and largest spacing along D, H, W.
        findings: Errors, which training refuses, and warnings.
    """

    folder: str
    modality: str
    cases: int
    channels: list[str] = field(default_factory=list)
    classes: dict[str, int] = field(default_factory=dict)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    spacings_mm: list[Triple] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """Those that training refuses."""
        return [finding for finding in self.findings if finding.level == "error"]

    def __str__(self) -> str:
        counts = {level: sum(f.level == level for f in self.findings) for level in ("error", "warning")}
        parts = [f"{self.cases} case{'s' * (self.cases != 1)}"]
        if len(self.channels) > 1:
            parts.append(f"channels {', '.join(self.channels)}")
        if self.shapes:
            low, high = ("x".join(map(str, shape)) for shape in self.shapes)
            thin, middle, thick = ("x".join(f"{s:.3g}" for s in spacing) for spacing in self.spacings_mm)
            parts.append(f"shapes {low} to {high}" if low != high else f"shape {low}")
            parts.append(f"spacing {thin} to {thick} mm (median {middle})" if thin != thick else f"spacing {thin} mm")
        parts.append(", ".join(f"{name!r} in {count}" for name, count in self.classes.items()) or "no classes")
        return "; ".join([*parts, ", ".join(f"{n} {level}{'s' * (n != 1)}" for level, n in counts.items())])


@dataclass(frozen=True)
class _CaseReport:
    """What one case says: with an error of the image, only that."""

    findings: list[Finding]
    shape: tuple[int, ...] = ()
    spacing: Triple = (0.0, 0.0, 0.0)
    values: tuple[int, ...] = ()
    channels: int = 1
    digest: bytes = b""


def audit(name: str) -> Audit:
    """Read all files of a folder as training would, and list what is wrong or odd, with the name of the file.

    Errors are what `load_volumes` and the reading of cases refuse: images or label maps without a partner, files that
    cannot be read (missing, truncated, damaged, of another kind, with NaN), cases that lack a channel or have one too
    many, channels or pairs on different grids, labels that dataset.json does not name or that are not whole, no class
    at all, one case only.

    Warnings: files that inlay does not read, empty label maps, images of one value, an sform and a qform that disagree,
    two cases with the same image, spacings that differ by a factor of 2, classes that no case has, and values in only
    one case of ten or more.

    Args:
        name: As for `load_volumes`.

    Raises:
        InlayError: There is no such folder, it holds no scans, or its dataset.json cannot be read.
    """
    found = find_cases(name)
    cases = [*found.train, *found.validation]
    report = Audit(name, found.modality or "other", len(cases))
    report.findings = [Finding("error", file, fault) for file, fault in found.faults]
    not_read = f"not read: inlay reads {READ}; convert it"
    report.findings += [Finding("warning", file, not_read) for file in found.unread]
    values = tuple(found.labels) if found.labels else None
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        looked = pool.map(lambda case: _examine_case(case, values, found.ignored), cases)
        seen = list(tqdm(looked, total=len(cases), disable=None, leave=False, unit="case"))
    for one in seen:
        report.findings += one.findings
    channels = found.channels or number_channels(most_common([one.channels for one in seen if one.shape]))
    report.channels = list(channels)
    whole = [(case, one) for case, one in zip(cases, seen, strict=True) if one.shape]
    if whole:
        shapes, spacings = (np.array([getattr(one, key) for _, one in whole]) for key in ("shape", "spacing"))
        report.shapes = [tuple(shapes.min(0).tolist()), tuple(shapes.max(0).tolist())]
        report.spacings_mm = [tuple(spacing(spacings, 0).tolist()) for spacing in (np.min, np.median, np.max)]
    for case, one in whole:
        if one.channels != len(channels):
            where = str(case.files[0]) if case.files else case.name
            report.findings.append(Finding("error", where, explain_channels(one.channels, channels)))
    names: dict[int, str] = {}
    try:
        if any(one.values for one in seen):
            names = name_classes(found, {value for one in seen for value in one.values}, name)
    except InlayError as error:
        report.findings.append(Finding("error", name, str(error)))
    try:
        if found.train and not found.validation:
            hold_out_cases(found.train, Fold(0.5), 0, name)
    except InlayError as error:
        report.findings.append(Finding("error", name, str(error)))
    report.classes = {label: sum(v in one.values for one in seen) for v, label in names.items()}
    report.findings += _compare_cases(name, whole, report, list(names))
    return report


def _examine_case(case: Case, values: tuple[int, ...] | None, ignored: int | None) -> _CaseReport:
    """One case by itself; `values` are those that dataset.json names."""
    images = [*map(str, case.files)] or [case.name]
    label = str(case.label) if isinstance(case.label, Path) else case.name
    found: list[Finding] = []
    try:
        array, affine = read_image(case)
    except InlayError as error:
        broken = next((file for file in images if f"'{file}'" in str(error)), images[0])
        return _CaseReport([Finding("error", broken, _explain(error, broken))])
    image, grid = reorient_to_ras(array[0], affine)
    for file in case.files:
        found += _find_affine_conflict(file)
    for i, channel in enumerate(array):
        if channel.min() == channel.max():
            where = f" of channel {i}" if len(array) > len(images) else ""
            shown = images[min(i, len(images) - 1)]
            found.append(Finding("warning", shown, f"all voxels{where} are {channel.min():g}"))
    seen: dict[str, Any] = {"shape": image.shape, "spacing": spacing_of(grid), "channels": len(array)}
    seen["digest"] = hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).digest()
    try:
        labels, own = read_labels(case)
    except InlayError as error:
        return _CaseReport([*found, Finding("error", label, _explain(error, label))], **seen)
    found += _find_affine_conflict(case.label)
    view, own = reorient_to_ras(labels, own)
    apart = is_misplaced(view.shape, own, image.shape, grid)
    strange = find_strange_values(view, values, ignored) if values else []
    if apart:
        found.append(Finding("error", label, f"{apart}, unlike its image"))
    if strange:
        found.append(Finding("error", label, f"labels {list_first(strange)} that dataset.json does not name"))
    if not np.any((view != 0) & (view != ignored)):
        found.append(Finding("warning", label, "no voxel has a label"))
    return _CaseReport(found, values=tuple(np.unique(view).tolist()), **seen)


def _find_affine_conflict(file: Path | np.ndarray | None) -> list[Finding]:
    """A warning where a file that can be read has two orientations."""
    conflict = find_affine_conflict(file) if isinstance(file, Path) else None
    return [Finding("warning", str(file), conflict)] if conflict else []


def _compare_cases(name: str, whole: list[tuple[Case, _CaseReport]], report: Audit, values: list[int]) -> list[Finding]:
    """What only all cases tell."""
    found: list[Finding] = []
    first: dict[bytes, str] = {}
    for case, one in whole:
        twin = first.setdefault(one.digest, case.name)
        if twin != case.name:
            found.append(
                Finding("warning", case.name, f"the same image as {twin}: they must not be in different splits")
            )
    for value, (label, count) in zip(values, report.classes.items(), strict=True):
        if whole and not count:
            found.append(Finding("warning", name, f"no case has the class {label!r}"))
        elif count == 1 and len(whole) >= RARE:
            single = next(case.name for case, one in whole if value in one.values)
            found.append(Finding("warning", single, f"the only case with the label {value} ({label})"))
    for axis, letter in enumerate("DHW"):
        low, _, high = (spacing[axis] for spacing in report.spacings_mm) if report.spacings_mm else (1.0, 1.0, 1.0)
        if high > UNEVEN * low:
            thickest = max(whole, key=lambda pair: pair[1].spacing[axis])[0].name
            found.append(
                Finding("warning", thickest, f"spacing along {letter} {high:.3g} mm, elsewhere from {low:.3g}")
            )
    return found


def _explain(error: InlayError, file: str) -> str:
    return explain_unreadable(Path(file), error.__cause__) if error.__cause__ else str(error)

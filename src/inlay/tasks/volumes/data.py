"""Labelled scans: from embedded data, folders of files, the Decathlon's layout and .npz to cases."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from inlay.errors import BadInput, DamagedFile
from inlay.tasks.evaluation import Split, Training, choose_split, name_groups, split_note
from inlay.tasks.folds import FOLDS, Fold
from inlay.tasks.groups import group_files, hold_out_groups, list_groups, relative_paths, warn_of_shared_groups
from inlay.tasks.sampling import complete_parts
from inlay.tasks.tables import list_first
from inlay.tasks.volumes.file_checks import has_suffix
from inlay.tasks.volumes.formats import READ, case_name, is_scan, read_header, read_volume, suffix_of
from inlay.tasks.volumes.nifti import find_affine_conflict

logger = logging.getLogger(__name__)

Modality = Literal["mr", "ct", "other"]
PAIRS = (("imagesTr", "labelsTr"), ("images", "labels"))
HELD_OUT = (("imagesVal", "labelsVal"), ("imagesVa", "labelsVa"))
VALIDATION = ("validation", "val", "valid", "dev")
TEST = ("test", "testing")  # scored when asked for, and never chooses anything
TEST_PAIRS = (("imagesTs", "labelsTs"),)
CLASSES = 255  # a file with more values is no label map
LARGEST = 2**31 - 1  # what a label map of 32 bits holds
ROUNDING = 1e-3  # what stored labels may be off from whole numbers by
NUMBERED = re.compile(r"(.+)_(\d{4})")  # nnU-Net's name of a channel's file, without suffix
IGNORE = "ignore"  # nnU-Net's name of the label without a loss
BESIDE = (".json", ".txt", ".csv", ".tsv", ".md", ".bval", ".bvec", ".yaml", ".yml", ".xml", ".log", ".db")  # no scans
WANTED = "builtin:volumes, or a folder with images/ and labels/, imagesTr/ and labelsTr/, dataset.json or .npz files"


@dataclass(frozen=True)
class Case:
    """One scan, in a file or in memory, with its label map if there is one.

    Attributes:
        name: The file's, without suffix.
        image: A file or a DICOM folder, as `read_volume` takes it; voxels (X, Y, Z), or (C, X, Y, Z) of several
            channels; or a tuple of files, one a channel.
        label: The same of the label map; None: there is none.
        affine: Voxel index to mm, (4, 4), of voxels in memory; None: what the file says, or 1 mm.
        values: The numbers in the label map of the classes 1..K, in their order; None: 1, 2, ... themselves.
        ignored: The number of voxels that are neither trained on nor scored (nnU-Net's "ignore"); None: there is none.
        group: What it is kept together with, where that was asked for.
        channels: Names of the image's channels, in their order; none: they have no names.
    """

    name: str
    image: Path | np.ndarray | tuple[Path | bytes, ...]
    label: Path | np.ndarray | None = None
    affine: np.ndarray | None = None
    values: tuple[int, ...] | None = None
    ignored: int | None = None
    group: str | None = None
    channels: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of its image; none where it is in memory."""
        parts = self.image if isinstance(self.image, tuple) else (self.image,)
        return tuple(part for part in parts if isinstance(part, Path))


@dataclass(frozen=True)
class VolumeData:
    """Labelled scans in two or three parts.

    Attributes:
        labels: Names of the classes 1..K, without the background.
        test: The part that chooses nothing; None where none was asked for.
        test_split: The split of the data that `evaluate` finds it under.
        channels: Names of the channels of a scan, with the modality of each.
    """

    name: str
    train: tuple[Case, ...]
    validation: tuple[Case, ...]
    labels: tuple[str, ...]
    modality: Modality
    test: tuple[Case, ...] | None = None
    test_split: Split = "test"
    channels: dict[str, Modality] = field(default_factory=dict)


@dataclass
class FoundCases:
    """What a folder holds, with what is wrong in it: for `load_volumes` and the audit.

    Attributes:
        train: Cases to train on, and to hold some out of where there are none for validation.
        validation: Cases that choose the best step.
        test: Cases that are only scored, when asked for.
        labels: Names of the classes by their values in the label maps; None: dataset.json does not say.
        ignored: The value without a loss.
        modality: As dataset.json says; of several channels the one that all have, or "other".
        channels: Names of the channels, as dataset.json says; none: it does not.
        faults: File and what is wrong with it.
        test_faults: The same of the test cases, which training does not need.
        unread: Files and folders among the scans that inlay does not read.
    """

    train: list[Case] = field(default_factory=list)
    validation: list[Case] = field(default_factory=list)
    test: list[Case] = field(default_factory=list)
    labels: dict[int, str] | None = None
    ignored: int | None = None
    modality: Modality | None = None
    channels: tuple[str, ...] = ()
    faults: list[tuple[str, str]] = field(default_factory=list)
    test_faults: list[tuple[str, str]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def load_volumes(
    name: str | os.PathLike[str],
    *,
    seed: int = 0,
    validation: float = 1 / FOLDS,
    fold: int | None = None,
    modality: Modality | None = None,
    labels: Sequence[str] | None = None,
    group: str | None = None,
    test: bool = False,
) -> VolumeData:
    """Labelled scans for training and validation; voxels are read only where nothing else tells the classes.

    Classes and modality come from dataset.json (the Decathlon's, or nnU-Net's) if the folder has one. Otherwise all
    label maps are read, and their values called "class 1" and so on.

    Args:
        name: `builtin:volumes`, `builtin:channels` (scans of two channels) or `builtin:atlas` (heads with 32 classes);
            a folder with images/ and labels/ or imagesTr/ and labelsTr/, whose files have equal names (nnU-Net's
            _0000, _0001 ... aside, which number the channels), directly or in train/ and validation/ (test/ is only
            scored); a folder of .npz (see `read_volume`).
        seed: Chooses the cases to hold out where the data does not; alike on every machine.
        validation: Share of the cases to hold out, between 0 and 1.
        fold: Which part of `validation` is held out, from 0; all parts together are the data. None: the first.
        modality: Instead of the one that dataset.json names; without either "other", which is treated as MR is.
        labels: Names of the classes without background, in the order of their values, instead of those found.
        group: Keep together what this regular expression finds in the paths of scans, from the data's folder on: the
            patient, the site.
        test: Keep a third part that chooses nothing: the data's test cases, or else what would be validation without
            this; validation is then held out of the rest.

    Raises:
        InlayError: No such data, images or label maps without a partner, fewer than two cases, no classes.
    """
    name = os.fspath(name)
    part = Fold(validation, fold)
    if modality not in (None, "mr", "ct", "other"):
        raise BadInput(f"modality must be mr, ct or other, got {modality!r}.")
    found = _group_cases(find_cases(name), group, name, test=test)
    _refuse_faults(name, found.faults)
    named = name_present_classes(found, [*found.train, *found.validation], name)
    names = tuple(named.values() if labels is None else labels)
    if len(names) != len(named) or not all(names) or len(set(names)) < len(names) or isinstance(labels, str):
        raise BadInput(f"labels must be {len(named)} different class names, got {labels!r}.")
    if found.unread:
        logger.warning(
            "%d files of %s are not read, as they are no %s: %s.",
            len(found.unread), name, READ, list_first([Path(file).name for file in found.unread]),
        )  # fmt: skip
    if test and found.test:
        _refuse_faults(name, found.test_faults)
    own = {"train": found.train, "validation": found.validation, "test": found.test if test else []}
    channels = _name_channels(found, [case for cases in own.values() for case in cases], name)
    parts = {part: _with_values(cases, named, found) for part, cases in own.items() if cases}
    _warn_of_affines([case for cases in parts.values() for case in cases])
    warn_of_shared_groups({part: list_groups(cases) for part, cases in parts.items()}, "scan")
    test_split: Split = "test" if "test" in parts or not test else "validation"

    def hold_out(cases: list[Case], part: Fold, first: bool) -> tuple[list[Case], list[Case]]:
        return hold_out_cases(cases, part, seed, name)

    complete_parts(parts, test, part, hold_out, name, name_groups(group) if group else "scan")
    tested = tuple(parts["test"]) if test else None
    modalities = {channel: modality or find_modality(channel, found.modality or "other") for channel in channels}
    modality = modality or found.modality or "other"
    return VolumeData(
        name, tuple(parts["train"]), tuple(parts["validation"]), names, modality, tested, test_split, modalities
    )


def load_volumes_to_score(
    name: str | os.PathLike[str], *, split: Split | None = None, training: Training | None = None
) -> tuple[Split, tuple[Case, ...], tuple[str, ...], list[str]]:
    """Labelled scans for an adapter that is trained already; unlike for training, one scan is enough.

    Args:
        name: As for `load_volumes`.
        split: Which part, as `choose_split` has it.
        training: Of the adapter.

    Returns:
        The split, its cases, the names of the classes 1..K of their label maps, and notes.

    Raises:
        InlayError: As `load_volumes`; no such split.
    """
    name = os.fspath(name)
    training = training or Training()
    found = _group_cases(find_cases(name), training.group_for(name), name, test=split == "test")
    parts = {"train": found.train, "validation": found.validation, "test": found.test if split == "test" else []}
    own = [part for part, cases in parts.items() if cases]  # test cases are scored only when asked for
    chosen = choose_split(name, split, own, "validation", training)
    _refuse_faults(name, found.test_faults if chosen == "test" else found.faults)
    if not found.validation and chosen in ("train", "validation"):
        fold = training.fold_for(name)
        parts["train"], parts["validation"] = hold_out_cases(found.train, fold, training.seed, name)
    everything = [*found.train, *found.validation]
    scored = parts.get(chosen, everything)
    named = name_present_classes(found, scored if chosen == "test" else everything, name)
    _name_channels(found, scored, name)
    cases = _with_values(scored, named, found)
    _warn_of_affines(cases)
    return chosen, tuple(cases), tuple(named.values()), split_note(name, chosen, own, training)


def _group_cases(found: FoundCases, group: str | None, name: str, *, test: bool) -> FoundCases:
    """The same cases with the groups that a regular expression finds in their paths; in memory they have names only.

    Those of test cases are not looked for unless `test` is true: they do not stop a training.
    """
    folder = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own raises for an unknown user

    def with_groups(cases: list[Case]) -> list[Case]:
        files = [case.files[0] if case.files else case.name for case in cases]
        return group_files(cases, group, name, relative_paths(files, folder))

    tested = with_groups(found.test) if test else found.test
    return replace(found, train=with_groups(found.train), validation=with_groups(found.validation), test=tested)


def _refuse_faults(name: str, faults: Sequence[tuple[str, str]]) -> None:
    """Raise InlayError where a case lacks its image or its label map."""
    if faults:
        got = list_first([f"{file} ({fault})" for file, fault in faults])
        raise DamagedFile(
            f"{name!r} needs an image and a label map for every case: {got}. Fix them; `inlay audit` lists all."
        )


def _with_values(cases: Sequence[Case], named: dict[int, str], found: FoundCases) -> list[Case]:
    """Cases that know which numbers in their label maps are classes, and what their channels are called."""
    channels = found.channels if len(found.channels) > 1 else ()
    return [replace(case, values=tuple(named), ignored=found.ignored, channels=channels) for case in cases]


def _name_channels(found: FoundCases, cases: Sequence[Case], name: str) -> tuple[str, ...]:
    """Names of the channels of a scan: those of dataset.json, or else channel_0, channel_1 ...; headers are read.

    Raises:
        InlayError: A case with more or fewer channels.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        counts = [*pool.map(count_channels, cases)]
    channels = found.channels or number_channels(most_common(counts))
    wrong = {case.name: count for case, count in zip(cases, counts, strict=True) if count != len(channels)}
    if wrong:
        got = list_first([f"{case} ({explain_channels(count, channels)})" for case, count in wrong.items()])
        raise DamagedFile(f"all scans of {name!r} need the channels {', '.join(channels)}: {got}.")
    return channels


def number_channels(count: int) -> tuple[str, ...]:
    """Names of channels that have none."""
    return tuple(f"channel_{i}" for i in range(count))


def most_common(counts: Sequence[int]) -> int:
    """The number of channels that most cases have, so that a single odd case is the one that is named."""
    return max(counts, key=lambda count: (counts.count(count), count), default=1)


def count_channels(case: Case) -> int:
    """How many channels the image of a case has; of files only headers are read."""
    if isinstance(case.image, tuple):
        return len(case.image)
    if isinstance(case.image, np.ndarray):
        return case.image.shape[0] if case.image.ndim == 4 else 1
    shape, _ = read_header(case.image)
    return shape[3] if len(shape) == 4 else 1


def explain_channels(count: int, channels: Sequence[str]) -> str:
    """What is wrong with a scan of so many channels, where it needs these."""
    if count > len(channels):
        return f"{count} channels, {count - len(channels)} too many"
    return f"{count} channel{'s' * (count != 1)}, so that it lacks {', '.join(channels[count:])}"


def find_modality(channel: str, otherwise: Modality = "other") -> Modality:
    """What a channel's name says ("CT", "CT_arterial", "T1w MRI" ...); `otherwise` where it says nothing."""
    words = {*re.split(r"[^A-Z0-9]+", channel.upper())}
    mr = {"MR", "MRI", "T1", "T2", "T1W", "T2W", "T1GD", "T1CE", "T1C", "T1N", "T2F", "FLAIR", "PD", "ADC", "DWI"}
    return "ct" if words & {"CT", "CBCT"} else "mr" if mr & words else otherwise


def name_present_classes(found: FoundCases, cases: Sequence[Case], name: str) -> dict[int, str]:
    """`name_classes`; label maps are read only where nothing else tells their values."""
    return name_classes(found, [] if found.labels else {0}.union(*_read_values(cases)), name)


def name_classes(found: FoundCases, present: Iterable[int], name: str) -> dict[int, str]:
    """Values in the label maps and the names of their classes: the judgement of training and of the audit.

    Args:
        found: From `find_cases`.
        present: All values in the label maps.
        name: Of the data.

    Raises:
        InlayError: No class, more than `CLASSES`, or values that are none.
    """
    if found.labels:
        return found.labels
    values = sorted({*present} - {0})
    if not values:
        raise BadInput(f"all label maps of {name!r} are empty; there is no class to learn.")
    if len(values) > CLASSES or values[0] < 0 or values[-1] > LARGEST:
        raise BadInput(
            f"the label maps of {name!r} hold {len(values)} values from {values[0]} to {values[-1]}; classes are 1 to "
            f"{CLASSES} whole numbers above 0."
        )
    return {value: f"class {value}" for value in values}


def hold_out_cases(cases: Sequence[Case], fold: Fold, seed: int, name: str) -> tuple[list[Case], list[Case]]:
    """What is left of training cases and what is held out, by rank of a hash of their names, or by groups.

    So a new case moves few others.

    Raises:
        InlayError: There is one case only, so that none can be held out; too few cases or groups for folds.
    """
    if len(cases) < 2:
        raise BadInput(f"{name!r} needs at least two cases, to hold one out, got {len(cases)}; add some.")
    groups, names = list_groups(cases), [case.name for case in cases]
    if groups is not None:
        chosen = {*hold_out_groups(groups, names, fold, seed, "scan")}
    else:
        fold.check_count(len(cases), "case")
        digests = [hashlib.sha256(f"{seed}:{case.name}".encode()).digest() for case in cases]
        chosen = {*fold.take(sorted(range(len(cases)), key=digests.__getitem__))}
    left = [case for i, case in enumerate(cases) if i not in chosen]
    return left, [case for i, case in enumerate(cases) if i in chosen]


def _warn_of_affines(cases: Sequence[Case]) -> None:
    """Say which scans have two orientations that disagree."""
    odd = {case.name: find_affine_conflict(file) for case in cases for file in case.files}
    odd = {name: conflict for name, conflict in odd.items() if conflict}
    if odd:
        logger.warning(
            "%d scans have two orientations: %s: %s.", len(odd), list_first([*odd]), next(iter(odd.values()))
        )


def find_cases(name: str) -> FoundCases:
    """The cases of a source, without a look at their voxels.

    Raises:
        InlayError: There is no such source, its dataset.json cannot be read, or it holds no cases.
    """
    if name.startswith("builtin:"):
        from inlay.builtin import atlas, bodies

        sets: dict[str, tuple[Callable[[], Iterable[bodies.Body]], tuple[str, ...], tuple[str, ...]]] = {
            "builtin:volumes": (bodies.generate_bodies, bodies.LABELS, ()),
            "builtin:channels": (bodies.generate_pairs_of_channels, bodies.PAIR_LABELS, bodies.CHANNELS),
            "builtin:atlas": (atlas.generate_heads, atlas.LABELS, ()),
        }
        if name not in sets:
            raise BadInput(f"unknown data {name!r}; the embedded scans are {', '.join(sets)}.")
        generate, labels, channels = sets[name]
        values = tuple(range(1, len(labels) + 1))
        return FoundCases(
            [Case(*body, values) for body in generate()],
            labels=dict(enumerate(labels, 1)),
            modality="mr",
            channels=channels,
        )
    folder = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own raises for an unknown user
    if not name or not folder.is_dir():
        raise BadInput(f"there is no folder {name!r}; give {WANTED}.")
    found = FoundCases()
    described = folder / "dataset.json"
    content = _read_description(described, found) if described.is_file() else {}
    if content.get("training"):
        found.train = _list_described(content["training"], folder, found)
        found.validation = _list_described(_entries_with_label(content.get("validation")), folder, found)
    else:
        _find_in_folders(folder, found)
    if not found.train and not found.faults:
        inside = list_first(sorted(path.name for path in folder.iterdir())) or "nothing"
        strange = f" None of {list_first([Path(file).name for file in found.unread])} is read." if found.unread else ""
        raise BadInput(
            f"{name!r} holds {inside}, and no labelled scans.{strange} Give {WANTED}; it may be above or below."
        )
    names = [case.name for case in (*found.train, *found.validation)]
    found.faults += [
        (twice, "two cases of this name") for twice in dict.fromkeys(n for n in names if names.count(n) > 1)
    ]
    return found


def find_scans(folder: str | os.PathLike[str], channels: Sequence[str] = ()) -> list[Case]:
    """The scans of a folder without label maps, by name; no voxel is read.

    Where all names end with _0000, as in nnU-Net's folders of one channel, the cases are called without it. Of several
    channels case_0000, case_0001 ... are one case, and a file without a number is a case with all of them.

    Args:
        folder: Scans in files and DICOM folders, directly in it.
        channels: Names of the channels that a case has; fewer than two: one, in a file.

    Raises:
        InlayError: No such folder, no scan in it, two scans of the same name, or a case that lacks a channel.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise BadInput(f"there is no folder '{folder}'; give one with scans in it.")
    found = FoundCases()
    # nnU-Net's --save_probabilities writes case.npz and case.pkl next to the mask case.nii.gz
    probabilities = {file.with_suffix(".npz") for file in path.glob("*.pkl")}
    files = [file for file in _list_scans(path, found) if file not in probabilities]
    if not files:
        inside = list_first(sorted(each.name for each in path.iterdir()))
        lacking = f"holds no scan ({inside})" if inside else "is empty"
        named = next((name for name, _ in (*PAIRS, *HELD_OUT, *TEST_PAIRS) if (path / name).is_dir()), None)
        if named is not None:
            raise BadInput(f"'{folder}' {lacking}; give '{path / named}'.")
        raise BadInput(f"'{folder}' {lacking}; give a folder of scans: {READ}.")
    if found.unread:
        logger.warning(
            "%d entries of %s are not read, as they are no %s: %s.",
            len(found.unread), folder, READ, list_first([Path(file).name for file in found.unread]),
        )  # fmt: skip
    cases: dict[str, Case] = {}
    if len(channels) > 1:
        several: dict[str, dict[int, Path]] = {}
        for file in files:
            if match := NUMBERED.fullmatch(case_name(file)):
                several.setdefault(match[1], {})[int(match[2])] = file
        found.channels = tuple(channels)
        for name, parts in several.items():
            cases[name] = Case(name, _order_channels(parts, channels, found), channels=tuple(channels))
        if found.faults:
            got = list_first([f"{file} ({fault})" for file, fault in found.faults])
            raise BadInput(f"the scans of '{folder}' need the channels {', '.join(channels)}: {got}.")
        files = [file for file in files if not NUMBERED.fullmatch(case_name(file))]
    numbered = all(case_name(file).endswith("_0000") for file in files)
    for file in files:
        name = case_name(file).removesuffix("_0000") if numbered else case_name(file)
        if name in cases:
            twins = f"{cases[name].files[0].name} and {file.name}"
            raise BadInput(f"'{folder}' holds two scans of the name {name!r}: {twins}; rename or remove one.")
        cases[name] = Case(name, file)
    return [cases[name] for name in sorted(cases)]


def _find_in_folders(folder: Path, found: FoundCases) -> None:
    """Put the cases of a folder's layout into `found`; none for validation where it has no split."""
    inner = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    if "train" in inner and (train := _pair_files(inner["train"], PAIRS, found)):
        held = (_pair_files(inner[split], PAIRS, found) for split in VALIDATION if split in inner)
        found.train, found.validation = train, next((cases for cases in held if cases), [])
    else:
        found.train, found.validation = _pair_files(folder, PAIRS, found), _pair_files(folder, HELD_OUT, found)
    apart = FoundCases(channels=found.channels)  # what is wrong with test cases does not stop a training
    tests = [_pair_files(inner[split], PAIRS, apart) for split in TEST if split in inner]
    tests.append(_pair_files(folder, TEST_PAIRS, apart))
    found.test, found.test_faults = next((cases for cases in tests if cases), []), apart.faults


def _pair_files(folder: Path, names: Sequence[tuple[str, str]], found: FoundCases) -> list[Case]:
    """Cases of two folders of files with equal names, or else of the .npz files in `folder`."""
    for images, labels in names:
        if (folder / images).is_dir() and (folder / labels).is_dir():
            scans, maps = (_list_scans(folder / part, found) for part in (images, labels))
            return _match_pairs(scans, maps, found)
    if names is not PAIRS:
        return []
    apart = FoundCases()
    files = [path for path in _list_scans(folder, apart) if has_suffix(path, (".npz",))]
    if files:  # else it is no folder of scans
        found.unread += [file for file in apart.unread if not Path(file).is_dir()]
    return [Case(case_name(path), path, path) for path in files]


def _list_scans(folder: Path, found: FoundCases) -> list[Path]:
    """Scans in a folder; what else could be one is noted in `found`."""
    scans = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if is_scan(path):
            scans.append(path)
        elif path.is_dir() or not has_suffix(path, BESIDE):
            found.unread.append(str(path))
    return scans


def _match_pairs(scans: Sequence[Path], maps: Sequence[Path], found: FoundCases) -> list[Case]:
    """Cases of images and label maps with equal names, and a fault for each file without a partner.

    nnU-Net numbers the channels of an image as case_0000, case_0001 ... and not those of its label map. So an image is
    a channel where there is a label map without that number, and none with it.
    """
    named = {case_name(path) for path in maps}
    images: dict[str, Path] = {}
    numbered: dict[str, dict[int, Path]] = {}
    for path in scans:
        name = case_name(path)
        channel = NUMBERED.fullmatch(name)
        if channel and name not in named and channel[1] in named:
            name, number = channel[1], int(channel[2])
            if number in numbered.setdefault(name, {}):
                _add_file(images, name, path, found)
            numbered[name].setdefault(number, path)
            if len(numbered[name]) > 1:
                continue
        _add_file(images, name, path, found)
    channels = found.channels or number_channels(most_common([1 + max(files) for files in numbered.values()]))
    further = {name: _order_channels(files, channels, found) for name, files in numbered.items()}
    labels: dict[str, Path] = {}
    for path in maps:
        name = case_name(path)
        if name not in images and name.removesuffix("_0000") in images:
            name = name.removesuffix("_0000")
        _add_file(labels, name, path, found)
    found.faults += [(str(images[name]), "no label map") for name in images if name not in labels]
    found.faults += [(str(labels[name]), "no image") for name in labels if name not in images]
    return [Case(name, further.get(name, images[name]), labels[name]) for name in images if name in labels]


def _order_channels(files: dict[int, Path], channels: Sequence[str], found: FoundCases) -> Path | tuple[Path, ...]:
    """The numbered files of a case in the order of the channels, and a fault for each that lacks or is too many."""
    first = files[min(files)]
    for number, channel in enumerate(channels):
        if number not in files:
            wanted = first.with_name(f"{case_name(first)[:-4]}{number:04}{suffix_of(first)}")
            found.faults.append((str(wanted), f"the case lacks the channel {channel}"))
    for number, path in files.items():
        if number >= len(channels):
            found.faults.append((str(path), f"a channel more than {', '.join(channels)}"))
    ordered = tuple(files[number] for number in sorted(files))
    return ordered if len(ordered) > 1 else ordered[0]


def _add_file(files: dict[str, Path], name: str, path: Path, found: FoundCases) -> None:
    if name in files:
        found.faults.append((str(path), f"a second file of the case, next to {files[name].name}"))
    files.setdefault(name, path)


def _read_description(path: Path, found: FoundCases) -> dict[str, Any]:
    """The content of dataset.json, with its classes and modality put into `found`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        labels, channels = content["labels"], content.get("modality") or content.get("channel_names") or {}
        # The Decathlon writes {"1": "name"}, nnU-Net {"name": 1}.
        pairs = [(v, k) if isinstance(v, int) else (int(k), v) for k, v in labels.items()]
        values = {int(value): str(label) for value, label in sorted(pairs)}
        named = [channels] if isinstance(channels, str) else _channel_names(channels)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"'{path}' ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        raise DamagedFile(
            f'{got}: labels in dataset.json must be {{"1": "name"}} or {{"name": 1}}, with one number each.'
        ) from error
    values.pop(0, None)
    found.ignored = next((value for value, label in values.items() if label.strip().lower() == IGNORE), None)
    if found.ignored is not None:
        values.pop(found.ignored)
    found.channels = tuple(named)
    count = len(pairs) - (0 in dict(pairs)) - (found.ignored is not None)
    if not values or not 0 < min(values) <= max(values) <= LARGEST or len(set(values.values())) < count:
        found.faults.append((str(path), "classes without names and values of their own"))
    found.labels = values
    if named:
        modalities = {find_modality(channel) for channel in named}
        found.modality = modalities.pop() if len(modalities) == 1 else "other"
    return content


def _channel_names(channels: dict[str, Any]) -> list[str]:
    """Names in the order of their numbers; those that several share are numbered, as `MRI` of the Decathlon may be."""
    names = [str(channels[key]) for key in sorted(channels, key=int)]
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]


def _entries_with_label(entries: Any) -> list[Any]:
    """Entries of a list in dataset.json that name a label map."""
    return [e for e in entries if isinstance(e, dict) and "label" in e] if isinstance(entries, list) else []


def _list_described(entries: Any, folder: Path, found: FoundCases) -> list[Case]:
    """Cases that dataset.json lists, as {"image", "label"} relative to it."""
    if not isinstance(entries, list) or len(_entries_with_label(entries)) < len(entries):
        raise DamagedFile(f"training in '{folder / 'dataset.json'}' must be a list of objects with image and label.")
    cases = []
    for entry in entries:
        listed = entry["image"] if isinstance(entry.get("image"), list) else [entry.get("image")]
        images = [folder / str(image) for image in listed]
        if len(images) == 1 and not images[0].exists():
            images = _list_numbered(images[0], len(found.channels)) or images
        label = folder / str(entry["label"])
        if not label.exists():
            label = next(iter(_list_numbered(label, 1)), label)
        missing = [path for path in (*images, label) if not path.exists()]
        found.faults += [(str(path), "listed in dataset.json, but not there") for path in missing]
        if not missing and images:
            name, own = case_name(images[0]), case_name(label)
            image = tuple(images) if len(images) > 1 else images[0]
            cases.append(Case(own if name == f"{own}_0000" else name, image, label))
    return cases


def _list_numbered(path: Path, least: int) -> list[Path]:
    """The files case_0000, case_0001 ... of a path that is listed as case: at least so many, and those that are there.

    None where there is not even the first.
    """
    found: list[Path] = []
    while (file := path.with_name(f"{case_name(path)}_{len(found):04}{suffix_of(path)}")).exists() or (
        found and len(found) < least
    ):
        found.append(file)
    return found


def find_present_classes(cases: Sequence[Case]) -> list[set[int]]:
    """The classes 1..K that each case has; all label maps are read.

    Raises:
        InlayError: As `read_labels`.
    """
    return [
        {number for number, value in enumerate(case.values or range(1, CLASSES + 1), 1) if value in values}
        for case, values in zip(cases, _read_values(cases), strict=True)
    ]


def _read_values(cases: Sequence[Case]) -> list[set[int]]:
    """The values in the label map of each case."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return [*pool.map(lambda case: {*np.unique(read_labels(case)[0]).tolist()}, cases)]


def read_labels(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The label map of a case on its own grid, in whole numbers of any type, (X, Y, Z), and its affine (4, 4).

    Numbers that rounding has moved by up to `ROUNDING` are taken for whole.

    Raises:
        InlayError: There is none, it cannot be read, or has numbers that are not whole.
    """
    if case.label is None:
        raise BadInput(f"case {case.name!r} has no label map; give one.")
    if isinstance(case.label, np.ndarray):
        where, array, affine = case.name, case.label, np.eye(4)
    else:
        where, (array, affine) = str(case.label), read_volume(case.label, "label")
    if array.dtype.kind not in "bui":
        whole = np.rint(array)
        if not (np.abs(whole - array) <= ROUNDING).all() or np.abs(array).max(initial=0) > LARGEST:
            raise DamagedFile(f"{where!r} holds numbers that are not whole, so it is no label map.")
        array = whole.astype(np.int32)
    if array.ndim != 3:
        raise DamagedFile(f"the label map {where!r} has {array.ndim} axes; it needs three.")
    return array, affine if case.affine is None else case.affine

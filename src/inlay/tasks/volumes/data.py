"""Labelled scans: from embedded data, NIfTI folders, the Medical Segmentation Decathlon's layout and .npz to cases."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from inlay.errors import BadInput, DamagedFile
from inlay.tasks.evaluation import Split, Training, choose_split, split_note
from inlay.tasks.tables import list_first
from inlay.tasks.volumes.nifti import SUFFIXES, case_name, read_volume

Modality = Literal["mr", "ct", "other"]
PAIRS = (("imagesTr", "labelsTr"), ("images", "labels"))
HELD_OUT = (("imagesVal", "labelsVal"), ("imagesVa", "labelsVa"))
VALIDATION = ("validation", "val", "valid", "dev", "test")
CLASSES = 255  # a file with more values is no label map
WANTED = "builtin:volumes, or a folder with images/ and labels/, imagesTr/ and labelsTr/, dataset.json or .npz files"


@dataclass(frozen=True)
class Case:
    """One scan, in a file or in memory, with its label map if there is one.

    Attributes:
        name: The file's, without suffix.
        image: A .nii, .nii.gz or .npz file, or voxels (X, Y, Z).
        label: The same of the label map; None: there is none.
        affine: Voxel index to mm, (4, 4), of voxels in memory; None: what the file says, or 1 mm.
        values: The numbers in the label map of the classes 1..K, in their order; None: 1, 2, ... themselves.
    """

    name: str
    image: Path | np.ndarray
    label: Path | np.ndarray | None = None
    affine: np.ndarray | None = None
    values: tuple[int, ...] | None = None


@dataclass(frozen=True)
class VolumeData:
    """Labelled scans in two splits; `labels` names the classes 1..K, without the background."""

    name: str
    train: tuple[Case, ...]
    validation: tuple[Case, ...]
    labels: tuple[str, ...]
    modality: Modality


@dataclass
class Found:
    """What a folder holds, with what is wrong in it, by the name of the file: for `load_volumes` and the audit."""

    train: list[Case] = field(default_factory=list)
    validation: list[Case] = field(default_factory=list)
    labels: dict[int, str] | None = None
    modality: Modality | None = None
    faults: list[tuple[str, str]] = field(default_factory=list)


def load_volumes(
    name: str,
    *,
    seed: int = 0,
    validation: float = 0.2,
    modality: Modality | None = None,
    labels: Sequence[str] | None = None,
) -> VolumeData:
    """Labelled scans for training and validation; voxels are read where only they tell the classes.

    Classes and modality come from dataset.json (the Decathlon's, or nnU-Net's) if the folder has one. Otherwise all
    label maps are read, and their values called "class 1" and so on.

    Args:
        name: `builtin:volumes`; a folder with images/ and labels/ or imagesTr/ and labelsTr/, whose files have equal
            names (nnU-Net's _0000 aside), alone or in train/ and validation/; a folder of .npz (see `read_volume`).
        seed: Chooses the cases to hold out where the data does not; alike on every machine.
        validation: Share of the cases to hold out, between 0 and 1.
        modality: Instead of the one that dataset.json names; without either "other", which is treated as MR is.
        labels: Names of the classes without background, in the order of their values, instead of those found.

    Raises:
        InlayError: No such data, images or label maps without a partner, fewer than two cases, no classes.
    """
    if not 0 < validation < 1 or modality not in (None, "mr", "ct", "other"):
        raise BadInput(
            f"validation must be between 0 and 1, and modality mr, ct or other, got {validation} and {modality!r}."
        )
    found = _whole_cases(name)
    train, held = found.train, found.validation
    if not held:
        train, held = _split(train, validation, seed, name)
    named = _classes(found, name)
    names = tuple(named.values() if labels is None else labels)
    if len(names) != len(named) or not all(names) or len(set(names)) < len(names) or isinstance(labels, str):
        raise BadInput(f"labels must be {len(named)} different class names, got {labels!r}.")
    train, held = ([replace(case, values=tuple(named)) for case in cases] for cases in (train, held))
    return VolumeData(name, tuple(train), tuple(held), names, modality or found.modality or "other")


def load_volumes_to_score(
    name: str, *, split: Split | None = None, training: Training | None = None
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
    training = training or Training()
    found = _whole_cases(name)
    train, held, named = found.train, found.validation, _classes(found, name)
    own = ("train", "validation") if held else ("train",)
    chosen = choose_split(name, split, own, "validation", training)
    if not held and chosen != "all":
        train, held = _split(train, 0.2, training.seed, name)
    cases = {"train": train, "validation": held}.get(chosen, [*train, *held])
    cases = [replace(case, values=tuple(named)) for case in cases]
    return chosen, tuple(cases), tuple(named.values()), split_note(name, chosen, own, training)


def _whole_cases(name: str) -> Found:
    """The cases of a source, all with image and label map."""
    found = find_cases(name)
    if found.faults:
        got = list_first([f"{file} ({fault})" for file, fault in found.faults])
        raise DamagedFile(
            f"{name!r} needs an image and a label map for every case: {got}. Fix them; `inlay audit` lists all."
        )
    return found


def _classes(found: Found, name: str) -> dict[int, str]:
    """Values in the label maps and the names of their classes."""
    named = found.labels or {value: f"class {value}" for value in _values([*found.train, *found.validation])}
    if not named:
        raise BadInput(f"all label maps of {name!r} are empty.")
    return named


def find_cases(name: str) -> Found:
    """The cases of a source, without a look at their voxels.

    Raises:
        InlayError: There is no such source, its dataset.json cannot be read, or it holds no cases.
    """
    if name.startswith("builtin:"):
        if name != "builtin:volumes":
            raise BadInput(f"unknown data {name!r}; the embedded scans are builtin:volumes.")
        from inlay.builtin.bodies import LABELS, generate_bodies

        values = tuple(range(1, len(LABELS) + 1))
        return Found(
            [Case(*body, values) for body in generate_bodies()], labels=dict(enumerate(LABELS, 1)), modality="mr"
        )
    folder = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own raises for an unknown user
    if not name or not folder.is_dir():
        raise BadInput(f"expected {WANTED}, but there is no folder {name!r}. Change the name.")
    found = Found()
    described = folder / "dataset.json"
    content = _describe(described, found) if described.is_file() else {}
    if content.get("training"):
        found.train = _listed(content["training"], folder, found)
        found.validation = _listed(_labelled(content.get("validation")), folder, found)
    else:
        found.train, found.validation = _folders(folder, found)
    if not found.train and not found.faults:
        inside = list_first(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise BadInput(f"expected {WANTED}, but {name!r} holds {inside}. Pass the folder above or below.")
    names = [case.name for case in (*found.train, *found.validation)]
    found.faults += [
        (twice, "two cases of this name") for twice in dict.fromkeys(n for n in names if names.count(n) > 1)
    ]
    return found


def _folders(folder: Path, found: Found) -> tuple[list[Case], list[Case]]:
    """Training and validation cases of a folder's layout; no validation cases where it has no split."""
    inner = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    if "train" in inner and (train := _pairs(inner["train"], PAIRS, found)):
        held = (_pairs(inner[split], PAIRS, found) for split in VALIDATION if split in inner)
        return train, next((cases for cases in held if cases), [])
    return _pairs(folder, PAIRS, found), _pairs(folder, HELD_OUT, found)


def _pairs(folder: Path, names: Sequence[tuple[str, str]], found: Found) -> list[Case]:
    """Cases of two folders of files with equal names, or else of the .npz files in `folder`."""
    for images, labels in names:
        if (folder / images).is_dir() and (folder / labels).is_dir():
            scans, maps = (_files(folder / part, found) for part in (images, labels))
            found.faults += [(str(scans[name]), "no label map") for name in scans if name not in maps]
            found.faults += [(str(maps[name]), "no image") for name in maps if name not in scans]
            return [Case(name, scans[name], maps[name]) for name in scans if name in maps]
    if names is not PAIRS:
        return []
    return [Case(name, path, path) for name, path in _files(folder, found, (".npz",)).items()]


def _files(folder: Path, found: Found, suffixes: tuple[str, ...] = SUFFIXES) -> dict[str, Path]:
    """Scans of a folder by the name of their case."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.name.endswith(suffixes):
            continue
        name = case_name(path)
        channel = re.search(r"_(\d{4})$", name)  # nnU-Net's number of the channel
        if channel and channel[1] != "0000" and (folder / path.name.replace(channel[0], "_0000")).exists():
            found.faults.append((str(path), "a further channel: inlay reads one"))
            continue
        name = name.removesuffix("_0000")
        if name in files:
            found.faults.append((str(path), f"a second file of the case beside {files[name].name}"))
        files.setdefault(name, path)
    return files


def _describe(path: Path, found: Found) -> dict[str, Any]:
    """The content of dataset.json, with its classes and modality put into `found`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        labels, channels = content["labels"], content.get("modality") or content.get("channel_names") or {}
        # The Decathlon writes {"1": "name"}, nnU-Net {"name": 1}.
        pairs = [(v, k) if isinstance(v, int) else (int(k), v) for k, v in labels.items()]
        values = {int(value): str(label) for value, label in sorted(pairs)}
        channel = str(channels if isinstance(channels, str) else next(iter(channels.values()), ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        got = f"'{path}' ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        raise DamagedFile(f'{got}: labels in dataset.json must be {{"1": "name"}}, each one number.') from error
    values.pop(0, None)
    if len(channels) > 1 and not isinstance(channels, str):
        found.faults.append((str(path), f"{len(channels)} channels: inlay reads one"))
    if not values or min(values) < 0 or len(set(values.values())) < len(pairs) - (0 in dict(pairs)):
        found.faults.append((str(path), "classes without names and values of their own"))
    found.labels = values
    if channel:
        words = re.split(r"[^A-Z0-9]+", channel.upper())
        mr = {"MR", "MRI", "T1", "T2", "T1W", "T2W", "FLAIR", "PD", "ADC", "DWI"}
        found.modality = "ct" if "CT" in words or "CBCT" in words else "mr" if mr & {*words} else "other"
    return content


def _labelled(entries: Any) -> list[Any]:
    """Entries of a list in dataset.json that name a label map."""
    return [e for e in entries if isinstance(e, dict) and "label" in e] if isinstance(entries, list) else []


def _listed(entries: Any, folder: Path, found: Found) -> list[Case]:
    """Cases that dataset.json lists, as {"image", "label"} relative to it."""
    if not isinstance(entries, list) or len(_labelled(entries)) < len(entries):
        raise DamagedFile(f"training in '{folder / 'dataset.json'}' must be a list of objects with image and label.")
    cases = []
    for entry in entries:
        paths = [folder / str(entry.get(key)) for key in ("image", "label")]
        for i, path in enumerate(paths):
            numbered = path.with_name(f"{case_name(path)}_0000{path.name.removeprefix(case_name(path))}")
            if not path.exists() and numbered.exists():
                paths[i] = numbered
        missing = [path for path in paths if not path.is_file()]
        found.faults += [(str(path), "listed in dataset.json, but not there") for path in missing]
        if not missing:
            cases.append(Case(case_name(paths[0]).removesuffix("_0000"), paths[0], paths[1]))
    return cases


def _split(cases: list[Case], share: float, seed: int, name: str) -> tuple[list[Case], list[Case]]:
    """Training and validation cases, by rank of a hash of their names: a new case moves few others."""
    if len(cases) < 2:
        raise BadInput(f"{name!r} needs at least two cases, to hold one out, got {len(cases)}; add some.")
    ranked = sorted(cases, key=lambda case: hashlib.sha256(f"{seed}:{case.name}".encode()).digest())
    held = {case.name for case in ranked[: min(max(1, round(len(cases) * share)), len(cases) - 1)]}
    return [case for case in cases if case.name not in held], [case for case in cases if case.name in held]


def _values(cases: Sequence[Case]) -> list[int]:
    """All values but 0 in the label maps of cases."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = set().union(*pool.map(lambda case: np.unique(read_labels(case)[0]).tolist(), cases))
    values = sorted(found - {0})
    if len(values) > CLASSES or (values and values[0] < 0):
        got = f"{len(values)} values from {values[0]} to {values[-1]}"
        raise BadInput(f"label maps have 1 to {CLASSES} classes above 0, but these hold {got}.")
    return values


def read_labels(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The label map of a case on its own grid, in whole numbers of any type, (X, Y, Z), and its affine (4, 4).

    Raises:
        InlayError: There is none, it cannot be read, or has numbers that are not whole.
    """
    if case.label is None:
        raise BadInput(f"expected a label map, but case {case.name!r} has none. Pass one.")
    if isinstance(case.label, np.ndarray):
        where, array, affine = case.name, case.label, np.eye(4)
    else:
        where, (array, affine) = str(case.label), read_volume(case.label, "label")
    if array.dtype.kind not in "bui":
        whole = np.round(array)
        if not np.array_equal(whole, array) or np.abs(array).max() >= 2**31:
            raise DamagedFile(f"{where!r} holds numbers that are not whole, so it is no label map.")
        array = whole.astype(np.int32)
    if array.ndim != 3:
        raise DamagedFile(f"the label map {where!r} has {array.ndim} axes; it needs three.")
    return array, affine if case.affine is None else case.affine

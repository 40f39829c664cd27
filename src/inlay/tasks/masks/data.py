"""Images with maps of the objects in them, from embedded data and folders, checked before they are used."""

import logging
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import numpy.typing as npt
from PIL import Image

from inlay.errors import BadInput, DamagedFile, InlayError
from inlay.tasks.evaluation import Split, Training, choose_split, is_cut, name_groups, split_note
from inlay.tasks.folds import FOLDS, Fold
from inlay.tasks.groups import group_files, hold_out_groups, list_groups, relative_paths, warn_of_shared_groups
from inlay.tasks.image_decoding import SUFFIXES, explain_unreadable
from inlay.tasks.images.checked import Checked, check_images
from inlay.tasks.images.data import VALIDATION
from inlay.tasks.sampling import complete_parts, hold_out_unlabelled, warn_of_overlap
from inlay.tasks.tables import list_first

logger = logging.getLogger(__name__)

Meaning = Literal["instances", "classes"]
Map = npt.NDArray[np.int64]
_MAP_SUFFIXES = (".png", ".tif", ".tiff")


@dataclass(frozen=True)
class Masked:
    """An image and the map of what is in it.

    Attributes:
        name: The file's stem, or `scene 3`.
        image: A path or an array (H, W, 3), uint8.
        objects: A path or an array (H, W): 0 = background.
        group: What it is kept together with, where that was asked for.
    """

    name: str
    image: Any
    objects: Any
    group: str | None = None


Distinct = tuple[Masked, str]  # and what tells its image from others


@dataclass(frozen=True)
class MaskData:
    """Images with maps in two or three parts.

    Attributes:
        name: As given to `load_masks`.
        train: Those to learn from.
        validation: Those held out.
        meaning: What a number in a map is: one object, or a class of which each connected part is an object.
        test: The part that chooses nothing; None where none was asked for.
        test_split: The split of the data that `evaluate` finds it under.
    """

    name: str
    train: tuple[Masked, ...]
    validation: tuple[Masked, ...]
    meaning: Meaning = "instances"
    test: tuple[Masked, ...] | None = None
    test_split: Split = "test"


def load_masks(
    name: str | os.PathLike[str],
    *,
    seed: int = 0,
    validation: float = 1 / FOLDS,
    fold: int | None = None,
    meaning: Meaning = "instances",
    limit: int | None = None,
    group: str | None = None,
    test: bool = False,
) -> MaskData:
    """Images with maps of their objects, for training and validation; each is read once, to find what is wrong.

    Args:
        name: `builtin:scenes` (generated cells), or a folder with images/ and labels/ of equal stems, or of train/ and
            val/ that hold them. Labels are PNG or TIFF maps of 8 or 16 bits, one channel: 0 = background.
        seed: Chooses the images to hold out where the data does not.
        validation: Share to hold out, between 0 and 1.
        fold: Which part of `validation` is held out, from 0; all parts together are the data. None: the first.
        meaning: What a number in a map is.
        limit: Take so many images for training at most, and a quarter of that for validation.
        group: Keep together what this regular expression finds in the paths of images, from the data's folder on: the
            patient, the slide.
        test: Keep a third part that chooses nothing: the data's test split, or else what would be validation without
            this; validation is then held out of the rest.

    Raises:
        InlayError: The data cannot be found; images without a map or the reverse, files that cannot be read, maps of
            another size, with colours or without any object (all named).
    """
    name = os.fspath(name)
    part = Fold(validation, fold)
    if meaning not in ("instances", "classes") or (limit is not None and limit < 1):
        raise BadInput(f"meaning must be instances or classes, and limit at least 1, got {meaning!r} and {limit}.")
    parts = _read_splits(name, ("train", "validation", "test") if test else ("train", "validation"), group)
    warn_of_shared_groups({split: list_groups([row for row, _ in found]) for split, found in parts.items()}, "image")
    for split, found in parts.items():
        if split != "train":
            warn_of_overlap(_list_contents(parts["train"]), _list_contents(found), split, "image")
    test_split: Split = "test" if "test" in parts or not test else "validation"

    def hold_out(rows: list[Distinct], part: Fold, first: bool) -> tuple[list[Distinct], list[Distinct]]:
        return _hold_out(rows, part, seed, name, first=first)

    complete_parts(parts, test, part, hold_out, name, name_groups(group) if group else "image")
    made = {split: tuple(row for row, _ in found) for split, found in parts.items()}
    train, held = made["train"], made["validation"]
    if limit is not None:
        train, held = train[:limit], held[: max(1, limit // 4)]
    return MaskData(name, train, held, meaning, made.get("test"), test_split)


def load_masks_to_score(
    name: str | os.PathLike[str], *, split: Split | None = None, training: Training | None = None
) -> tuple[Split, tuple[Masked, ...], list[str]]:
    """Images with maps for an adapter that is trained already; unlike for training, one image is enough.

    Args:
        name: As for `load_masks`.
        split: Which part, as `choose_split` has it; by itself validation, or test where there is only that.
        training: Of the adapter.

    Returns:
        The split, its images, and notes.

    Raises:
        InlayError: As `load_masks`; no such split.
    """
    name = os.fspath(name)
    training = training or Training()
    own = _own_splits(name)
    scored: Split = "test" if "test" in own and "validation" not in own else "validation"
    chosen = choose_split(name, split, own, scored, training)
    cut = is_cut(chosen, own)
    wanted = own if chosen == "all" else ("train",) if cut else (chosen,)
    parts = _read_splits(name, wanted, training.group_for(name))
    if cut:
        train, held = _hold_out(parts["train"], training.fold_for(name), training.seed, name)
        found = train if chosen == "train" else held
    else:
        found = [pair for part in wanted for pair in parts[part]]
    return chosen, tuple(row for row, _ in found), split_note(name, chosen, own, training)


def _own_splits(name: str) -> tuple[str, ...]:
    """The splits that a source has of its own: train, and perhaps validation and test."""
    folder = Path(name).expanduser()
    if name.startswith("builtin:"):
        return ("train", "validation")
    if not folder.is_dir():
        raise BadInput(f"{name!r} is no folder; pass builtin:scenes, or a folder with images/ and labels/.")
    return tuple(_split_folders(folder))


def _split_folders(folder: Path) -> dict[str, Path]:
    """By split the folder that holds images/ and labels/."""
    if not (folder / "train").is_dir():
        return {"train": folder}
    held = next((folder / split for split in VALIDATION if (folder / split).is_dir()), None)
    found = {"train": folder / "train", "validation": held, "test": folder / "test"}
    return {split: path for split, path in found.items() if path and path.is_dir()}


def _read_splits(name: str, wanted: Sequence[str], group: str | None) -> dict[str, list[Distinct]]:
    """Those of the splits that there are, all images and maps checked, each with its group."""
    own = _own_splits(name)
    if name.startswith("builtin:"):
        scenes = {split: rows for split, rows in _generate_scenes(name).items() if split in wanted}
        return {
            split: [(row, row.name) for row in group_files(rows, group, name, [row.name for row in rows])]
            for split, rows in scenes.items()
        }
    folders = _split_folders(Path(name).expanduser())
    found = {split: _pair_files(folders[split]) for split in own if split in wanted}
    for split, rows in found.items():
        paths = relative_paths([row.image for row in rows], Path(name).expanduser())
        found[split] = group_files(rows, group, name, paths)
    images = {split: [{"bytes": None, "path": str(row.image)} for row in rows] for split, rows in found.items()}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    tables = {split: datasets.Dataset.from_dict({"image": paths}, features=features) for split, paths in images.items()}
    checked = check_images(name, tables)
    for split, rows in found.items():
        faults = [fault for row, one in zip(rows, checked[split], strict=True) if (fault := _find_fault(row, one))]
        if faults:
            raise DamagedFile(
                f"{len(faults)} of {len(rows)} images with maps in {str(folders[split])!r} are not right: "
                f"{list_first(faults)}; replace them, or take them out."
            )
    return {
        split: [(row, one.content) for row, one in zip(rows, checked[split], strict=True)]
        for split, rows in found.items()
    }


def _list_contents(rows: list[Distinct]) -> list[str]:
    return [content for _, content in rows]


def _hold_out(
    rows: list[Distinct], fold: Fold, seed: int, name: str, *, first: bool = True
) -> tuple[list[Distinct], list[Distinct]]:
    """Images to train on and images held out; equal ones stay on one side, unless, the first time, all are equal."""
    if len(rows) == 1:
        raise BadInput(f"{name!r} has one image, so none can be held out; add some.")
    groups, contents = list_groups([row for row, _ in rows]), _list_contents(rows)
    held = (
        {*hold_out_unlabelled(fold, seed, contents, "image")}
        if groups is None
        else {*hold_out_groups(groups, contents, fold, seed, "image", warn=first)}
    )
    if not held and not first:
        raise BadInput(f"all images of {name!r} that are left are equal; add others.")
    if not held:
        logger.warning("all images of %r are equal, so training and validation share them.", name)
        held = set(hold_out_unlabelled(fold, seed, range(len(rows)), "image"))
    parts: dict[bool, list[Distinct]] = {True: [], False: []}
    for i, row in enumerate(rows):
        parts[i in held].append(row)
    return parts[False], parts[True]


def _generate_scenes(name: str) -> dict[str, list[Masked]]:
    if name != "builtin:scenes":
        raise BadInput(f"unknown data {name!r}; the embedded scenes are builtin:scenes.")
    from inlay.builtin.scenes import generate_scenes

    made = generate_scenes(200, seed=20_000, kind="cells")  # pre-training draws `mixed` scenes only
    pairs = zip(made.images, made.instances, strict=True)
    found = [Masked(f"scene {i}", image, objects) for i, (image, objects) in enumerate(pairs)]
    return {"train": found[:160], "validation": found[160:]}


def _pair_files(folder: Path) -> list[Masked]:
    """The images of a folder with their maps, by file stem."""
    images, labels = _list_files(folder / "images", SUFFIXES), _list_files(folder / "labels", _MAP_SUFFIXES)
    odd = [images[stem].name for stem in images.keys() - labels.keys()]
    odd += [labels[stem].name for stem in labels.keys() - images.keys()]
    if odd:
        raise BadInput(
            f"each image in images/ of {str(folder)!r} needs a map in labels/ of the same stem, but {len(odd)} files "
            f"have no counterpart: {list_first(sorted(odd))}. Add the others, or take these out."
        )
    return [Masked(stem, images[stem], labels[stem]) for stem in sorted(images)]


def _list_files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files by stem."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [p for p in entries if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    if not files:
        raise BadInput(
            f"there are no files ({', '.join(suffixes[:3])} ...) in {str(folder)!r}; pass a folder with images/ and "
            "labels/ of maps. For a folder for each class use recipes/lora_vit.py or load_images."
        )
    found = {unicodedata.normalize("NFC", path.stem): path for path in files}
    if len(found) < len(files):
        twice = [path.name for path in files if path not in found.values()]
        raise BadInput(f"{str(folder)!r} holds a second file of the stem of {list_first(twice)}; rename one of them.")
    return found


def _find_fault(item: Masked, checked: Checked) -> str | None:
    """What is wrong with a pair, with the file's name."""
    if checked.fault:
        return f"{Path(item.image).name} ({checked.fault})"
    try:
        objects = read_map(item.objects)
    except InlayError as error:
        return str(error)
    height, width = objects.shape
    if (width, height) != (checked.width, checked.height):
        return f"{Path(item.objects).name} ({width} x {height}, but its image has {checked.width} x {checked.height})"
    return None if objects.any() else f"{Path(item.objects).name} (no object in it)"


def read_map(source: Any) -> Map:
    """The map (H, W) of a file of 1, 8 or 16 bits with one channel, or of an array.

    Raises:
        InlayError: Not readable, or with colours.
    """
    if isinstance(source, np.ndarray):
        return source.astype(np.int64)
    name = Path(source).name
    try:
        with Image.open(source) as file:
            file.load()
            values = np.asarray(file)  # of a palette the indices
    except Exception as error:  # Pillow's readers raise what they please
        raise DamagedFile(f"{name} ({explain_unreadable(error)})") from error
    if values.ndim != 2 or values.dtype.kind not in "bui" or (values.dtype.kind == "i" and values.min() < 0):
        raise DamagedFile(f"{name} ({file.mode}: a map has one channel of whole numbers)")
    return values.astype(np.int64)


def split_classes(objects: Map) -> Map:
    """Number the connected parts (also over corners) of each class of a map anew, so that each is an object."""
    from scipy.ndimage import label

    result, count = np.zeros_like(objects), 0
    for value in np.unique(objects[objects > 0]):
        parts, found = label(objects == value, structure=np.ones((3, 3)))
        result = np.where(parts > 0, parts + count, result)
        count += found
    return result

"""Pictures with maps of the objects in them, from embedded data and folders, checked before they are used."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from inlay.errors import BadInput, DamagedFile, InlayError
from inlay.tasks.evaluation import Split, Training, choose_split, split_note
from inlay.tasks.images.data import SUFFIXES, VALIDATION
from inlay.tasks.pictures import decode_image, explain_unreadable
from inlay.tasks.tables import list_first

Meaning = Literal["instances", "classes"]
Map = npt.NDArray[np.int64]
_MAPS = (".png", ".tif", ".tiff")


@dataclass(frozen=True)
class Masked:
    """A picture and the map of what is in it.

    Attributes:
        name: The file's stem, or `scene 3`.
        image: A path or an array (H, W, 3), uint8.
        objects: A path or an array (H, W): 0 = background.
    """

    name: str
    image: Any
    objects: Any


@dataclass(frozen=True)
class MaskData:
    """Pictures with maps in two splits.

    Attributes:
        name: As given to `load_masks`.
        train: Those to learn from.
        validation: Those held out.
        meaning: What a number in a map is: one object, or a class of which each connected part is an object.
    """

    name: str
    train: tuple[Masked, ...]
    validation: tuple[Masked, ...]
    meaning: Meaning = "instances"


def load_masks(
    name: str, *, seed: int = 0, validation: float = 0.2, meaning: Meaning = "instances", limit: int | None = None
) -> MaskData:
    """Pictures with maps of their objects, for training and validation; each is read once, to find what is wrong.

    Args:
        name: `builtin:scenes` (generated cells), or a folder with images/ and labels/ of equal stems, or of train/ and
            val/ that hold them. Labels are PNG or TIFF maps of 8 or 16 bits, one channel: 0 = background.
        seed: Chooses the pictures to hold out where the data does not.
        validation: Share to hold out, between 0 and 1.
        meaning: What a number in a map is.
        limit: Take so many pictures for training at most, and a quarter of that for validation.

    Raises:
        InlayError: The data cannot be found; pictures without a map or the reverse, files that cannot be read, maps of
            another size, with colours or without any object (all named).
    """
    if not 0 < validation < 1 or meaning not in ("instances", "classes") or (limit is not None and limit < 1):
        raise BadInput(
            "validation must be between 0 and 1, meaning instances or classes, and limit at least 1, got "
            f"{validation}, {meaning!r} and {limit}. Change them."
        )
    train, held = _own_splits(name)
    if not held:
        train, held = _hold_out(train, validation, seed, name)
    if limit is not None:
        train, held = train[:limit], held[: max(1, limit // 4)]
    return MaskData(name, tuple(train), tuple(held), meaning)


def load_masks_to_score(
    name: str, *, split: Split | None = None, training: Training | None = None
) -> tuple[Split, tuple[Masked, ...], list[str]]:
    """Images with maps for an adapter that is trained already; unlike for training, one image is enough.

    Args:
        name: As for `load_masks`.
        split: Which part, as `choose_split` has it.
        training: Of the adapter.

    Returns:
        The split, its images, and notes.

    Raises:
        InlayError: As `load_masks`; no such split.
    """
    training = training or Training()
    train, held = _own_splits(name)
    own = ("train", "validation") if held else ("train",)
    chosen = choose_split(name, split, own, "validation", training)
    if not held and chosen != "all":
        train, held = _hold_out(train, 0.2, training.seed, name)
    rows = {"train": train, "validation": held}.get(chosen, [*train, *held])
    return chosen, tuple(rows), split_note(name, chosen, own, training)


def _own_splits(name: str) -> tuple[list[Masked], list[Masked]]:
    """Training and validation of a source; no validation where it has no split."""
    folder = Path(name).expanduser()
    if name.startswith("builtin:"):
        return _scenes(name)
    if not folder.is_dir():
        raise BadInput(f"{name!r} is no folder; pass builtin:scenes, or a folder with images/ and labels/.")
    if (folder / "train").is_dir():
        second = next((folder / split for split in VALIDATION if (folder / split).is_dir()), None)
        return _pairs(folder / "train"), _pairs(second) if second else []
    return _pairs(folder), []


def _hold_out(train: list[Masked], share: float, seed: int, name: str) -> tuple[list[Masked], list[Masked]]:
    order = np.random.default_rng(seed).permutation(len(train))
    count = min(max(1, round(share * len(train))), len(train) - 1)
    if not count:
        raise BadInput(f"{name!r} has one image, so none can be held out; add some.")
    return [train[i] for i in sorted(order[count:])], [train[i] for i in sorted(order[:count])]


def _scenes(name: str) -> tuple[list[Masked], list[Masked]]:
    if name != "builtin:scenes":
        raise BadInput(f"unknown data {name!r}; the embedded scenes are builtin:scenes.")
    from inlay.builtin.scenes import generate_scenes

    made = generate_scenes(200, seed=20_000, kind="cells")  # pre-training draws `mixed` scenes alone
    pairs = zip(made.pictures, made.instances, strict=True)
    found = [Masked(f"scene {i}", picture, objects) for i, (picture, objects) in enumerate(pairs)]
    return found[:160], found[160:]


def _pairs(folder: Path) -> list[Masked]:
    """The pictures of a folder with their maps, all read once."""
    images, labels = _files(folder / "images", SUFFIXES), _files(folder / "labels", _MAPS)
    odd = [images[stem].name for stem in images.keys() - labels.keys()]
    odd += [labels[stem].name for stem in labels.keys() - images.keys()]
    if odd:
        raise BadInput(
            f"expected a map in labels/ for each picture in images/ of {str(folder)!r}, by file stem, but {len(odd)} "
            f"files stand alone: {list_first(sorted(odd))}. Add the others, or take these out."
        )
    found = [Masked(stem, images[stem], labels[stem]) for stem in sorted(images)]
    faults = [fault for item in found if (fault := _fault(item))]
    if faults:
        raise DamagedFile(
            f"expected pictures with maps of their objects in {str(folder)!r}, but {len(faults)} of {len(found)} are "
            f"not right: {list_first(faults)}. Replace them, or take them out."
        )
    return found


def _files(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Files by stem."""
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [p for p in entries if p.suffix.lower() in suffixes and not p.name.startswith(".")]
    if not files:
        raise BadInput(
            f"expected files ({', '.join(suffixes[:3])} ...) in {str(folder)!r}, but there are none. "
            "Pass a folder with images/ and labels/."
        )
    found = {path.stem: path for path in files}
    if len(found) < len(files):
        twice = [path.name for path in files if found[path.stem] != path]
        raise BadInput(
            f"expected one file of a stem in {str(folder)!r}, but {list_first(twice)} have a second. Rename them."
        )
    return found


def _fault(item: Masked) -> str | None:
    """What is wrong with a pair, with the file's name."""
    try:
        size = decode_image(str(item.image)).size
    except Exception as error:  # Pillow's readers raise what they please
        return f"{Path(item.image).name} ({explain_unreadable(error)})"
    try:
        objects = read_map(item.objects)
    except InlayError as error:
        return str(error)
    if objects.shape != size[::-1]:
        height, width = objects.shape
        return f"{Path(item.objects).name} ({width} x {height}, but its picture has {size[0]} x {size[1]})"
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

"""Images with prompts: a few of one subject, or many with captions of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
from PIL import Image, ImageOps

from inlay.errors import BadInput, DamagedFile
from inlay.tasks.evaluation import Split, Training, choose_split, is_cut, split_note
from inlay.tasks.folds import FOLDS, Fold
from inlay.tasks.image_decoding import SUFFIXES
from inlay.tasks.images.checked import check_images
from inlay.tasks.images.data import VALIDATION
from inlay.tasks.sampling import complete_parts, hold_out_unlabelled, warn_of_overlap
from inlay.tasks.tables import list_first

HELD_OUT_FROM = 10  # images; of fewer all are trained on, as DreamBooth does
CAPTIONS = "metadata.jsonl"  # of datasets' imagefolder: {"file_name": ..., "text": ...}
# The embedded subjects, and the beginning of their prompts; the rest names the background.
BUILTIN: dict[str, tuple[Literal["dog", "toy"], str]] = {
    "builtin:dog": ("dog", "a photo of sks dog"),
    "builtin:toy": ("toy", "a photo of zwx toy"),
}


@dataclass(frozen=True)
class Captioned:
    """An image and its prompt.

    Attributes:
        name: The file's stem, or `dog 3`.
        image: A path or an image.
        prompt: What it shows.
        weight: In the loss.
    """

    name: str
    image: Any
    prompt: str
    weight: float = 1.0


Distinct = tuple[Captioned, str]  # and what tells its image from others


@dataclass(frozen=True)
class CaptionedData:
    """Images with prompts in two or three parts.

    Attributes:
        name: As given to `load_captioned`.
        train: Those to learn from.
        validation: Those held out; none of a few images of one subject.
        test: The part that chooses nothing; None where none was asked for.
        test_split: The split of the data that `evaluate` finds it under.
    """

    name: str
    train: tuple[Captioned, ...]
    validation: tuple[Captioned, ...]
    test: tuple[Captioned, ...] | None = None
    test_split: Split = "validation"


def load_captioned(
    name: str, prompt: str | None = None, *, seed: int = 0, validation: float = 1 / FOLDS, test: bool = False
) -> CaptionedData:
    """Images with prompts for training; each is read once, to find what is wrong.

    Args:
        name: `builtin:dog` or `builtin:toy` (six images of a subject), a folder of images, or of train/ and perhaps
            val/ and test/ that hold them. Captions stand in metadata.jsonl (`file_name` and `text`) or in a .txt file
            next to each image.
        prompt: Of images without captions, such as "a photo of sks dog".
        seed: Chooses what is held out where the data does not.
        validation: Share to hold out of ten images or more; of fewer nothing is.
        test: Keep a third part that chooses nothing: the data's test split, or else what would be validation without
            this; validation is then held out of the rest.

    Raises:
        InlayError: No such data, no images, images without a prompt, or files that cannot be read (all named); too few
            for three parts.
    """
    fold = Fold(validation)
    parts = _read_splits(name, ("train", "validation", "test") if test else ("train", "validation"), prompt)
    contents = {split: [content for _, content in found] for split, found in parts.items()}
    for split, found in contents.items():
        if split != "train":
            warn_of_overlap(contents["train"], found, split, "image")
    test_split: Split = "test" if "test" in parts or not test else "validation"

    def hold_out(rows: list[Distinct], fold: Fold, first: bool) -> tuple[list[Distinct], list[Distinct]]:
        if test and len(rows) < HELD_OUT_FROM:
            raise BadInput(
                f"{len(rows)} images of {name!r} are too few different images for three parts (to train on, to choose "
                "by, to test); add some, or give it a validation or test split of its own."
            )
        return _hold_out(rows, fold, seed)

    complete_parts(parts, test, fold, hold_out, name, "image")
    made = {split: tuple(row for row, _ in found) for split, found in parts.items()}
    return CaptionedData(name, made["train"], made["validation"], made.get("test"), test_split)


def load_captioned_to_score(
    name: str, prompt: str | None = None, *, split: Split | None = None, training: Training | None = None
) -> tuple[Split, tuple[Captioned, ...], list[str]]:
    """Images with prompts for an adapter that is trained already; one is enough.

    Args:
        name: As for `load_captioned`, like `prompt`.
        prompt: Of images without captions.
        split: Which part, as `choose_split` has it; by itself validation, or test where there is only that, and all of
            a few images of a subject.
        training: Of the adapter.

    Returns:
        The split, its images, and notes.

    Raises:
        InlayError: As `load_captioned`; no such split.
    """
    training = training or Training()
    own = tuple(_find_splits(name))
    scored: Split = "test" if "test" in own and "validation" not in own else "validation"
    chosen = choose_split(name, split, own, scored, training)
    cut = is_cut(chosen, own)
    wanted = own if chosen == "all" else ("train",) if cut else (chosen,)
    parts = _read_splits(name, wanted, prompt)
    found = [pair for part in wanted for pair in parts[part]]
    if cut:
        train, held = _hold_out(found, Fold(), training.seed)
        if not held and split == "validation":
            raise BadInput(f"nothing is held out of the {len(found)} images of {name!r}; leave split out.")
        if held:
            found = train if chosen == "train" else held
        elif chosen == "validation":
            chosen = "all"
    return chosen, tuple(row for row, _ in found), split_note(name, chosen, own, training)


def read_captioned(name: str, prompt: str | None = None) -> list[Captioned]:
    """All images of the data with their prompts; as `load_captioned`."""
    parts = _read_splits(name, ("train", "validation", "test"), prompt)
    return [row for found in parts.values() for row, _ in found]


def _find_splits(name: str) -> dict[str, Path | None]:
    """The splits that a source has of its own, and their folders: train, and perhaps validation and test."""
    if name.startswith("builtin:"):
        return {"train": None}
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise BadInput(f"{name!r} is no folder; give a folder of images, or one of {', '.join(BUILTIN)}.")
    if not (folder / "train").is_dir():
        return {"train": folder}
    held = next((folder / split for split in VALIDATION if (folder / split).is_dir()), None)
    found = {"train": folder / "train", "validation": held, "test": folder / "test"}
    return {split: path for split, path in found.items() if path and path.is_dir()}


def _read_splits(name: str, wanted: Sequence[str], prompt: str | None) -> dict[str, list[Distinct]]:
    """Those of the splits that there are, all images and captions checked."""
    if name.startswith("builtin:"):
        rows = _generate_subject(name, prompt)
        return {"train": [(row, row.name) for row in rows]}
    folders = {split: folder for split, folder in _find_splits(name).items() if folder and split in wanted}
    found = {split: _list_captioned(folder, prompt) for split, folder in folders.items()}
    contents = _check_images(name, found)
    return {split: list(zip(rows, contents[split], strict=True)) for split, rows in found.items()}


def _generate_subject(name: str, prompt: str | None) -> list[Captioned]:
    if name not in BUILTIN:
        raise BadInput(f"unknown data {name!r}; the embedded subjects are {', '.join(BUILTIN)}.")
    from inlay.builtin.paintings import BACKGROUNDS, generate_subject

    subject, beginning = BUILTIN[name]
    images = generate_subject(subject, len(BACKGROUNDS))  # one on each
    return [
        Captioned(f"{subject} {i}", Image.fromarray(image), prompt or f"{beginning} on {background}")
        for i, (image, background) in enumerate(zip(images, BACKGROUNDS, strict=True))
    ]


def _list_captioned(folder: Path, prompt: str | None) -> list[Captioned]:
    """The images of a folder with their prompts."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        raise BadInput(f"there is no image in {str(folder)!r}; put {', '.join(SUFFIXES[:3])} ... files there.")
    captions = _read_captions(folder)
    rows = [Captioned(path.stem, path, captions.get(path.name) or prompt or "") for path in files]
    if silent := [row.name for row in rows if not row.prompt.strip()]:
        raise BadInput(
            f"{len(silent)} of {len(rows)} images in {str(folder)!r} have no prompt ({list_first(silent)}); give "
            f"--prompt, or captions in {CAPTIONS} or .txt files."
        )
    return rows


def _check_images(name: str, parts: dict[str, list[Captioned]]) -> dict[str, list[str]]:
    """What tells each image from others; an error names all that cannot be read."""
    features = datasets.Features({"image": datasets.Image(decode=False)})
    places = {split: [{"bytes": None, "path": str(row.image)} for row in rows] for split, rows in parts.items()}
    tables = {split: datasets.Dataset.from_dict({"image": paths}, features=features) for split, paths in places.items()}
    checked = check_images(name, tables)
    for split, rows in parts.items():
        pairs = zip(rows, checked[split], strict=True)
        if faults := [f"{Path(row.image).name}: {one.fault}" for row, one in pairs if one.fault]:
            raise DamagedFile(
                f"{len(faults)} of {len(rows)} images in {name!r} cannot be read ({list_first(faults)}); replace them, "
                "or take them out."
            )
    return {split: [one.content for one in found] for split, found in checked.items()}


def open_captioned(row: Captioned) -> Image.Image:
    """Its image in RGB, turned as the camera noted."""
    if isinstance(row.image, Image.Image):
        return row.image
    with Image.open(row.image) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


def _read_captions(folder: Path) -> dict[str, str]:
    """By file name: of metadata.jsonl, and of text files next to images."""
    found = {path.stem: path.read_text(encoding="utf-8").strip() for path in folder.glob("*.txt")}
    captions = {
        path.name: found[path.stem]
        for path in folder.iterdir()
        if path.stem in found and path.suffix.lower() in SUFFIXES
    }
    table = folder / CAPTIONS
    if table.is_file():
        for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                captions[row["file_name"]] = str(row["text"])
            except (ValueError, KeyError, TypeError):
                raise DamagedFile(
                    f'line {number} of {table} is not {{"file_name": ..., "text": ...}}; mend or remove it.'
                ) from None
    return captions


def _hold_out(rows: list[Distinct], fold: Fold, seed: int) -> tuple[list[Distinct], list[Distinct]]:
    """Images to train on and images held out, where equal ones stay on one side; none of a few of a subject."""
    if len(rows) < HELD_OUT_FROM:
        return rows, []
    held = {*hold_out_unlabelled(fold, seed, [content for _, content in rows], "image")}
    parts: dict[bool, list[Distinct]] = {True: [], False: []}
    for i, row in enumerate(rows):
        parts[i in held].append(row)
    return parts[False], parts[True]

"""Images with prompts: a few of one subject, or many with captions of their own."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.errors import BadInput, DamagedFile
from inlay.tasks.evaluation import Split
from inlay.tasks.images.data import SUFFIXES
from inlay.tasks.sampling import hold_out_unlabelled
from inlay.tasks.tables import list_first

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)
HELD_OUT_FROM = 10  # images; of fewer all are trained on, as DreamBooth does
CAPTIONS = "metadata.jsonl"  # of datasets' imagefolder: {"file_name": ..., "text": ...}


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
    name: str, prompt: str | None = None, *, seed: int = 0, validation: float = 0.2, test: bool = False
) -> CaptionedData:
    """Images with prompts for training.

    Args:
        name: A folder of images. Captions stand in metadata.jsonl (`file_name` and
            `text`) or in a .txt file next to each image.
        prompt: Of images without captions, such as "a photo of sks dog".
        seed: Chooses what is held out.
        validation: Share to hold out of ten images or more; of fewer nothing is.
        test: Keep a third part that chooses nothing.

    Raises:
        InlayError: No such data, no images, images without a prompt, or files that cannot be read (all named); too few
            for three parts.
    """
    rows = read_captioned(name, prompt)
    if len(rows) < HELD_OUT_FROM:
        if test:
            raise BadInput(f"{name!r} has {len(rows)} images; a part to test takes {HELD_OUT_FROM} or more.")
        return CaptionedData(name, tuple(rows), ())
    train, held = _hold_out(rows, validation, seed)
    if not test:
        return CaptionedData(name, train, held)
    train, chooses = _hold_out(train, validation, seed)
    return CaptionedData(name, train, chooses, held)


def read_captioned(name: str, prompt: str | None = None) -> list[Captioned]:
    """All images of the data with their prompts, each read once to find what is wrong; as `load_captioned`."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise BadInput(f"{name!r} is no folder; give a folder of images.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise BadInput(f"there is no image in {name!r}; put {', '.join(SUFFIXES)} files there.")
    captions = _read_captions(folder)
    rows = [Captioned(path.stem, path, captions.get(path.name) or prompt or "") for path in files]
    if silent := [row.name for row in rows if not row.prompt.strip()]:
        raise BadInput(
            f"{len(silent)} of {len(rows)} images in {name!r} have no prompt ({list_first(silent)}); give --prompt, or "
            f"captions in {CAPTIONS} or .txt files."
        )
    faults = []
    for row in rows:
        try:
            open_captioned(row)
        except (OSError, ValueError) as error:
            faults.append(f"{Path(row.image).name}: {error}")
    if faults:
        raise DamagedFile(f"{len(faults)} of {len(rows)} images in {name!r} cannot be read ({list_first(faults)}).")
    return rows


def open_captioned(row: Captioned) -> Image.Image:
    """Its image in RGB, turned as the camera noted."""
    from PIL import Image, ImageOps

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


def _hold_out(
    rows: list[Captioned] | tuple[Captioned, ...], share: float, seed: int
) -> tuple[tuple[Captioned, ...], tuple[Captioned, ...]]:
    held = set(hold_out_unlabelled(share, seed, [row.name for row in rows]))
    return (
        tuple(row for i, row in enumerate(rows) if i not in held),
        tuple(row for i, row in enumerate(rows) if i in held),
    )

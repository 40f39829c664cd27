"""One picture, decoded from anything that Pillow reads; and a split of them as a model wants it."""

import io
import math
import os
import random
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from inlay.errors import InlayError

Augment = Literal["none", "crop", "crop-flip"]
Source = str | os.PathLike[str] | bytes | dict[str, Any]


def open_image(source: Source) -> Image.Image:
    """A picture as RGB, upright as its EXIF orientation says; of an animation the first frame.

    Transparent pixels are laid on white, and 16-bit greys scaled to 8 bits rather than clipped.

    Args:
        source: A path, the bytes of a file, or {"bytes", "path"} with one of them, as in `ImageData`.

    Raises:
        InlayError: The file is missing, broken, no picture, or has pixels of unknown range.
    """
    try:
        return decode(source)
    except Exception as error:  # Pillow's readers raise what they please
        path = source.get("path") if isinstance(source, dict) else source
        got = "the bytes given" if not path or isinstance(path, bytes) else repr(os.fspath(path))
        raise InlayError(f"expected a picture, but got {got} ({reason(error)}). Replace it.") from error


def decode(source: Any, draft: bool = False) -> Image.Image:
    """As `open_image`, with the errors of Pillow; as a `draft`, all of a JPEG is read, but drawn at an eighth."""
    if isinstance(source, dict):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if not source:
        raise ValueError("no picture in this row" if source is None else "an empty file")
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
        if draft:
            file.draft("RGB", (1, 1))
        file.load()
        image = ImageOps.exif_transpose(file)
    if image.mode == "F" or (image.mode == "I" and file.format != "PPM"):
        raise ValueError("pixels of 32 bits have no known range: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def reason(error: BaseException) -> str:
    """What went wrong with a file, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    kind = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error).strip()
    return (kind or type(error).__name__).splitlines()[0].rstrip(".")


class ImageView(torch.utils.data.Dataset):
    """One split as a model wants it: item i is {"pixel_values": float (C, H, W), "labels": int}.

    Decoding, augmentation and the processor run when an item is asked for, so in a DataLoader's workers. All
    chance comes from Python's `random`: seeded alike, an item is the same in any process.

    Args:
        rows: A split of `ImageData`, a datasets.Dataset.
        processor: The base model's own Hugging Face image processor.
        augment: `crop` takes 0.7 to 1 of the area at a ratio of 3/4 to 4/3; `crop-flip` also mirrors half.
    """

    def __init__(self, rows: Any, processor: Any, augment: Augment = "none") -> None:
        if augment not in ("none", "crop", "crop-flip"):
            raise InlayError(f"expected augment 'none', 'crop' or 'crop-flip', but got {augment!r}. Use one.")
        self.rows, self.processor, self.augment = rows, processor, augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[int(index)]
        image = open_image(row["image"])
        if self.augment != "none":
            image = random_crop(image)
        if self.augment == "crop-flip" and random.random() < 0.5:
            image = ImageOps.mirror(image)
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels.float(), "labels": row["label"]}


def random_crop(image: Image.Image) -> Image.Image:
    """Random part of a picture, drawn as torchvision's RandomResizedCrop draws it; the processor resizes."""
    width, height = image.size
    for _ in range(10):
        area = width * height * random.uniform(0.7, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = random.randint(0, width - w), random.randint(0, height - h)
            return image.crop((x, y, x + w, y + h))
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    return image.crop(((width - w) // 2, (height - h) // 2, (width + w) // 2, (height + h) // 2))

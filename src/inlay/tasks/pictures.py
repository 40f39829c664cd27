"""One picture, decoded from anything that Pillow reads."""

import io
import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from inlay.errors import DamagedFile

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
        return decode_image(source)
    except Exception as error:  # Pillow's readers raise what they please
        path = source.get("path") if isinstance(source, dict) else source
        got = "the bytes given" if not path or isinstance(path, bytes) else repr(os.fspath(path))
        raise DamagedFile(f"{got} cannot be read as an image: {explain_unreadable(error)}.") from error


def decode_image(source: Any, draft: bool = False) -> Image.Image:
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


def explain_unreadable(error: BaseException) -> str:
    """What went wrong with a file, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    kind = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error).strip()
    return (kind or type(error).__name__).splitlines()[0].rstrip(".")

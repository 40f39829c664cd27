"""One way to decode an image, whatever it comes as: every task and every function of inlay goes through here."""

import hashlib
import io
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from inlay.errors import BadInput, DamagedFile

Source = str | os.PathLike[str] | bytes | dict[str, Any] | Image.Image
Box = tuple[int, int, int, int]  # left, upper, right and lower, in pixels
Intensity = Literal["percentiles", "range"]
INTENSITIES: tuple[Intensity, ...] = ("percentiles", "range")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by the number of channels that a base takes
SUFFIXES = tuple(f".{s}" for s in "jpg jpeg jfif png gif bmp webp avif tif tiff ppm pgm".split())  # noqa: SIM905
# What is decoded of strangers. Pillow reads 40 formats more, some by other programs (EPS by Ghostscript).
_AVIF = () if find_spec("PIL.AvifImagePlugin") is None else ("AVIF",)  # since Pillow 11.3
FORMATS = (*_AVIF, "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
UPRIGHT = 1  # EXIF orientation
_ORIENTED = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # in `info`; TIFF has tags instead
TURNED = (5, 6, 7, 8)  # EXIF orientations whose upright image has width and height exchanged
SMALL = 2**16  # bytes
# A JPEG is decoded at 1/n of its size if what is made of it is at least 2 n times smaller: the bound of `thumbnail`.
REDUCING_GAP = 2.0


def open_image(source: Source, *, channels: int = 3, intensity: Intensity = "range") -> Image.Image:
    """An image of 8 bits, upright as its EXIF orientation says; of an animation the first frame.

    Of a PIL image it makes what it makes of the file that the image was opened from.

    Args:
        source: A path, the bytes of a file, {"bytes", "path"} with one of them as in `ImageData`, or a PIL image.
        channels: 1 for grey, 3 for RGB, 4 for RGBA. With 1 or 3 transparent pixels are laid on white.
        intensity: How greys of 16 bits become 8 bits. `range`: 0 to 65535 is scaled to 0 to 255. `percentiles`: the 1st
            and 99th percentile of the image become 0 and 255. Images of 8 bits stay as they are.

    Raises:
        InlayError: The file is missing, broken or no image, or its pixels have no known range.
    """
    try:
        return decode_image(source, channels=channels, intensity=intensity)
    except Exception as error:  # Pillow's readers raise what they please
        raise DamagedFile(f"{_name_source(source)} cannot be read as an image: {explain_unreadable(error)}.") from error


def open_crop(
    source: dict[str, Any],
    draw_box: Callable[[int, int], Box],
    find_reduction: Callable[[int, int], float],
    *,
    channels: int = 3,
) -> Image.Image:
    """A part of an image, as `open_image` opens it; a JPEG that is made much smaller is decoded smaller.

    Args:
        source: As for `open_image`.
        draw_box: Chooses the part, from the width and height of the upright image.
        find_reduction: How many times smaller a part of this width and height is made afterwards.
        channels: As for `open_image`.

    Raises:
        InlayError: As `open_image`.

    Source: `PIL.Image.Image.thumbnail` with its `reducing_gap`.
    """
    try:
        with _open_file(source) as file:
            return _decode_crop(file, draw_box, find_reduction, channels)
    except Exception as error:  # Pillow's readers raise what they please
        raise DamagedFile(f"{_name_source(source)} cannot be read as an image: {explain_unreadable(error)}.") from error


def check_pixels(source: Source, limit: int) -> None:
    """Refuse an image from a stranger by the header of its file, before it is decoded.

    Args:
        source: As for `open_image`.
        limit: Pixels at most.

    Raises:
        InlayError: It has more, cannot be read, or has a format that is not one of `FORMATS`.
    """
    if isinstance(source, Image.Image):
        width, height = source.size
    else:
        try:
            with _open_file(source, FORMATS) as file:
                width, height = file.size
        except UnidentifiedImageError:
            raise DamagedFile(
                f"{_name_source(source)} cannot be read as an image: not one of {', '.join(FORMATS)}."
            ) from None
        except Exception as error:  # Pillow's readers raise what they please
            raise DamagedFile(
                f"{_name_source(source)} cannot be read as an image: {explain_unreadable(error)}."
            ) from error
    if width * height > limit:
        raise BadInput(f"the image has {width} x {height} pixels; the limit is {limit:,} in all.")


def open_for_processor(source: Source, processor: Any, intensity: Intensity = "range") -> Image.Image:
    """`open_image` with as many channels as an image processor makes."""
    return open_image(source, channels=count_channels(processor), intensity=intensity)


def count_channels(processor: Any) -> int:
    """How many channels the images of a processor have: `num_channels`, or as many as it has means."""
    stated = getattr(processor, "num_channels", None)
    if isinstance(stated, int):
        return stated
    means = getattr(processor, "image_mean", None)
    return len(means) if getattr(processor, "do_normalize", False) and isinstance(means, list | tuple) else 3


def decode_image(source: Any, *, channels: int = 3, intensity: Intensity = "range") -> Image.Image:
    """As `open_image`, with the errors of Pillow."""
    if isinstance(source, Image.Image):  # whoever opened it closes it
        return _convert_mode(_turn_upright(source), channels, intensity)
    with _open_file(source) as file:
        return _convert_mode(_turn_upright(file), channels, intensity)


def _decode_crop(
    file: Image.Image,
    draw_box: Callable[[int, int], Box],
    find_reduction: Callable[[int, int], float],
    channels: int,
) -> Image.Image:
    if not isinstance(file, JpegImageFile):  # its size may be known only once it is decoded
        image = _convert_mode(_turn_upright(file, in_place=True), channels, "range")
        return image.crop(draw_box(*image.size))
    orientation = file.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    width, height = (file.height, file.width) if orientation in TURNED else file.size
    box = draw_box(width, height)
    reduction = find_reduction(box[2] - box[0], box[3] - box[1]) / REDUCING_GAP
    scale = max((n for n in (2, 4, 8) if n <= reduction), default=1)
    if scale > 1:
        file.draft(None, (file.width // scale, file.height // scale))
    if orientation != UPRIGHT:
        ImageOps.exif_transpose(file, in_place=True)
    image = _convert_mode(file, channels, "range")
    x, y = image.width / width, image.height / height  # 1 where it is decoded in full
    return image.crop((round(box[0] * x), round(box[1] * y), round(box[2] * x), round(box[3] * y)))


def digest_image(source: Any) -> tuple[str, int, int]:
    """What tells an image from all others, however both are stored, and its width and height; errors as Pillow's.

    Images have one digest if `open_image` makes equal pixels of them; those of 16 bits if all their bits are equal.
    """
    with _open_file(source) as file:
        image = _turn_upright(file)
        width, height = image.size
        seen = np.asarray(image).tobytes() if image.mode.startswith("I") else _convert_mode(image, 3, "range").tobytes()
    start = f"{width} x {height} {image.mode[:1] == 'I'} ".encode()
    return hashlib.blake2b(start + seen, digest_size=16).hexdigest(), width, height


def _open_file(source: Any, formats: tuple[str, ...] | None = None) -> Image.Image:
    if isinstance(source, dict):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    if not source:
        raise ValueError("no image in this row" if source is None else "an empty file")
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else _read_small(source), formats=formats)


def _read_small(path: Any) -> Any:
    """The content of a small file, which is read faster at once; the path of a larger one."""
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - half the time of Path.open
        content = file.read(SMALL)
    return io.BytesIO(content) if len(content) < SMALL else path


def _turn_upright(file: Image.Image, *, in_place: bool = False) -> Image.Image:
    """All of a file's pixels, upright, in a mode of 8 or 16 bits; `in_place` copies nothing."""
    file.load()
    if in_place and _may_be_turned(file):
        ImageOps.exif_transpose(file, in_place=True)
    image = file if in_place else ImageOps.exif_transpose(file)
    if image.mode == "F" or (image.mode == "I" and file.format != "PPM"):
        raise ValueError("pixels of 32 bits have no known range: save it with 8 or 16 bits")
    return image


def _may_be_turned(file: Image.Image) -> bool:
    """False if a file that was just opened and loaded holds nothing in which Pillow looks for an orientation."""
    return hasattr(file, "tag_v2") or not _ORIENTED.isdisjoint(file.info)


def _convert_mode(image: Image.Image, channels: int, intensity: Intensity) -> Image.Image:
    if image.mode.startswith("I"):
        image = _scale_to_8_bits(image, intensity)
    if image.has_transparency_data and channels != 4:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == MODES[channels] else image.convert(MODES[channels])


def _scale_to_8_bits(image: Image.Image, intensity: Intensity) -> Image.Image:
    """Greys of 16 bits as 8 bits, and white where one of them is declared transparent."""
    values = np.asarray(image).astype(np.uint32)  # H W
    if intensity == "percentiles":
        low, high = np.percentile(values, (1, 99))
        if high <= low:  # nearly all pixels are alike
            low, high = values.min(), max(values.max(), values.min() + 1)
        grey = ((values - low) * (255 / (high - low))).clip(0, 255).round().astype(np.uint8)
    else:
        grey = ((values + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _name_source(source: Source) -> str:
    if isinstance(source, Image.Image):
        path: Any = getattr(source, "filename", None)
        return repr(os.fspath(path)) if path else "the image given"
    path = source.get("path") if isinstance(source, dict) else source
    return "the bytes given" if not path or isinstance(path, bytes) else repr(os.fspath(path))


def explain_unreadable(error: BaseException) -> str:
    """What went wrong with a file, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    kind = "not an image" if isinstance(error, UnidentifiedImageError) else str(error).strip()
    return (kind or type(error).__name__).splitlines()[0].rstrip(".")

"""The steps of image processors: bit for bit the processor's own pixels, and JPEGs that are decoded smaller."""

import io
import random

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from inlay.tasks.image_decoding import open_crop, open_image
from inlay.tasks.images import pixels
from inlay.tasks.images.pixels import PixelSteps, ProcessorSteps, choose_steps
from inlay.tasks.images.view import draw_box

SHORT = {"shortest_edge": 20}
SQUARE = {"height": 24, "width": 24}
STEPPED = {
    "ViT": {"size": SQUARE},
    "ViT, other settings": {"size": {"height": 17, "width": 30}, "resample": 3, "image_mean": [0.1, 0.5, 0.7]},
    "ViT, not normalised": {"size": SQUARE, "do_normalize": False, "rescale_factor": 1 / 127.5},
    "ViT, not rescaled": {"size": SQUARE, "do_rescale": False},
    "ViT, factor without a divisor": {"size": SQUARE, "rescale_factor": 0.0123},
    "CLIP": {"size": SHORT, "crop_size": {"height": 16, "width": 16}},
    "CLIP, padded": {"size": SHORT, "crop_size": {"height": 25, "width": 33}},
    "DeiT": {"size": SQUARE, "crop_size": {"height": 20, "width": 20}},
    "MobileNetV2": {"size": SHORT, "crop_size": {"height": 18, "width": 18}},
    "Beit": {"size": SQUARE},
}


def noise(width, height, channels=3):
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values)


def processor(name, **settings):
    return getattr(transformers, f"{name.split(',')[0]}ImageProcessorPil")(**settings)


@pytest.mark.parametrize("name", STEPPED)
def test_pixels_are_the_processors_own(name):
    own = processor(name, **STEPPED[name])
    steps = choose_steps(own)
    assert isinstance(steps, PixelSteps)
    for size in ((31, 44), (90, 61), (7, 5), (24, 24), (20, 91), (64, 20)):
        image = noise(*size)
        expected = own(images=[image], return_tensors="pt")["pixel_values"][0]
        found = steps(image)["pixel_values"]
        assert found.dtype == torch.float32 and found.is_contiguous() and torch.equal(found, expected), size


@pytest.mark.parametrize("name", ["ViT, other settings", "ViT, factor without a divisor"])
def test_a_batch_of_eight_bits_is_normalised_as_the_processor_does(name, monkeypatch):
    monkeypatch.setattr(pixels, "IN_CACHE", 5000)  # of five images some together
    own, images = (
        processor(name, **STEPPED[name]),
        [noise(*size) for size in ((31, 44), (90, 61), (7, 5), (9, 9), (24, 24))],
    )
    steps = choose_steps(own)
    eight_bits = torch.stack([steps.resize(image) for image in images])
    assert eight_bits.dtype == torch.uint8
    assert torch.equal(steps.normalise(eight_bits), own(images=images, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("channels", [1, 4])
def test_pixels_of_other_channels(channels):
    own = processor("ViT", size=SQUARE, image_mean=[0.3] * channels, image_std=[0.2] * channels, do_convert_rgb=False)
    own.num_channels = channels
    steps, image = choose_steps(own), noise(50, 40, channels)
    assert isinstance(steps, PixelSteps)
    assert torch.equal(steps(image)["pixel_values"], own(images=[image], return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize(
    ("name", "settings"),
    [("ConvNext", {"size": SHORT}), ("Levit", {"size": SHORT}), ("EfficientNet", {"rescale_offset": True})],
)
def test_a_processor_with_steps_of_its_own_is_called_itself(name, settings):
    own, image = processor(name, **settings), noise(50, 40)
    steps = choose_steps(own)
    assert isinstance(steps, ProcessorSteps) and steps.find_reduction(500, 400) == 1
    assert torch.equal(steps(image)["pixel_values"], own(images=[image], return_tensors="pt")["pixel_values"][0])


# open_crop


def encode(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def smooth(width, height):
    """An image that every way to make it smaller makes alike."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray((255 * np.stack([x, y, x * y], -1)).astype(np.uint8))


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_crop_at_full_size_is_part_of_the_whole_image(kind, orientation):
    source = encode(smooth(60, 40), kind, exif=turned(orientation))
    whole, box = open_image(source), (3, 5, 33, 35)
    sizes = []
    crop = open_crop(source, lambda *size: sizes.append(size) or box, lambda width, height: 3.9)
    assert sizes == [whole.size] and whole.size == ((40, 60) if orientation == 6 else (60, 40))
    assert crop.mode == "RGB" and crop.tobytes() == whole.crop(box).tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_in_xmp_counts(kind):
    """Editors write it there, and no EXIF."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    source = encode(smooth(60, 40), kind, **({"pnginfo": info} if kind == "PNG" else {"xmp": xmp}))
    whole, box = open_image(source), (3, 5, 33, 35)
    assert whole.size == (40, 60)
    crop = open_crop(source, lambda width, height: box, lambda width, height: 1)
    assert crop.tobytes() == whole.crop(box).tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("side", [8, 300])
def test_a_file_on_disk_is_its_bytes(kind, side, tmp_path):
    """Small files are read at once, larger ones as Pillow reads them."""
    source, box = encode(noise(side, side), kind), (1, 2, 7, 8)
    (tmp_path / "image").write_bytes(source["bytes"])
    on_disk = {"bytes": None, "path": str(tmp_path / "image")}
    assert open_image(on_disk).tobytes() == open_image(source).tobytes()
    crops = [open_crop(each, lambda width, height: box, lambda width, height: 1) for each in (on_disk, source)]
    assert crops[0].tobytes() == crops[1].tobytes()


@pytest.mark.parametrize(("reduction", "scale"), [(4, 2), (7.9, 2), (8, 4), (40, 8)])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_large_jpeg_is_decoded_smaller(reduction, scale, orientation):
    """The part is the one that was drawn on the whole image, at a half, a quarter or an eighth of its size."""
    source = encode(smooth(403, 301), exif=turned(orientation), quality=95, subsampling=0)
    whole = open_image(source)
    box = (40, 16, 200, 160)
    crop = open_crop(source, lambda width, height: box, lambda width, height: reduction)
    assert abs(crop.width - 160 / scale) <= 1 and abs(crop.height - 144 / scale) <= 1
    expected = np.asarray(whole.crop(box).resize(crop.size, Image.Resampling.BOX), int)
    assert np.abs(np.asarray(crop, int) - expected).max() <= 8  # a pixel and a half


def test_boxes_are_drawn_in_the_order_that_they_always_were():
    """By Python's generator, for the whole image: a seed crops the same part, whatever the image is decoded to."""
    random.seed(3)
    boxes = [draw_box(640, 480) for _ in range(3)]
    random.seed(3)
    source, drawn = encode(smooth(640, 480)), []
    for _ in range(3):
        open_crop(source, lambda *size: drawn.append(draw_box(*size)) or drawn[-1], lambda width, height: 8)
    assert drawn == boxes == [(66, 35, 578, 457), (60, 34, 621, 456), (33, 6, 614, 476)]


def test_a_cut_jpeg_is_named():
    source = encode(noise(200, 150))
    source = {"bytes": source["bytes"][:3000], "path": "cut.jpg"}
    for reduction in (1, 8):
        with pytest.raises(Exception, match=r"'cut.jpg' cannot be read as an image: image file is truncated"):
            open_crop(source, draw_box, lambda width, height, reduction=reduction: reduction)

"""One way to decode: whatever an image comes as, the same pixels."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from inlay import InlayError, load_adapter, predict
from inlay.tasks.image_decoding import FORMATS, check_pixels, digest_image, open_image

RNG = np.random.default_rng(0)
GREY = Image.fromarray(RNG.integers(0, 256, (12, 16), np.uint8))
RGB = Image.fromarray(RNG.integers(0, 256, (12, 16, 3), np.uint8))
RGBA = Image.fromarray(RNG.integers(0, 256, (12, 16, 4), np.uint8))
GREY_16 = Image.fromarray(RNG.integers(0, 65536, (12, 16)).astype(np.uint16))
FRAMES = [RGB, ImageOps.flip(RGB)]


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oriented(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(RGB, kind, exif=exif)


FILES = {
    "16 bits": encode(GREY_16, "PNG"),
    "16 bits, TIFF": encode(GREY_16, "TIFF"),
    "16 bits, big-endian": encode(Image.fromarray(np.asarray(GREY_16).astype(">u2")), "TIFF"),
    "16 bits, one transparent grey": encode(GREY_16, "PNG", transparency=int(np.asarray(GREY_16)[0, 0])),
    "16 bits, PGM": b"P5\n2 1\n65535\n\x80\x80\xff\xff",
    "RGBA": encode(RGBA, "PNG"),
    "RGBA, WebP": encode(RGBA, "WEBP", lossless=True),
    "LA": encode(RGBA.convert("LA"), "PNG"),
    "1 bit": encode(GREY.convert("1"), "PNG"),
    "1 bit, TIFF": encode(GREY.convert("1"), "TIFF"),
    "palette": encode(RGB.convert("P"), "PNG"),
    "palette, transparent": encode(RGB.convert("P"), "PNG", transparency=3),
    "palette, many transparencies": encode(RGB.convert("P"), "PNG", transparency=bytes(range(256))),
    "grey, transparent": encode(GREY, "PNG", transparency=int(np.asarray(GREY)[0, 0])),
    "RGB, transparent": encode(RGB, "PNG", transparency=RGB.getpixel((0, 0))),
    "CMYK": encode(RGB.convert("CMYK"), "JPEG"),
    "CMYK, TIFF": encode(RGB.convert("CMYK"), "TIFF"),
    "YCbCr, TIFF": encode(RGB.convert("YCbCr"), "TIFF"),
    **{f"{kind}, several frames": encode(RGB, kind, save_all=True, append_images=FRAMES[1:]) for kind in
       ("GIF", "PNG", "WEBP", "TIFF")},
    **{f"{kind}, orientation {n}": oriented(kind, n) for kind in ("JPEG", "PNG", "TIFF", "WEBP") for n in (3, 6, 7)},
}  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", FILES)
def test_a_file_its_bytes_and_a_pil_image_are_one(tmp_path, name, channels):
    content = FILES[name]
    (tmp_path / "image").write_bytes(content)
    loaded = Image.open(io.BytesIO(content))
    loaded.load()
    with Image.open(tmp_path / "image") as opened:
        sources = [content, tmp_path / "image", {"bytes": content, "path": None}, loaded, opened, loaded.copy()]
        if name == "16 bits, PGM":
            del sources[-1]  # a copy has forgotten of which file it is, and 32 bits have no range
        whole = [open_image(source, channels=channels) for source in sources]
    assert {image.mode for image in whole} == {{1: "L", 3: "RGB", 4: "RGBA"}[channels]}
    assert all(np.array_equal(image, whole[0]) for image in whole)


def test_predictions_of_files_and_pil_images_are_one(digits_adapter):
    adapter = load_adapter(digits_adapter)
    for name, content in FILES.items():
        a, b = predict(adapter, [content, Image.open(io.BytesIO(content))], top=10)
        assert a.labels == b.labels and a.probabilities == b.probabilities, name


def test_pil_images_of_32_bits_are_refused_as_their_files_are():
    for kind in (np.float32, np.int32):
        with pytest.raises(InlayError, match=r"the image given cannot be read as an image: .* no known range"):
            open_image(Image.fromarray(np.ones((2, 2), kind)))


def test_percentiles_scale_16_bits_only():
    """A camera of 12 bits: by the whole range at most 16 of 255, by percentiles as numpy computes them."""
    values = RNG.integers(100, 4096, (40, 50)).astype(np.uint16)
    assert np.asarray(open_image(Image.fromarray(values))).max() == 16
    found = np.asarray(open_image(Image.fromarray(values), intensity="percentiles"))[..., 0]
    low, high = np.percentile(values, (1, 99))
    expected = np.clip((values - low) / (high - low), 0, 1) * 255
    assert np.abs(found - expected).max() <= 0.5 and (found.min(), found.max()) == (0, 255)
    assert np.array_equal(open_image(RGB, intensity="percentiles"), RGB)


@pytest.mark.parametrize("values", [[7] * 200, [7] * 199 + [4000], [0] * 200, [65535] * 200])
def test_percentiles_of_flat_images_are_no_division_by_zero(values):
    found = np.asarray(
        open_image(Image.fromarray(np.array(values, np.uint16).reshape(10, 20)), intensity="percentiles")
    )
    assert found.max() == (255 if len(set(values)) > 1 else 0)


def test_a_digest_is_of_pixels_and_not_of_files(tmp_path):
    for i, (image, kind, options) in enumerate(
        [(RGB, "PNG", {}), (RGB, "BMP", {}), (RGB, "PNG", {"compress_level": 0}), (RGB, "WEBP", {"lossless": True})]
    ):
        (tmp_path / f"{i}").write_bytes(encode(image, kind, **options))
    assert len({digest_image({"bytes": None, "path": tmp_path / f"{i}"}) for i in range(4)}) == 1
    others = [encode(GREY, "PNG"), encode(ImageOps.flip(RGB), "PNG"), encode(RGB.rotate(180), "PNG")]
    assert len({digest_image(content) for content in (*others, encode(RGB, "PNG"))}) == 4
    low = [Image.fromarray(np.full((4, 4), value, np.uint16)) for value in (1000, 1001)]  # both 4 of 255
    assert len({digest_image(encode(image, "PNG")) for image in low}) == 2
    turned = oriented("PNG", 6)
    assert digest_image(turned) == digest_image(encode(RGB.rotate(-90, expand=True), "PNG"))
    assert digest_image(turned)[1:] == (12, 16)


# ---- files of strangers


def png(width, height, *, chunks=b"", body=b""):
    """A PNG whose parts need not fit together."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + chunk(b"IDAT", body) + chunk(b"IEND", b"")


MUCH = zlib.compress(bytes(20_000_000), 9)
TEXT = struct.pack(">I", len(MUCH) + 3) + b"zTXta\0\0" + MUCH + struct.pack(">I", zlib.crc32(b"zTXta\0\0" + MUCH))
WIDE_FRAME = (
    b"GIF89a" + struct.pack("<HH", 10, 10) + b"\x80\0\0" + bytes(6) + b"," + struct.pack("<HHHH", 0, 0, 9000, 9000)
)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (png(40_000, 300), "40000 x 300 pixels; the limit is 1,000,000"),
        (png(100_000, 100_000), "cannot be read as an image"),
        (png(10, 10, chunks=TEXT), "cannot be read as an image: Decompressed data too large"),
        (WIDE_FRAME + b"\0\x02\x02\x44\x01\0;", "9000 x 9000 pixels"),  # on a canvas of 10 x 10
        (encode(RGB, "TGA"), f"not one of {', '.join(FORMATS)}"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(a) show\n", "not one of"),  # a program
        (b"", "an empty file"),
    ],
    ids=["pixels", "more pixels", "text", "frame", "format", "PostScript", "empty"],
)
def test_what_a_stranger_sends_is_refused_by_its_header(data, words):
    with pytest.raises(InlayError, match=words):
        check_pixels(data, 1_000_000)


def test_more_data_than_pixels_and_many_frames_cost_nothing():
    frames = [Image.fromarray(np.full((8, 8), i, np.uint8)) for i in range(200)]
    for kind in ("GIF", "TIFF"):
        many = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        check_pixels(many, 64)
        assert open_image(many).size == (8, 8)
    long = png(10, 10, body=MUCH)
    check_pixels(long, 100)
    assert open_image(long).size == (10, 10)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_formats_that_are_decoded_for_strangers_are_those_of_images(kind):
    data = encode(RGB, kind)
    check_pixels(data, 12 * 16)
    assert open_image(data).size == (16, 12)

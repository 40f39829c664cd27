"""Scans as bytes from anyone: as ITK and nibabel read them from files, and no more than their headers announce."""

import gzip
import random
import tracemalloc
import zlib

import nibabel
import numpy as np
import pytest

from inlay import InlayError
from inlay.tasks.volumes.formats import read_volume
from inlay.tasks.volumes.sent import inflate_sent, read_sent_header
from tasks.volumes.test_formats import GRIDS, affine_of, itk_image

sitk = pytest.importorskip("SimpleITK")
SHAPE, COUNT = (5, 4, 3), 60
RNG = np.random.default_rng(0)


def write(path, array, affine=None, packed=True, channels=False):
    """A file of another library, and its bytes."""
    affine = affine_of("oblique") if affine is None else affine
    if path.suffix in (".mgz", ".mgh"):
        nibabel.MGHImage(array, affine).to_filename(path)
        return path.read_bytes()
    if channels:
        image = itk_image(array[..., 0], affine)
        many = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0, 3)), isVector=True)
        many.CopyInformation(image)
        image = many
    else:
        image = itk_image(array, affine)
    sitk.WriteImage(image, str(path), packed)
    return path.read_bytes()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mgz", ".mgh"])
def test_a_file_is_read_as_itk_and_nibabel_read_it(suffix, packed, grid, tmp_path):
    file = tmp_path / f"a{suffix}"
    data = write(file, RNG.normal(size=SHAPE).astype(np.float32), affine_of(grid), packed)
    array, affine = read_volume(inflate_sent(data, COUNT))
    expected, own = read_volume(file)
    assert np.array_equal(array, expected) and np.allclose(affine, own, atol=1e-4)
    header = read_sent_header(data, COUNT)
    assert header.shape == SHAPE and np.allclose(header.affine, own, atol=1e-4)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "i8", "f4", "f8"])
@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_each_type_of_number(suffix, dtype, tmp_path):
    file = tmp_path / f"a{suffix}"
    data = write(file, RNG.integers(0, 100, SHAPE).astype(dtype))
    assert np.array_equal(read_volume(inflate_sent(data, COUNT), "label")[0], read_volume(file, "label")[0])


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mgz"])
def test_channels(suffix, tmp_path):
    file = tmp_path / f"a{suffix}"
    data = write(file, RNG.normal(size=(*SHAPE, 2)).astype(np.float32), channels=True)
    assert read_sent_header(data, 2 * COUNT).shape == (*SHAPE, 2)
    found, expected = read_volume(inflate_sent(data, 2 * COUNT), channels=True)[0], read_volume(file, channels=True)[0]
    assert np.array_equal(found, expected)
    with pytest.raises(InlayError, match="the limit is 119 in all"):
        read_sent_header(data, 2 * COUNT - 1)


def test_big_endian_and_other_spaces(tmp_path):
    nrrd = pytest.importorskip("nrrd")
    voxels = RNG.integers(-9, 9, SHAPE).astype(">i2")
    header = {"space": "right-anterior-superior", "space origin": [1, 2, 3], "space directions": np.diag([1.0, 2, -3])}
    nrrd.write(str(tmp_path / "a.nrrd"), voxels, {**header, "endian": "big"})
    array, affine = read_volume(inflate_sent((tmp_path / "a.nrrd").read_bytes(), COUNT))
    assert np.array_equal(array, voxels) and np.allclose(
        affine, [[1, 0, 0, 1], [0, 2, 0, 2], [0, 0, -3, 3], [0, 0, 0, 1]]
    )


NRRD_HEADER = (
    b"NRRD0004\ntype: uint8\ndimension: 3\nspace: left-posterior-superior\nsizes: 5 4 3\n"
    b"space directions: (1,0,0) (0,1,0) (0,0,1)\nencoding: gzip\nspace origin: (0,0,0)\n\n"
)
MHA_HEADER = (
    b"ObjectType = Image\nNDims = 3\nBinaryData = True\nCompressedData = True\nDimSize = 5 4 3\n"
    b"ElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
)
WHOLE = {"nrrd": NRRD_HEADER + gzip.compress(bytes(COUNT)), "mha": MHA_HEADER + zlib.compress(bytes(COUNT))}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_file_by_hand(kind):
    array, affine = read_volume(inflate_sent(WHOLE[kind], COUNT))
    assert array.shape == SHAPE and np.array_equal(affine, np.diag([-1, -1, 1, 1]))


@pytest.mark.parametrize(
    ("kind", "old", "new", "words"),
    [
        (
            "nrrd",
            b"sizes: 5 4 3",
            b"sizes: 50000 40000 30000",
            "has 50000 x 40000 x 30000 voxels; the limit is 60 in all",
        ),
        ("mha", b"DimSize = 5 4 3", b"DimSize = 5 4 -3", "no volume"),
        ("mha", b"DimSize = 5 4 3", b"DimSize = 5 4", "2 axes, no volume"),
        ("nrrd", b"sizes: 5 4 3", b"sizes: 5 4 2", "more data than its header announces"),
        ("mha", b"DimSize = 5 4 3", b"DimSize = 5 4 2", "more data than its header announces"),
        ("nrrd", b"type: uint8", b"type: double\nendian: little", "truncated"),
        ("nrrd", b"encoding: gzip", b"encoding: hex", "the encoding 'hex': save it as raw or gzip"),
        ("nrrd", b"encoding: gzip", b"endian: big", "a header without encoding"),
        ("nrrd", b"type: uint8", b"type: block", "voxels of type block"),
        ("nrrd", b"space directions: (1,0,0) (0,1,0) (0,0,1)", b"spacings: 1 1 1", "without space directions"),
        ("nrrd", b"(0,0,1)", b"(0,0,0)", "an affine that maps no space"),
        ("nrrd", b"(0,0,1)", b"(0,0,nan)", "an affine that maps no space"),
        ("nrrd", b"encoding", b"data file: /etc/passwd\nencoding", "without its data: save it as one .nrrd"),
        ("mha", b"LOCAL", b"/etc/passwd", "without its data: save it as one .mha"),
        ("mha", b"MET_UCHAR", b"MET_OTHER", "voxels of type MET_OTHER"),
        ("mha", b"BinaryData = True", b"BinaryData = False", "written as text"),
    ],
)
def test_a_header_that_is_refused(kind, old, new, words):
    assert old in WHOLE[kind]
    with pytest.raises(InlayError, match=words):
        inflate_sent(WHOLE[kind].replace(old, new, 1), COUNT)


@pytest.mark.parametrize("kind", WHOLE)
def test_damaged_data_is_named(kind):
    with pytest.raises(InlayError, match="truncated"):
        inflate_sent(WHOLE[kind][:-9], COUNT)
    with pytest.raises(InlayError, match="does not match its checksum"):
        inflate_sent(WHOLE[kind][:-8] + bytes(8), COUNT)


def test_a_bomb_is_not_inflated(tmp_path):
    mgz = write(tmp_path / "a.mgz", np.zeros(SHAPE, np.uint8))
    bombs = [
        NRRD_HEADER + gzip.compress(bytes(50_000_000)),
        MHA_HEADER + zlib.compress(bytes(50_000_000)),
        gzip.compress(gzip.decompress(mgz) + bytes(50_000_000)),
    ]
    for bomb in bombs:
        tracemalloc.start()
        with pytest.raises(InlayError, match="more data than its header announces"):
            inflate_sent(bomb, COUNT)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8_000_000


def test_any_damage_is_an_inlay_error_or_a_scan(tmp_path):
    """Bytes that are changed, cut or put in, and lines of headers that are lost or there twice."""
    wholes = [*WHOLE.values()]
    for name in ("a.nrrd", "a.mha", "a.mgz", "a.mgh"):
        wholes.append(write(tmp_path / name, RNG.normal(size=SHAPE).astype(np.float32), packed=name != "a.mha"))
    draw, refused = random.Random(0), 0
    for _ in range(1500):
        data = bytearray(draw.choice(wholes))
        for _ in range(draw.choice([1, 1, 3])):
            place = draw.randrange(max(1, min(len(data), draw.choice([40, 300, 10**6]))))
            match draw.randrange(4):
                case 0:
                    data[place : place + 1] = bytes([draw.randrange(256)])
                case 1:
                    del data[place : place + draw.choice([1, 5, 10**6])]
                case 2:
                    data[place:place] = draw.choice([b"-", b"9" * 9, b"9" * 5000, b"\n", b" ", b"nan", b"()", b"\xff"])
                case _:
                    lines = bytes(data).split(b"\n")
                    lines.insert(draw.randrange(len(lines)), lines.pop(draw.randrange(len(lines))))
                    data = bytearray(b"\n".join(lines))
        try:
            read_sent_header(bytes(data), COUNT)
            read_volume(inflate_sent(bytes(data), COUNT))
        except InlayError:
            refused += 1
    assert 300 < refused < 1500

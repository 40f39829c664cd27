"""Files of scans: written and read again, and every broken kind named with its fault."""

import gzip
import struct
import tracemalloc

import nibabel
import numpy as np
import pytest

from inlay.errors import InlayError
from inlay.tasks.volumes.data import Case, read_labels
from inlay.tasks.volumes.formats import case_name, read_header, read_volume, write_volume
from inlay.tasks.volumes.nifti import find_affine_conflict, inflate_nifti, read_nifti_header


def test_files_come_back_as_they_were_written(tmp_path):
    affine = np.array([[0, -1.1, 0.1, 5], [0.8, 0.1, 0, -3], [0, 0.2, 3, 40], [0, 0, 0, 1]])
    array = np.random.default_rng(0).integers(0, 3, (4, 5, 6))
    for name in ("a.nii.gz", "b.nii"):
        write_volume(tmp_path / name, array, affine)
        found, own = read_volume(tmp_path / name, "label")
        assert found.dtype == np.uint8 and np.array_equal(found, array) and np.allclose(own, affine, atol=1e-5)
        shape, own = read_header(tmp_path / name)
        assert shape == (4, 5, 6) and np.allclose(own, affine, atol=1e-5)
    assert nibabel.load(tmp_path / "a.nii.gz").header.get_xyzt_units()[0] == "mm"
    with pytest.raises(InlayError, match=r"a\.png. must end with \.nii\.gz or \.nii"):
        write_volume(tmp_path / "a.png", array, affine)
    with pytest.raises(InlayError, match="32 bits"):
        write_volume(tmp_path / "c.nii", array * 2**31, affine)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "b.nii"]


def broken(folder):
    """Files that are no scan of three axes, with what is to be said of each."""
    rng = np.random.default_rng(0)
    good = nibabel.Nifti1Image(rng.random((12, 12, 12), np.float32), np.eye(4))
    nibabel.save(good, folder / "whole.nii.gz")
    whole = (folder / "whole.nii.gz").read_bytes()
    (folder / "truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "damaged.nii.gz").write_bytes(whole[:2000] + b"\0" * 200 + whole[2200:])
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "text.nii.gz").write_text("<html>404</html>")
    nibabel.save(good, folder / "plain.nii")
    (folder / "short.nii").write_bytes((folder / "plain.nii").read_bytes()[:-500])
    for name, shape in (("series", (4, 4, 4, 3)), ("flat", (4, 4))):
        nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)), folder / f"{name}.nii.gz")
    bad = np.ones((4, 4, 4), np.float32)
    bad[0, 0, 0], bad[1, 1, 1] = np.nan, np.inf
    nibabel.save(nibabel.Nifti1Image(bad, np.eye(4)), folder / "nan.nii.gz")
    header = nibabel.Nifti1Image(np.ones((4, 4, 4), np.float32), None)
    header.set_sform(np.diag([1.0, 1.0, 0.0, 1.0]), 2)
    nibabel.save(header, folder / "singular.nii.gz")
    colours = np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colours, np.eye(4)), folder / "colours.nii.gz")
    np.savez(folder / "other.npz", scan=np.ones((3, 3, 3)))
    np.savez(folder / "objects.npz", image=np.array([{}], object))
    (folder / "cut.npz").write_bytes((folder / "other.npz").read_bytes()[:-40])
    return {
        "truncated.nii.gz": "truncated",
        "damaged.nii.gz": "",
        "empty.nii.gz": "an empty file",
        "text.nii.gz": "",
        "short.nii": "truncated",
        "series.nii.gz": "4 axes of 4x4x4x3, a series or several channels",
        "flat.nii.gz": "no volume",
        "nan.nii.gz": "2 voxels that are NaN or infinite",
        "singular.nii.gz": "an affine that maps no space",
        "colours.nii.gz": "voxels of type",
        "other.npz": "an .npz with scan, but no array 'image'",
        "objects.npz": "",
        "cut.npz": "",
        "none.nii.gz": "no such file",
        "scan.tif": "is no scan in .nii.gz, .nii, .npz, ",
    }


def test_broken_files_are_named(tmp_path):
    for name, reason in broken(tmp_path).items():
        with pytest.raises(InlayError) as caught:
            read_volume(tmp_path / name)
        message = str(caught.value)
        assert name in message and reason in message and "\n" not in message, message


def test_axes_of_length_one_and_scaled_integers(tmp_path):
    image = nibabel.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4, 1), np.eye(4))
    image.header.set_slope_inter(0.5, -3)
    nibabel.save(image, tmp_path / "a.nii.gz")
    array, _ = read_volume(tmp_path / "a.nii.gz")
    assert array.shape == (2, 3, 4) and array.dtype == np.float32
    assert array[0, 0, 1] - array[0, 0, 0] == pytest.approx(0.5)


def damaged_copies(data, count, seed=0):
    """The bytes with one bit flipped, `count` times, and cut at `count` places; the header of the file stays."""
    generator = np.random.default_rng(seed)
    for place, bit in zip(generator.integers(12, len(data), count), generator.integers(0, 8, count), strict=True):
        changed = bytearray(data)
        changed[place] ^= 1 << bit
        yield bytes(changed)
    for place in generator.integers(20, len(data), count):
        yield data[:place]


@pytest.mark.parametrize("kind", ["nii.gz", "npz"])
def test_a_damaged_file_is_never_read_as_other_voxels(tmp_path, kind):
    array = np.random.default_rng(0).normal(0, 100, (12, 14, 16)).astype(np.int16)
    path = tmp_path / f"a.{kind}"
    if kind == "npz":
        np.savez_compressed(path, image=array)
    else:
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    whole, refused = path.read_bytes(), 0
    for copy in damaged_copies(whole, 60):
        path.write_bytes(copy)
        try:
            found, affine = read_volume(path)
        except InlayError as error:
            refused += 1
            assert path.name in str(error)
        else:  # a bit that no voxel depends on: a name, a date
            assert np.array_equal(found, array) and np.array_equal(affine, np.eye(4))
    assert refused >= (120 if kind == "nii.gz" else 110)


def test_the_content_tells_what_a_file_is_and_not_its_name(tmp_path):
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    for number, kind in enumerate((nibabel.Nifti1Image, nibabel.Nifti2Image)):
        for order in "<>":
            image = kind(array, np.diag([2.0, 3, 4, 1]), kind.header_class(endianness=order))
            image.set_data_dtype(np.dtype(np.int16).newbyteorder(order))
            nibabel.save(image, tmp_path / "right.nii.gz")
            packed = (tmp_path / "right.nii.gz").read_bytes()
            for name, content in (
                ("SCAN.NII.GZ", packed),
                ("packed.nii", packed),
                ("plain.nii.gz", gzip.decompress(packed)),
                ("Plain.Nii", gzip.decompress(packed)),
            ):
                path = tmp_path / str(number) / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
                found, affine = read_volume(path)
                assert np.array_equal(found, array) and np.allclose(affine, np.diag([2.0, 3, 4, 1])), (name, kind)
                shape, own = read_header(path)
                assert shape == (3, 4, 5) and np.array_equal(own, affine)
                assert case_name(path).lower() in ("scan", "packed", "plain")
    np.savez(tmp_path / "A.npz", image=array)
    (tmp_path / "A.npz").rename(tmp_path / "B.NPZ")
    assert np.array_equal(read_volume(tmp_path / "B.NPZ")[0], array)


@pytest.mark.parametrize(("unit", "mm"), [("meter", 1000.0), ("mm", 1.0), ("micron", 0.001), ("unknown", 1.0)])
@pytest.mark.parametrize("which", ["sform", "qform", "both"])
def test_units_are_those_of_the_header(tmp_path, unit, mm, which):
    """nibabel gives affines in the file's unit; NIfTI-1 (nifti1.h, xyzt_units) has 1 metre, 2 mm, 3 micron."""
    affine = np.array([[0, -2.0, 0, 7], [3, 0, 0, -5], [0, 0, 4, 1], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(np.ones((3, 4, 5), np.int16), None)
    if which != "qform":
        image.set_sform(affine, 1)
    if which != "sform":
        image.set_qform(affine, 1)
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "a.nii.gz")
    wanted = affine * np.array([[mm], [mm], [mm], [1]])
    for found in (read_volume(tmp_path / "a.nii.gz")[1], read_header(tmp_path / "a.nii.gz")[1]):
        assert np.allclose(found, wanted, rtol=1e-6, atol=1e-6 * mm)
    assert find_affine_conflict(tmp_path / "a.nii.gz") is None


def label_map(path, array, store=None, slope=None):
    """A label map as nibabel stores it: in a type that it scales to, or with a slope."""
    image = nibabel.Nifti1Image(array, np.eye(4))
    if store is not None:
        image.set_data_dtype(store)
    nibabel.save(image, path)
    if slope is not None:  # nibabel writes a slope only where it has scaled
        raw = bytearray(gzip.decompress(path.read_bytes()))
        struct.pack_into("<2f", raw, 112, slope, 0)
        path.write_bytes(gzip.compress(bytes(raw)))
    return Case("a", path, path)


@pytest.mark.parametrize(
    ("factor", "store", "slope", "largest"),
    [
        (1.0, np.int16, None, 2), (1.0, np.int16, None, 20), (1.0, np.int16, None, 2000), (1.0, np.uint8, None, 2),
        (1.0, np.uint8, None, 20), (0.99999, None, None, 2), (1.0000153, None, None, 9), (1.0, None, None, 2),
        (100, None, 0.01, 2), (2, None, 0.5, 9),
    ],
)  # fmt: skip
def test_labels_that_storing_has_rounded_are_whole(tmp_path, factor, store, slope, largest):
    labels = np.random.default_rng(0).integers(0, largest + 1, (6, 7, 8))
    labels.flat[:2] = 0, largest
    array = (labels * factor).astype(np.float64 if slope is None else np.uint8)
    found, _ = read_labels(label_map(tmp_path / "a.nii.gz", array, store, slope))
    assert found.dtype.kind in "iu" and np.array_equal(found, labels)


@pytest.mark.parametrize("array", [np.array([0, 0.5, 1]), np.array([0, 1.01, 2]), np.linspace(0, 1, 50)])
@pytest.mark.parametrize("store", [None, np.int16])
def test_numbers_between_labels_are_refused(tmp_path, array, store):
    case = label_map(tmp_path / "a.nii.gz", np.broadcast_to(array, (2, 2, len(array))), store)
    with pytest.raises(InlayError, match="not whole"):
        read_labels(case)


def moved(**change):
    affine = np.diag([2.0, 2, 3, 1])
    for place, value in change.values():
        affine[place] = value
    return affine


@pytest.mark.parametrize(
    ("qform", "codes", "says"),
    [
        (moved(), (1, 1), False),
        (moved(flip=((0, 0), -2)), (1, 1), True),  # left and right
        (moved(flip=((0, 0), -2)), (0, 1), False),  # one of them does not hold
        (moved(flip=((0, 0), -2)), (1, 0), False),
        (moved(size=((2, 2), 4)), (1, 4), True),
        (moved(origin=((1, 3), 30)), (2, 1), True),
        (moved(rounding=((1, 3), 0.05)), (1, 1), False),  # less than a tenth of a voxel
    ],
)
def test_two_orientations_that_disagree_get_a_word(tmp_path, qform, codes, says):
    image = nibabel.Nifti1Image(np.ones((5, 6, 7), np.int16), None)
    image.set_qform(qform, codes[0])
    image.set_sform(moved(), codes[1])
    nibabel.save(image, tmp_path / "a.nii.gz")
    found = find_affine_conflict(tmp_path / "a.nii.gz")
    assert ("sform and its qform" in found) if says else found is None


def in_memory(kind=nibabel.Nifti1Image, shape=(4, 5, 6), dtype=np.float32):
    """The bytes of a scan, and its voxels."""
    voxels = np.random.default_rng(0).normal(size=shape).astype(dtype)
    return kind(voxels, np.diag([1.0, 2.0, 3.0, 1.0])).to_bytes(), voxels


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_bytes_are_read_as_their_file(kind, tmp_path):
    plain, voxels = in_memory(kind)
    (tmp_path / "a.nii").write_bytes(plain)
    packed = gzip.compress(plain[:200]) + gzip.compress(plain[200:])  # of several members, as pigz writes them
    assert read_nifti_header(packed, 120).get_data_shape() == (4, 5, 6)
    for data in (plain, packed, packed + bytes(512)):
        whole = inflate_nifti(data, 120)
        assert whole == plain
        array, affine = read_volume(whole)
        expected, own = read_volume(tmp_path / "a.nii")
        assert np.array_equal(array, voxels) and np.array_equal(array, expected) and np.array_equal(affine, own)
        assert find_affine_conflict(whole) is None


@pytest.mark.parametrize("text", [b"a text of one line", b"<html>" * 100, b"abc"])
def test_another_file_of_this_name_is_told_so(text, tmp_path):
    file = tmp_path / "a.nii.gz"
    for data, words in (
        (text, "it is neither NIfTI nor gzip"),
        (gzip.compress(text), "what its gzip holds is no NIfTI"),
    ):
        file.write_bytes(data)
        for source in (file, data):
            with pytest.raises(InlayError, match=f"cannot be read as a scan of three axes: {words}"):
                read_volume(source)
        with pytest.raises(InlayError, match=words):
            read_nifti_header(data, 120)


def changed(plain, offset, form, value):
    return plain[:offset] + struct.pack(form, value) + plain[offset + struct.calcsize(form) :]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plain: gzip.compress(plain)[:-9], "truncated"),
        (lambda plain: gzip.compress(plain)[:-8] + bytes(8), "does not match its checksum"),
        (lambda plain: gzip.compress(plain + bytes(2**21)), "more data than its header announces"),
        (lambda plain: changed(plain, 108, "<f", 2.0**30), "voxels that begin at byte 1073741824"),
        (lambda plain: gzip.compress(changed(plain, 108, "<f", float("nan"))), "voxels that begin at byte nan"),
        (lambda plain: changed(plain, 42, "<h", -4), "no volume"),
        (lambda plain: b"\x1f\x8b" + bytes(400), "damaged, its compressed data"),
        (lambda plain: b"", "an empty file"),
        (lambda plain: plain[:100], "the file given cannot be read"),
    ],
)
def test_bytes_that_are_refused(change, words):
    with pytest.raises(InlayError, match=words):
        inflate_nifti(change(in_memory()[0]), 120)


def test_what_is_too_large_is_not_inflated():
    plain, _ = in_memory()
    with pytest.raises(InlayError, match=r"the scan has 4 x 5 x 6 voxels; the limit is 119 in all"):
        inflate_nifti(gzip.compress(plain), 119)
    bomb = gzip.compress(plain + bytes(50_000_000))
    tracemalloc.start()
    with pytest.raises(InlayError, match="more data than its header announces"):
        inflate_nifti(bomb, 120)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000

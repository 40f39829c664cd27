"""Files of scans: written and read again, and every broken kind named with its fault."""

import nibabel
import numpy as np
import pytest

from inlay.errors import InlayError
from inlay.tasks.volumes.nifti import read_header, read_volume, write_volume


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
    with pytest.raises(InlayError, match="16 bits"):
        write_volume(tmp_path / "c.nii", array * 40000, affine)
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
        "scan.mha": "is no scan in .nii.gz, .nii, .npz",
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

"""DICOM series written by pydicom: read where ITK places them, and every stack that is no volume told."""

from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest
import SimpleITK as sitk

from inlay import InlayError, segment
from inlay.cli import app as cli
from inlay.tasks.volumes.audit import audit
from inlay.tasks.volumes.data import find_scans, load_volumes
from inlay.tasks.volumes.formats import read_header, read_volume, write_volume
from tasks.volumes.dicom_series import SECRET, new_slice, write_frames, write_series
from tasks.volumes.standin import adapter, blobs
from tasks.volumes.test_formats import GRIDS, affine_of, check_positions


def itk_series(folder):
    """ITK's own view of a folder with one series."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


@pytest.fixture
def stored():
    return np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)


@pytest.mark.parametrize("grid", GRIDS)
def test_slices_lie_where_itk_places_them(tmp_path, stored, grid):
    folder = write_series(tmp_path / "scan", stored, affine_of(grid))
    (folder / "DICOMDIR").write_bytes(b"no slice")
    (folder / "readme.txt").write_text("a note")
    array, affine = read_volume(folder)
    image = itk_series(folder)
    sitk.WriteImage(image, str(tmp_path / "itk.nrrd"))
    assert np.array_equal(array, sitk.GetArrayFromImage(image).transpose(2, 1, 0)) and array.dtype == np.float32
    check_positions(tmp_path / "itk.nrrd", affine, 1e-4)
    backwards = np.linalg.det(np.diag([-1.0, -1, 1]) @ GRIDS[grid]) < 0  # slices are ordered along their normal
    assert np.array_equal(array, stored[:, :, ::-1] if backwards else stored)
    shape, header = read_header(folder)
    assert shape == (5, 6, 7) and np.array_equal(header, affine)


def test_each_slice_has_its_own_slope(tmp_path, stored):
    slopes = [(1 + k / 4, -10 * k) for k in range(7)]
    array, _ = read_volume(write_series(tmp_path / "a", stored, affine_of("flipped"), slopes))
    wanted = stored * np.array([s for s, _ in slopes]) + np.array([i for _, i in slopes])
    assert np.allclose(array, wanted) or np.allclose(array, wanted[:, :, ::-1])


@pytest.mark.parametrize("slope", [(1, 0), (2, -7)])
def test_an_inverted_display_changes_no_value(tmp_path, stored, slope):
    """ITK inverts the values of MONOCHROME1, so that HU would change their sign; it tells how to show them."""
    tags = {"PhotometricInterpretation": "MONOCHROME1"}
    inverted = write_series(tmp_path / "a", stored, affine_of("plain"), [slope] * 7, **tags)
    plain = write_series(tmp_path / "b", stored, affine_of("plain"), [slope] * 7)
    assert np.array_equal(read_volume(inverted)[0], read_volume(plain)[0])


@pytest.mark.parametrize("grid", ["oblique", "plain"])
def test_one_file_of_many_frames_is_its_slices(tmp_path, stored, grid):
    series, path = write_series(tmp_path / "s", stored, affine_of(grid)), tmp_path / "frames" / "a.dcm"
    path.parent.mkdir()
    write_frames(path, stored, affine_of(grid), (2, -5))
    for source in (path, path.parent):
        array, affine = read_volume(source)
        wanted, own = read_volume(series)
        assert np.array_equal(array, wanted * 2 - 5) and np.allclose(affine, own)


@pytest.mark.parametrize("kind", ["RLE", "jpeg_ls_lossless", "jp2klossless", "bigendian"])
def test_compressed_slices(tmp_path, kind):
    (tmp_path / "a").mkdir()
    packed = Path(pydicom.data.get_testdata_file(f"MR_small_{kind}.dcm", download=False))
    (tmp_path / "a" / "slice").write_bytes(packed.read_bytes())
    pixels = pydicom.dcmread(packed.with_name("MR_small.dcm")).pixel_array
    assert np.array_equal(read_volume(tmp_path / "a")[0][:, :, 0], pixels.T)


def edit(folder, which, **tags):
    """Change tags of the slice at a place along z."""
    for file in sorted(folder.iterdir()):
        slice_ = pydicom.dcmread(file)
        if which(float(slice_.ImagePositionPatient[2])):
            for name, value in tags.items():
                setattr(slice_, name, value)
            slice_.save_as(file)
            return file
    raise AssertionError


def shifted(folder):
    for file in folder.iterdir():
        slice_ = pydicom.dcmread(file)
        x, y, z = map(float, slice_.ImagePositionPatient)
        slice_.ImagePositionPatient = [x, y + z * np.tan(np.radians(15)), z]
        slice_.save_as(file)


def several(folder):
    for file in folder.iterdir():
        for echo in (1, 2):
            slice_ = pydicom.dcmread(file)
            slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
            slice_.save_as(folder / f"{file.name}e{echo}")
        file.unlink()


def other_series(folder):
    made = np.zeros((5, 6, 3), np.int16)
    write_series(folder, made, affine_of("plain"), SeriesInstanceUID="9.8", SeriesDescription="Sag T2")


def no_positions(folder):
    for file in folder.iterdir():
        slice_ = pydicom.dcmread(file)
        del slice_.ImagePositionPatient
        slice_.save_as(file)


MISTAKES = {
    "gap": (
        lambda f: edit(f, lambda z: abs(z - 10.25) < 0.1).unlink(),
        "2 mm lie between .* 1 mm elsewhere; 1 slice is",
    ),
    "tilt": (shifted, "gantry tilt of 15 degrees"),
    "several": (several, "several slices at 7 places"),
    "series": (
        other_series,
        r"2 series \('Axial' \(CT\), 7 slices, such as 'i_00_0'; 'Sag T2' \(CT\), 3 slices|2 series",
    ),
    "size": (lambda f: edit(f, lambda z: z > 0, Rows=5, Columns=6), "different sizes: "),
    "spacing": (lambda f: edit(f, lambda z: z > 0, PixelSpacing=[2, 2]), "different spacings"),
    "turn": (lambda f: edit(f, lambda z: z > 0, ImageOrientationPatient=[0, 1, 0, 1, 0, 0]), "different orientations"),
    "unplaced": (no_positions, "no positions"),
    "twice": (lambda f: (f / "copy").write_bytes(sorted(f.iterdir())[0].read_bytes()), "same slice twice: "),
    "cut": (lambda f: (p := sorted(f.iterdir())[2]).write_bytes(p.read_bytes()[:-30]), "voxels of"),
    "none": (lambda f: [p.unlink() for p in f.iterdir()], "folder without DICOM slices"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_stack_that_is_no_volume_is_told(tmp_path, stored, mistake):
    folder = write_series(tmp_path / "scan", stored, affine_of("plain"))
    change, reason = MISTAKES[mistake]
    change(folder)
    with pytest.raises(InlayError, match=reason) as caught:
        read_volume(folder)
    assert str(folder) in str(caught.value) and SECRET not in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_slice_is_left_out_and_a_file_chooses_its_series(tmp_path, stored):
    folder = write_series(tmp_path / "scan", stored, affine_of("plain"))
    wanted, _ = read_volume(folder)
    scout = {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [1, 0, 0, 0, 0, -1], "PixelSpacing": [3, 3]}
    pixels = np.zeros((20, 20), np.int16)
    new_slice(pixels, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"], **scout).save_as(folder / "scout")
    new_slice(pixels, SeriesInstanceUID="7.7").save_as(folder / "capture")  # without a position
    new_slice(pixels, Modality="SEG", SeriesInstanceUID="7.8", **scout).save_as(folder / "mask")
    assert np.array_equal(read_volume(folder)[0], wanted)
    other_series(folder)
    with pytest.raises(InlayError, match="give a file of the one that you want"):
        read_volume(folder)
    first = next(file for file in sorted(folder.iterdir()) if file.name.startswith("i_"))
    assert np.array_equal(read_volume(first)[0], wanted)
    assert read_volume(next(folder.glob("9.8*")))[0].shape == (5, 6, 3)


def test_masks_of_a_series_lie_on_its_grid_and_name_nobody(tmp_path):
    array = blobs((12, 14, 16))
    folder = write_series(tmp_path / "scan", array, affine_of("oblique"))
    write_volume(tmp_path / "a.nii.gz", *read_volume(folder))
    found = segment(adapter(), folder, progress=False)
    assert np.array_equal(found.mask, segment(adapter(), tmp_path / "a.nii.gz", progress=False).mask)
    series = itk_series(folder)
    for name in ("m.nrrd", "m.seg.nrrd", "m.mha", "m.nii.gz"):
        path = found.save(tmp_path / name)
        mask = sitk.ReadImage(str(path))
        for ask in ("GetOrigin", "GetSpacing", "GetDirection", "GetSize"):
            assert np.allclose(getattr(mask, ask)(), getattr(series, ask)(), atol=1e-4), (name, ask)
        assert SECRET.encode() not in path.read_bytes()


def test_folders_of_slices_are_cases(tmp_path, capsys):
    for i in range(3):
        scan = write_series(tmp_path / "imagesTr" / f"case.{i}", blobs((6, 7, 8), i), affine_of("plain"))
        labels = (read_volume(scan)[0] > 200).astype(np.uint8)
        (tmp_path / "labelsTr").mkdir(exist_ok=True)
        write_volume(tmp_path / "labelsTr" / f"case.{i}.nrrd", labels, read_volume(scan)[1])
    data = load_volumes(tmp_path)
    assert {case.name for case in (*data.train, *data.validation)} == {"case.0", "case.1", "case.2"}
    report = audit(str(tmp_path))
    assert report.cases == 3 and not report.errors
    assert [case.name for case in find_scans(tmp_path / "imagesTr")] == ["case.0", "case.1", "case.2"]
    edit(scan, lambda z: 9.9 < z < 10.6).unlink()
    (error,) = audit(str(tmp_path)).errors
    assert "1 slice is missing" in error.what and error.file == str(scan)


def test_the_command_line_takes_a_folder_of_slices(tmp_path, monkeypatch, capsys):
    scan = write_series(tmp_path / "scan", blobs((12, 14, 16)), affine_of("plain"))
    monkeypatch.setattr("inlay.cli.volumes.load_adapter_in", lambda *given: adapter(), raising=False)
    monkeypatch.setattr("inlay.cli.volumes.load_ensemble", lambda *given: [adapter()], raising=False)
    monkeypatch.setattr("sys.argv", ["inlay", "segment", "x", str(scan), "-o", str(tmp_path / "m.seg.nrrd")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert "bright" in capsys.readouterr().out
    assert sitk.ReadImage(str(tmp_path / "m.seg.nrrd")).GetSize() == (12, 14, 16)

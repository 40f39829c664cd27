"""Masks as DICOM segmentations: read back by highdicom and pydicom, where and what the NIfTI mask says."""

import sys

import nibabel
import numpy as np
import pydicom
import pytest

from inlay import InlayError, segment
from inlay.cli import app as cli
from inlay.tasks.volumes.data import find_scans
from inlay.tasks.volumes.folder import FolderWork
from inlay.tasks.volumes.formats import read_volume, write_volume
from tasks.volumes.dicom_series import SECRET, write_frames, write_series
from tasks.volumes.standin import adapter, blobs
from tasks.volumes.test_formats import GRIDS, affine_of

highdicom = pytest.importorskip("highdicom", reason="no highdicom: pip install 'inlay[formats]'")
# Of values of the series, and pydicom's of its own next version.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
SHAPE = (16, 18, 12)


def place(path, mask):
    """The classes of a segmentation's file at the voxels of a NIfTI mask, found by their positions in mm."""
    found = highdicom.seg.segread(path).get_volume(combine_segments=True)
    towards = np.linalg.inv(mask.affine) @ np.diag([-1, -1, 1, 1]) @ found.affine
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in found.array.shape), indexing="ij"), -1).reshape(-1, 3)
    places = nibabel.affines.apply_affine(towards, voxels)
    assert np.abs(places - places.round()).max() < 1e-3
    classes = np.zeros(mask.shape, np.uint8)
    classes[tuple(places.round().astype(int).T)] = found.array.reshape(-1)
    return classes


def check_equal(found, folder):
    """A segmentation saved in both formats says the same."""
    path = found.save(folder / "mask.dcm")
    mask = nibabel.load(found.save(folder / "mask.nii.gz"))
    array, number = np.asarray(mask.dataobj), {0: 0, **{value: k for k, value in enumerate(found.names, start=1)}}
    wanted = np.vectorize(number.get)(array)
    assert set(np.unique(wanted)) == {0, 1, 2}
    assert np.array_equal(place(path, mask), wanted)
    return pydicom.dcmread(path)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("values", [None, (1000, 7)])
def test_the_segments_lie_where_the_mask_does(tmp_path, grid, values):
    series = write_series(tmp_path / "scan", blobs(SHAPE), affine_of(grid))
    made = check_equal(segment(adapter(values=values), series, progress=False), tmp_path)
    assert [(each.SegmentNumber, each.SegmentLabel) for each in made.SegmentSequence] == [(1, "bright"), (2, "dark")]
    first = pydicom.dcmread(next(series.iterdir()))
    assert made.ReferencedSeriesSequence[0].SeriesInstanceUID == first.SeriesInstanceUID != made.SeriesInstanceUID
    assert made.StudyInstanceUID == first.StudyInstanceUID and made.FrameOfReferenceUID == first.FrameOfReferenceUID
    assert made.Modality == "SEG" and made.SegmentSequence[0].SegmentAlgorithmName == "inlay"
    assert made.NumberOfFrames < 2 * SHAPE[2]  # slices without a class are left out


def test_one_file_of_many_frames(tmp_path):
    path = write_frames(tmp_path / "a.dcm", blobs(SHAPE), affine_of("oblique"))
    made = check_equal(segment(adapter(), path, progress=False), tmp_path)
    referred = made.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]
    assert referred.ReferencedSOPInstanceUID == pydicom.dcmread(path).SOPInstanceUID


def test_the_patient_is_that_of_the_series_and_nothing_private_comes_along(tmp_path):
    tags = {"PatientName": "Müller^Zoë", "SpecificCharacterSet": "ISO_IR 100"}
    tags |= dict.fromkeys(("PatientComments", "StudyDescription", "OperatorsName", "StationName"), "secret")
    series = write_series(tmp_path / "scan", blobs(SHAPE), affine_of("plain"), **tags, InstitutionName="secret")
    for file in series.iterdir():
        slice_ = pydicom.dcmread(file)
        slice_.private_block(0x1001, "somebody", create=True).add_new(1, "LO", "secret")
        slice_.save_as(file)
    made = segment(adapter(), series, progress=False).save(tmp_path / "mask.dcm")
    read = pydicom.dcmread(made)
    assert str(read.PatientName) == "Müller^Zoë" and read.PatientID == SECRET and b"secret" not in made.read_bytes()


def test_fields_that_were_removed_are_empty_and_names_of_classes_are_any_text(tmp_path):
    series = write_series(tmp_path / "scan", blobs(SHAPE), affine_of("plain"))
    for file in series.iterdir():
        slice_ = pydicom.dcmread(file)
        del slice_.PatientName, slice_.PatientID
        slice_.save_as(file)
    given = adapter()
    given.labels = ["Läsion 肝\\臓", "x" * 80]
    read = pydicom.dcmread(segment(given, series, progress=False).save(tmp_path / "mask.dcm"))
    assert str(read.PatientName) == "" and [each.SegmentLabel for each in read.SegmentSequence] == [
        "Läsion 肝/臓",
        "x" * 64,
    ]


def test_what_is_refused(tmp_path, monkeypatch, capsys):
    series = write_series(tmp_path / "scan", blobs(SHAPE), affine_of("plain"))
    write_volume(tmp_path / "a.nii.gz", blobs(SHAPE), affine_of("plain"))
    found, other = (segment(adapter(), each, progress=False) for each in (series, tmp_path / "a.nii.gz"))
    with pytest.raises(InlayError, match=r"'.*mask.dcm' would be a DICOM segmentation, .*a.nii.gz' is none; give"):
        other.save(tmp_path / "mask.dcm")
    with pytest.raises(InlayError, match="and the scan is none"):
        segment(adapter(), (tmp_path / "a.nii.gz").read_bytes(), progress=False).save(tmp_path / "mask.dcm")
    (slice_, *_) = series.iterdir()
    before = slice_.rename(series / "slice.dcm").read_bytes()
    with pytest.raises(InlayError, match="is there and no segmentation, perhaps a slice of a scan"):
        found.save(series / "slice.dcm")
    assert (series / "slice.dcm").read_bytes() == before
    found.save(tmp_path / "mask.dcm")
    found.save(tmp_path / "mask.dcm")  # one that is there is replaced
    wrong = ["segment", str(tmp_path), str(tmp_path / "a.nii.gz"), "-o", str(tmp_path / "b.dcm")]
    monkeypatch.setattr(sys, "argv", ["inlay", *wrong])
    with pytest.raises(SystemExit) as ended:  # before the adapter is looked for
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code and "belongs to a DICOM series" in said and "Traceback" not in said
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(InlayError, match=r"pip install 'inlay\[formats\]'"):
        found.save(tmp_path / "mask.dcm")


def test_a_series_that_names_no_frame_of_reference_is_refused(tmp_path):
    series = write_series(tmp_path / "scan", blobs(SHAPE), affine_of("plain"))
    for file in series.iterdir():
        slice_ = pydicom.dcmread(file)
        del slice_.FrameOfReferenceUID
        slice_.save_as(file)
    found = segment(adapter(), series, progress=False)
    with pytest.raises(InlayError, match=r"lacks what a DICOM segmentation refers to: .*; save the mask as .nii.gz"):
        found.save(tmp_path / "mask.dcm")
    assert not (tmp_path / "mask.dcm").exists()


def test_a_folder_of_series_gets_segmentations_and_one_of_other_scans_is_refused(tmp_path):
    for i in range(2):
        write_series(tmp_path / "scans" / f"case{i}", blobs(SHAPE, i), affine_of("plain"))
    work = FolderWork.plan(find_scans(tmp_path / "scans"), tmp_path / "masks", {}, suffix=".dcm")
    work.run([adapter()])
    assert not work.failed and {file.name for file in (tmp_path / "masks").glob("*.dcm")} == {"case0.dcm", "case1.dcm"}
    assert read_volume(tmp_path / "scans" / "case0")[0].shape == SHAPE
    write_volume(tmp_path / "scans" / "b.nii.gz", blobs(SHAPE), affine_of("plain"))
    with pytest.raises(InlayError, match=r"b.nii.gz' is none; give a name"):
        FolderWork.plan(find_scans(tmp_path / "scans"), tmp_path / "others", {}, suffix=".dcm")

"""NRRD, MetaImage and MGH: written by other libraries and read, and masks that other libraries read."""

import json
import sys

import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from inlay import InlayError, VolumeProcessor, segment
from inlay.tasks import TASKS
from inlay.tasks.evaluation import Request
from inlay.tasks.volumes.audit import audit
from inlay.tasks.volumes.data import find_scans, load_volumes
from inlay.tasks.volumes.formats import SUFFIXES, case_name, read_header, read_volume, write_volume
from inlay.tasks.volumes.nifti import find_affine_conflict
from inlay.tasks.volumes.scan import read_image
from places import SHARED
from tasks.volumes.dicom_series import write_series
from tasks.volumes.standin import adapter, blobs

HIPPOCAMPUS = SHARED / "hippocampus_msd04" / "dev"
ITK = ("a.nrrd", "a.nhdr", "a.mha", "a.mhd")


def rotation(*angles):
    """Turns about x, y and z, one after the other."""
    turned = np.eye(3)
    for axis, angle in enumerate(angles):
        c, s, (i, j) = np.cos(angle), np.sin(angle), [k for k in range(3) if k != axis]
        turn = np.eye(3)
        turn[i, i], turn[j, j], turn[i, j], turn[j, i] = c, c, -s, s
        turned = turned @ turn
    return turned


GRIDS = {
    "plain": np.diag([1.0, 1, 1]),
    "anisotropic": np.diag([0.7, 1.3, 5.0]),
    "flipped": np.diag([-0.7, 1.3, -2.0]),
    "swapped": np.array([[0, 0, 2.0], [-0.5, 0, 0], [0, 1.5, 0]]),
    "oblique": rotation(0.3, -0.2, 0.5) * [0.7, 1.3, -4],
}


def affine_of(grid):
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = GRIDS[grid], [12.5, -30, 7.25]
    return affine


def itk_image(array, affine):
    """ITK's image of voxels (X, Y, Z) and an affine to RAS."""
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    return image


def check_positions(path, affine, tolerance=1e-9):
    """Compare where an affine and ITK place the corners of the file's voxels."""
    image = sitk.ReadImage(str(path))
    for index in np.ndindex(2, 2, 2):
        voxel = (np.array(index) * (np.array(image.GetSize()) - 1)).astype(float)
        placed = np.array(image.TransformContinuousIndexToPhysicalPoint(voxel.tolist())) * [-1, -1, 1]
        assert np.allclose(placed, affine[:3, :3] @ voxel + affine[:3, 3], atol=tolerance)


@pytest.mark.parametrize("grid", GRIDS)
def test_files_of_itk_lie_where_itk_says(tmp_path, grid):
    array = np.random.default_rng(0).normal(0, 300, (4, 5, 6)).astype(np.int16)
    affine = affine_of(grid)
    for compressed in (False, True):
        for name in ITK:
            path = tmp_path / name
            sitk.WriteImage(itk_image(array, affine), str(path), compressed)
            found, own = read_volume(path)
            assert np.array_equal(found, array) and found.dtype == np.float32 and np.allclose(own, affine, atol=1e-12)
            check_positions(path, own)
            shape, header = read_header(path)
            assert shape == (4, 5, 6) and np.array_equal(header, own)
            assert find_affine_conflict(path) is None and case_name(path) == "a"


@pytest.mark.parametrize("grid", GRIDS)
def test_files_of_nibabel_and_pynrrd_lie_where_these_say(tmp_path, grid):
    array, affine = np.random.default_rng(0).integers(0, 9, (4, 5, 6)).astype(np.int16), affine_of(grid)
    for name in ("a.mgz", "b.mgh"):
        nibabel.save(nibabel.MGHImage(array, affine), tmp_path / name)
        found, own = read_volume(tmp_path / name, "label")
        assert np.array_equal(found, array) and np.allclose(own, affine, atol=1e-5)
        assert read_header(tmp_path / name)[0] == (4, 5, 6)
    for space, turn in (("left-posterior-superior", [-1, -1, 1]), ("right-anterior-superior", [1, 1, 1])):
        header = {"space": space, "space directions": (affine[:3, :3].T * turn), "space origin": affine[:3, 3] * turn}
        for encoding in ("raw", "gzip", "ascii"):
            nrrd.write(str(tmp_path / "c.nrrd"), array, {**header, "encoding": encoding})
            found, own = read_volume(tmp_path / "c.nrrd", "label")
            assert found.dtype == np.int16 and np.array_equal(found, array) and np.allclose(own, affine, atol=1e-9)


def test_several_channels_are_read_from_each_format(tmp_path):
    array, affine = np.random.default_rng(0).normal(size=(4, 5, 6, 3)).astype(np.float32), affine_of("oblique")
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0, 3), isVector=True)
    image.CopyInformation(itk_image(array[..., 0], affine))
    for name in ("a.nrrd", "a.mha"):
        sitk.WriteImage(image, str(tmp_path / name))
    nibabel.save(nibabel.MGHImage(array, affine), tmp_path / "a.mgz")
    joined = sitk.JoinSeries([itk_image(np.ascontiguousarray(array[..., c]), affine) for c in range(3)])
    sitk.WriteImage(joined, str(tmp_path / "time.mha"))
    for name in ("a.nrrd", "a.mha", "a.mgz", "time.mha"):
        found, own = read_volume(tmp_path / name, channels=True)
        assert np.array_equal(found, array.transpose(3, 0, 1, 2)) and np.allclose(own, affine, atol=1e-5), name
        assert read_header(tmp_path / name)[0] == (4, 5, 6, 3)
        with pytest.raises(InlayError, match="several channels"):
            read_volume(tmp_path / name)


def scan_files(folder, array, affine):
    """The same scan in all formats."""
    for name in ITK:
        sitk.WriteImage(itk_image(array, affine), str(folder / name), True)
    for name, kind in (("a.nii.gz", nibabel.Nifti1Image), ("a.mgz", nibabel.MGHImage)):
        nibabel.save(kind(array, affine), folder / name)
    return [folder / name for name in (*ITK, "a.nii.gz", "a.mgz")]


@pytest.mark.parametrize("grid", ["oblique", "swapped"])
def test_masks_lie_on_the_scans_own_grid_in_every_format(tmp_path, grid):
    given, array = adapter(), blobs((12, 14, 16))
    masks = []
    for scan in scan_files(tmp_path, array, affine_of(grid)):
        found = segment(given, scan, progress=False)
        masks.append(found.mask)
        for suffix in (".nrrd", ".seg.nrrd", ".mha", ".nii.gz", ".mgz"):
            path = found.save(tmp_path / f"mask{suffix}")
            again, own = read_volume(path, "label")
            assert np.array_equal(again, found.mask) and np.allclose(own, found.affine, atol=1e-4)
            if scan.suffix == ".mgz" or suffix == ".mgz":  # ITK reads no MGH: nibabel does
                assert suffix != ".mgz" or np.allclose(nibabel.load(path).affine, found.affine, atol=1e-4)
                continue
            mask, original = sitk.ReadImage(str(path)), sitk.ReadImage(str(scan))
            exact = suffix in (".nrrd", ".seg.nrrd", ".mha") and scan.name in ITK
            for ask in ("GetOrigin", "GetSpacing", "GetDirection"):
                one, other = getattr(mask, ask)(), getattr(original, ask)()
                assert np.allclose(one, other, rtol=0, atol=1e-14 if exact else 1e-5), (scan, suffix, ask)
            assert np.array_equal(sitk.GetArrayFromImage(mask).T, found.mask)
    assert all(np.array_equal(mask, masks[0]) for mask in masks) and masks[0].any()
    named = json.loads(sitk.ReadImage(str(tmp_path / "mask.mha")).GetMetaData("classes"))
    assert named == {"labels": {"0": "background", "1": "bright", "2": "dark"}}
    assert json.loads(nrrd.read_header(str(tmp_path / "mask.nrrd"))["classes"]) == named


def test_segments_are_named_as_slicer_names_them(tmp_path):
    found = segment(adapter(values=(4, 2)), scan_files(tmp_path, blobs((12, 14, 16)), affine_of("plain"))[0])
    header = nrrd.read_header(str(found.save(tmp_path / "mask.seg.nrrd")))
    assert header["type"] in ("uint8", "unsigned char", "uchar") and header["encoding"] == "gzip"
    for i, (value, name) in enumerate((("4", "bright"), ("2", "dark"))):
        assert (header[f"Segment{i}_LabelValue"], header[f"Segment{i}_Name"]) == (value, name)
        assert header[f"Segment{i}_Layer"] == "0" and header[f"Segment{i}_Extent"] == "0 11 0 13 0 15"
    assert header["Segmentation_SourceRepresentation"] == "Binary labelmap"


def test_malformed_files_are_named_with_their_fault(tmp_path):
    array = np.random.default_rng(0).normal(0, 300, (12, 12, 12)).astype(np.int16)
    image = itk_image(array, np.eye(4))
    files = {}
    for kind, packed in (("nrrd", True), ("nrrd", False), ("mha", True), ("mha", False)):
        sitk.WriteImage(image, str(tmp_path / f"whole.{kind}"), packed)
        whole = (tmp_path / f"whole.{kind}").read_bytes()
        name = f"{'packed' if packed else 'plain'}.{kind}"
        files[f"half-{name}"] = whole[: len(whole) * 2 // 3], "truncated"
        files[f"short-{name}"] = whole[:-30], "truncated"
        files[f"head-{name}"] = whole[:60], ""
        longer = whole.replace(b"12 12 12", b"12 12 90")
        files[f"more-{name}"] = longer, "less data" if packed and kind == "mha" else "truncated"
        if packed:
            files[f"bit-{name}"] = whole[:1500] + bytes([whole[1500] ^ 4]) + whole[1501:], ""
    files["empty.nrrd"] = b"", "an empty file"
    files["text.mha"] = b"<html>404</html>", ""
    files["cut.mgz"] = b"", "an empty file"
    nibabel.save(nibabel.MGHImage(array, np.eye(4)), tmp_path / "whole.mgz")
    files["cut.mgz"] = (tmp_path / "whole.mgz").read_bytes()[:-40], "truncated"
    bad = np.ones((4, 4, 4), np.float32)
    bad[0, 0, 0], bad[1, 1, 1] = np.nan, np.inf
    sitk.WriteImage(itk_image(bad, np.eye(4)), str(tmp_path / "nan.nrrd"))
    files["nan.nrrd"] = (tmp_path / "nan.nrrd").read_bytes(), "2 voxels that are NaN or infinite"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5))), str(tmp_path / "flat.mha"))
    files["flat.mha"] = (tmp_path / "flat.mha").read_bytes(), "no volume"
    header = "ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementType = MET_UCHAR\n"
    files["lost.mhd"] = f"{header}ElementDataFile = none.raw\n".encode(), "data file 'none.raw' is missing"
    files["many.mhd"] = f"{header}ElementDataFile = LIST\na.raw\n".encode(), "several files"
    for name, (content, reason) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InlayError) as caught:
            read_volume(tmp_path / name)
        message = str(caught.value)
        assert name in message and reason in message and "\n" not in message and "sitk" not in message, message
    with pytest.raises(InlayError, match="no such file"):
        read_volume(tmp_path / "none.nrrd")


@pytest.mark.parametrize("kind", ["nrrd", "mha", "mgz"])
def test_a_damaged_compressed_file_is_never_read_as_other_voxels(tmp_path, kind):
    array = np.random.default_rng(0).normal(0, 100, (12, 14, 16)).astype(np.int16)
    path, generator = tmp_path / f"a.{kind}", np.random.default_rng(0)
    write_volume(path, array, np.eye(4))
    whole, refused = path.read_bytes(), 0
    start = len(whole) - 4000  # in the compressed voxels
    for place in generator.integers(start, len(whole), 60):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(generator.integers(0, 8))
        path.write_bytes(changed)
        try:
            found, _ = read_volume(path)
        except InlayError as error:
            refused += 1
            assert path.name in str(error)
        else:
            assert np.array_equal(found, array)
    assert refused >= 55


def test_a_folder_of_mixed_formats_is_trained_on_audited_and_found(tmp_path):
    for i, suffix in enumerate((".nrrd", ".mha", ".mgz", ".nii.gz", ".mhd")):
        for part, array in (("images", blobs((6, 7, 8), i)), ("labels", (blobs((6, 7, 8), i) > 200).astype(np.uint8))):
            path = tmp_path / part / f"case{i}{suffix}"
            path.parent.mkdir(exist_ok=True)
            if suffix == ".mhd":
                sitk.WriteImage(itk_image(array, affine_of("oblique")), str(path))
            else:
                write_volume(path, array, affine_of("oblique"))
    data = load_volumes(tmp_path)
    assert len(data.train) + len(data.validation) == 5 and data.labels == ("class 1",)
    for case in (*data.train, *data.validation):
        assert np.array_equal(read_image(case)[0].squeeze(), blobs((6, 7, 8), int(case.name[-1])))
    report = audit(str(tmp_path))
    assert report.cases == 5 and not report.errors
    assert [case.name for case in find_scans(tmp_path / "images")] == [f"case{i}" for i in range(5)]
    assert all(case_name(tmp_path / f"x{suffix}") == "x" for suffix in SUFFIXES)


def write_labelled(folder, suffix, channels=1):
    """A scan with its label map, of which the mask of the stand-in misses a part."""
    array, affine = blobs((14, 12, 10)), affine_of("oblique")
    label = (array > 200).astype(np.uint8) + 2 * (array < 0).astype(np.uint8)
    label[:, :4] = 0
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    if suffix == "dicom":
        write_series(folder / "imagesTr/case", array, affine)
    for i in range(channels if suffix != "dicom" else 0):
        name = f"case_{i:04}" if channels > 1 else "case"
        write_volume(folder / f"imagesTr/{name}{suffix}", array[:, :, :: 1 - 2 * i].copy(), affine)
    write_volume(folder / f"labelsTr/case{'.nrrd' if suffix == 'dicom' else suffix}", label, affine)
    described = {"labels": {"background": 0, "bright": 1, "dark": 2}}
    if channels > 1:
        described["channel_names"] = {"0": "T1", "1": "T2"}
    (folder / "dataset.json").write_text(json.dumps(described))
    return folder


def test_scores_rows_and_pictures_are_alike_in_every_format(tmp_path):
    """Of DICOM and of an nnU-Net case of two channels too; the stand-in looks at the first channel only."""
    made = {}
    for name, suffix, channels in (
        ("nifti", ".nii.gz", 1), ("nrrd", ".nrrd", 1), ("mha", ".mha", 1), ("mgz", ".mgz", 1), ("dicom", "dicom", 1),
        ("channels", ".nii.gz", 2),
    ):  # fmt: skip
        data = write_labelled(tmp_path / name, suffix, channels)
        segmenter = adapter()
        if channels > 1:
            segmenter.processor = VolumeProcessor(None, (16, 16, 16), channels=("T1", "T2"))
        options = {"plot": data / "plot.png", "worst": 1, "worst_folder": data / "worst"}
        found = TASKS["volume-segmentation"].evaluate(
            segmenter, str(data), Request(compare=False, resamples=2, options=options)
        )
        csv_file = found.write_csv(data / "rows.csv").read_text()
        [worst] = (data / "worst").iterdir()
        made[name] = [np.asarray(Image.open(file)) for file in (worst, data / "plot.png")], csv_file
        assert found.count == 1 and 0.2 < found.scores["dice"].value < 0.9 and worst.stem.endswith("_case")
        assert found.scores["dice"].value == pytest.approx(float(worst.stem.split("_")[0]), abs=6e-4)
    (picture, plot), rows = made["nifti"]
    for (other, other_plot), other_rows in made.values():
        assert [line.split(",")[:4] for line in other_rows.split()] == [line.split(",")[:4] for line in rows.split()]
        assert np.abs(picture.astype(int) - other).mean() < 1 and np.abs(plot.astype(int) - other_plot).mean() < 1


def test_a_library_that_is_missing_is_said(tmp_path, monkeypatch):
    write_volume(tmp_path / "a.nrrd", np.ones((3, 3, 3), np.uint8), np.eye(4))
    found = segment(adapter(), scan_files(tmp_path, blobs((12, 14, 16)), np.eye(4))[-1])
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    for work in (lambda: read_volume(tmp_path / "a.nrrd"), lambda: found.save(tmp_path / "m.mha")):
        with pytest.raises(InlayError, match=r"pip install 'inlay\[formats\]'"):
            work()


@pytest.mark.skipif(not HIPPOCAMPUS.exists(), reason="the hippocampus scans are not here")
def test_real_scans_are_the_same_in_every_format(tmp_path):
    source = sorted((HIPPOCAMPUS / "imagesTr").glob("*.nii.gz"))[0]
    wanted, affine = read_volume(source)
    mask = segment(adapter(), source, progress=False).mask
    image = sitk.ReadImage(str(source))
    for name in (*ITK, "a.mgz"):
        if name == "a.mgz":
            nibabel.save(nibabel.MGHImage(wanted, affine), tmp_path / name)
        else:
            sitk.WriteImage(image, str(tmp_path / name), True)
        found, own = read_volume(tmp_path / name)
        assert np.array_equal(found, wanted) and np.allclose(own, affine, atol=1e-5)
        assert np.array_equal(segment(adapter(), tmp_path / name, progress=False).mask, mask)

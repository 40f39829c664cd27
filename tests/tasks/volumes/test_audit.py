"""What the audit finds in broken copies of scans, and that it finds nothing in whole ones."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from inlay.cli import app as cli
from inlay.errors import InlayError
from inlay.tasks.volumes.audit import audit
from inlay.tasks.volumes.data import load_volumes
from inlay.tasks.volumes.formats import read_volume, write_volume
from inlay.tasks.volumes.scan import VolumeProcessor
from places import SHARED

HIPPOCAMPUS = SHARED / "hippocampus_msd04/dev"


@pytest.fixture
def folder(tmp_path):
    """Twelve cases in the Decathlon's layout; real ones if they are there."""
    if HIPPOCAMPUS.is_dir():
        for path in sorted((HIPPOCAMPUS / "imagesTr").iterdir())[:12]:
            for part in ("imagesTr", "labelsTr"):
                (tmp_path / part).mkdir(exist_ok=True)
                shutil.copy(HIPPOCAMPUS / part / path.name, tmp_path / part / path.name)
    else:
        generator = np.random.default_rng(0)
        for i in range(12):
            for part in ("imagesTr", "labelsTr"):
                (tmp_path / part).mkdir(exist_ok=True)
                array = generator.integers(0, 3, (8, 9, 10)) if part == "labelsTr" else generator.random((8, 9, 10))
                write_volume(tmp_path / part / f"{i:03}.nii.gz", array.astype(np.float32), np.eye(4))
    (tmp_path / "dataset.json").write_text(
        json.dumps({"labels": {"0": "background", "1": "Anterior", "2": "Posterior"}, "modality": {"0": "MRI"}})
    )
    return tmp_path


def files(folder, part):
    return sorted((folder / part).iterdir())


def change(path, edit=None, affine=None, key="label"):
    array, own = read_volume(path, key)
    write_volume(path, array if edit is None else edit(array.copy()), own if affine is None else affine)


def test_whole_data_has_no_findings(folder):
    report = audit(str(folder))
    assert not report.findings and report.cases == 12 and report.modality == "mr"
    assert report.classes == {"Anterior": 12, "Posterior": 12}
    assert report.spacings_mm == [(1.0, 1.0, 1.0)] * 3
    assert "12 cases" in str(report) and "0 errors, 0 warnings" in str(report)


def stray(a):
    a[0, 0, 0] = 9
    return a


def with_nan(a):
    a[0, 0, 0] = np.nan
    return a


def break_all(folder):
    """One fault per case, with the level, the file and the words of its finding."""
    images, labels = files(folder, "imagesTr"), files(folder, "labelsTr")
    change(labels[0], stray)
    change(labels[1], np.zeros_like)
    change(labels[2], lambda a: a[1:])
    change(labels[3], affine=np.diag([2.0, 1, 1, 1]))
    labels[4].unlink()
    images[5].unlink()
    change(images[6], lambda a: np.stack([a, a], -1), key="image")
    change(images[7], with_nan, key="image")
    images[8].write_bytes(images[8].read_bytes()[: images[8].stat().st_size // 2])
    change(labels[9], lambda a: a + 0.25)
    change(images[10], np.ones_like, key="image")
    labels[11].write_bytes(b"")
    return [
        ("error", labels[0], "labels 9 that dataset.json does not name"),
        ("warning", labels[1], "no voxel has a label"),
        ("error", labels[2], "and not"),
        ("error", labels[3], "an affine that moves a corner by"),
        ("error", images[4], "no label map"),
        ("error", labels[5], "no image"),
        ("error", images[6], "2 channels, 1 too many"),
        ("error", images[7], "1 voxels that are NaN or infinite"),
        ("error", images[8], "truncated"),
        ("error", labels[9], "holds numbers that are not whole"),
        ("warning", images[10], "all voxels are 1"),
        ("error", labels[11], "an empty file"),
    ]


def test_every_fault_is_found_with_its_file(folder):
    expected = break_all(folder)
    report = audit(str(folder))
    found = {(f.level, f.file): f.what for f in report.findings}
    for level, path, words in expected:
        assert words in found.pop((level, str(path))), path
    assert not found
    assert len(report.errors) == 10
    with pytest.raises(InlayError, match="no label map"):  # training stops at these
        load_volumes(str(folder))


def write_cases(folder, maps, labels=None):
    """Cases with these label maps; None stands for an image of one value, and a float map for a broken one."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i, values in enumerate(maps):
        image = np.random.default_rng(i).random((6, 7, 8), np.float32)
        array = np.resize(np.array(values), image.shape)
        write_volume(folder / "images" / f"{i}.nii.gz", image, np.eye(4))
        write_volume(folder / "labels" / f"{i}.nii.gz", array, np.eye(4))
    if labels is not None:
        (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return str(folder)


@pytest.mark.parametrize(
    ("maps", "labels", "fine"),
    [
        ([[0, 1, 2]] * 3, None, True),
        ([[0, 1000, 2000]] * 3, None, True),
        ([[0, 1], [0, 70000], [0, 3]], None, True),
        ([[0, 1]] * 2 + [[0]], None, True),
        ([[0]] * 3, None, False),
        ([[0, 1]], None, False),
        ([[0, -1, 1]] * 3, None, False),
        ([np.arange(300)] * 3, None, False),
        ([[0, 1, 0.4]] * 3, None, False),
        ([[0, 1.0001]] * 3, None, True),
        ([[0, 5]] * 3, {"background": 0, "a": 5}, True),
        ([[0, 5, 9]] * 3, {"background": 0, "a": 5, "ignore": 9}, True),
        ([[0, 5, 6]] * 3, {"background": 0, "a": 5}, False),
        ([[0, 1000]] * 3, {"background": 0, "a": 1000}, True),
        ([[0, 1]] * 3, {"background": 0}, False),
        ([[0, 1]] * 3, {"background": 0, "ignore": 1}, False),
        ([[0, 1]], {"a": 1}, False),
    ],
)
def test_audit_and_training_judge_alike(tmp_path, maps, labels, fine):
    folder = write_cases(tmp_path / "data", maps, labels)
    try:
        data = load_volumes(folder)
        processor = VolumeProcessor.fitted(data, (4, 4, 4))
        for case in (*data.train, *data.validation):
            processor.read(case)
        takes = True
    except InlayError:
        takes = False
    errors = audit(folder).errors
    assert (takes, not errors) == (fine, fine), errors


def test_files_that_training_will_not_see_are_warned_of(folder):
    """Of the twelve cases one is in capitals, which is read, and three in other formats."""
    images, labels = files(folder, "imagesTr"), files(folder, "labelsTr")
    for file in (images[0], labels[0]):
        file.rename(file.with_name(file.name.replace(".nii.gz", ".NII.GZ")))
    for i, suffix in enumerate((".bmp", ".tif", ".img"), 1):
        for file in (images[i], labels[i]):
            file.rename(file.with_name(file.name.replace(".nii.gz", suffix)))
    report = audit(str(folder))
    assert report.cases == 9 and not report.errors and len(report.findings) == 6
    assert all("not read" in finding.what for finding in report.findings)
    assert {Path(finding.file).suffix for finding in report.findings} == {".bmp", ".tif", ".img"}


def test_two_orientations_are_warned_of(folder, caplog):
    import nibabel

    file = files(folder, "imagesTr")[3]
    image = nibabel.load(file)
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine @ np.diag([-1, 1, 1, 1]), 1)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), None, image.header), file)
    (finding,) = audit(str(folder)).findings
    assert finding.file == str(file) and finding.level == "warning" and "sform and its qform" in finding.what
    load_volumes(str(folder))
    assert "two orientations" in caplog.text and "other programs may take the qform" in caplog.text


def test_what_only_all_cases_tell(folder):
    images, labels = files(folder, "imagesTr"), files(folder, "labelsTr")
    for path in labels[1:]:
        change(path, lambda a: np.minimum(a, 1))
    shutil.copy(images[0], images[1]), shutil.copy(labels[0], labels[1])
    change(labels[1], lambda a: np.minimum(a, 1))
    for path in (images[2], labels[2]):
        change(path, affine=np.diag([1.0, 1, 4, 1]), key="image" if path == images[2] else "label")
    (folder / "dataset.json").write_text(json.dumps({"labels": {"1": "a", "2": "b", "3": "c"}}))
    found = {f.what: Path(f.file).name for f in audit(str(folder)).findings}
    name = [path.name.removesuffix(".nii.gz") for path in images]
    assert found == {
        f"the same image as {name[0]}: they must not be in different splits": name[1],
        "the only case with the label 2 (b)": name[0],
        "no case has the class 'c'": folder.name,
        "spacing along D 4 mm, elsewhere from 1": name[2],
    }


def test_command(folder, capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["inlay", "audit", *map(str, arguments)])
        with pytest.raises(SystemExit) as status:
            cli.main()
        return int(status.value.code or 0), *capsys.readouterr()

    status, out, err = run(folder)
    assert (status, err) == (0, "") and out.startswith("12 cases") and out.count("\n") == 1
    broken = files(folder, "labelsTr")[3]
    broken.write_bytes(b"")
    status, out, _ = run(folder)
    assert status == 1 and f"labelsTr/{broken.name}" in out.replace("\n", "") and "1 error," in out
    status, out, _ = run(folder, "--json")
    facts = json.loads(out)
    assert status == 1 and facts["cases"] == 12 and facts["classes"]["Anterior"] == 11
    assert facts["findings"] == [{"level": "error", "file": str(broken), "what": "an empty file"}]
    status, out, err = run(folder / "none")
    assert (status, out) == (2, "") and err.startswith("error: there is no folder")


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampus scans are not beside the checkout (shared/data)")
def test_all_of_the_hippocampus_scans_are_whole():
    report = audit(str(HIPPOCAMPUS))
    assert not report.findings and report.cases == 60
    assert report.classes == {"class 1": 60, "class 2": 60} and report.spacings_mm[0] == (1.0, 1.0, 1.0)


def test_a_label_map_with_nothing_but_voxels_to_ignore_is_named(tmp_path):
    folder = write_cases(tmp_path / "data", [[0, 1, 9], [0, 9], [1]], {"background": 0, "a": 1, "ignore": 9})
    assert [(Path(f.file).name, f.what) for f in audit(folder).findings] == [("1.nii.gz", "no voxel has a label")]

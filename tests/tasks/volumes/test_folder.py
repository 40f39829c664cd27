"""All scans of a folder: taken up again, a failing scan, changed options, files of others; ensembles, probabilities."""

import csv
import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from command import run
from inlay import InlayError, segment
from inlay.files.atomic import lock_folder
from inlay.tasks.volumes import folder as folders
from inlay.tasks.volumes.data import find_scans
from inlay.tasks.volumes.folder import FolderWork
from inlay.tasks.volumes.formats import write_volume
from places import ROOT
from tasks.volumes.standin import adapter, blobs

SHIPPED = ROOT / "adapters_hub" / "lesions-spatial-sam-tiny"
TURNED = np.array([[0, -1.5, 0, 40.0], [-0.8, 0, 0, 30.0], [0, 0, 2.0, -50.0], [0, 0, 0, 1.0]])


@pytest.fixture
def scans(tmp_path):
    (tmp_path / "scans").mkdir()
    for k, name in enumerate(("a.nii.gz", "b.nii", "c.nii.gz")):
        write_volume(tmp_path / "scans" / name, blobs((17, 18, 20 + k), k), TURNED)
    return tmp_path / "scans"


def plan(scans, out, **options):
    made_by = {"adapters": ["stand-in 1"], "overlap": 0.5} | options.pop("made_by", {})
    return FolderWork.plan(find_scans(scans), out, made_by, **options)


def rows(out):
    with (out / "volumes.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_masks_and_volumes_are_those_of_segment_scan_by_scan(scans, tmp_path):
    out, given = tmp_path / "masks", adapter()
    work = plan(scans, out)
    work.run([given])
    assert sorted(path.name for path in out.iterdir()) == [
        "a.nii.gz", "b.nii", "c.nii.gz", "segment.json", "volumes.csv",
    ]  # fmt: skip
    for row, file in zip(rows(out), sorted(scans.iterdir()), strict=True):
        wanted, found = segment(given, file), nib.load(out / file.name)
        assert np.array_equal(found.dataobj, wanted.mask) and np.allclose(found.affine, TURNED)
        volumes = {f"{name}_ml": f"{volume:.6g}" for name, volume in wanted.volumes_ml.items()}
        assert row == {"case": file.name.partition(".")[0], **volumes, "error": ""}
        assert float(row["bright_ml"]) > 0
    assert not work.pending and not plan(scans, out).pending


def test_one_failing_scan_does_not_end_the_rest_and_is_tried_again(scans, tmp_path):
    out = tmp_path / "masks"
    whole = (scans / "a.nii.gz").read_bytes()
    (scans / "a.nii.gz").write_bytes(whole[:200])
    work = plan(scans, out)
    work.run([adapter()])
    assert list(work.failed) == ["a"] and "truncated" in work.failed["a"] and not (out / "a.nii.gz").exists()
    assert [row["case"] for row in rows(out) if not row["error"]] == ["b", "c"] and rows(out)[0]["bright_ml"] == ""
    (scans / "a.nii.gz").write_bytes(whole)
    work, given = plan(scans, out), adapter()
    assert [job.case.name for job in work.pending] == ["a"]
    work.run([given])
    assert not work.failed and given.model.encoded == 8 and [row["error"] for row in rows(out)] == ["", "", ""]


def test_a_stopped_run_leaves_whole_masks_and_goes_on(scans, tmp_path, monkeypatch):
    out, done = tmp_path / "masks", []

    def stop_at_the_second(*arguments, **options):
        if done:
            raise KeyboardInterrupt
        done.append(segment(*arguments, **options))
        return done[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("inlay.tasks.volumes.segment.segment", stop_at_the_second)
        plan(scans, out).run([adapter()])
    assert [row["case"] for row in rows(out)] == ["a"]
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    (out / "c.nii.gz").unlink(missing_ok=True)
    work = plan(scans, out)
    assert [job.case.name for job in work.pending] == ["b", "c"]
    work.run([adapter()])
    assert len(rows(out)) == 3
    (out / "c.nii.gz").unlink()
    assert [job.case.name for job in plan(scans, out).pending] == ["c"]


def test_masks_of_other_adapters_options_or_scans_are_told_and_kept(scans, tmp_path):
    out = tmp_path / "masks"
    plan(scans, out).run([adapter()])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for made_by, words in (
        ({"overlap": 0.25}, "overlap was 0.5, and is 0.25"),
        ({"adapters": ["stand-in 2"]}, "adapters was stand-in 1, and is stand-in 2"),
    ):
        with pytest.raises(InlayError, match=f"holds 3 of the masks already, .*a.nii.gz .{words}.*--overwrite"):
            plan(scans, out, made_by=made_by)
    write_volume(scans / "b.nii", blobs((9, 9, 9)), TURNED)
    with pytest.raises(InlayError, match=r"holds 1 of the masks already, .*b.nii .its scan has changed since"):
        plan(scans, out)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    work = plan(scans, out, overwrite=True)
    assert [job.case.name for job in work.pending] == ["b"]
    work.run([adapter()])
    assert nib.load(out / "b.nii").shape == (9, 9, 9) and (out / "a.nii.gz").read_bytes() == before["a.nii.gz"]
    work = plan(scans, out, made_by={"overlap": 0.25}, suffix=".nii", overwrite=True)
    work.run([adapter()], overlap=0.25)
    assert sorted(path.name for path in out.glob("*.nii*")) == ["a.nii", "b.nii", "c.nii"]
    assert len(json.loads((out / "segment.json").read_text())["made_by"]) == 1


def test_files_that_are_none_of_ours_are_never_replaced_unasked(scans, tmp_path):
    out = tmp_path / "masks"
    out.mkdir()
    (out / "c.nii.gz").write_text("by hand")
    with pytest.raises(InlayError, match=r"holds 1 of the masks already, .*c.nii.gz .not made by this command"):
        plan(scans, out)
    for overwrite in (False, True):
        with pytest.raises(InlayError, match="is the folder of the scans"):
            plan(scans, scans, overwrite=overwrite)
    (out / "segment.json").write_text("[]")
    with pytest.raises(InlayError, match="is no record of segmented scans"):
        plan(scans, out)
    with pytest.raises(InlayError, match=r"unknown format 'png'; choose one of nii.gz"):
        plan(scans, tmp_path / "new", suffix=".png")


def test_the_next_scan_is_read_while_the_model_answers(scans, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr("inlay.tasks.volumes.segment.open_scan", lambda _, source: order.append(source.name) or source)
    for job, scan in folders._read_ahead(plan(scans, tmp_path / "masks").jobs, adapter()):
        assert scan() == job.source
    assert order == ["a.nii.gz", "b.nii", "c.nii.gz"]


# Ensembles and probabilities


def brightened(gain, **options):
    given = adapter(**options)
    given.model.gain.data.fill_(gain)
    return given


@pytest.mark.parametrize("spacing", [None, (3.0, 1.7, 2.0)])
def test_an_ensemble_is_the_mean_of_probabilities_on_the_own_grid(scans, spacing):
    members = [brightened(2.0), brightened(0.3, crop=(12, 16, 16), spacing_mm=spacing), brightened(0.9)]
    path = scans / "c.nii.gz"
    each = [segment(one, path, keep_probabilities=True).probabilities.astype(np.float64) for one in members]
    found = segment(members[0], path, ensemble=members[1:], keep_probabilities=True)
    mean = np.mean(each, 0)
    assert np.abs(found.probabilities - mean).max() < 1e-3  # those of one adapter are rounded to float16
    sure = np.sort(mean, 0)[-1] - np.sort(mean, 0)[-2] > 2e-3
    assert (found.mask == mean.argmax(0))[sure].all() and sure.mean() > 0.95
    alone = segment(members[0], path).mask
    assert (segment(members[0], path, ensemble=members[1:]).mask == found.mask).all() and (alone != found.mask).any()


def test_an_ensemble_of_other_classes_numbers_or_channels_is_refused(scans):
    path, first = scans / "a.nii.gz", adapter()
    other = adapter()
    other.labels = ["bright", "grey"]
    with pytest.raises(InlayError, match=r"adapter 3 of the ensemble, 'stand-in', has the classes bright, grey, and"):
        segment(first, path, ensemble=[adapter(), other])
    with pytest.raises(InlayError, match="has the numbers of classes 4, 9, and the first one, 'stand-in', has 1, 2"):
        segment(first, path, ensemble=[adapter(values=(4, 9))])
    named = adapter()
    settings = named.processor.to_dict() | {"channels": ["t1", "t2"]}
    named.processor = SimpleNamespace(flip=(), values=None, to_dict=lambda: settings)
    with pytest.raises(InlayError, match="has the channels t1, t2, and the first one, 'stand-in', has none"):
        segment(first, path, ensemble=[named])
    with pytest.raises(InlayError, match=r"reads scans at another spacing .* give the scan's file"):
        segment(first, first.processor.read(path), ensemble=[adapter(spacing_mm=(2.0, 2.0, 2.0))])
    with pytest.raises(InlayError, match="was not trained on mirrored scans"):
        segment(first, path, ensemble=[adapter(flip=())], flips=True)


def test_probabilities_are_files_that_itk_and_nibabel_read(scans, tmp_path):
    itk = pytest.importorskip("SimpleITK")
    out, given = tmp_path / "masks", adapter()
    plan(scans, out).run([given])
    masks = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii*")}
    work = plan(scans, out, probabilities=True)
    assert len(work.pending) == 3  # they lack their probabilities
    work.run([given])
    assert masks == {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii*")}, "masks stay as they are"
    wanted = segment(given, scans / "b.nii", keep_probabilities=True).probabilities
    path = out / "probabilities" / "b.nii.gz"
    image = nib.load(path)
    assert image.shape == (*wanted.shape[1:], 3) and np.allclose(image.affine, TURNED)
    assert np.abs(np.moveaxis(image.get_fdata(), -1, 0) - wanted).max() < 1e-4
    read = itk.GetArrayFromImage(itk.ReadImage(str(path), itk.sitkFloat32))  # C Z Y X
    assert np.abs(read.transpose(0, 3, 2, 1) - wanted).max() < 1e-4
    assert not plan(scans, out, probabilities=True).pending
    with pytest.raises(InlayError, match="has no probabilities"):
        segment(given, scans / "b.nii").save_probabilities(tmp_path / "p.nii.gz")


# The command


def test_the_command_segments_a_folder_and_goes_on(capsys, monkeypatch, scans, tmp_path):
    out = tmp_path / "masks"
    (scans / "b.nii").write_bytes(b"no scan")
    command = ("segment", SHIPPED, scans, "-o", out, "--overlap", 0)
    monkeypatch.setattr("inlay.cli.volumes.load_ensemble", lambda *_: [adapter()])
    status, told, err = run(capsys, monkeypatch, *command)
    assert status == 1 and told.startswith("2 scans segmented.") and "failed: b: " in err
    write_volume(scans / "b.nii", blobs((9, 9, 9)), TURNED)
    status, told, _ = run(capsys, monkeypatch, *command, "--json")
    facts = json.loads(told)
    assert status == 0 and (facts["made"], facts["there"], facts["failed"]) == (1, 2, {})
    assert [row["case"] for row in rows(out)] == ["a", "b", "c"] and "dark_ml" in rows(out)[0]
    monkeypatch.setattr("inlay.cli.volumes.load_ensemble", lambda *_: pytest.fail("nothing is to be done"))
    status, told, _ = run(capsys, monkeypatch, *command)
    assert status == 0 and told.startswith("0 scans segmented; 3 were there already.")
    status, _, err = run(capsys, monkeypatch, *command[:-1], 0.25)
    assert status == 2 and "overlap was 0.0, and is 0.25" in err
    with lock_folder(out):
        status, _, err = run(capsys, monkeypatch, *command)
    assert status == 2 and "another process is writing" in err
    status, _, err = run(capsys, monkeypatch, *command, "--point", "1,1,1")
    assert status == 2 and "--point is for one scan" in err


def test_an_ensemble_on_the_command_line_shares_its_base(capsys, monkeypatch, scans, tmp_path):
    import shutil

    from inlay.cli.models import load_ensemble

    second = shutil.copytree(SHIPPED, tmp_path / "second")
    one, two = load_ensemble([str(SHIPPED), str(second)], None, "cpu", None)
    shared = {p.data_ptr() for p in one.model.parameters()} & {p.data_ptr() for p in two.model.parameters()}
    assert len(shared) >= len(list(one.model.get_base_model().vision_encoder.parameters())) / 2
    mask, alone = tmp_path / "mask.nii.gz", tmp_path / "alone.nii.gz"
    command = ("segment", SHIPPED, scans / "a.nii.gz", "--overlap", 0, "-o")
    status, _, _ = run(capsys, monkeypatch, *command, mask, "--ensemble", second, "--probabilities")
    assert status == 0 and (tmp_path / "mask_probabilities.nii.gz").is_file()
    assert run(capsys, monkeypatch, *command, alone)[0] == 0
    assert np.array_equal(nib.load(mask).dataobj, nib.load(alone).dataobj)
    status, _, err = run(capsys, monkeypatch, *command, mask, "--format", "nii")
    assert status == 2 and "--format is for a folder" in err


def test_ctrl_c_ends_cleanly(capsys, monkeypatch, scans, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("inlay.cli.volumes.load_ensemble", lambda *_: [adapter()])
    monkeypatch.setattr("inlay.tasks.volumes.segment.segment", interrupt)
    status, told, err = run(capsys, monkeypatch, "segment", SHIPPED, scans, "-o", tmp_path / "masks")
    assert status == 130 and told == "" and "stopped with 3 of 3 scans to do" in err

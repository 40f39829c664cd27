"""Folders of masks scored without a model, in every format, and what is wrong with them."""

import csv
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from inlay import InlayError, score_masks
from inlay.cli.app import app
from inlay.tasks.volumes.formats import write_volume
from inlay.tasks.volumes.scores import score_case

AFFINE = np.array([[0, 0, 2.0, 5], [-1, 0, 0, 9], [0, 1.5, 0, -7], [0, 0, 0, 1]])  # permuted, flipped, uneven
MOVED = np.array([[0, 0, 2.0, 6], [-1, 0, 0, 9], [0, 1.5, 0, -7], [0, 0, 0, 1]])


def write_data(folder, values=(1, 2), suffix=".nii.gz", described=True):
    """Three scans with label maps of two boxes, and masks in which these are one voxel off; gives masks and maps."""
    made = {}
    for part in ("data/imagesTr", "data/labelsTr", "masks"):
        (folder / part).mkdir(parents=True)
    for i in range(3):
        truth = np.zeros((14, 12, 10), np.int16)
        truth[2:7, 2:8, 2:8] = values[0]
        truth[8:12, 3 + i : 8, 3:7] = values[1]
        mask = np.roll(truth, 1, axis=i)
        image = np.random.default_rng(i).normal(100, 10, truth.shape).astype(np.float32) + 20 * truth.clip(max=2)
        write_volume(folder / f"data/imagesTr/case{i}{suffix}", image, AFFINE)
        write_volume(folder / f"data/labelsTr/case{i}{suffix}", truth, AFFINE)
        write_volume(folder / f"masks/case{i}{suffix}", mask, AFFINE)
        made[f"case{i}"] = (mask, truth)
    if described:
        labels = {"background": 0, "left": values[0], "right": values[1], "ignore": 9}
        (folder / "data/dataset.json").write_text(json.dumps({"labels": labels}))
    return made


@pytest.mark.parametrize(("values", "suffix"), [((1, 2), ".nii.gz"), ((4, 7), ".nrrd"), ((1000, 2000), ".mgz")])
def test_scores_are_those_of_each_pair(tmp_path, values, suffix):
    made = write_data(tmp_path, values, suffix)
    options = ["--csv", "s.csv", "--plot", "p.png", "--worst", "2", "--worst-folder", "worst", "--tolerance-mm", "1.2"]
    paths = [str(tmp_path / option) if "." in option[1:] and option != "1.2" else option for option in options]
    paths[paths.index("worst")] = str(tmp_path / "worst")
    done = CliRunner().invoke(app, ["score", str(tmp_path / "masks"), str(tmp_path / "data/labelsTr"), *paths])
    assert done.exit_code == 0, done.output
    assert "3 scans" in done.output and "left" in done.output and "surface Dice within 1.2 mm" in done.output
    rows = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert [(row["case"], row["class"], int(row["value"])) for row in rows] == [
        (case, label, value) for case in made for label, value in zip(("left", "right"), values, strict=True)
    ]
    for case, (mask, truth) in made.items():
        numbers = {0: 0, values[0]: 1, values[1]: 2}
        mask, truth = (np.vectorize(numbers.get)(array).astype(np.int16) for array in (mask, truth))
        expected = score_case(mask, truth, ["left", "right"], (1.0, 1.5, 2.0), tolerance_mm=1.2)
        for row, wanted in zip([row for row in rows if row["case"] == case], expected, strict=True):
            for key in ("dice", "iou", "hd95_mm", "nsd", "predicted_ml", "volume_error_ml"):
                assert float(row[key]) == pytest.approx(wanted[key], abs=1e-5)
    pictures = sorted((tmp_path / "worst").iterdir())
    dice = {case: np.mean([float(row["dice"]) for row in rows if row["case"] == case]) for case in made}
    assert [path.stem.split("_")[1] for path in pictures] == sorted(dice, key=dice.get)[:2]
    for path in (*pictures, tmp_path / "p.png"):
        assert np.asarray(Image.open(path).convert("RGB")).std() > 5


def test_a_folder_of_label_maps_alone_and_voxels_to_ignore(tmp_path):
    write_data(tmp_path, described=False)
    (tmp_path / "data/labelsTr").rename(tmp_path / "truth")
    found = score_masks(tmp_path / "masks", tmp_path / "truth", resamples=5, worst=1, worst_folder=tmp_path / "worst")
    assert [row["class"] for row in found.per_class] == ["class 1", "class 2"]
    assert len(list((tmp_path / "worst").iterdir())) == 1  # drawn on the label map itself
    write_data(tmp_path / "b")
    before = score_masks(tmp_path / "b/masks", tmp_path / "b/data", resamples=5)
    assert [row["dice"] for row in before.rows] == [row["dice"] for row in found.rows]
    hidden = np.full((14, 12, 10), 9, np.int16)
    hidden[2:7, 2:8, 2:8] = 1
    write_volume(tmp_path / "b/data/labelsTr/case0.nii.gz", hidden, AFFINE)
    after = score_masks(tmp_path / "b/masks", tmp_path / "b/data", resamples=5)
    assert after.rows[0]["predicted_ml"] == pytest.approx(4 * 6 * 6 * 3e-3)  # the part of the mask that is not hidden


def test_what_nnunet_writes_next_to_its_masks_is_no_mask(tmp_path):
    write_data(tmp_path)
    expected = score_masks(tmp_path / "masks", tmp_path / "data", resamples=5).rows
    for i in range(3):
        np.savez(tmp_path / f"masks/case{i}.npz", probabilities=np.zeros((3, 10, 12, 14), np.float16))
        (tmp_path / f"masks/case{i}.pkl").write_bytes(b"properties")
    assert score_masks(tmp_path / "masks", tmp_path / "data", resamples=5).rows == expected


def test_what_does_not_fit_is_named(tmp_path):
    write_data(tmp_path)
    masks, data = tmp_path / "masks", tmp_path / "data"
    (masks / "case2.nii.gz").rename(tmp_path / "away.nii.gz")
    found = score_masks(masks, data, resamples=5)
    assert found.count == 2 and found.notes[0] == "1 of 3 label maps have no mask and are not scored: case2."
    (tmp_path / "away.nii.gz").rename(masks / "other.nii.gz")
    with pytest.raises(InlayError, match=r"1 of the 3 masks in '.*masks' have no label map in '.*data' \(other\)"):
        score_masks(masks, data)
    (masks / "other.nii.gz").unlink()
    write_volume(masks / "case1.nii.gz", np.full((14, 12, 10), 5, np.uint8), AFFINE)
    with pytest.raises(InlayError, match=r"case1.nii.gz' holds 5, which no label map has; classes are 1 \(left\), 2"):
        score_masks(masks, data)
    for shape, affine, words in (((14, 12, 9), AFFINE, "shape"), ((14, 12, 10), MOVED, "affine")):
        write_volume(masks / "case1.nii.gz", np.zeros(shape, np.uint8), affine)
        with pytest.raises(InlayError, match=rf"case1.nii.gz' is not on the grid of its label map: it has .*{words}"):
            score_masks(masks, data)
    write_volume(masks / "case1.nii.gz", np.full((14, 12, 10), 0.5, np.float32), AFFINE)
    with pytest.raises(InlayError, match="numbers that are not whole"):
        score_masks(masks, data)
    (tmp_path / "none").mkdir()
    for wrong in ((tmp_path / "none", data), (masks, tmp_path / "nowhere"), (masks, tmp_path / "none")):
        with pytest.raises(InlayError, match=r"no folder|is empty"):
            score_masks(*wrong)


def test_the_table_fits_a_terminal_of_100_columns(tmp_path):
    label = np.zeros((9, 9, 9), np.uint8)
    label[2:5, 2:5, 2:5], label[6:8, 6:8, 6:8] = 1, 2
    for folder in ("masks", "labels"):
        (tmp_path / folder).mkdir()
        write_volume(tmp_path / folder / "a.nii.gz", label, np.eye(4))
    lines = str(score_masks(tmp_path / "masks", tmp_path / "labels", resamples=5)).split("\n")
    table = next(i for i, line in enumerate(lines) if line.startswith("Class "))
    assert max(map(len, lines[table - 2 : table + 3])) <= 100
    assert lines[table - 2].split() == ["Surface", "Volume"]  # headings end on one line
    assert lines[table - 1].split() == ["HD95,", "Dice", "Predicted", "Reference", "Dice,", "error,"]
    assert lines[table].split() == ["Class", "Value", "Dice", "IoU", "mm", "(NSD)", "ml", "ml", "median", "ml"]
    assert lines[table + 1].split()[:4] == ["class", "1", "1", "1.0000"]

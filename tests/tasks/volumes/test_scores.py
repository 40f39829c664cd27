"""Scores of masks by hand, against MONAI and scikit-learn, and of empty ones."""

import csv
import math
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score

from inlay.errors import InlayError
from inlay.tasks.volumes.scores import COLUMNS, VolumeDice, overlap, score_case, summarise, write_csv

SPACING = (3.0, 1.0, 0.5)


def ball(centre, radius, shape=(16, 40, 60), spacing=SPACING):
    grid = np.stack(np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, spacing, strict=True)), indexing="ij"), -1)
    return np.linalg.norm(grid - np.array(centre), axis=-1) <= radius


def noisy(seed=0, shape=(2, 9, 10, 11)):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 3, shape, generator=generator)
    other = torch.randint(0, 3, shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.7, truth, other), truth


def test_overlap_is_that_of_monai_and_scikit_learn():
    from monai.metrics import compute_dice, compute_iou

    predicted, truth = noisy()
    onehot = [torch.nn.functional.one_hot(mask, 3).movedim(-1, 1) for mask in (predicted, truth)]
    dice, iou = (measure(*onehot, include_background=False) for measure in (compute_dice, compute_iou))
    for case in range(2):
        rows = score_case(predicted[case], truth[case], ["a", "b"], (1, 1, 1))
        flat = truth[case].flatten(), predicted[case].flatten()
        for k, row in enumerate(rows):
            assert row["dice"] == pytest.approx(float(dice[case, k]), abs=1e-6)
            assert row["dice"] == pytest.approx(f1_score(*flat, labels=[k + 1], average=None)[0], abs=1e-9)
            assert row["iou"] == pytest.approx(float(iou[case, k]), abs=1e-6)
            assert row["iou"] == pytest.approx(jaccard_score(*flat, labels=[k + 1], average=None)[0], abs=1e-9)
    metric = VolumeDice(["a", "b"])
    counts = overlap(predicted, truth, 2)
    assert counts.shape == (2, 2, 3) and counts.dtype == torch.int64
    for case in range(2):
        metric.add_batch(predictions=counts[case : case + 1], references=torch.zeros(1))
    scores = metric.compute()
    assert scores == pytest.approx(
        {"dice": float(dice.mean()), "dice_a": float(dice[:, 0].mean()), "dice_b": float(dice[:, 1].mean())}
    )


def test_a_shifted_box_by_hand():
    """Two boxes of 4 x 8 x 8 voxels, one moved by 2 voxels of 3 mm: half of each lies in the other."""
    a, b = np.zeros((16, 16, 16), int), np.zeros((16, 16, 16), int)
    a[4:8, 4:12, 4:12] = b[6:10, 4:12, 4:12] = 1
    (row,) = score_case(a, b, ["box"], (3.0, 1.0, 1.0), case="c")
    assert (row["case"], row["class"]) == ("c", "box")
    assert row["dice"] == 0.5 and row["iou"] == pytest.approx(1 / 3)
    assert row["hd95_mm"] == pytest.approx(6.0)
    assert row["predicted_ml"] == row["reference_ml"] == pytest.approx(256 * 3 / 1000)
    (wide,) = score_case(a, b, ["box"], (3.0, 1.0, 1.0), tolerance_mm=6.1)
    assert 0.3 < row["nsd"] < 0.7 and wide["nsd"] == 1


@pytest.mark.filterwarnings("ignore::FutureWarning")  # MONAI's, of its own calls
@pytest.mark.parametrize(("shift", "tolerance"), [((0, 2, 0), 1.0), ((3, 0, 0), 1.0), ((3, 0, 1), 2.0)])
def test_surfaces_are_those_of_monai_on_the_whole_grid(shift, tolerance):
    """The box that is cut out first changes nothing, at the edge of the grid either."""
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    for centre in ((24, 20, 15), (3, 4, 27)):
        a, b = ball(centre, 8), ball(np.add(centre, shift), 7)
        (row,) = score_case(a.astype(int), b.astype(int), ["x"], SPACING, tolerance_mm=tolerance)
        whole = [torch.from_numpy(mask)[None, None] for mask in (a, b)]
        options = {"include_background": True, "spacing": SPACING}
        distance = compute_hausdorff_distance(*whole, percentile=95, **options)
        nsd = compute_surface_dice(*whole, [tolerance], use_subvoxels=True, **options)
        assert row["hd95_mm"] == pytest.approx(float(distance), abs=1e-5)
        assert row["nsd"] == pytest.approx(float(nsd), abs=1e-5) and 0 < row["nsd"] < 1


def test_millimetres_follow_the_spacing():
    a, b = ball((24, 20, 15), 8).astype(int), ball((24, 22, 15), 8).astype(int)
    (one,), (double,) = (score_case(a, b, ["x"], np.array(SPACING) * f, tolerance_mm=f) for f in (1, 2))
    assert double["hd95_mm"] == pytest.approx(2 * one["hd95_mm"]) and double["nsd"] == pytest.approx(one["nsd"])
    assert double["predicted_ml"] == pytest.approx(8 * one["predicted_ml"])
    (same,) = score_case(a, a, ["x"], SPACING)
    assert [same[k] for k in ("dice", "iou", "hd95_mm", "nsd")] == [1, 1, 0, 1]


def test_conventions_for_empty_masks():
    full, empty = ball((24, 20, 15), 8).astype(int), np.zeros((16, 40, 60), int)
    diagonal = math.dist((16 * 3, 40, 30), (0, 0, 0))
    scores = ("dice", "iou", "nsd", "hd95_mm")
    for a, b, wanted in (
        (empty, empty, [1, 1, 1, 0]),
        (full, empty, [0, 0, 0, diagonal]),
        (empty, full, [0, 0, 0, diagonal]),
    ):
        (row,) = score_case(a, b, ["x"], SPACING)
        assert [row[k] for k in scores] == pytest.approx(wanted)
        counts = overlap(torch.from_numpy(a)[None], torch.from_numpy(b)[None], 1)
        assert VolumeDice(["x"]).compute(predictions=counts) == {"dice": wanted[0]}


def test_a_class_is_judged_by_the_scans_that_have_it():
    """Of three scans one has the class "b" and half of it is found; in another it is predicted by mistake."""
    counts = np.array(
        [
            [[4, 4, 4], [2, 4, 4], [0, 0, 0]],
            [[1, 2, 2], [0, 0, 0], [0, 0, 0]],
            [[2, 2, 2], [0, 3, 0], [0, 0, 0]],
        ]
    )  # scans, classes; in both, predicted, in the reference
    scores = VolumeDice(["a", "b", "nowhere"]).compute(predictions=counts)
    a, b = (1 + 0.5 + 1) / 3, (0.5 + 0) / 2
    assert scores == pytest.approx({"dice": (a + b) / 2, "dice_a": a, "dice_b": b, "dice_nowhere": 1.0})


def test_ignored_voxels_count_nowhere():
    predicted, truth = noisy(shape=(1, 6, 7, 8))
    masked = truth.clone()
    masked[:, :, :, 4:] = -1
    left = slice(None), slice(None), slice(None), slice(0, 4)
    assert torch.equal(overlap(predicted, masked, 2), overlap(predicted[left], truth[left], 2))
    mine = score_case(predicted[0], masked[0], ["a", "b"], (1, 1, 1))
    alone = score_case(predicted[left][0], truth[left][0], ["a", "b"], (1, 1, 1))
    for one, other in zip(mine, alone, strict=True):
        assert {k: one[k] for k in COLUMNS} == pytest.approx({k: other[k] for k in COLUMNS})


def test_csv_and_summary(tmp_path):
    predicted, truth = noisy()
    rows = [r for i in range(2) for r in score_case(predicted[i], truth[i], ["a", "b, c"], (1, 1, 1), case=f"case {i}")]
    write_csv(rows, tmp_path / "s.csv")
    with (tmp_path / "s.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert tuple(read[0]) == COLUMNS and [r["case"] for r in read] == ["case 0", "case 0", "case 1", "case 1"]
    assert read[3]["class"] == "b, c" and float(read[3]["dice"]) == pytest.approx(rows[3]["dice"], rel=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["s.csv"]
    summary = summarise(rows)
    assert summary["cases"] == 2 and summary["dice"] == pytest.approx(np.mean([r["dice"] for r in rows]))
    assert summary["classes"]["a"]["nsd"] == pytest.approx((rows[0]["nsd"] + rows[2]["nsd"]) / 2)
    with pytest.raises(InlayError, match="there are no rows to summarise"):
        summarise([])


def test_what_cannot_be_scored_is_refused():
    a = np.ones((4, 5, 6), int)
    for arguments, words in (
        ((a, a[1:], ["x"], SPACING), "one shape"),
        ((a[0], a[0], ["x"], SPACING), "three axes"),
        ((a * 0.5, a, ["x"], SPACING), "floats"),
        ((a * 2, a, ["x"], SPACING), "2 classes"),
        ((a, a, ["x"], (1, 1)), "above 0"),
        ((a, a, ["x"], (1, 1, 0)), "above 0"),
    ):
        with pytest.raises(InlayError, match=words):
            score_case(*arguments)
    with pytest.raises(InlayError, match="has none"):
        VolumeDice(["x"]).compute()


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.metrics", None)
    a = np.ones((3, 3, 3), int)
    with pytest.raises(InlayError, match=r"pip install 'inlay\[volumes\]'"):
        score_case(a, a, ["x"], SPACING)
    (row,) = score_case(a, a * 0, ["x"], SPACING)  # without surfaces nothing of MONAI is needed
    assert row["dice"] == 0

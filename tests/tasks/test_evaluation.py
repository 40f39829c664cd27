"""Which part of data is scored, and how an evaluation is printed, written and drawn."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from inlay import InlayError
from inlay.tasks.evaluation import (
    Evaluation,
    Request,
    Score,
    Training,
    check_labels,
    choose_split,
    interval_note,
    pick_evenly,
)


@pytest.mark.parametrize(
    ("wanted", "own", "trained_on", "expected"),
    [
        (None, ["train", "val"], None, "validation"),
        (None, ["train"], None, "all"),
        (None, ["train"], "other", "all"),
        (None, ["train"], "data", "validation"),
        ("all", ["train", "val"], "data", "all"),
        ("train", ["train"], "data", "train"),
        ("test", ["train", "test"], None, "test"),
    ],
)
def test_a_recipes_split_or_the_whole(wanted, own, trained_on, expected):
    assert choose_split("data", wanted, own, "validation", Training(trained_on)) == expected


def test_mistakes_are_named():
    with pytest.raises(InlayError, match="'data' has no split 'test'"):
        choose_split("data", "test", ["train"], "validation", Training())
    with pytest.raises(InlayError, match=r"unknown split 'dev'; choose one of validation, test, train, all"):
        Request(split="dev")
    with pytest.raises(InlayError, match="limit must be a whole number of at least 1, got 0"):
        Request(limit=0)
    with pytest.raises(InlayError, match=r"'x', 'y' are labels of 'data', but not of adapter 'zoo', which knows 'cat'"):
        check_labels("data", ["x", "cat", "y", "x"], ["cat"], "zoo")
    check_labels("data", ["cat"], ["dog", "cat"], "zoo")


def test_what_metrics_tell_is_looked_at_before_it_is_used(tmp_path):
    told = Training.from_metrics({"dataset": 3, "training": ["seed"], "decoding": None})
    assert told == Training() and told.seed == 0 and not told.used("3")
    assert Training(settings={"seed": "4"}).seed == 0 and Training(settings={"seed": 4}).seed == 4
    (tmp_path / "a").mkdir()
    assert Training(str(tmp_path / "a")).used(f"{tmp_path}/./a/") and not Training("a").used("b")


def test_a_limit_takes_from_the_whole_range():
    assert pick_evenly(10, 4) == [0, 2, 5, 7] and pick_evenly(3, None) == pick_evenly(3, 8) == [0, 1, 2]


@pytest.fixture
def evaluation():
    return Evaluation(
        "builtin:digits", "image-classification", "validation", 3, "image",
        {"accuracy": Score(0.5, 0.25, 0.75), "loss": Score(1.0)},
        {"accuracy": Score(0.25)},
        [{"image": "a, b.png", "right": True}, {"image": "c.png", "right": False, "more": 0.5}],
        [{"class": "cat", "precision": 0.5, "f1": 2 / 3, "images": 2}],
        ["cat", "dog"], [[1, 1], [0, 1]], ["A note."],
    )  # fmt: skip


def test_it_prints_as_a_table(evaluation):
    assert str(evaluation).splitlines() == [
        "builtin:digits (validation): 3 images",
        "          with the adapter           base only",
        "Accuracy  0.5000 (0.2500 to 0.7500)  0.2500",
        "Loss      1.0000",
        "",
        "Class  Precision  F1      Images",
        "cat    0.5000     0.6667  2",
        "",
        "A note.",
    ]


def test_csv_and_json_hold_what_is_there(evaluation, tmp_path):
    with evaluation.write_csv(tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"image": "a, b.png", "right": "True", "more": ""} and rows[1]["more"] == "0.5"
    told = json.loads(json.dumps(evaluation.to_dict()))
    assert told["scores"]["accuracy"] == {"value": 0.5, "low": 0.25, "high": 0.75}
    assert told["base"]["accuracy"]["low"] is None and told["confusion"] == [[1, 1], [0, 1]]
    assert "rows" not in evaluation.summary() and len(told["rows"]) == 2
    assert evaluation.summary()["confusion"] == [[1, 1], [0, 1]]
    large = replace(evaluation, labels=[str(i) for i in range(101)], confusion=[[0] * 101] * 101)
    assert "confusion" not in large.summary() and len(large.to_dict()["confusion"]) == 101


@pytest.mark.parametrize("classes", [2, 12, 40, 70])
def test_the_matrix_is_dark_where_a_row_is(classes, tmp_path):
    confusion = np.roll(np.eye(classes, dtype=int) * 7, 1, axis=1)
    labels = [f"class {i} with a name" for i in range(classes)]
    made = Evaluation("d", "t", "all", 1, "image", {}, labels=labels, confusion=confusion.tolist())
    image = np.asarray(Image.open(made.draw_confusion(tmp_path / "m.png")).convert("RGB"))
    blue = (image == (8, 48, 107)).all(-1)
    side = {2: 64, 12: 44, 40: 26, 70: 4}[classes]
    # Fully dark cells, but for edges and counts, and none of them on the diagonal.
    assert 0.4 * side**2 * classes < blue.sum() <= side**2 * classes
    rows, columns = np.nonzero(blue)
    top, left = rows.min() // 1, columns.min()
    assert rows.max() - top < side * classes and columns.max() - left < side * classes


def test_what_is_no_classifier_has_no_matrix(tmp_path):
    with pytest.raises(InlayError, match="an adapter for text-generation has no confusion matrix"):
        Evaluation("d", "text-generation", "all", 1, "prompt", {}).draw_confusion(tmp_path / "m.png")
    with pytest.raises(InlayError, match=r"must be the name of an image, such as matrix\.png"):
        Evaluation("d", "t", "all", 1, "image", {}, labels=["a"], confusion=[[1]]).draw_confusion(tmp_path / "m.doc")


def test_few_units_are_said():
    assert "takes two scans" in interval_note(1, "scan")[0] and "over 3 scans are rough" in interval_note(3, "scan")[0]
    assert interval_note(10, "scan") == []

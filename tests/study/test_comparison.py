"""A comparison that is stored and read again is the same one."""

import json
import math
from dataclasses import replace

import pytest

from inlay.errors import DamagedFile, Unsupported
from inlay.study.comparison import Comparison, Row

ROW = Row(
    method="lora",
    learning_rate=3e-3,
    width=8,
    curve={9e-4: 0.7, 3e-3: 0.9, 3e-2: math.nan},
    edge=False,
    scores={"accuracy": [0.9, 0.8], "ece": [0.02, 0.03]},
    validation=[0.91, 0.82],
    forgetting={"drift": [0.1, 0.2]},
    costs={"trainable_parameters": 1000, "energy_j": None, "latency_ms": 1.5},
    merges=True,
    seconds=12.5,
    failed=["seed 2: the loss became NaN"],
)
WHOLE = Comparison(
    base="builtin:vit-tiny",
    data="photos <b>",
    task="image-classification",
    score="accuracy",
    larger_is_better=True,
    seeds=[0, 1],
    counts={"train": 100, "validation": 20, "test": 30},
    budget={"steps": 50, "batch_size": 8},
    rows=[ROW],
    refused={"prompt": "it suits texts only"},
    about={"device": "cpu", "threads": 1},
)


def test_what_is_read_is_what_was_written(tmp_path):
    read = Comparison.read(WHOLE.write(tmp_path / "comparison.json"))
    (row,) = read.rows
    assert math.isnan(row.curve[3e-2])
    finite = {rate: score for rate, score in ROW.curve.items() if not math.isnan(score)}
    assert replace(read, rows=[replace(row, curve=finite)]) == replace(WHOLE, rows=[replace(ROW, curve=finite)])


def test_the_file_is_json_of_any_reader(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    path = WHOLE.write(tmp_path / "comparison.json")
    stored = json.loads(path.read_text(), parse_constant=refuse)
    assert stored["rows"][0]["curve"] == [[9e-4, 0.7], [3e-3, 0.9], [3e-2, None]]


def test_a_failed_seed_stays_nan(tmp_path):
    row = replace(ROW, scores={"accuracy": [0.9, math.nan]})
    read = Comparison.from_dict(json.loads(json.dumps(replace(WHOLE, rows=[row]).to_dict())))
    assert read.rows[0].scores["accuracy"][0] == 0.9 and math.isnan(read.rows[0].scores["accuracy"][1])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"method": "lora"}]}', '{"rows": 3}', "{"])
def test_what_is_no_comparison_is_refused(tmp_path, text):
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(DamagedFile, match="compar"):
        Comparison.read(tmp_path / "comparison.json")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DamagedFile, match="nowhere"):
        Comparison.read(tmp_path / "nowhere.json")


def test_a_method_of_another_version_is_named():
    facts = replace(WHOLE, rows=[replace(ROW, method="hyperlora")]).to_dict()
    with pytest.raises(Unsupported, match="hyperlora"):
        Comparison.from_dict(facts)


def test_a_path_on_this_machine_is_told_by_its_end():
    comparison = replace(WHOLE, base="/models/vit", data="~/projects/cells/photos/dev")
    assert comparison.subject == "models/vit on photos/dev"
    assert replace(WHOLE, base="google/vit", data="builtin:digits").subject == "google/vit on builtin:digits"

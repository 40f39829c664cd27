"""`inlay evaluate`: a table or JSON, a CSV file, an image, and scores in the adapter."""

import csv
import json
import shutil

import pytest
from PIL import Image

from command import run
from places import ROOT

SHIPPED = ROOT / "adapters_hub" / "digits-lora-vit-tiny"


def test_everything_at_once(capsys, monkeypatch, tmp_path):
    adapter = shutil.copytree(SHIPPED, tmp_path / "digits")
    status, out, _ = run(
        capsys, monkeypatch, "evaluate", adapter, "builtin:digits", "--limit", 40, "--json", "--write",
        "--csv", tmp_path / "rows.csv", "--matrix", tmp_path / "matrix.png",
    )  # fmt: skip
    told = json.loads(out)
    assert status == 0 and told["count"] == 40 and told["split"] == "validation" and len(told["rows"]) == 40
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["right"] == "True" for row in rows) / 40 == pytest.approx(told["scores"]["accuracy"]["value"])
    with Image.open(tmp_path / "matrix.png") as matrix:
        assert matrix.size[0] > 400
    noted = json.loads((adapter / "metrics.json").read_text())["evaluations"]["builtin:digits"]
    assert (
        noted["scores"] == told["scores"] and "## Evaluation on builtin:digits" in (adapter / "README.md").read_text()
    )
    status, out, _ = run(capsys, monkeypatch, "info", adapter, "--verify")
    assert status == 0 and "failed" not in out


def test_a_table_for_people(capsys, monkeypatch):
    status, out, _ = run(capsys, monkeypatch, "evaluate", SHIPPED, "builtin:digits", "--limit", 20, "--adapter-only")
    lines = out.splitlines()
    assert status == 0 and lines[0] == "builtin:digits (validation): 20 images"
    assert any(line.startswith("Expected calibration error") for line in lines)
    assert any(line.startswith("Class  Precision") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["builtin:shapes"], "are labels of 'builtin:shapes', but not of adapter 'digits-lora-vit-tiny'"),
        (["builtin:digits", "--split", "dev"], "unknown split 'dev'; choose one of validation, test, train, all"),
        (["builtin:digits", "--split", "test"], "has no split 'test'"),
        (["builtin:digits", "--limit", "0"], "limit must be a whole number of at least 1, got 0"),
        (["builtin:digits", "--csv", "{tmp}/none/rows.csv"], "there is no folder"),
        (["nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, monkeypatch, tmp_path, arguments, sentence):
    filled = [argument.format(tmp=tmp_path) for argument in arguments]
    status, out, err = run(capsys, monkeypatch, "evaluate", SHIPPED, *filled)
    assert status == 2 and out == "" and sentence in err and err.count("\n") == 1


def test_what_has_no_classes_has_no_matrix(capsys, monkeypatch, tmp_path):
    adapter = ROOT / "adapters_hub" / "restaurants-lora-gpt2-tiny"
    for option in (["--matrix", tmp_path / "m.png"], ["--group", "digits"]):
        status, out, err = run(capsys, monkeypatch, "evaluate", adapter, "builtin:restaurants", *option)
        assert status == 2 and out == "" and err.count("\n") == 1 and not (tmp_path / "m.png").exists()
        assert "text-generation" in err

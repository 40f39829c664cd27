"""The recipe for classifiers of texts as a user runs it, on a few pairs."""

import csv
import runpy
import sys
from pathlib import Path

from command import run
from inlay import classify_texts, load_adapter

RECIPE = Path(__file__).parents[3] / "recipes/lora_bert.py"


def test_lora_bert(monkeypatch, tmp_path, capsys):
    rows = [
        (f"It welcomes {who} {i}.", "Families may come.", "yn"[i % 2]) for i, who in enumerate(["all", "none"] * 10)
    ]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("premise", "hypothesis", "label"), *rows])
    options = {"dataset": tmp_path / "pairs.csv", "output_dir": tmp_path / "run", "epochs": 1, "batch_size": 8}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *words, "--label_smoothing", "0.1", "--max_length", "32"])
    runpy.run_path(str(RECIPE), run_name="__main__")
    assert "Matthews" in capsys.readouterr().out
    loaded = load_adapter(tmp_path / "run/adapter")
    assert loaded.labels == ["n", "y"] and loaded.processor.max_length == 32
    assert {"accuracy", "f1", "matthews"} <= loaded.file.metrics["validation"].keys()
    (found,) = classify_texts(loaded, [("It welcomes all.", "Families may come.")])
    assert sum(found.probabilities) > 0.999
    said = run(capsys, monkeypatch, "predict", tmp_path / "run/adapter", "A text.", "--pair", "Another.", "--top", "1")
    assert said[0] == 0 and said[1].startswith("A text. | Another.: ")
    status, _, err = run(capsys, monkeypatch, "predict", tmp_path / "run/adapter", "a", "b", "--pair", "c")
    assert status == 2 and "2 texts have 1 second ones" in err

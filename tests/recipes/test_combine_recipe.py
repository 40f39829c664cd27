"""Two adapters trained, added and evaluated, on a few images with few steps."""

import runpy
import sys

import pytest
from PIL import Image

from inlay import load_adapter
from places import ROOT


@pytest.fixture
def tasks(tmp_path):
    """Two folders of images, of 3 and of 2 labels."""
    for i in range(60):
        first, second = tmp_path / "digits" / str(i % 3), tmp_path / "shapes" / "ab"[i % 2]
        for folder, colour in ((first, (85 * (i % 3), i, 0)), (second, (0, i, 255 * (i % 2)))):
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), colour).save(folder / f"{i}.png")
    return tmp_path / "digits", tmp_path / "shapes"


def test_two_tasks_are_trained_added_and_evaluated(monkeypatch, capsys, tasks, tmp_path):
    path, out = str(ROOT / "recipes/combine_adapters.py"), tmp_path / "run"
    options = ["--first", *tasks[:1], "--second", *tasks[1:], "--epochs", 0.5, "--workers", 0, "--output_dir", out]
    monkeypatch.setattr(sys, "argv", [path, *map(str, options)])
    runpy.run_path(path, run_name="__main__")
    said = capsys.readouterr().out
    assert "add: stacked 5 labels" in said and "relative error 0;" in said and "digits and shapes:" in said
    task, alone, combined, among_all = next(
        line for line in said.splitlines() if line.startswith(str(tasks[0]))
    ).split()
    assert 0 <= float(among_all) <= float(combined) <= 1 and 0 <= float(alone) <= 1 and task == str(tasks[0])
    assert (out / "report.png").stat().st_size > 1000 and len(load_adapter(out / "sum").labels) == 5

"""Two adapters trained, added and evaluated, on a few images with few steps."""

import runpy
import sys

from inlay import load_adapter
from places import ROOT


def test_two_tasks_are_trained_added_and_evaluated(monkeypatch, capsys, two_tasks, tmp_path):
    path, out, (digits, shapes) = str(ROOT / "recipes/combine_adapters.py"), tmp_path / "run", two_tasks
    options = ["--first", digits, "--second", shapes, "--output_dir", out, "--epochs", 0.5, "--workers", 0]
    monkeypatch.setattr(sys, "argv", [path, *map(str, options)])
    runpy.run_path(path, run_name="__main__")
    said = capsys.readouterr().out
    assert "add: stacked 5 labels" in said and "relative error 0;" in said and "digits and shapes:" in said
    task, alone, combined, among_all = next(line for line in said.splitlines() if line.startswith(str(digits))).split()
    assert 0 <= float(among_all) <= float(combined) <= 1 and 0 <= float(alone) <= 1 and task == str(digits)
    assert (out / "report.png").stat().st_size > 1000 and len(load_adapter(out / "sum").labels) == 5

"""Two adapters trained, added and evaluated, with few steps."""

import runpy
import sys

from inlay import load_adapter
from places import ROOT


def test_two_tasks_are_trained_added_and_evaluated(monkeypatch, capsys, tmp_path):
    path, out = str(ROOT / "recipes/combine_adapters.py"), tmp_path / "run"
    monkeypatch.setattr(sys, "argv", [path, "--output_dir", str(out), "--epochs", "0.05", "--workers", "0"])
    runpy.run_path(path, run_name="__main__")
    said = capsys.readouterr().out
    assert "add: stacked 47 labels" in said and "relative error 0;" in said and "digits and shapes:" in said
    task, alone, combined, among_all = next(
        line for line in said.splitlines() if line.startswith("builtin:digits")
    ).split()
    assert 0 <= float(among_all) <= float(combined) <= 1 and 0 <= float(alone) <= 1 and task == "builtin:digits"
    assert (out / "report.png").stat().st_size > 1000 and len(load_adapter(out / "sum").labels) == 47

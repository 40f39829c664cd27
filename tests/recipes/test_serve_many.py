"""The recipe that serves several adapters at once, with few steps."""

import runpy
import sys

from inlay import read_adapter
from places import ROOT


def test_it_trains_two_methods_and_serves_them_in_one_batch(monkeypatch, capsys, two_tasks, tmp_path):
    arguments = ["--output_dir", tmp_path / "run", "--epochs", 0.5, "--workers", 0, "--requests", 48, "--rows", 16]
    arguments += ["--tasks", *two_tasks, "--methods", "lora", "attention-prefix"]
    monkeypatch.setattr(sys, "argv", ["serve_many.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "recipes/serve_many.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "48 images, 2 adapters in every batch of 16" in said and "in memory: digits, shapes" in said
    assert said.count("accuracy") >= 2 and "attention-prefix" in said
    kinds = [read_adapter(tmp_path / "run/adapters" / name).config["peft_type"] for name in ("digits", "shapes")]
    assert kinds == ["LORA", "INLAY_ATTENTION_PREFIX"]

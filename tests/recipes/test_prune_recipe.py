"""The recipe that prunes and heals writes a base that loads."""

import runpy
import sys

from inlay import load_base
from places import ROOT


def test_prune_heal_vit(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    options = ["--output_dir", str(tmp_path), "--steps", "1", "--batch_size", "4", "--examples", "8"]
    monkeypatch.setattr(sys, "argv", ["prune_heal_vit.py", *options, "--criterion", "activation"])
    runpy.run_path(str(ROOT / "recipes" / "prune_heal_vit.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "multiply-accumulates: 32,294,592 -> " in out and "  healed " in out
    assert load_base(tmp_path / "model").config.model_type == "vit_pruned"

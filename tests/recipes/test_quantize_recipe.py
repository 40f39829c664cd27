"""The recipe that quantises, with modes as fast as a test says: another load of the machine chooses no other one."""

import runpy
import sys

import pytest
import torch

from inlay.compress import quantize as quantizing
from inlay.compress.probe import Speed
from places import ROOT

pytest.importorskip("onnxruntime", reason="needs the extra: pip install 'inlay[export]'")


def test_it_compares_before_and_after(monkeypatch, capsys, tmp_path):
    def time_by_turns(models, inputs):
        milliseconds = {name: 1.0 if name == "int8-dynamic" else 2.0 for name in models}
        return {name: Speed(each, each, each, each, 40) for name, each in milliseconds.items()}

    programs, trace = [], torch.onnx.export

    def export_once(*arguments, **options):  # tracing takes seconds, and the recipe traces one model twice
        programs.extend([] if programs else [trace(*arguments, **options)])
        return programs[0]

    monkeypatch.setattr(quantizing, "time_by_turns", time_by_turns)
    monkeypatch.setattr(torch.onnx, "export", export_once)
    monkeypatch.chdir(ROOT)  # where adapters_hub is
    monkeypatch.setattr(sys, "argv", ["quantize.py", "--output_dir", str(tmp_path / "run"), "--mode", "dynamic"])
    runpy.run_path(str(ROOT / "recipes/quantize.py"), run_name="__main__")
    *_, before, after, saved = capsys.readouterr().out.splitlines()
    assert before.split()[:2] == ["float32", "2.000"] and after.split()[:2] == ["int8-dynamic", "1.000"]
    assert float(after.split()[3]) < 0.4 * float(before.split()[3]) and saved == f"saved {tmp_path / 'run/quantized'}"
    was, now = (float(line.split("accuracy ")[1].split()[0]) for line in (before, after))
    assert was > 0.9 and abs(was - now) < 0.01

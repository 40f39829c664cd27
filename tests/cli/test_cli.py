"""The `inlay` command: what it prints, and mistakes in one sentence."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

from command import run
from inlay import resolve_base
from inlay.cli.models import hide_bitsandbytes


def test_what_the_system_refuses_is_one_sentence(capsys, monkeypatch):
    long = "x" * 5000
    for verb in (["list", long], ["index", long], ["info", long], ["search", "a", "--folder", long]):
        status, out, err = run(capsys, monkeypatch, *verb)
        assert status == 2 and out == "" and err.startswith("error: x") and "File name too long" in err
        assert err.count("\n") == 1


def test_info_says_what_an_adapter_is(capsys, monkeypatch, digits_adapter):
    status, out, _ = run(capsys, monkeypatch, "info", digits_adapter, "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["method"] == "LoRA r=4, alpha=8" and facts["base"] == "builtin:vit-tiny"
    assert facts["labels"][3] == "digit 3" and facts["validation"] == {"accuracy": 0.5}
    assert facts["file_kb"] == pytest.approx(
        (digits_adapter / "adapter_model.safetensors").stat().st_size / 1000, abs=0.1
    )
    status, out, _ = run(capsys, monkeypatch, "info", digits_adapter, "--base", "builtin:vit-tiny")
    assert status == 0 and "yes, golden output deviation" in out


def test_predict_prints_json_lines_and_a_sheet(capsys, monkeypatch, digits_adapter, pictures, tmp_path):
    sheet = tmp_path / "sheet.png"
    status, out, _ = run(
        capsys, monkeypatch, "predict", digits_adapter, pictures, "--json", "--grid", sheet, "--top", 2
    )
    predictions = json.loads(out)
    assert status == 0 and sheet.stat().st_size > 1000
    assert len(predictions) == 5 and all(len(p["labels"]) == 2 for p in predictions)
    status, merged, _ = run(capsys, monkeypatch, "predict", digits_adapter, pictures, "--merge", "--top", 1)
    assert status == 0
    for line, prediction in zip(merged.splitlines(), predictions, strict=True):
        assert line.startswith(f"{prediction['source']}: {prediction['labels'][0]} ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["info", "{tmp}"], "is not an adapter"),
        (["info", "{tmp}/none"], "does not exist"),
        (["predict", "{adapter}", "none.png"], "no image or folder at 'none.png'"),
        (["predict", "{adapter}", "{pictures}", "--base", "builtin:none"], "unknown embedded model 'builtin:none'"),
        (["predict", "{adapter}", "{pictures}", "--tpo", "3"], "unknown option --tpo; did you mean --top?"),
        (["evaluate", "{adapter}", "{pictures}", "--splitt", "test"], "unknown option --splitt; did you mean --split?"),
        (["index", "{tmp}"], "holds no adapter"),
    ],
)
def test_a_mistake_is_one_sentence(capsys, monkeypatch, tmp_path, digits_adapter, pictures, arguments, sentence):
    filled = [a.format(tmp=tmp_path, adapter=digits_adapter, pictures=pictures) for a in arguments]
    status, out, err = run(capsys, monkeypatch, *filled)
    assert status == 2 and out == "" and sentence in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_index_lists_good_and_broken_adapters(capsys, monkeypatch, tmp_path, digits_adapter):
    import shutil

    shutil.copytree(digits_adapter, tmp_path / "good")
    shutil.copytree(digits_adapter, tmp_path / "bad")
    weights = tmp_path / "bad" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    status, _, _ = run(capsys, monkeypatch, "index", tmp_path)
    rows = json.loads((tmp_path / "index.json").read_text())
    assert status == 0 and [row["name"] for row in rows] == ["bad", "good"]
    assert "truncated" in rows[0]["error"] and rows[1]["validation"] == {"accuracy": 0.5}
    assert "[good](good)" in (tmp_path / "README.md").read_text()


def test_dtype_auto_is_said_on_standard_error_and_is_not_the_default(capsys, monkeypatch, digits_adapter, pictures):
    monkeypatch.setattr("inlay.adapters.precision.choose_dtype", lambda device: ("bfloat16", "this CPU is fast in it"))
    command = ("predict", digits_adapter, pictures, "--top", 1, "--device", "cpu", "--json")
    answers = {}
    for asked in ((), ("--dtype", "float32"), ("--dtype", "auto"), ("--dtype", "bfloat16", "--merge")):
        status, out, err = run(capsys, monkeypatch, *command, *asked)
        answers[" ".join(asked)] = json.loads(out)
        assert status == 0 and (" computes in " in err) == bool(asked)
        assert ("computes in bfloat16" in err) == ("auto" in asked or "bfloat16" in asked)
    assert "this CPU is fast in it" in run(capsys, monkeypatch, *command, "--dtype", "auto")[2]
    assert answers[""] == answers["--dtype float32"] != answers["--dtype auto"]
    for whole, halved, merged in zip(
        *(answers[k] for k in ("", "--dtype auto", "--dtype bfloat16 --merge")), strict=True
    ):
        assert whole["probabilities"] == pytest.approx(halved["probabilities"], abs=0.05)
        assert whole["probabilities"] == pytest.approx(merged["probabilities"], abs=0.05)
    status, out, err = run(capsys, monkeypatch, *command, "--dtype", "half")
    assert status == 2 and out == "" and "half" in err


def test_doctor_tries_what_it_reports(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("inlay.bases.bfloat16.speedup_file", lambda: tmp_path / "bfloat16.json")
    status, out, _ = run(capsys, monkeypatch, "doctor", "--json")
    findings = {f["what"]: f for f in json.loads(out)}
    assert (tmp_path / "bfloat16.json").is_file() and "--dtype auto takes " in findings["bf16"]["remark"]
    assert status == 0
    assert findings["torch"]["works"] and "builtin:vit-tiny" in findings["embedded bases"]["remark"]
    assert isinstance(findings["bf16"]["works"], bool) and isinstance(findings["8-bit base"]["works"], bool)
    assert "bfloat16, " in findings["golden output"]["remark"] and "0.02" in findings["golden output"]["remark"]


@pytest.mark.parametrize("verb", ["segment", "compare", "import"])
def test_help_is_wrapped_for_the_terminal_and_not_as_the_source_is(capsys, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, monkeypatch, verb, "--help")
    lines = [line.strip() for line in out.partition("╭")[0].splitlines()]
    assert len(lines) > 5
    for line, after in pairwise(lines):
        if line and after:  # of one paragraph: the next word had no room
            assert len(f"{line} {after.split()[0]}") > 78


def test_help_imports_nothing_heavy():
    code = (
        "import sys, inlay.cli.app\nsys.argv = ['inlay', '--help']\n"
        "try: inlay.cli.app.main()\nexcept SystemExit: pass\n"
        "print('HEAVY', [m for m in ('torch', 'transformers', 'peft', 'numpy', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "predict" in done.stdout and done.stdout.rstrip().endswith("HEAVY []")


def test_predict_hides_bitsandbytes_unless_the_base_is_stored_in_few_bits(monkeypatch, tmp_path, digits_adapter):
    """From peft, which would import it; what is imported already stays."""
    base = Path(resolve_base("builtin:vit-tiny"))
    config = json.loads((base / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    there = ModuleType("bitsandbytes")
    monkeypatch.setitem(sys.modules, "bitsandbytes", there)
    hide_bitsandbytes(str(digits_adapter), None)
    assert sys.modules["bitsandbytes"] is there
    monkeypatch.delitem(sys.modules, "peft")
    for name, given in ((digits_adapter, tmp_path), (digits_adapter, tmp_path / "missing"), (base, None)):
        hide_bitsandbytes(str(name), given and str(given))
        assert sys.modules["bitsandbytes"] is there
    hide_bitsandbytes(str(digits_adapter), None)
    assert sys.modules["bitsandbytes"] is None

"""`inlay info --verify`: one line for each check, and an exit status."""

import hashlib
import json
import sys

import pytest
from safetensors.torch import load_file, save_file

from inlay.adapters.file import METRICS, WEIGHTS
from inlay.adapters.verify import verify
from inlay.cli import app as cli
from inlay.errors import InlayError

A = "base_model.model.vit.layers.0.attention.q_proj.lora_A.weight"


def results(folder, base=None):
    return {check.what: check.result for check in verify(folder, base)}


def test_a_whole_adapter(zoo):
    checks = {check.what: check for check in verify(zoo)}
    assert {what: check.result for what, check in checks.items()} == {
        "files": "ok",
        "header": "ok",
        "config": "ok",
        "record": "ok",
        "method": "ok",
        "weights": "ok",
        "base": "ok",
        "patterns": "ok",
        "shapes": "ok",
        "golden": "ok",
        "trained by": "not recorded",
        "trained on": "not recorded",
        "trained with": "ok",
    }
    assert hashlib.sha256((zoo / WEIGHTS).read_bytes()).hexdigest() in checks["header"].remark
    assert "builtin:vit-tiny" in checks["base"].remark and "50 tensors" in checks["weights"].remark
    assert "allowed on a base in float32" in checks["golden"].remark and "torch 2" in checks["trained with"].remark
    told = json.loads((zoo / METRICS).read_text())
    told |= {"trained_by": "A. Author", "training": {"dataset": "digits", "seed": 3, "rank": 4}}
    (zoo / METRICS).write_text(json.dumps(told))
    checks = {check.what: check for check in verify(zoo)}
    assert checks["trained by"].remark == "A. Author" and checks["trained on"].remark == "dataset digits, seed 3"


def test_what_plain_peft_wrote_is_not_recorded(zoo, plain):
    plain(zoo)
    found = results(zoo, "builtin:vit-tiny")
    assert found["shapes"] == "failed"  # five labels, and nothing says of which base with a head of five
    tensors = {key: value for key, value in load_file(zoo / WEIGHTS).items() if "classifier" not in key}
    save_file(tensors, zoo / WEIGHTS)
    plain(zoo, lambda c: c.update(modules_to_save=None))
    found = results(zoo)
    assert found.pop("trained with") == "ok"
    assert {k: v for k, v in found.items() if v == "ok"}.keys() == {
        "files",
        "config",
        "method",
        "weights",
        "patterns",
        "shapes",
    }
    assert {k for k, v in found.items() if v == "not recorded"} >= {"header", "record", "base", "golden"}


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({"weights": lambda t: t[A].view(-1).__setitem__(0, float("nan"))}, "weights"),
        ({"record": lambda r: r["base"].update(blocks=7)}, "base"),
        ({"record": lambda r: r.update(golden=[1.0] * 5)}, "golden"),
        ({"config": lambda c: c.update(peft_type="MAGIC")}, "method"),
        ({"config": lambda c: c.update(lora_alpha=1e9)}, "config"),
        ({"config": lambda c: c.update(init_lora_weights="pissa")}, "method"),
        ({"config": lambda c: c.update(r=5)}, "shapes"),
        ({"record": lambda r: r.update(config="of another one")}, "record"),
    ],
)
def test_what_fails_is_the_last_but_what_metrics_tell(change, failed, zoo, rewrite):
    found = results(rewrite(zoo, **change))
    assert [what for what, result in found.items() if result == "failed"] == [failed]
    assert list(found).index(failed) == len(found) - (1 if failed in ("config", "record") else 4)


def test_no_such_folder(tmp_path):
    with pytest.raises(InlayError, match="does not exist"):
        verify(tmp_path / "nowhere")


def test_the_command(zoo, rewrite, capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["inlay", "info", str(zoo), "--verify", *arguments])
        with pytest.raises(SystemExit) as status:
            cli.main()
        return int(status.value.code or 0), capsys.readouterr().out

    status, out = run()
    lines = [line.split(None, 1) for line in out.splitlines()]
    assert status == 0 and len(lines) == 13 and out.startswith("files          ok            all there")
    status, out = run("--json")
    assert status == 0 and json.loads(out)[0] == {
        "what": "files",
        "result": "ok",
        "remark": json.loads(out)[0]["remark"],
    }
    rewrite(zoo, weights=lambda t: t[A].view(-1).__setitem__(0, float("inf")))
    status, out = run()
    assert status == 1 and "weights        failed        the tensor" in out

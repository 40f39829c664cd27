"""`--push_to` of the recipes: checked before the training, done after it."""

import runpy
import sys

import pytest

from hub.client import online
from inlay import load_adapter
from places import ROOT


@pytest.fixture
def hub(tmp_path):
    with online(tmp_path / "cache") as server:
        yield server


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes" / name), *map(str, arguments)])
    runpy.run_path(str(ROOT / "recipes" / name), run_name="__main__")


def refused(monkeypatch, capsys, *arguments):
    with pytest.raises(SystemExit) as status:
        run(monkeypatch, *arguments)
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status.value.code == 2
    return error


def test_a_recipe_trains_and_pushes_and_goes_on_after_a_broken_push(hub, monkeypatch, capsys, two_tasks, tmp_path):
    out = tmp_path / "run"
    options = ["--dataset", two_tasks[0], "--output_dir", out, "--epochs", 5, "--eval_every", 7, "--workers", 0]
    hub.fail("commit/main", "503", times=1000)
    error = refused(monkeypatch, capsys, "lora_vit.py", *options, "--push_to", "ann/digits", "--private")
    assert f"is saved in {out}/adapter; push it with: inlay push {out}/adapter ann/digits --private" in error
    assert load_adapter(out / "adapter").verified
    hub.faults.clear()
    run(monkeypatch, "lora_vit.py", *options, "--push_to", "ann/digits", "--private")  # a finished run is kept
    assert "finished run, which is kept" in (said := capsys.readouterr().out) and hub.repos["ann/digits"].head in said
    assert hub.repos["ann/digits"].private and "training.png" in said
    assert load_adapter("ann/digits").verified


@pytest.mark.parametrize(
    ("recipe", "repo", "sentence"),
    [
        ("lora_vit.py", "digits", "'digits' names no user or organisation; give user/name"),
        ("lora_vit.py", "", "'' is no name on the Hub"),
        ("lora_vit.py", "ann/digits/a b", "'ann/digits/a b' is no name on the Hub"),
        ("lora_vit.py", "ann/digits", "set HF_TOKEN"),
        ("compare.py", "ann/digits", "this recipe saves no adapter, so there is nothing to push"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_the_training(hub, monkeypatch, capsys, tmp_path, recipe, repo, sentence):
    monkeypatch.setenv("HF_TOKEN", "")
    assert sentence in refused(monkeypatch, capsys, recipe, "--output_dir", tmp_path / "run", "--push_to", repo)
    assert not (tmp_path / "run").exists() and hub.repos == {}

"""Two processes on CPUs, and the launches that would silently be something else."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands import launch as commands
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from safetensors.torch import load_file

from docs.blocks import read_blocks
from forked_program import PATIENCE_S, finish
from inlay import InlayError
from inlay.train import launch
from places import ROOT

pytestmark = pytest.mark.launch
JOB = Path(__file__).parent / "train_job.py"
# 13 validation examples: the last batch of 8 is padded, for the second process with more than one row.
SETTINGS = [
    *("--batch_size", "8"),
    *("--epochs", "3"),
    *("--accumulate", "2"),
    *("--dropout", "0"),
    *("--workers", "1"),
    *("--ema", "0.8"),
]


def arguments(folder):
    return ["--output_dir", str(folder / "run"), "--out", str(folder / "weights"), *SETTINGS]


def test_two_processes_equal_one(tmp_path, forked, environment):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    blocks = read_blocks(ROOT / "docs/guides/many_gpus.md")
    settings = tmp_path / "two_cpu_processes.yaml"
    settings.write_text(next(block.text for block in blocks if block.title == settings.name))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings)]
    command = [*launch, "--main_process_port", "0", str(JOB), *arguments(two)]
    launched = subprocess.Popen(
        command,
        env={**environment, "ACCELERATE_USE_CPU": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    finish(forked(JOB, *arguments(one)))
    said, _ = launched.communicate(timeout=120)
    assert launched.returncode == 0, said
    assert said.count("step    17/17") == 1, "both processes report"

    curves = [[json.loads(line) for line in (f / "run" / "log.jsonl").read_text().splitlines()] for f in (one, two)]
    assert len(curves[0]) == len(curves[1]) == 17 + 3
    for a, b in zip(*curves, strict=True):
        assert b == pytest.approx(a, abs=1e-5), "a line of the loss curve differs"
        assert a.get("accuracy") == b.get("accuracy")
    weights = load_file(one / "weights"), load_file(two / "weights")
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-5, rtol=0)


def prepare_launch(monkeypatch, *arguments):
    """The program that `accelerate launch ARGUMENTS` starts as its only process, and the variables of that process."""
    found = []
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(commands, "simple_launcher", lambda args: found.extend(prepare_simple_launcher_cmd_env(args)))
    commands.launch_command(commands.launch_command_parser().parse_args(list(arguments)))
    (python, *argv), environment = found
    assert python == sys.executable
    return argv, environment


def test_a_launch_of_one_process_for_several_is_refused(tmp_path, forked, monkeypatch):
    options = ["--cpu", "--num_processes", "2", "--main_process_port", "0"]
    argv, environment = prepare_launch(monkeypatch, *options, str(JOB), *arguments(tmp_path))
    launched = forked(*argv, environment=environment)
    launched.join(PATIENCE_S)
    assert launched.exitcode == 2
    assert "error: several processes were requested, but each would train by itself" in launched.said.read_text()
    assert list(tmp_path.iterdir()) == [], "a refused launch must leave nothing"


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    """As `accelerate launch --multi_gpu --num_processes 2` starts them on a machine without a GPU."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InlayError, match="2 processes were requested, but each would train by itself"):
        launch._check_process_count(SimpleNamespace(num_processes=1))

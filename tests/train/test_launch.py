"""Two processes on CPUs, and the launches that would silently be something else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.launch
JOB = Path(__file__).parent / "train_job.py"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
# 13 validation examples: the last batch of 8 is padded, for the second process with more than one row.
SETTINGS = [
    *("--batch_size", "8"),
    *("--epochs", "3"),
    *("--accumulate", "2"),
    *("--dropout", "0"),
    *("--workers", "1"),
]


def arguments(folder):
    return ["--output_dir", str(folder / "run"), "--out", str(folder / "weights"), *SETTINGS]


def test_two_processes_equal_one(tmp_path, forked, environment):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", str(JOB), *arguments(two)]
    launched = subprocess.Popen(
        launch,
        env={**environment, "ACCELERATE_USE_CPU": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    alone = forked(arguments(one))
    alone.join(60)
    assert alone.exitcode == 0
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


def test_launches_that_would_train_alone_are_refused(tmp_path, environment):
    for name in ("--cpu", "--multi_gpu"):
        (tmp_path / name).mkdir()
    environment = {k: v for k, v in environment.items() if k != "ACCELERATE_USE_CPU"}
    launched = {
        name: subprocess.Popen(
            [*LAUNCH, name, "--num_processes", "2", "--main_process_port", "0", str(JOB), *arguments(tmp_path / name)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("--cpu", "--multi_gpu")
    }
    for name, process in launched.items():
        said, _ = process.communicate(timeout=120)
        assert process.returncode != 0, said
        assert "error: 2 processes" in said or "error: several processes" in said
        assert "would train by itself" in said
        assert list((tmp_path / name).iterdir()) == [], "a refused launch must leave nothing"

"""A run that is killed or told to stop, and started again, ends bit for bit as one that was left alone.

The runs have two workers, dropout, and augmentation by all three global generators.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_launch import prepare_launch

import forked_program
from forked_program import PATIENCE_S, two_ranks
from inlay.files.atomic import PENDING_FILE

JOB = Path(__file__).with_name("train_job.py")
STEPS = 28
# Evaluations, checkpoints and epochs fall on different steps.
SETTINGS = [*("--batch_size", 8), *("--epochs", 5), *("--workers", 2), *("--eval_every", 8), *("--save_every", 3)]
SETTINGS += ["--pause", 0.005]


def command(folder):
    return [str(a) for a in (JOB, "--output_dir", folder / "run", "--out", folder / "weights", *SETTINGS)]


def logged(folder):
    """Steps in the log so far."""
    log = folder / "run" / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return sum('"gradient_norm"' in line for line in lines)


def wait_for_step(folder, step, alive):
    deadline = time.monotonic() + PATIENCE_S
    while logged(folder) < step:
        assert alive(), f"the run ended before step {step}"
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.002)


def kill_at(forked, folder, step, number=signal.SIGKILL):
    process = forked(*command(folder))
    wait_for_step(folder, step, process.is_alive)
    os.kill(process.pid, number)
    process.join(PATIENCE_S)
    return process.exitcode


def finish(forked, folder):
    forked_program.finish(forked(*command(folder)))


def outcome(folder):
    """The loss curve, the final weights and the result, without the times."""
    result = json.loads((folder / "run" / "finished.json").read_text())
    del result["seconds"], result["steps_per_second"]
    return (folder / "run" / "log.jsonl").read_text(), (folder / "weights").read_bytes(), result


@pytest.fixture(scope="module")
def undisturbed(forked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(forked, folder)
    log, weights, result = outcome(folder)
    rows = [json.loads(line) for line in log.splitlines()]
    assert [r["step"] for r in rows if "gradient_norm" in r] == list(range(1, STEPS + 1))
    assert [r["step"] for r in rows if "accuracy" in r] == [8, 16, 24, 28]
    return log, weights, result


@pytest.mark.parametrize("step", [1, 17, 27])
def test_killed_once(forked, undisturbed, tmp_path, step):
    assert kill_at(forked, tmp_path, step) == -signal.SIGKILL
    finish(forked, tmp_path)
    assert outcome(tmp_path) == undisturbed


def test_killed_again_and_again_at_random(forked, undisturbed, tmp_path):
    drawn = random.Random()
    step = 0
    while (step := step + drawn.randint(3, 12)) < STEPS - 1:
        assert kill_at(forked, tmp_path, step) == -signal.SIGKILL
    finish(forked, tmp_path)
    assert outcome(tmp_path) == undisturbed


def test_killed_in_the_middle_of_the_log_line_and_of_a_checkpoint(forked, undisturbed, tmp_path):
    assert kill_at(forked, tmp_path, 8) == -signal.SIGKILL
    run = tmp_path / "run"
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 9, "loss": 0.')
    (run / "last").rename(run / ".last.inlay-old")  # between the two renames
    (run / ".last.inlay-new").mkdir()
    finish(forked, tmp_path)
    assert outcome(tmp_path) == undisturbed
    assert sorted(p.name for p in run.iterdir()) == ["best", "finished.json", "log.jsonl", "run.json"]


def test_killed_before_the_first_step_and_in_the_middle_of_the_settings(forked, undisturbed, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / f"{PENDING_FILE}0a1b2c3d.run.json").write_text('{"ep')
    finish(forked, tmp_path)
    assert outcome(tmp_path) == undisturbed
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["best", "finished.json", "log.jsonl", "run.json"]


@pytest.mark.parametrize("step", [5, 15])  # before and after the first evaluation, whose workers are kept
def test_sigterm_saves_and_exits_143(forked, undisturbed, tmp_path, step):
    assert kill_at(forked, tmp_path, step, signal.SIGTERM) == 143
    stopped = logged(tmp_path)
    saved = json.loads((tmp_path / "run" / "last" / "progress.json").read_text())
    assert saved["step"] == stopped >= step, "the step that was under way must be saved"
    finish(forked, tmp_path)
    assert outcome(tmp_path) == undisturbed


def test_sigterm_to_one_of_two_processes_ends_both_and_their_workers(forked, tmp_path):
    processes = [forked(*command(tmp_path), environment=rank) for rank in two_ranks()]
    wait_for_step(tmp_path, 15, processes[0].is_alive)
    workers = [worker for process in processes for worker in psutil.Process(process.pid).children(recursive=True)]
    assert len(workers) >= 4
    os.kill(processes[0].pid, signal.SIGTERM)
    for process in processes:
        process.join(PATIENCE_S)
        assert process.exitcode == 143, process.said.read_text()
    assert psutil.wait_procs(workers, timeout=PATIENCE_S)[1] == [], "workers are left over"


def test_sigterm_to_every_process_as_schedulers_send_it(forked, undisturbed, tmp_path):
    process = forked(*command(tmp_path))
    wait_for_step(tmp_path, 5, process.is_alive)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    for one in (*workers, process):
        os.kill(one.pid, signal.SIGTERM)
    process.join(PATIENCE_S)
    assert process.exitcode == 143
    assert json.loads((tmp_path / "run" / "last" / "progress.json").read_text())["step"] == logged(tmp_path)
    assert psutil.wait_procs(workers, timeout=PATIENCE_S)[1] == [], "workers are left over"
    finish(forked, tmp_path)
    assert outcome(tmp_path) == undisturbed


def test_sigterm_to_the_group_of_a_program_leaves_nothing_behind(forked, undisturbed, tmp_path, environment):
    arguments = [sys.executable, *command(tmp_path)]
    begun = time.monotonic()
    process = subprocess.Popen(arguments, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True)
    wait_for_step(tmp_path, 15, lambda: process.poll() is None)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    stopped = time.monotonic()
    os.killpg(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143
    ended = time.monotonic()
    assert ended - stopped < stopped - begun, "the program hung at its exit: it took longer than its imports"
    assert psutil.wait_procs(family, timeout=PATIENCE_S)[1] == [], "workers are left over"
    saved = json.loads((tmp_path / "run" / "last" / "progress.json").read_text())["step"]
    assert f"stopped by SIGTERM after step {saved} of {STEPS}" in said
    assert saved == logged(tmp_path) >= 15
    finish(forked, tmp_path)
    assert outcome(tmp_path) == undisturbed


@pytest.mark.launch
def test_killed_under_accelerate_launch(forked, undisturbed, tmp_path, monkeypatch):
    argv, environment = prepare_launch(monkeypatch, "--num_processes", "1", "--cpu", *command(tmp_path))
    process = forked(*argv, environment=environment)
    wait_for_step(tmp_path, 13, process.is_alive)
    process.kill()
    process.join(PATIENCE_S)
    assert logged(tmp_path) < STEPS
    finish(forked, tmp_path)
    assert outcome(tmp_path) == undisturbed

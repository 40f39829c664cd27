"""Runs of a language model, whose batches are of about one length: resumed, shared, in pieces, on an 8-bit base."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from points import log_of, same
from safetensors.torch import load_file
from test_resume import logged, outcome, wait_for_step
from text_job import Paused, adapt, base, views

from forked_program import PATIENCE_S, finish, two_ranks
from inlay import TrainConfig, fit, load_base
from places import ROOT

JOB = Path(__file__).with_name("text_job.py")
# More than 32: lengths are sorted anew in the middle. Evaluations, checkpoints and epochs fall on different steps.
STEPS = 44
SETTINGS = [*("--batch_size", 8), *("--epochs", 8), *("--workers", 0), *("--eval_every", 15), *("--save_every", 4)]


def command(folder, *more):
    return [JOB, "--output_dir", folder / "run", "--out", folder / "weights", *SETTINGS, *more]


@pytest.fixture(scope="module")
def undisturbed(forked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(forked(*command(folder)))
    assert logged(folder) == STEPS
    return outcome(folder)


@pytest.mark.parametrize("step", [2, 34])
def test_a_killed_run_ends_bit_for_bit_as_one_left_alone(forked, undisturbed, tmp_path, step):
    process = forked(*command(tmp_path, "--pause", 0.01))
    wait_for_step(tmp_path, step, process.is_alive)
    os.kill(process.pid, signal.SIGKILL)
    process.join(PATIENCE_S)
    assert process.exitcode == -signal.SIGKILL and logged(tmp_path) < STEPS
    finish(forked(*command(tmp_path)))
    assert outcome(tmp_path) == undisturbed


def test_two_processes_equal_one_though_their_shares_hold_different_numbers_of_tokens(forked, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    more = ["--dropout", 0, "--accumulate", 2, "--epochs", 3]
    both = [forked(*command(two, *more), environment=rank) for rank in two_ranks()]
    for process in (forked(*command(one, *more)), *both):
        finish(process)
    for a, b in zip(log_of(one / "run"), log_of(two / "run"), strict=True):
        assert b == pytest.approx(a, abs=1e-5), "a line of the loss curve differs"
    same(load_file(one / "weights"), load_file(two / "weights"), atol=1e-5)


@pytest.mark.launch
def test_a_recipe_that_speaks_before_it_trains_runs_in_two_processes_as_in_one(forked, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f'{{"prompt": "p{i}", "completion": "{"word " * (i % 5 + 1)}"}}\n' for i in range(9)))
    options = ["--dataset", pairs, "--batch_size", 4, "--epochs", 1.5, "--max_new_tokens", 2]
    argv = [ROOT / "recipes" / "prompt_gpt2.py", *options, "--output_dir"]
    both = [forked(*argv, tmp_path / "two", environment=rank) for rank in two_ranks()]
    for process in (forked(*argv, tmp_path / "one"), *both):
        finish(process)
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert b == pytest.approx(a, abs=1e-5), "a line of the loss curve differs"
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    same(one, two, atol=1e-5)


def train(folder, model, **config):
    examples, held_out = views()
    config = TrainConfig(str(folder), **{"batch_size": 8, "epochs": 1, "workers": 0, **config})
    return fit(model, examples, held_out, config, collate=examples.collate, loss=Paused())


def small_memory(model, most):
    """The model as on a device where more than `most` rows do not fit; also in evaluation."""
    inner, seen = model.forward, []

    def forward(**inputs):
        seen.append(len(inputs["input_ids"]))
        if seen[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total of ...")
        return inner(**inputs)

    model.forward = forward
    return seen


def test_out_of_memory_halves_the_pieces_with_the_same_result(tmp_path, capsys):
    by_hand, small = adapt(base()), adapt(base())
    a = train(tmp_path / "hand", by_hand, accumulate=4)
    seen = small_memory(small, 2)
    b = train(tmp_path / "small", small)
    assert seen[:3] == [8, 4, 2] and max(seen[3:]) == 2
    assert "in 4 pieces" in capsys.readouterr().out
    same(by_hand, small)
    assert a.history == b.history


def test_pieces_of_different_numbers_of_tokens_add_up_to_the_whole(tmp_path):
    whole, pieces = adapt(base(dropout=0)), adapt(base(dropout=0))
    a = train(tmp_path / "whole", whole)
    b = train(tmp_path / "pieces", pieces, accumulate=4)
    same(whole, pieces, atol=1e-5)
    assert a.metrics == pytest.approx(b.metrics, abs=1e-5)


def test_the_loss_on_an_8_bit_base_is_within_2_percent(tmp_path):
    pytest.importorskip("bitsandbytes")
    base(dropout=0, width=64).save_pretrained(tmp_path / "base")
    losses = {}
    for quantize in (None, "8bit"):
        model = adapt(load_base(tmp_path / "base", quantize=quantize))
        run = tmp_path / f"run-{quantize}"
        result = train(run, model, epochs=30 * 8 / 44, learning_rate=1e-2)
        rows = [row["loss"] for row in log_of(run) if "gradient_norm" in row]
        assert len(rows) == 30 and result.steps == 30
        losses[quantize] = [sum(rows[-5:]) / 5, result.metrics["loss"], rows[0]]
    assert losses[None][0] < 0.7 * losses[None][2], "it must have learnt something"
    assert losses["8bit"] == pytest.approx(losses[None], rel=0.02) and losses["8bit"] != losses[None]
    assert json.loads((tmp_path / "run-8bit" / "finished.json").read_text())["steps"] == 30

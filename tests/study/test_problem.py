"""Trials on one base that is loaded once, each as if it were alone; and the file of what came of them."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from inlay import ImageTask, InlayError, TextTask, TrainConfig
from inlay.study.problem import Problem
from inlay.study.records import Records
from inlay.study.trial import Outcome, Trial
from inlay.train.loop import _Trainer
from inlay.train.run import WEIGHTS

LORA = Trial("lora", 3e-3, width=2, steps=3, seed=1)


def problem(digits, folder, **changes):
    train = TrainConfig(batch_size=4, epochs=1, workers=0)
    return Problem(ImageTask("builtin:vit-tiny", str(digits)), replace(train, **changes), folder)


def weights(problem, trial):
    return load_file(problem.folder_of(trial) / "best" / WEIGHTS)


@pytest.fixture(scope="module")
def after_others(digits, tmp_path_factory):
    """A problem in which LORA is the last of several trials."""
    made = problem(digits, tmp_path_factory.mktemp("study") / "s")
    for trial in (Trial("full", 1e-3, steps=2), Trial("visual-prompt", 1e-2, width=2, steps=2, seed=1)):
        assert not made.run(trial).failed
    made.run(LORA, test=True)
    return made


def test_a_trial_after_others_is_bit_for_bit_that_trial_alone(digits, after_others, tmp_path):
    alone = problem(digits, tmp_path / "alone")
    outcome = alone.run(LORA, test=True)
    own, other = weights(alone, LORA), weights(after_others, LORA)
    assert own.keys() == other.keys() and any("lora_B" in name for name in own)
    assert all(torch.equal(own[name], other[name]) for name in own)
    shared = after_others.run(LORA, test=True)
    assert shared.validation == outcome.validation and shared.test == outcome.test


def test_a_trial_computes_what_a_recipe_computes(digits, after_others, tmp_path):
    """The recipe's steps by hand, without a Problem."""
    from accelerate.utils import set_seed

    from inlay import METHODS, fit

    task, data = after_others.task, after_others.task.load(0)
    set_seed(LORA.seed)
    model = METHODS["lora"].adapt(task.base(data), LORA.width)
    steps = TrainConfig(
        str(tmp_path / "run"), batch_size=4, epochs=2.5 * 4 / len(data.train), workers=0, learning_rate=3e-3, seed=1
    )
    found = fit(model, after_others.data.train, after_others.data.validation, steps, metrics=data.metrics)
    assert found.steps == 3
    own, other = load_file(tmp_path / "run" / "best" / WEIGHTS), weights(after_others, LORA)
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)


def test_text_trials_do_not_depend_on_each_other_either(tmp_path):
    """Words are drawn for prompts, and a soft prompt starts from them: the generators matter."""
    rows = [{"prompt": f"name[{n}]", "completion": f"{n} is a pub."} for n in ("Fern", "Oak", "Cotto", "Zizzi", "Ash")]
    data = tmp_path / "pubs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    train, trial = TrainConfig(batch_size=2, epochs=1, workers=0), Trial("prompt", 1e-2, width=3, steps=2)
    shared, alone = (Problem(TextTask("builtin:gpt2-tiny", str(data)), train, tmp_path / name) for name in "ab")
    shared.run(Trial("attention-prefix", 1e-2, width=2, steps=1))
    outcome = shared.run(trial)
    assert outcome.validation == alone.run(trial).validation
    assert shared.main_score(outcome) == pytest.approx(math.exp(outcome.validation["loss"]))
    assert not shared.larger_is_better
    names, refused = shared.fits(["prompt", "lora"], width=250)
    assert names == ["lora"] and "do not hold a prompt of 250 and the longest example of" in refused["prompt"]


def test_a_base_in_8_bits_is_loaded_for_each_trial(digits, tmp_path):
    pytest.importorskip("bitsandbytes")
    task = ImageTask("builtin:vit-tiny", str(digits), quantize="8bit")
    trial = Trial("bottleneck", 1e-2, width=2, steps=1)
    first, second = (Problem(task, TrainConfig(batch_size=4, workers=0), tmp_path / name) for name in "ab")
    names, refused = first.fits(["lora", "full", "partial"])
    assert names == ["lora"] and "8 or 4 bits" in refused["full"] and refused.keys() == {"full", "partial"}
    first.run(Trial("lora", 1e-2, width=2, steps=1))
    assert first.run(trial).validation == second.run(trial).validation
    assert all(torch.equal(a, b) for a, b in zip(*(weights(p, trial).values() for p in (first, second)), strict=True))


def test_a_finished_trial_is_read_back_and_scored_without_training(digits, after_others, tmp_path, monkeypatch):
    again = problem(digits, shutil.copytree(after_others.folder, tmp_path / "again"))
    assert again.records.find(LORA) == after_others.run(LORA, test=True)

    def trained(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr("inlay.train.loop._Trainer.train", trained)
    assert again.run(replace(LORA, steps=3)).test is not None
    full = again.run(Trial("full", 1e-3, steps=2), test=True)  # its best weights are still there
    assert full.test.keys() == again.run(LORA).test.keys() and 0 <= full.test["accuracy"] <= 1
    assert full.validation == after_others.records.find(Trial("full", 1e-3, steps=2)).validation
    assert again.records.list_measured(full.trial) == {"test"}


def test_a_killed_trial_goes_on(digits, after_others, tmp_path, monkeypatch):
    killed = problem(digits, tmp_path / "k", save_every=1)
    take_step = _Trainer._take_step

    def die(trainer, batch, step, stop):
        if step == 2:
            raise KeyboardInterrupt
        return take_step(trainer, batch, step, stop)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Trainer, "_take_step", die)
        killed.run(LORA)
    assert killed.records.outcomes == []
    assert (killed.folder_of(LORA) / "last" / "progress.json").is_file()
    assert killed.run(LORA).validation == after_others.run(LORA).validation
    own, other = weights(killed, LORA), weights(after_others, LORA)
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_a_trial_that_diverges_is_an_outcome(digits, after_others, monkeypatch):
    broken = Trial("full", 1e30, steps=3)
    outcome = after_others.run(broken, test=True)
    assert outcome.failed.startswith("training broke at step 2: loss nan") and outcome.test is None
    assert math.isnan(after_others.main_score(outcome))
    monkeypatch.setattr(Problem, "compute", None)
    assert after_others.run(broken, test=True) == outcome


def test_steps_are_the_budget_and_the_schedule_is_over_them(digits, after_others):
    examples = after_others.parts.counts["train"]
    assert after_others.steps == math.ceil(examples / 4) and after_others.complete(Trial("lora", 1)).steps
    log = [json.loads(line) for line in (after_others.folder_of(LORA) / "log.jsonl").read_text().splitlines()]
    rates = [row["learning_rate"] for row in log if "learning_rate" in row]
    wanted = [LORA.learning_rate * (1 + math.cos(math.pi * step / 3)) / 2 for step in range(3)]  # cosine, no warm-up
    assert rates == pytest.approx(wanted)


def test_the_time_of_a_step_is_measured_once(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("inlay.study.problem._TIMED", 2)
    timed = problem(digits, tmp_path / "t")
    seconds = timed.measure_step(LORA)
    assert 0 < seconds < 5 and list(timed.folder.iterdir()) == [timed.folder / "trials.jsonl"]
    monkeypatch.setattr(Problem, "_time_steps", None)
    assert problem(digits, tmp_path / "t").measure_step(replace(LORA, seed=5)) == seconds


def test_what_fits_is_found_without_weights(digits, tmp_path):
    names, refused = problem(digits, tmp_path).fits()
    assert {"probe", "lora", "full", "visual-prompt"} <= {*names} and names[0] == "probe"
    assert refused["prompt"] == refused["spatial"] == "not made for an image classifier."
    assert "has no convolution of more than 1x1" in refused["conv-adapter"] and "name it" in refused["pissa"]
    assert problem(digits, tmp_path).fits(["pissa"])[0] == ["pissa"]
    with pytest.raises(InlayError, match="unknown method 'nothing'; choose some of probe, lora"):
        problem(digits, tmp_path).fits(["nothing"])
    assert not (tmp_path / "trials.jsonl").exists()


def test_places_are_chosen(digits, tmp_path):
    narrow = Trial("lora", 1e-3, width=2, blocks=(1,), modules="attention")
    trained = [n for n, p in problem(digits, tmp_path).adapt(narrow).named_parameters() if p.requires_grad]
    assert any(".layers.1.attention." in name for name in trained)
    assert all(".layers.1.attention." in name or "classifier" in name for name in trained)


OUTCOME = Outcome(Trial("lora", 1e-3, blocks=(0, 2), steps=5), validation={"loss": 0.5}, test={"accuracy": 1.0})


def test_a_torn_last_line_is_ignored_and_overwritten(tmp_path):
    path = tmp_path / "trials.jsonl"
    Records(path, {"batch_size": 4}).add(OUTCOME, {"test"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"outcome": {"trial": {"method": "fu')
    records = Records(path, {"batch_size": 4})
    assert records.outcomes == [OUTCOME] and records.list_measured(OUTCOME.trial) == {"test"}
    records.add(replace(OUTCOME, trial=replace(OUTCOME.trial, seed=1)))
    assert path.read_bytes().startswith(whole) and b'"fu' not in path.read_bytes()
    assert len(Records(path).outcomes) == 2


def test_a_later_line_replaces_an_earlier_one(tmp_path):
    records = Records(tmp_path / "trials.jsonl", {})
    records.add(replace(OUTCOME, test=None))
    records.add(OUTCOME, {"test"})
    assert Records(tmp_path / "trials.jsonl").outcomes == [OUTCOME]


def test_two_processes_in_one_folder_lose_nothing(tmp_path):
    first, second = (Records(tmp_path / "trials.jsonl", {}) for _ in range(2))
    first.add(OUTCOME)
    with pytest.raises(InlayError, match="another process is writing"):
        second.add(replace(OUTCOME, seconds=9.0))
    assert Records(tmp_path / "trials.jsonl").outcomes == [OUTCOME]
    first.add(replace(OUTCOME, trial=replace(OUTCOME.trial, seed=3)))
    assert len(Records(tmp_path / "trials.jsonl").outcomes) == 2


def test_records_of_another_study_and_damaged_ones_are_refused(digits, after_others, tmp_path):
    other = problem(digits, after_others.folder, batch_size=5)
    with pytest.raises(InlayError, match=r"holds a study with other settings \(batch_size 4 -> 5\); choose another"):
        other.run(LORA)
    Records(tmp_path / "trials.jsonl", {"a": 1})
    (tmp_path / "trials.jsonl").write_text('{"settings": {"a": 1}}\n{"outcome": {}}\n')
    with pytest.raises(InlayError, match=r"line 2 of .* is no trial"):
        Records(tmp_path / "trials.jsonl")


def test_processes_that_were_launched_together_are_refused(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("inlay.study.problem.PartialState", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(InlayError, match="start it as one process, and give jobs=2 or more"):
        problem(digits, tmp_path)

"""A search as a whole: the same at each start and after any interruption, within its budget, and what it leaves."""

import io
import json
import math
import runpy
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from command import run
from inlay import (
    BadInput,
    ComputationFailed,
    ImageTask,
    Outcome,
    Problem,
    TrainConfig,
    load_adapter,
    parse_budget,
    tune,
)
from inlay.adapters.study import read_study
from inlay.cli import app as cli
from inlay.files.atomic import lock_folder
from inlay.study.tune.length import Length
from inlay.study.tune.run import choose_methods
from inlay.study.tune.search import STRATEGIES
from inlay.study.tune.winner import suggest_longer_training


class Interruption(Exception):
    """A kill, as far as a test can have one."""


class Synthetic(Problem):
    """Trials that train nothing: the score is best at a learning rate of 1e-2, and for narrow adapters."""

    fails_at = None
    built: ClassVar[dict] = {}  # by what a trial adapts: counting reads a skeleton only

    def skeleton(self, trial):
        adapter = (trial.method, trial.width, trial.blocks, trial.modules)
        if adapter not in self.built:
            self.built[adapter] = super().skeleton(trial)
        return self.built[adapter]

    def compute(self, trial, measured=()):
        self.calls = [*getattr(self, "calls", []), trial]
        if len(self.calls) - 1 == self.fails_at:
            raise Interruption
        if trial.method == "bottleneck":
            return Outcome(trial, failed="the loss is NaN", seconds=1.0)
        score = 1 - abs(math.log10(trial.learning_rate) + 2) / 4 - trial.width / 1000 + trial.seed / 1e4
        score += 0.01 * (trial.blocks is not None and 0 in trial.blocks)
        test = {"accuracy": score - 0.05} if "test" in measured else None
        return Outcome(trial, {"accuracy": score, "loss": 1.0}, test=test, seconds=trial.steps * 0.5)


def synthetic(digits, folder, **changes):
    train = TrainConfig(batch_size=4, epochs=2, workers=0)  # 14 steps in all
    made = Synthetic(ImageTask("builtin:vit-tiny", str(digits)), train, folder)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


BUDGET = parse_budget("params=8k,trials=3")
METHODS_HERE = ("ssf", "bottleneck", "lora")


@pytest.fixture(scope="module")
def first(digits, tmp_path_factory):
    made = synthetic(digits, tmp_path_factory.mktemp("first") / "s")
    return made, tune(made, BUDGET, methods=METHODS_HERE, finals=2)


def list_trials(found):
    return [[each.trial for each in rung] for rung in found.rungs]


def test_two_starts_say_the_same(digits, first, tmp_path):
    again = tune(synthetic(digits, tmp_path / "s"), BUDGET, methods=METHODS_HERE, finals=2)
    assert str(again) == str(first[1]) and list_trials(again) == list_trials(first[1])
    other = tune(synthetic(digits, tmp_path / "t"), BUDGET, methods=METHODS_HERE, finals=2, seed=1)
    assert list_trials(other) != list_trials(first[1])


def test_killed_at_any_trial_and_started_again_it_ends_the_same(digits, first, tmp_path):
    made, found = first
    for place in range(len(made.calls)):
        killed = synthetic(digits, tmp_path / str(place), fails_at=place)
        with pytest.raises(Interruption):
            tune(killed, BUDGET, methods=METHODS_HERE, finals=2)
        again = synthetic(digits, tmp_path / str(place))
        assert str(tune(again, BUDGET, methods=METHODS_HERE, finals=2)) == str(found)
        assert killed.calls[:-1] + again.calls == made.calls  # nothing was run twice
    assert len(made.calls) >= 9


def test_the_winner_is_the_best_of_the_last_rung_and_failures_are_said(first):
    made, found = first
    assert found.winner.score == max(each.score for each in found.candidates)
    assert {each.trial.steps for each in found.candidates} == {made.steps}
    assert found.failed and "trials gave no score: the loss is NaN" in str(found)
    assert all("bottleneck" in key for key in found.failed)
    assert not any(each.trial.method == "bottleneck" for each in found.candidates)
    assert [final.trial for final in found.finals] == [replace(found.winner.trial, seed=seed) for seed in (1, 2)]
    assert found.test_scores == [final.test["accuracy"] for final in found.finals]
    assert found.fresh_scores == [final.validation["accuracy"] for final in found.finals]
    first_seed, second = (f"{found.winner.score + seed / 1e4:.4f}" for seed in (1, 2))  # as `compute` has it
    assert f"chooses: {found.winner.score:.4f} in the search, then {first_seed}, {second}\n" in str(found)
    front = found.find_front()
    assert [each.params for each in front] == sorted(each.params for each in front)
    assert all(a.score < b.score for a, b in pairwise(front))


def test_a_winner_that_profits_from_steps_comes_with_the_command_to_train_it_longer(first, tmp_path):
    made, found = first
    assert (found.length.short, found.length.long) == (5, 15)  # of the two rungs
    assert found.length.by_steps == 0 and f"length: {found.length}" in str(found)
    assert suggest_longer_training(found, made, tmp_path) == ""  # the score does not depend on the steps here
    rising = replace(found, length=Length("accuracy", 5, 15, by_steps=0.2, by_candidates=0.1))
    epochs = 45 * 4 / made.parts.counts["train"]  # three times as many steps again, of four examples
    expected = f"{tmp_path / 'recipe.sh'} --epochs {epochs:.3g} --output_dir longer"
    assert suggest_longer_training(rising, made, tmp_path) == expected
    assert suggest_longer_training(replace(found, length=None), made, tmp_path) == ""


def test_the_winner_may_be_trained_longer_than_the_trials(digits, first, tmp_path):
    made = synthetic(digits, tmp_path / "s")
    found = tune(made, BUDGET, methods=METHODS_HERE, finals=2, final_steps=60)
    assert list_trials(found) == list_trials(first[1]) and found.winner == first[1].winner
    assert [final.trial for final in found.finals] == [replace(found.winner.trial, seed=s, steps=60) for s in (1, 2)]
    assert "on the test part with 2 fresh seeds and 60 steps: " in str(found)
    # These runs are of the time too, which is kept for them from the start.
    limited = parse_budget("params=8k,seconds=120")
    short, long = (
        tune(synthetic(digits, tmp_path / str(steps)), limited, methods=["ssf"], finals=2, final_steps=steps)
        for steps in (None, 60)
    )
    assert long.seconds <= 120 and len(long.finals) == 2 and long.steps < short.steps
    with pytest.raises(BadInput, match="final_steps must be at least 1, got 0"):
        tune(made, BUDGET, final_steps=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_has_the_same_compute(digits, strategy, tmp_path):
    made = synthetic(digits, tmp_path / "s")
    found = tune(made, BUDGET, methods=["ssf"], strategy=strategy, finals=1)
    run = sum(trial.steps for trial in made.calls if trial.seed == 0)
    assert found.steps == run and 3 * made.steps - found.planned[0].steps < run <= 3 * made.steps


def test_seconds_are_a_limit_of_everything(digits, tmp_path):
    """A step takes half a second by the records."""
    made = synthetic(digits, tmp_path / "s")
    budget = parse_budget("params=8k,seconds=90")
    found = tune(made, budget, methods=["ssf"], finals=2)
    assert found.seconds <= 90 and found.seconds == sum(0.5 * trial.steps for trial in made.calls)
    assert 90 * 0.9 - found.seconds < 0.5 * made.steps  # no trial more would have had room
    again = tune(synthetic(digits, tmp_path / "s"), budget, methods=["ssf"], finals=2)
    assert again.planned == found.planned  # what the first run took is in the records
    # Half of the time is gone before: fewer candidates, but the last rung and the final trials are not left out.
    late = tune(synthetic(digits, tmp_path / "t"), budget, methods=["ssf"], finals=2, started=time.monotonic() - 45)
    assert late.seconds <= 45 and len(late.rungs[0]) < len(found.rungs[0])
    assert [len(rung) for rung in late.rungs] == [rung.count for rung in late.planned] and len(late.finals) == 2


def test_too_few_seconds_for_one_trial_are_said(digits, tmp_path):
    """A trial takes 7.5 s, and so does each of the final ones."""
    said = r"20 s are too few: after \d s a trial of 15 steps and 2 final runs of 15 need about 22 s more; allow"
    with pytest.raises(BadInput, match=said):
        tune(synthetic(digits, tmp_path / "s"), parse_budget("params=8k,seconds=20"), methods=["ssf"], finals=2)


def test_two_searches_in_one_folder_would_overwrite_each_other(digits, tmp_path):
    made = synthetic(digits, tmp_path / "s")
    with lock_folder(made.folder), pytest.raises(BadInput, match="another process is writing"):
        tune(made, BUDGET, methods=["ssf"])


def test_what_cannot_be_searched_is_said(digits, tmp_path):
    made = synthetic(digits, tmp_path / "s")
    with pytest.raises(BadInput, match="full makes no adapter"):
        choose_methods(made, ["full"])
    with pytest.raises(BadInput, match="conv-adapter does not fit builtin:vit-tiny"):
        choose_methods(made, ["lora", "conv-adapter"])
    with pytest.raises(BadInput, match="unknown method 'laura'"):
        choose_methods(made, ["laura"])
    with pytest.raises(BadInput, match="finals must be at least 1"):
        tune(made, BUDGET, finals=0)
    with pytest.raises(ComputationFailed, match="all trials failed; the first: the loss is NaN"):
        tune(made, BUDGET, methods=["bottleneck"])


@pytest.fixture(scope="module")
def real(digits, tmp_path_factory):
    """What the command leaves after a search that trains, and what it prints."""
    folder = tmp_path_factory.mktemp("real") / "s"
    arguments = ["tune", digits, "--base", "builtin:vit-tiny", "--budget", "params=5k,trials=2", "-o", folder]
    arguments += ["--methods", "ssf, lora", "--finals", 1, "--epochs", 2, "--batch-size", 12, "--augment", "crop"]
    arguments += ["--final-epochs", 3]
    said, told = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(told):
        patch.setattr("sys.argv", ["inlay", *map(str, arguments)])
        with pytest.raises(SystemExit) as status:
            cli.main()
    assert status.value.code in (0, None), told.getvalue()
    return folder, said.getvalue(), told.getvalue()


def test_a_real_search_saves_its_winner(real):
    folder, said, told = real
    facts = json.loads((folder / "search.json").read_text())
    loaded = load_adapter(folder / "best" / "adapter")
    trained = sum(p.numel() for n, p in loaded.model.named_parameters() if "default" in n and "modules_to" not in n)
    assert loaded.verified and trained == facts["params"] <= 5000
    assert (facts["winner"]["steps"], facts["final_steps"]) == (5, 8)  # 29 examples, 12 a step
    assert facts["winner"]["method"] in ("ssf", "lora") and len(facts["test"]) == 1
    assert f"{facts['params']:,} parameters" in said and f"trained again by {folder / 'best' / 'recipe.sh'}" in said
    assert len(told.splitlines()) == facts["trials"] + 1
    assert facts["length"] is None and "longer" not in said  # one rung
    study = read_study(loaded.metrics)
    assert (study["made_by"], study["strategy"], study["trials"]) == ("tune", "halving", facts["trials"])
    assert study["test"]["accuracy"]["mean"] == facts["test"][0]
    assert "to tell places apart" in study["placement"]
    card = (folder / "best" / "adapter" / "README.md").read_text()
    assert f"Winner of a search ({facts['trials']} runs, halving) on" in card
    assert (folder / "placement.png").is_file()
    assert not list((folder / "trials").iterdir())  # weights of trials are gone; what came of them is in trials.jsonl


def test_its_recipe_trains_the_same_adapter(real, tmp_path, monkeypatch, capsys):
    best = real[0] / "best"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", str(best / "config.yaml"), "--output_dir", "longer"])
    runpy.run_path(str(best / "train.py"), run_name="__main__")
    assert "saved longer/adapter" in capsys.readouterr().out
    saved, again = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (best, tmp_path / "longer"))
    assert saved.keys() == again.keys() and all(torch.equal(saved[key], again[key]) for key in saved)
    script = (best / "recipe.sh").read_text()
    assert script.splitlines()[-1] == 'cd "$(dirname "$0")" && accelerate launch train.py config.yaml "$@"'


def test_a_mistake_on_the_command_line_is_one_sentence(digits, tmp_path, capsys, monkeypatch):
    for option, value, match in (
        ("--budget", "params=0", "params=0 is no limit"),
        ("--strategy", "hyperband", "unknown strategy 'hyperband'"),
        ("--methods", "full", "full makes no adapter"),
        ("--augmint", "none", "there is no option --augmint"),
    ):
        asked = ["tune", digits, "--base", "builtin:vit-tiny", "-o", tmp_path / "s", option, value]
        status, out, err = run(capsys, monkeypatch, *asked)
        assert (status, out) == (2, "") and match in err and err.count("\n") == 1

"""Methods at their best learning rate: chosen on one part of the data, scored on another."""

import math
from dataclasses import replace

import pytest

from inlay import ImageTask, InlayError, TrainConfig, compare, load_base
from inlay.methods import METHODS
from inlay.study import compare as module
from inlay.study.compare import _Search, sort_rows
from inlay.study.comparison import Row
from inlay.study.problem import Problem
from inlay.study.records import Records
from inlay.study.trial import Outcome, Trial

QUICK = {"width": 2, "steps": 2, "costs": False, "forgetting": False, "tell": None}


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "vision" in method.bases])
def test_a_method_trains_what_it_says(name):
    model = load_base("builtin:vit-tiny", labels=["a", "b"])
    frozen = {id(p) for n, p in model.named_parameters() if not n.startswith("classifier")}
    trained = {n: p for n, p in METHODS[name].adapt(model, 4).named_parameters() if p.requires_grad}
    assert any("classifier" in n for n in trained)
    assert any(id(p) in frozen for p in trained.values()) == (name == "full")
    assert any("classifier" not in n for n in trained) == (name != "probe")


class Judged:
    """Stands for a Problem: the loss of a rate is its distance from the best one, in decades."""

    larger_is_better = True

    def __init__(self, best, broken=math.inf):
        self.best, self.broken = best, broken

    def complete(self, trial):
        return trial

    def run(self, trial):
        if trial.learning_rate > self.broken:
            return Outcome(trial, failed="training broke at step 1: loss nan.")
        return Outcome(trial, validation={"loss": abs(math.log10(trial.learning_rate / self.best))})

    def main_score(self, outcome):
        return math.nan if outcome.failed else -outcome.validation["loss"]


def search(problem, rates=None):
    """All rates that are tried in the end, in their order."""
    found = _Search.plan(problem, Trial("lora", 1e-2), rates, (0.1, 0.316, 1.0, 3.16))
    module._search_rates([found], lambda what, trials: [problem.run(trial) for trial in trials])
    return found


@pytest.mark.parametrize(
    ("problem", "tried", "best", "edge"),
    [
        (Judged(3e-3), [0.001, 0.0032, 0.01, 0.032], 0.0032, False),
        (Judged(3e-2), [0.001, 0.0032, 0.01, 0.032, 0.1], 0.032, False),
        (Judged(1e-1), [0.001, 0.0032, 0.01, 0.032, 0.1, 0.32], 0.1, False),
        (Judged(1e1), [0.001, 0.0032, 0.01, 0.032, 0.1, 0.32], 0.32, True),  # two half-decades and no more
        (Judged(1e-9), [0.001, 0.0032, 0.01, 0.032, 0.00032, 0.0001], 0.0001, True),
        (Judged(1e-1, broken=2e-3), [0.001, 0.0032, 0.01, 0.032, 0.00032], 0.001, False),
        (Judged(1e-1, broken=1e-9), [0.001, 0.0032, 0.01, 0.032, 0.00032, 0.0001], None, False),
    ],
)
def test_a_grid_grows_where_its_best_rate_is_at_an_edge(problem, tried, best, edge):
    found = search(problem)
    assert (found.rates, found.best, found.edge) == (tried, best, edge)
    assert len(found.list_finals([0, 1, 2])) == (0 if best is None else 3)


def test_rates_that_are_given_are_those_that_are_tried():
    assert search(Judged(1.0), [1e-3, 1e-4]).rates == [1e-4, 1e-3]
    assert search(Judged(1.0), {"lora": [5e-4]}).rates == [5e-4]
    assert len(search(Judged(3e-3), {"ia3": [5e-4]}).rates) == 4


def test_among_equal_scores_the_smallest_loss_chooses():
    problem = Judged(1e-2)
    problem.main_score = lambda outcome: 0.5
    assert search(problem, [1e-3, 1e-2, 1e-1]).best == 1e-2


def test_rows_stand_by_their_means():
    def row(name, *scores):
        return Row(name, 1e-3, 8, {}, False, {"s": list(scores)} if scores else {}, [])

    rows = [row("none"), row("low", 0.1, 0.3), row("one", math.nan, 0.9), row("high", 0.5, 0.7)]
    assert [r.method for r in sort_rows(rows, "s", True)] == ["one", "high", "low", "none"]
    assert [r.method for r in sort_rows(rows, "s", False)] == ["low", "high", "one", "none"]


@pytest.fixture(scope="module")
def compared(digits, tmp_path_factory):
    """Makes a comparison of two methods at two rates, one of which breaks a training; its folder; what was told."""
    folder, told = tmp_path_factory.mktemp("c") / "run", []
    options = {**QUICK, "methods": ["probe", "full", "prompt"], "learning_rates": [1e-2, 1e30], "tell": told.append}
    task, train = ImageTask("builtin:vit-tiny", str(digits)), TrainConfig(str(folder), batch_size=4, workers=0)
    return lambda seeds=(3, 5): compare(task, train, **{**options, "costs": True, "seeds": seeds}), folder, told


def test_a_comparison_says_what_was_tried_and_what_it_cost(digits, compared, monkeypatch):
    run, folder, told = compared
    monkeypatch.setattr("inlay.study.problem.measure_trial", lambda model, data, train: {"mmacs": 5.0})
    found = run()
    assert (found.base, found.data, found.task) == ("builtin:vit-tiny", str(digits), "image-classification")
    assert (found.score, found.larger_is_better, found.seeds) == ("accuracy", True, [3, 5])
    assert found.budget == {"steps": 2, "batch_size": 4} and sum(found.counts.values()) == 45
    assert found.refused == {"prompt": "not made for an image classifier."}
    by_name = {row.method: row for row in found.rows}
    full = by_name["full"]
    assert by_name.keys() == {"probe", "full"} and full.learning_rate == 1e-2
    assert math.isnan(full.curve[1e30]) and full.curve[1e-2] == full.validation[0]
    assert len(full.failed) == 1 and full.failed[0].startswith("learning rate 1e+30, seed 3: training broke at step 2")
    assert all(len(values) == 2 for values in full.scores.values()) and {"accuracy", "ece"} <= full.scores.keys()
    assert full.costs.keys() == {"mmacs", "steps_per_second"} and full.costs["steps_per_second"] > 0
    assert 0 < found.search_seconds < found.seconds == sum(row.seconds for row in found.rows)
    assert told[0].startswith("rates 1/4: probe, width 2, learning rate 0.01, seed 3: accuracy 0.")
    assert sum(line.startswith("test ") for line in told) == 4 and ", test 0." in told[4]
    tried = Records(folder / "trials.jsonl").outcomes
    assert len(tried) == 6 and sum(outcome.test is not None for outcome in tried) == 4
    assert all(outcome.test is None for outcome in tried if outcome.trial.learning_rate == 1e30)


def test_it_is_read_back_whole_and_goes_on_with_further_seeds(compared, monkeypatch):
    run, _, _ = compared
    found, computed = run(), []
    compute = Problem.compute
    monkeypatch.setattr(Problem, "compute", lambda self, trial, *a: computed.append(trial) or compute(self, trial, *a))
    assert run().to_dict() == found.to_dict() and computed == []
    more = run(seeds=(3, 5, 6))
    assert {trial.seed for trial in computed} == {6} and len(computed) == 2
    assert [row.scores["accuracy"][:2] for row in more.rows] == [row.scores["accuracy"] for row in found.rows]


def test_seeds_follow_from_the_time_of_a_run():
    def outcomes(seconds):
        found = search(Judged(3e-3))
        return [replace(found, tried={rate: replace(o, seconds=seconds) for rate, o in found.tried.items()})]

    assert module._choose_seed_count(outcomes(59)) == 5 and module._choose_seed_count(outcomes(61)) == 3


@pytest.fixture
def instant(monkeypatch):
    """Trials that take no time; gives all that are asked for."""
    asked = []

    def run_trials(problem, trials, **options):
        asked.extend(trials)
        return [Outcome(trial, {"loss": 1.0, "accuracy": 0.5}, test={"accuracy": trial.seed / 10}) for trial in trials]

    monkeypatch.setattr(module, "run_trials", run_trials)
    monkeypatch.setattr(module, "save_best", lambda problem, comparison: None)
    monkeypatch.setattr(Problem, "measure_step", lambda self, trial: 0.5 if trial.method == "lora" else 0.25)
    return asked


def test_equal_seconds_are_steps_of_each_method(digits, tmp_path, instant):
    task, train = ImageTask("builtin:vit-tiny", str(digits)), TrainConfig(str(tmp_path / "run"), batch_size=4)
    found = compare(task, train, methods=["lora", "probe"], seconds=1.25, forgetting=False, tell=None)
    assert {row.method: row.steps for row in found.rows} == {"lora": 2, "probe": 5}
    assert {(trial.method, trial.steps) for trial in instant} == {("lora", 2), ("probe", 5)}
    assert found.budget == {"seconds": 1.25, "batch_size": 4} and found.seeds == [0, 1, 2, 3, 4]
    assert found.rows[0].scores == {"accuracy": [0, 0.1, 0.2, 0.3, 0.4]}


def test_equal_epochs_are_steps_too(digits, tmp_path, instant):
    task, train = ImageTask("builtin:vit-tiny", str(digits)), TrainConfig(str(tmp_path / "run"), batch_size=4, epochs=2)
    found = compare(task, train, methods=["lora", "probe"], seeds=[7], width=3, forgetting=False, tell=None)
    wanted = math.ceil(2 * found.counts["train"] / 4)
    assert found.budget["steps"] == wanted and {(t.steps, t.width, t.seed) for t in instant} == {(wanted, 3, 7)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"methods": ["nothing"]}, "unknown method 'nothing'; choose some of probe, lora"),
        ({"methods": ["prompt"]}, "no method to compare on builtin:vit-tiny: prompt: not made for an image classifier"),
        ({"seeds": []}, "seeds must be different whole numbers from 0, at least one"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"width": 0}, "width must be over 0, got 0"),
        ({"seconds": 1.0}, "the budget is in steps or in seconds; give one of them"),
        ({"steps": None, "seconds": -1}, "seconds must be over 0, got -1"),
        ({"jobs": 0}, "jobs must be at least 1, not 0"),
        ({"engine": "slurm"}, "unknown engine 'slurm'; choose one of processes, ray, dask"),
        ({"learning_rates": [-1e-3]}, r"learning_rates must be one number over 0 or more, got \[-0.001\]"),
        ({"learning_rates": {"lora": []}}, r"learning_rates lora must be one number over 0 or more, got \[\]"),
        ({"factors": [0]}, "factors must be one number over 0 or more"),
    ],
)
def test_a_mistake_is_found_before_anything_is_trained(digits, tmp_path, changes, sentence):
    task, train = ImageTask("builtin:vit-tiny", str(digits)), TrainConfig(str(tmp_path / "run"), workers=0)
    with pytest.raises(InlayError, match=sentence):
        compare(task, train, **{**QUICK, "methods": ["probe"], **changes})
    assert not (tmp_path / "run" / "trials.jsonl").exists()


def test_two_at_a_time_would_overwrite_each_other(digits, tmp_path):
    from inlay.files.atomic import lock_folder

    task, train = ImageTask("builtin:vit-tiny", str(digits)), TrainConfig(str(tmp_path / "run"), workers=0)
    with lock_folder(tmp_path / "run"), pytest.raises(InlayError, match="another process is writing"):
        compare(task, train, **QUICK)


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("dask", "distributed")])
def test_an_engine_that_is_not_installed_is_named(digits, tmp_path, monkeypatch, engine, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(InlayError, match=rf"the engine {engine} is not installed \(.*\): pip install"):
        compare(ImageTask("builtin:vit-tiny", str(digits)), TrainConfig(str(tmp_path)), engine=engine, jobs=2)

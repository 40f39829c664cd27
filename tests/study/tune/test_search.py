"""The rungs of a search, on objectives whose best is known."""

import math
from itertools import count

import pytest

from inlay import BadInput, Trial
from inlay.study.tune.search import (
    ETA,
    STRATEGIES,
    Rung,
    count_steps,
    find_best,
    plan_rungs,
    run_rungs,
    sort_by_score,
)


def candidates():
    """Trials that differ in their width."""
    return (Trial("lora", 1e-3, width) for width in count(1))


def search(rungs, objective, **options):
    """The rungs of a search, and how many steps each call had."""
    steps = []

    def score(trials):
        steps.extend(trial.steps for trial in trials)
        return [objective(trial) for trial in trials]

    return run_rungs(rungs, candidates(), score, **options), steps


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("trials", "steps", "epoch"), [(1, 30, 6), (2, 30, 30), (4, 31, 7), (12, 30, 6), (17, 100, 9), (5, 1, 1), (6, 2, 1)]
)
def test_all_strategies_have_the_same_compute_to_within_a_run(strategy, trials, steps, epoch):
    for total in (trials * steps, trials * steps + steps // 2):
        rungs = plan_rungs(strategy, total, steps, epoch)
        assert total - rungs[0].steps < count_steps(rungs) <= total
        assert rungs[-1].steps == steps and rungs[-1].count >= 1
        _, run = search(rungs, lambda trial: trial.width)
        assert sum(run) == count_steps(rungs)


def test_plans_as_counted_by_hand():
    assert plan_rungs("halving", 360, 30, 6) == [Rung(18, 10), Rung(6, 30)]  # 18 x 10 + 6 x 30
    assert plan_rungs("topk", 360, 30, 6) == [Rung(30, 6), Rung(6, 30)]
    assert plan_rungs("random", 360, 30, 6) == [Rung(12, 30)]


@pytest.mark.parametrize("steps", [3, 10, 29, 100])
def test_the_first_rung_of_halving_is_a_third_or_more(steps):
    first, last = plan_rungs("halving", 20 * steps, steps, 1)
    assert first.steps >= steps / 3 and first.steps - 1 < steps / 3
    assert first.count >= ETA * last.count


def test_halving_finds_the_best_of_its_candidates():
    found, _ = search(plan_rungs("halving", 360, 30, 6), lambda trial: -abs(trial.width - 7.2))
    assert find_best(found).trial == Trial("lora", 1e-3, 7, steps=30)
    assert [each.trial.width for each in found[1]] == [7, 8, 6, 9, 5, 10]
    assert {each.trial.steps for each in found[0]} == {10}


def test_what_one_epoch_hides_is_found_by_longer_rungs():
    """Slow starters: after one epoch the narrow ones lead, in the end the wide ones do."""
    learns = {6: lambda width: -width, 10: lambda width: min(width, 14), 30: lambda width: width}

    def objective(trial):
        return learns[trial.steps](trial.width)

    best = {s: find_best(search(plan_rungs(s, 360, 30, 6), objective)[0]).trial.width for s in STRATEGIES}
    assert best["topk"] == 6  # the best of the six that led after one epoch
    assert best["random"] == 12  # the best of those that it could afford
    assert best["halving"] >= 18


def test_runs_that_fail_go_no_further():
    found, _ = search(plan_rungs("halving", 360, 30, 6), lambda t: math.nan if t.width % 2 else t.width)
    assert [each.trial.width for each in found[1]] == [18, 16, 14, 12, 10, 8]
    found, _ = search([Rung(3, 10), Rung(1, 30)], lambda t: math.nan if t.steps == 30 or t.width == 1 else t.width)
    assert find_best(found).trial == Trial("lora", 1e-3, 3, steps=10)  # of the last rung that gave a score
    found, _ = search([Rung(3, 10), Rung(1, 30)], lambda trial: math.nan)
    assert find_best(found) is None and found[1] == []


def test_equal_scores_stay_in_their_order():
    found, _ = search([Rung(4, 10)], lambda trial: 1.0)
    assert [each.trial.width for each in sort_by_score(found[0])] == [1, 2, 3, 4]


@pytest.mark.parametrize("at_once", [1, 3, 5])
def test_several_at_a_time_are_the_same_search(at_once):
    plan = plan_rungs("halving", 360, 30, 6)
    alone, _ = search(plan, lambda trial: math.sin(trial.width))
    assert search(plan, lambda trial: math.sin(trial.width), at_once=at_once)[0] == alone


@pytest.mark.parametrize("at_once", [1, 4])
def test_where_the_time_runs_out_the_rung_ends(at_once):
    left = iter([True] * 7)
    found, steps = search(
        plan_rungs("halving", 360, 30, 6),
        lambda t: t.width,
        may_start=lambda t, after: next(left, False),
        at_once=at_once,
    )
    assert len(found[0]) == 7 and found[1] == [] and steps == [10] * 7
    assert find_best(found).trial.width == 7


def test_before_each_run_the_steps_of_later_rungs_are_told():
    asked = []
    search([Rung(4, 10), Rung(2, 30)], lambda t: t.width, may_start=lambda t, after: asked.append(after) or True)
    assert asked == [60] * 4 + [0] * 2


def test_what_no_search_can_be_made_of_is_said():
    with pytest.raises(BadInput, match="halving, random, topk"):
        plan_rungs("hyperband", 100, 10, 1)
    with pytest.raises(BadInput, match="5 steps are too few for one trial of 10"):
        plan_rungs("random", 5, 10, 1)

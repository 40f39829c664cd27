"""Whether longer trials would have brought more than further candidates, as the rungs of a search tell."""

import statistics
from dataclasses import replace
from itertools import combinations

import pytest

from inlay import Trial
from inlay.study.tune.length import compare_lengths, expect_best
from inlay.study.tune.search import Scored

NAN = float("nan")


def rung(steps, *scores, first=0):
    """Trials that differ in their rate, which is their number."""
    return [Scored(Trial("lora", float(first + i), steps=steps), score) for i, score in enumerate(scores)]


@pytest.mark.parametrize("count", range(1, 6))
def test_the_best_of_fewer_is_the_mean_over_all_choices(count):
    scores = [0.3, 0.9, 0.5, 0.5, -1.0]
    assert expect_best(scores, count) == pytest.approx(statistics.fmean(map(max, combinations(scores, count))))


def test_steps_are_told_from_candidates():
    short = rung(24, 0.6, 0.5, 0.4, 0.5, 0.3, 0.3)
    long = [replace(each, trial=replace(each.trial, steps=72), score=each.score + 0.25) for each in short[:2]]
    found = compare_lengths([short, long], "accuracy")
    assert (found.short, found.long) == (24, 72) and found.by_steps == pytest.approx(0.25)
    scores = [each.score for each in short]  # six: a third of them is two
    assert found.by_candidates == pytest.approx(0.6 - statistics.fmean(map(max, combinations(scores, 2))))
    assert found.longer_is_better
    assert str(found) == (
        f"3 times the steps improved accuracy by 0.2500, 3 times the candidates by {found.by_candidates:.4f}: "
        "train the winner longer before you search again"
    )


def test_steps_that_bring_less_are_not_advised():
    short = rung(20, 0.9, 0.2, 0.2)
    for gain in (0.05, -0.1):
        found = compare_lengths(
            [short, [replace(short[0], trial=replace(short[0].trial, steps=40), score=0.9 + gain)]], "f1"
        )
        assert found.by_steps == pytest.approx(gain) and not found.longer_is_better
        assert str(found).startswith("2 times the steps improved f1 by ") and "longer" not in str(found)
    flat = rung(20, 0.5, 0.5)
    found = compare_lengths([flat, [replace(each, trial=replace(each.trial, steps=40)) for each in flat]], "f1")
    assert (found.by_steps, found.by_candidates, found.longer_is_better) == (0.0, 0.0, False)


def test_trials_that_failed_or_have_one_length_say_nothing():
    assert compare_lengths([rung(72, 0.5, 0.6)], "accuracy") is None
    assert compare_lengths([rung(24, 0.5, 0.6), rung(72, NAN)], "accuracy") is None
    assert compare_lengths([rung(24, 0.5, 0.6), []], "accuracy") is None
    assert compare_lengths([rung(24, 0.5), rung(72, 0.9, first=7)], "accuracy") is None
    found = compare_lengths([rung(24, NAN, 0.5, 0.4), rung(72, NAN, 0.8)], "accuracy")
    assert found.by_steps == pytest.approx(0.3) and found.by_candidates == pytest.approx(0.05)

"""What a search says about its length: whether longer trials would have brought more than further candidates."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from inlay.study.tune.search import Scored


@dataclass(frozen=True)
class Length:
    """What more steps brought, next to what as many times the candidates did.

    Attributes:
        score: Its name.
        short: Steps of a trial of the first rung.
        long: Steps of a trial of the last one.
        by_steps: Median improvement of the trials that are in both rungs, each of which has its own schedule, down to
            its own end. The trials were chosen by their first score, which is too good by chance, so that this is
            rather too small.
        by_candidates: The best score of the first rung, less the mean of the best one among `short / long` of its
            candidates: what the last of them were worth.
    """

    score: str
    short: int
    long: int
    by_steps: float
    by_candidates: float

    @property
    def longer_is_better(self) -> bool:
        """Whether the steps brought more than the candidates."""
        return self.by_steps > max(0.0, self.by_candidates)

    def __str__(self) -> str:
        times = f"{self.long / self.short:.2g} times"
        said = (
            f"{times} the steps improved {self.score} by {self.by_steps:.4f}, "
            f"{times} the candidates by {self.by_candidates:.4f}"
        )
        return f"{said}: train the winner longer before you search again" if self.longer_is_better else said


def compare_lengths(rungs: Sequence[Sequence[Scored]], score: str) -> Length | None:
    """What the rungs of a search say about its length; None where no trial has two lengths.

    Args:
        rungs: Scores the larger the better.
        score: Its name.
    """
    runs = [[each for each in rung if not each.failed] for rung in rungs if rung]
    if len(runs) < 2:
        return None
    first = {replace(each.trial, steps=0): each.score for each in runs[0]}
    gains = [each.score - first[same] for each in runs[-1] if (same := replace(each.trial, steps=0)) in first]
    if not gains:
        return None
    short, long = runs[0][0].trial.steps, runs[-1][0].trial.steps
    scores = [each.score for each in runs[0]]
    fewer = max(1, round(len(scores) * short / long))
    return Length(score, short, long, statistics.median(gains), max(scores) - expect_best(scores, fewer))


def expect_best(scores: Sequence[float], count: int) -> float:
    """The mean, over all choices of `count` of the scores, of the largest one that is chosen."""
    ways = math.comb(len(scores), count)
    return sum(math.comb(i, count - 1) * score for i, score in enumerate(sorted(scores))) / ways

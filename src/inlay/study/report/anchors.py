"""What others published of the same methods, to set next to one's own results; the figures are in anchors.json."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from inlay.study.comparison import Comparison
from inlay.study.report.standing import find_best

NOT_COMPARABLE = (
    "Their base, data and budgets are others, so that their numbers cannot be compared with those of this comparison; "
    "only their order can be held next to it."
)


@dataclass(frozen=True)
class Anchor:
    """A published score: what it is of in the paper's words, the row of METHODS that it is nearest to, percent."""

    theirs: str
    method: str
    score: float


@dataclass(frozen=True)
class Anchors:
    """Published scores with their source, and a sentence on what they are."""

    source: str
    said: str
    rows: list[Anchor]


@cache
def load_anchors() -> Anchors:
    """Those of image classifiers that stand in anchors.json."""
    stored = json.loads(Path(__file__).with_name("anchors.json").read_text(encoding="utf-8"))
    return Anchors(stored["source"], stored["said"], [Anchor(**row) for row in stored["rows"]])


def find_anchors(comparison: Comparison) -> list[Anchor]:
    """Those of the methods of a comparison, the best first; none where its score is no accuracy."""
    if comparison.score != "accuracy" or find_best(comparison) is None:
        return []
    compared = {row.method for row in comparison.rows}
    return [anchor for anchor in load_anchors().rows if anchor.method in compared]

"""One run of a study, and what came of it."""

from dataclasses import dataclass, field
from typing import Any, Literal

Modules = Literal["all", "attention", "mlp"]


@dataclass(frozen=True)
class Trial:
    """What is trained, all of it chosen before.

    Attributes:
        method: Name in METHODS.
        learning_rate: Peak.
        width: Rank or other width of the adapter.
        blocks: Numbers of the base's blocks, from 0, where the method attaches; None: all.
        modules: Which layers of a block.
        steps: Of the optimiser.
        seed: Of the order of the data, augmentation, dropout and new weights; the split is that of the problem.
    """

    method: str
    learning_rate: float
    width: int = 8
    blocks: tuple[int, ...] | None = None
    modules: Modules = "all"
    steps: int = 0
    seed: int = 0

    @property
    def key(self) -> str:
        """Says the same for the same trial, and is short enough for the name of a folder."""
        sites = "" if self.blocks is None else "-b" + ".".join(map(str, self.blocks))
        sites += "" if self.modules == "all" else f"-{self.modules}"
        return f"{self.method}-w{self.width}{sites}-lr{self.learning_rate:.4g}-n{self.steps}-s{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        trial: That was run.
        validation: Loss and metrics on the part that chooses, at the best evaluation.
        test: Scores on the part that chooses nothing, by name; None where they were not asked for.
        forgetting: What the base lost, by name; empty where it was not asked for.
        costs: As `Row.costs` of a comparison.
        seconds: Of training and scoring.
        failed: Why there are no scores, in a sentence: the loss became NaN, memory ran out.
    """

    trial: Trial
    validation: dict[str, float] = field(default_factory=dict)
    test: dict[str, float] | None = None
    forgetting: dict[str, float] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    failed: str = ""

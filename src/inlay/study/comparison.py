"""The result of comparing methods on one task, as it is stored, printed and drawn."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One method at its best learning rate.

    Attributes:
        method: Name in METHODS.
        learning_rate: That the part that chooses found best.
        width: Of the adapter.
        curve: Every learning rate that was tried, with the main score on the part that chooses; NaN where it diverged.
        edge: Whether the best rate is the smallest or largest that was tried.
        scores: Of the test part by name, one value per seed in the order of the comparison's seeds.
        validation: The main score of the part that chooses, one per seed.
        forgetting: One value per seed, by name: `own_task` (fall of the base's own main score, in its unit),
            `text_loss` (rise of the loss per token on held-out pre-training text, nats), `drift` (1 - linear CKA of the
            last features before and after, 0 to 1).
        costs: trainable_parameters, file_bytes, mmacs, base_mmacs, latency_ms, base_latency_ms, merged_latency_ms
            (absent where the method does not merge), peak_bytes (of a training step), energy_j, base_energy_j,
            steps_per_second. What could not be measured is absent.
        merges: It folds into the base's weights.
        seconds: Of all its runs, the search for the rate included.
        failed: Runs that gave no score, and why.
    """

    method: str
    learning_rate: float
    width: int
    curve: dict[float, float]
    edge: bool
    scores: dict[str, list[float]]
    validation: list[float]
    forgetting: dict[str, list[float]] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)
    merges: bool = False
    seconds: float = 0.0
    failed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """Methods on one base and task.

    Attributes:
        base: Its name.
        data: Its name.
        task: Name in TASKS.
        score: The main score of the test part, by which rows are ordered.
        larger_is_better: Whether a larger one is better.
        seeds: Of every row.
        counts: Examples to train on, of the part that chooses, and of the test part: train, validation, test.
        budget: What every run had: `steps` and `batch_size`, or `seconds`.
        rows: One per method, the best first.
        refused: Methods that do not fit the base, and why.
        search_seconds: Of all runs that only chose a learning rate.
        seconds: Of everything.
        about: Device, threads, versions, and further settings, as JSON takes them.
    """

    base: str
    data: str
    task: str
    score: str
    larger_is_better: bool
    seeds: list[int]
    counts: dict[str, int]
    budget: dict[str, float]
    rows: list[Row]
    refused: dict[str, str] = field(default_factory=dict)
    search_seconds: float = 0.0
    seconds: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)

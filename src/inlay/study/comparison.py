"""The result of comparing methods on one task, as it is stored, printed and drawn."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from inlay.errors import DamagedFile, Unsupported
from inlay.files.atomic import write_json
from inlay.files.bounded_json import parse_json
from inlay.methods import METHODS


@dataclass(frozen=True)
class Row:
    """One method at its best learning rate.

    Attributes:
        method: Name in METHODS.
        learning_rate: That the part that chooses found best.
        width: Of the adapter.
        steps: Of each of its runs; they differ between methods where the budget is in seconds.
        curve: Every learning rate that was tried, with the main score on the part that chooses; NaN where it diverged.
        edge: Whether the best rate is the smallest or largest that was tried.
        scores: Of the test part by name, one value per seed in the order of the comparison's seeds.
        validation: The main score of the part that chooses, one per seed.
        forgetting: One value per seed, by name: `own_task` (fall of the base's own main score, in its unit),
            `text_loss` (rise of the loss per token on held-out pre-training text, nats), `drift` (1 - linear CKA of the
            last features before and after, 0 to 1).
        costs: trainable_parameters, file_bytes, mmacs, base_mmacs, latency_ms, base_latency_ms, merged_latency_ms
            (absent where the method does not merge), peak_bytes (of a training step), energy_j, base_energy_j,
            steps_per_second. What could not be measured is absent; `measure_trial` says how the rest was.
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
    steps: int = 0
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

    @property
    def subject(self) -> str:
        """Base and data as others know them: of a path on this machine the last two parts."""
        return f"{_shorten_path(self.base)} on {_shorten_path(self.data)}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it: a curve is a list of pairs, and None stands for what is not a finite number."""
        facts = asdict(self)
        for row in facts["rows"]:
            row["curve"] = [[rate, score] for rate, score in row["curve"].items()]
        return _replace_nan(facts)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Self:
        """The comparison that `to_dict` gave.

        Raises:
            DamagedFile: A part is missing or of another form.
            Unsupported: A method that there is not.
        """
        try:
            rows = [Row(**{**row, **_restore_row(row)}) for row in facts["rows"]]
            comparison = cls(**{**facts, "rows": rows})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedFile(f"this is no stored comparison ({error}); compare again.") from error
        if unknown := [row.method for row in rows if row.method not in METHODS]:
            raise Unsupported(
                f"this comparison has the method {unknown[0]!r}, which inlay does not know; compare again."
            )
        return comparison

    def write(self, path: str | Path) -> Path:
        """Write it as JSON, completely or not at all."""
        write_json(Path(path), self.to_dict())
        return Path(path)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The comparison that `write` stored.

        Raises:
            InlayError: There is none, or not the whole of it, or one with a method that there is not.
        """
        try:
            facts = parse_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DamagedFile(f"no comparison can be read from {path} ({error.strerror}).") from error
        except ValueError as error:
            raise DamagedFile(f"{path} is not the whole file of a comparison ({error}); compare again.") from error
        return cls.from_dict(facts)


def _replace_nan(value: Any) -> Any:
    """A copy in which None stands for NaN and infinity, which are no JSON."""
    if isinstance(value, dict):
        return {key: _replace_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _restore_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON changed of a row: the curve's form, and NaN in lists of scores."""
    curve = {float(rate): _restore_nan(score) for rate, score in row["curve"]}
    lists = {
        key: {name: [_restore_nan(value) for value in values] for name, values in row[key].items()}
        for key in ("scores", "forgetting")
    }
    return {"curve": curve, "validation": [_restore_nan(value) for value in row["validation"]], **lists}


def _restore_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _shorten_path(name: str) -> str:
    """The last two parts of an absolute path; other names as they are."""
    return "/".join(Path(name).parts[-2:]) if name.startswith(("/", "~")) else name

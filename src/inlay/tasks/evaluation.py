"""An adapter scored on labelled data: scores with their intervals, those of the base, and a row for each example."""

from __future__ import annotations

import csv
import math
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from inlay.errors import BadInput, Unsupported
from inlay.files.atomic import replacing
from inlay.tasks.folds import FOLDS, Fold

Split: TypeAlias = Literal["validation", "test", "train", "all"]
SPLITS = ("validation", "test", "train", "all")
SMALL = 100  # classes up to which a confusion matrix is kept in metrics.json
TITLES = {
    "absolute_volume_error_ml": "Volume error, absolute, ml",
    "absolute_volume_error_percent": "Volume error, absolute, %",
    "accuracy": "Accuracy",
    "bleu": "BLEU",
    "chrf": "chrF",
    "clip_score": "CLIP score",
    "dice": "Dice",
    "dice_model_grid": "Dice on the model's grid, as recipes score it",
    "drift_features": "Drift, features",
    "drift_pixels": "Drift, pixels",
    "ece": "Expected calibration error",
    "f1": "Macro F1",
    "hd95_mm": "HD95, mm",
    "iou": "IoU",
    "loss": "Loss",
    "matthews": "Matthews correlation",
    "mean_iou_box": "Mean IoU, a box",
    "mean_iou_point": "Mean IoU, one point",
    "mean_iou_points": "Mean IoU, three points",
    "median_dice": "Dice, median",
    "median_hd95_mm": "HD95, mm, median",
    "median_iou": "IoU, median",
    "median_nsd": "Surface Dice (NSD), median",
    "nsd": "Surface Dice (NSD)",
    "own_fidelity": "Subject fidelity, own images",
    "perplexity": "Perplexity",
    "presence": "Presence of the subject",
    "precision": "Macro precision",
    "prompt_fidelity": "Prompt fidelity",
    "recall": "Macro recall",
    "rouge_l": "ROUGE-L",
    "subject_fidelity": "Subject fidelity",
    "volume_error_ml": "Volume error, ml",
    "volume_error_percent": "Volume error, %",
}


@dataclass(frozen=True)
class Score:
    """A score and its 95 % interval; no interval where there is only one unit to resample."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        between = "" if self.low is None or self.high is None else f" ({self.low:.4f} to {self.high:.4f})"
        return f"{self.value:.4f}{between}"


@dataclass(frozen=True)
class Evaluation:
    """How an adapter did on labelled data.

    Attributes:
        data: The name of the data, as it was given.
        task: What the adapter is for.
        split: Which part of the data was scored.
        count: How many units, which are independent and were resampled for the intervals.
        unit: What one is: image, prompt, block or scan.
        scores: Of the adapter, by name.
        base: Of its base without the adapter, by name; None where that means nothing or was not asked for.
        rows: One for each image, prompt, object and kind of prompt, or scan and class.
        per_class: A row for each class, empty where there are none.
        labels: Names of the rows and columns of `confusion`.
        confusion: How many of class i were taken for class j, (K, K); None for what is no classifier.
        notes: How it was scored, in sentences.
    """

    data: str
    task: str
    split: str
    count: int
    unit: str
    scores: dict[str, Score]
    base: dict[str, Score] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    per_class: list[dict[str, Any]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    confusion: list[list[int]] | None = None
    notes: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """What goes into metrics.json: all but the rows, the data's name and a confusion matrix of many classes."""
        kept = {"split": self.split, "count": self.count, "unit": self.unit, "scores": _scores_to_json(self.scores)}
        kept |= {} if self.base is None else {"base": _scores_to_json(self.base)}
        kept |= {"per_class": self.per_class} if self.per_class else {}
        kept |= self._matrix() if len(self.labels) <= SMALL else {}
        return kept | {"notes": self.notes}

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        return {"data": self.data, "task": self.task, **self.summary(), **self._matrix(), "rows": self.rows}

    def _matrix(self) -> dict[str, Any]:
        return {} if self.confusion is None else {"labels": self.labels, "confusion": self.confusion}

    def write_csv(self, path: str | Path) -> Path:
        """Write `rows` with a header; the file appears whole, or stays as it was."""
        names = list(dict.fromkeys(key for row in self.rows for key in row))
        with replacing(path) as new, new.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)
        return Path(path)

    def draw_confusion(self, path: str | Path) -> Path:
        """Draw the confusion matrix; the suffix chooses the format.

        Raises:
            InlayError: There is none: the adapter is no classifier.
        """
        if self.confusion is None:
            raise Unsupported(f"an adapter for {self.task} has no confusion matrix; leave the matrix out.")
        from inlay.tasks.confusion import draw_confusion

        return draw_confusion(self.confusion, self.labels, path)

    def __str__(self) -> str:
        count = f"{self.count:,} {self.unit}{'' if self.count == 1 else 's'}"
        header = ("", "score") if self.base is None else ("", "with the adapter", "base only")
        lines = [(title(name), str(score), *self._format_base(name)) for name, score in self.scores.items()]
        parts = [f"{self.data} ({self.split}): {count}", *align_columns([header, *lines])]
        if self.per_class:
            names = list(self.per_class[0])
            cells = [tuple(_format_cell(row.get(name)) for name in names) for row in self.per_class]
            parts += ["", *align_columns([*fold_headings([class_title(name) for name in names], cells), *cells])]
        return "\n".join([*parts, *([""] if self.notes else []), *self.notes])

    def _format_base(self, name: str) -> tuple[str, ...]:
        if self.base is None:
            return ()
        return (str(self.base[name]) if name in self.base else "",)


WIDEST = 100  # characters of a table, as far as headings decide it
_OF_TRAINING = ("dataset", "training", "decoding")  # keys of metrics.json


@dataclass(frozen=True)
class Training:
    """What an adapter's metrics.json tells of its training, as far as scoring depends on it.

    That file may have been written by anyone: each value is looked at before it is used.
    """

    dataset: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    decoding: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def select(cls, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a metrics.json that `from_metrics` reads, for what is made of an adapter."""
        return {key: metrics[key] for key in _OF_TRAINING if key in metrics}

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> Training:
        """What is there, and nothing for the rest."""
        dataset, settings, decoding = (metrics.get(key) for key in _OF_TRAINING)
        return cls(
            dataset if isinstance(dataset, str) else None,
            settings if isinstance(settings, dict) else {},
            decoding if isinstance(decoding, dict) else {},
        )

    @property
    def seed(self) -> int:
        """The seed by which a recipe held out a part of data without a split; 0 where none was noted."""
        seed = self.settings.get("seed")
        return seed if type(seed) is int and 0 <= seed < 2**32 else 0

    def group_for(self, data: str) -> str | None:
        """What kept examples of this data together in training: a column, or a regular expression for paths."""
        group = self.settings.get("group")
        return group if isinstance(group, str) and group and self.used(data) else None

    def fold_for(self, data: str, share: float = 1 / FOLDS) -> Fold:
        """Which part of this data training held out; the first of this share where no fold was noted."""
        fold, folds = self.settings.get("fold"), self.settings.get("folds")
        folds = folds if type(folds) is int and folds >= 2 else FOLDS
        noted = type(fold) is int and 0 <= fold < folds and self.used(data)
        return Fold(1 / folds, fold) if noted else Fold(share)

    def split_options(self, data: str) -> dict[str, Any]:
        """What the loaders of all tasks take to hold the same part of this data out again."""
        fold = self.fold_for(data)
        options = {"seed": self.seed, "group": self.group_for(data)}
        return options if fold.number is None else {**options, "validation": fold.share, "fold": fold.number}

    def asks_to_stream(self, data: str) -> bool:
        """Whether training on this data was told to stream it."""
        return self.settings.get("stream") is True and self.used(data)

    def used(self, data: str) -> bool:
        """Whether the adapter was trained on data of this name, or in this place."""
        if self.dataset is None:
            return False
        if self.dataset == data:
            return True
        here, there = (Path(name) for name in (data, self.dataset))
        return here.exists() and there.exists() and here.samefile(there)


@dataclass(frozen=True)
class Request:
    """What is to be scored, and how.

    Attributes:
        split: Which part of the data; None: as `choose_split` has it.
        limit: Score so many units at most, spread evenly; None: all.
        compare: Score the base without the adapter too, where that means something.
        group: Of labels, in a combination of classifiers: choose among its classes only.
        encoder: Model whose features compare painted images; None: an embedded one.
        resamples: Of the units, for the intervals.
        training: What metrics.json tells of the adapter's own.
        options: The values of the task's `score_options`, by name; those that are missing have their defaults.

    Raises:
        InlayError: No such split; a limit or resamples below 1.
    """

    split: Split | None = None
    limit: int | None = None
    compare: bool = True
    group: str | None = None
    encoder: str | None = None
    resamples: int = 1000
    training: Training = field(default_factory=Training)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.split is not None and self.split not in SPLITS:
            raise BadInput(f"unknown split {self.split!r}; choose one of {', '.join(SPLITS)}.")
        for name in ("limit", "resamples"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise BadInput(f"{name} must be a whole number of at least 1, got {value!r}.")


EVERYTHING = Request()
FEW = 10  # units below which an interval is said to be rough


def interval_note(count: int, unit: str) -> list[str]:
    """A sentence where there are too few units to resample."""
    if count == 1:
        return [f"There is no interval: it takes two {unit}s or more."]
    return [f"Intervals over {count} {unit}s are rough, and mostly too narrow."] if count < FEW else []


def name_groups(group: str) -> str:
    """What one group of examples is called: by its column, such as `patient group`; else `group`."""
    return f"{group} group" if re.fullmatch(r"[\w -]+", group) else "group"


def count_units(count: int, noun: str, groups: Sequence[str] | None, group: str | None) -> tuple[int, str, list[str]]:
    """How many independent units there are, what one is called, and a sentence where they are groups of examples.

    Args:
        count: Of the examples.
        noun: What one is called.
        groups: Of each example; None: they are independent.
        group: The column or the regular expression that says so.
    """
    if groups is None or group is None:
        return count, noun, []
    units, unit = len(set(groups)), name_groups(group)
    note = f"The unit that was resampled is the {unit}: {units} of them hold {count:,} {noun}{'s' * (count != 1)}."
    return units, unit, [note]


def choose_split(data: str, wanted: Split | None, own: Collection[str], scored: Split, training: Training) -> Split:
    """Which part of the data to score.

    Without a wish it is what a recipe would score. Data without a split of its own is scored whole; but if the adapter
    was trained on it, only the part that was held out.

    Args:
        data: Its name.
        wanted: What was asked for.
        own: The splits that the data has of its own, among them train.
        scored: The split that recipes score, where there are several.
        training: Of the adapter.

    Raises:
        InlayError: No such split.
    """
    if (wanted == "test" and "test" not in own) or (wanted == "train" and len(own) > 1 and "train" not in own):
        raise BadInput(
            f"{data!r} has no split {wanted!r} with labels (it has {', '.join(own)}); choose another, or pass the "
            f"folder of the {wanted} data itself."
        )
    if wanted is not None:
        return wanted
    if len(own) > 1:
        return scored
    return "validation" if training.used(data) else "all"


def is_cut(split: Split, own: Collection[str]) -> bool:
    """Whether a split is only a part of one of the data's own: a recipe holds validation out of train where it must."""
    return split in ("train", "validation") and "validation" not in own


def split_note(data: str, split: Split, own: Collection[str], training: Training) -> list[str]:
    """A sentence where the split that was scored is none of the data's own."""
    if split == "all" and len(own) == 1:
        seen = ", training examples among them" if training.used(data) else ""
        return [f"{data!r} has no split of its own and was scored whole{seen}."]
    if not is_cut(split, own):
        return []
    lacks = "no split of its own" if len(own) == 1 else "no validation split of its own"
    part = "hold out of it" if split == "validation" else "train on"
    fold = training.fold_for(data)
    said = f"seed {training.seed}" + ("" if fold.number is None else f", fold {fold.number} of 0 to {fold.count - 1}")
    return [f"{data!r} has {lacks}; what was scored is the part that recipes {part} ({said})."]


def pick_evenly(count: int, limit: int | None) -> list[int]:
    """At most `limit` of the numbers 0 to count - 1, spread evenly: the examples of a folder often stand by class."""
    wanted = count if limit is None else min(limit, count)
    return [i * count // wanted for i in range(wanted)]


def check_labels(data: str, found: Sequence[str], known: Sequence[str], adapter: str) -> None:
    """Refuse data with labels that the adapter does not have.

    Raises:
        InlayError: Names those labels.
    """
    strange = [repr(label) for label in dict.fromkeys(found) if label not in set(known)]
    if strange:
        first = ", ".join(strange[:5]) + (f" and {len(strange) - 5} others" if strange[5:] else "")
        names = ", ".join(map(repr, known[:10])) + (" ..." if known[10:] else "")
        verb = "is a label" if len(strange) == 1 else "are labels"
        raise BadInput(
            f"{first} {verb} of {data!r}, but not of adapter {adapter!r}, which knows {names}. Rename or remove them."
        )


def title(name: str) -> str:
    """A score's name for people; `dice_` is followed by the name of a class."""
    if name not in TITLES and name.startswith("dice_"):
        return f"Dice, {name.removeprefix('dice_')}"
    return TITLES.get(name, name.replace("_", " "))


def class_title(name: str) -> str:
    """The same for a column of `per_class`, where nothing is a mean over classes."""
    words = title(name).removeprefix("Macro ")
    return words[0].upper() + words[1:]


def _scores_to_json(scores: Mapping[str, Score]) -> dict[str, dict[str, float | None]]:
    return {name: {"value": score.value, "low": score.low, "high": score.high} for name, score in scores.items()}


def _format_cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def fold_headings(headings: Sequence[str], cells: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The lines of a table's heading: one, or several with headings cut between words where it is wider than WIDEST."""
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    if sum(widths) + 2 * (len(widths) - 1) <= WIDEST:
        return [tuple(headings)]
    columns = [
        textwrap.wrap(heading, max(map(len, [*column, *heading.split()])), break_on_hyphens=False)
        for heading, *column in zip(headings, *cells, strict=True)
    ]
    height = max(map(len, columns))
    return [*zip(*([""] * (height - len(lines)) + lines for lines in columns), strict=True)]


def align_columns(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """Cells under each other: the first to the left, numbers too, as they end with their intervals."""
    lines = [tuple("".join(c if c.isprintable() else "�" for c in cell) for cell in line) for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]

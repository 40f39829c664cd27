"""What classifiers of images and of texts share when they are scored."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from inlay.bases.load import read_config, resolve_base
from inlay.errors import BadInput, InlayError, Unsupported
from inlay.methods._peft import adapter_disabled
from inlay.tasks.adapter import Adapter
from inlay.tasks.evaluation import (
    Evaluation,
    Request,
    Score,
    Split,
    Training,
    choose_split,
    count_units,
    is_cut,
    split_note,
)
from inlay.tasks.folds import Fold
from inlay.tasks.groups import hold_out_groups, warn_of_shared_groups
from inlay.tasks.sampling import (
    hold_out_by_class,
    hold_out_by_content,
    hold_out_if_possible_by_content,
    normalise_label,
    warn_of_overlap,
)
from inlay.tasks.statistics import (
    BINS,
    Indices,
    calibration_error,
    class_rows,
    class_scores,
    confusion_matrix,
    matthews_correlation,
    score_with_intervals,
)

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class LabelledRows:
    """Examples with the column `label`.

    Attributes:
        rows: All columns; those of one `group`, where there is that column, are held out together.
        contents: Equal for rows that are the same example; None: it is not known which are.
    """

    rows: datasets.Dataset
    contents: Sequence[Hashable] | None = None

    def hold_out(
        self,
        labels: Sequence[str],
        fold: Fold,
        seed: int,
        noun: str,
        *,
        first: bool = True,
        refuse_equal: bool = False,
    ) -> tuple[LabelledRows, LabelledRows]:
        """What is left and what is held out: a share of each class, equal examples and groups on one side.

        Args:
            labels: Class names, by the numbers in `label`.
            fold: What is held out.
            seed: Chooses the examples.
            noun: What one is called.
            first: Whether nothing was held out of these before; if so, what stays in training is said.
            refuse_equal: Refuse examples that are all equal; otherwise, the first time, they are split with a warning.

        Raises:
            InlayError: There are too few.
        """
        ids = self.rows["label"][:]
        if self.groups is not None:
            held = hold_out_groups(
                self.groups, self.contents or range(len(ids)), fold, seed, noun, ids=ids, labels=labels, warn=first
            )
        elif self.contents is None:
            held = hold_out_by_class(ids, labels, fold, seed, noun, first)
        elif refuse_equal or not first:
            held = hold_out_by_content(ids, labels, fold, seed, noun, self.contents, first)
        else:
            held = hold_out_if_possible_by_content(ids, labels, fold, seed, noun, self.contents)
        return self.select(sorted({*range(len(ids))} - {*held})), self.select(held)

    @property
    def groups(self) -> list[str] | None:
        """Of each row, where they are known."""
        return self.rows["group"][:] if "group" in self.rows.column_names else None

    def select(self, places: Sequence[int]) -> LabelledRows:
        """Those in these places, from 0."""
        contents = None if self.contents is None else [self.contents[i] for i in places]
        return LabelledRows(self.rows.select(places), contents)


def warn_of_overlaps(parts: dict[str, LabelledRows], noun: str) -> None:
    """Say how many examples of the data's own splits are training examples too, and which groups stand in two."""
    warn_of_shared_groups({split: found.groups for split, found in parts.items()}, noun)
    known = parts["train"].contents
    for split, found in parts.items():
        if split != "train" and known is not None and found.contents is not None:
            warn_of_overlap(known, found.contents, split, noun)


def choose_labelled_rows(
    data: str,
    own: Sequence[str],
    load: Callable[[list[str]], LabelledRows],
    labels: Sequence[str],
    *,
    wanted: Split | None,
    scored: Split,
    training: Training,
    noun: str,
) -> tuple[Split, datasets.Dataset, list[str]]:
    """The labelled examples to score an adapter on: a split of the data's own, or what a recipe would hold out.

    Args:
        data: Its name.
        own: Its splits that have labels: of train, validation and test, or its only one as train.
        load: Reads some of these.
        labels: Class names, by the numbers in `label`.
        wanted: The split that was asked for.
        scored: The split to score where nothing was asked for and the data has several.
        training: Of the adapter.
        noun: What an example is called.

    Returns:
        The split, its rows, and notes.

    Raises:
        InlayError: No such split, or nothing that could be held out.
    """
    chosen = choose_split(data, wanted, own, scored, training)
    cut = is_cut(chosen, own)
    whole = "train" if "train" in own else own[0]
    found = load(list(own) if chosen == "all" else [whole if cut else chosen])
    if cut:
        left, held = found.hold_out(labels, training.fold_for(data), training.seed, noun)
        found = left if chosen == "train" else held
    return chosen, found.rows, split_note(data, chosen, own, training)


def number_labels(data: str, found: Sequence[str], adapter: Adapter) -> list[int]:
    """The numbers that an adapter has for the labels of training data; é of one character or of two is one label.

    Raises:
        InlayError: Labels that the adapter does not have.
    """
    numbers = {normalise_label(label): i for i, label in enumerate(adapter.labels)}
    strange = [label for label in map(normalise_label, found) if label not in numbers]
    if strange:
        raise BadInput(
            f"the data {data!r} has labels that the adapter does not have ({', '.join(strange[:5])}); it has "
            f"{', '.join(adapter.labels[:10])}."
        )
    return [numbers[normalise_label(label)] for label in found]


def classify_batch(model: Callable[..., Any], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Predicted and true classes (N,) of a batch with `labels`."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return model(**inputs).logits.argmax(-1), batch["labels"]


def class_probabilities(logits: Tensor, config: Any) -> Tensor:
    """Probabilities of classes: a softmax, or where classes do not exclude each other the sigmoid of each.

    Args:
        logits: Of a classifier, or some of its columns, (B, K).
        config: Of the model: its `problem_type` says which, and a single class is answered by a sigmoid.

    Raises:
        InlayError: The model gives numbers and no classes.

    Source: `transformers.ImageClassificationPipeline.postprocess`, as that of texts.
    """
    if config.problem_type == "regression":
        raise Unsupported(
            f"the base {config._name_or_path} gives numbers (problem_type regression), and no probabilities of classes."
        )
    return logits.softmax(-1) if _classes_exclude_each_other(config) else logits.sigmoid()


def check_one_label_each(base: Any, data: str) -> None:
    """Refuse to train a base whose classes do not exclude each other on data with one label for each example.

    A base with a new head for the labels of the data passes: that head is for one label each.

    Raises:
        InlayError: The base has the labels of the data already, and is for several of them at once.
    """
    if not _classes_exclude_each_other(base.config):
        raise Unsupported(
            f"{base.name_or_path} names several of its classes at once (problem_type multi_label_classification), and "
            f"{data!r} has one label for each example; rename the labels of the data to train a new head for one."
        )


def _classes_exclude_each_other(config: Any) -> bool:
    return config.problem_type != "multi_label_classification" and config.num_labels > 1


def evaluate_classifier(
    adapter: Adapter,
    request: Request,
    *,
    data: str,
    split: str,
    noun: str,
    groups: Sequence[str] | None,
    labels: list[str],
    true: np.ndarray,
    names: list[dict[str, Any]],
    notes: list[str],
    predict: Callable[[], np.ndarray],
) -> Evaluation:
    """All scores of a classifier, next to its base where that has the same labels.

    Args:
        adapter: From `load_adapter`.
        request: How.
        data: Its name.
        split: Which part of it.
        noun: What one example is called.
        groups: Of each example, (N,), where examples of one patient or slide are known; then these are resampled.
        labels: Class names, in the order of the columns of probabilities.
        true: Indices of `labels`, (N,).
        names: What tells each example from the others, the first columns of its row.
        notes: On the data.
        predict: Gives the probabilities (N, K) of the model as it is at the time.
    """
    exclusive = _classes_exclude_each_other(adapter.model.config)
    probabilities = predict()
    scores = score_probabilities(probabilities, true, request.resamples, exclusive, groups)
    base, remark = None, ""
    if request.compare:
        remark = _explain_missing_base(adapter, labels)
        if not remark:
            with adapter_disabled(adapter.model):
                base = score_probabilities(predict(), true, request.resamples, exclusive, groups)
    predicted = probabilities.argmax(1)
    rows = [
        {
            **name,
            **({} if groups is None else {"group": groups[k]}),
            "true": labels[t],
            "predicted": labels[p],
            "probability": round(float(row[p]), 6),
            "probability_of_true": round(float(row[t]), 6),
            "right": bool(t == p),
        }
        for k, (name, t, p, row) in enumerate(zip(names, true, predicted, probabilities, strict=True))
    ]
    told = f"Expected calibration error: {BINS} bins of equal width (Guo et al. 2017, arXiv:1706.04599)."
    if not exclusive:
        told = f"{told} The base names several classes at once: the loss is binary cross-entropy, a mean over classes."
    count, unit, counted = count_units(len(true), noun, groups, request.training.group_for(data))
    return Evaluation(
        data=data,
        task=adapter.task.name,
        split=split,
        count=count,
        unit=unit,
        scores=scores,
        base=base,
        rows=rows,
        per_class=class_rows(true, predicted, labels, noun),
        labels=labels,
        confusion=confusion_matrix(true, predicted, len(labels)).tolist(),
        notes=[*notes, *counted, told, *filter(None, [remark])],
    )


def score_probabilities(
    probabilities: np.ndarray,
    true: np.ndarray,
    resamples: int,
    exclusive: bool = True,
    groups: Sequence[str] | None = None,
) -> dict[str, Score]:
    """Accuracy, macro F1, precision and recall, Matthews correlation, cross-entropy and calibration error.

    Args:
        probabilities: (N, K).
        true: (N,).
        resamples: Of the bootstrap; 0: no intervals.
        exclusive: Whether one class is true at a time. If not, the cross-entropy is the mean of that of each class.
        groups: Of each example, (N,), to resample these; None: examples are resampled.
    """
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    if exclusive:
        surprise = -np.log(np.maximum(probabilities[np.arange(len(true)), true], 1e-300))
    else:
        is_true = np.arange(probabilities.shape[1]) == true[:, None]  # N K
        surprise = -np.log(np.maximum(np.where(is_true, probabilities, 1 - probabilities), 1e-300)).mean(1)
    right, classes = predicted == true, probabilities.shape[1]

    def statistic(rows: Indices) -> dict[str, float]:
        each = class_scores(true[rows], predicted[rows], classes)
        return {
            "accuracy": float(right[rows].mean()),
            **{name: float(np.nanmean(each[name])) for name in ("f1", "precision", "recall")},
            "matthews": matthews_correlation(true[rows], predicted[rows]),
            "loss": float(surprise[rows].mean()),
            "ece": calibration_error(confidence[rows], right[rows]),
        }

    return score_with_intervals(statistic, len(true), groups=groups, resamples=resamples)


def _explain_missing_base(adapter: Adapter, labels: list[str]) -> str:
    """Why the base without the adapter has no score; nothing where its labels are the adapter's."""
    if not hasattr(adapter.model, "disable_adapter"):
        return "The base was not scored: the adapter is merged into it."
    name = adapter.model.get_base_model().name_or_path
    try:
        own = read_config(name, resolve_base(name), None).id2label
    except InlayError:
        return "The base was not scored: its own labels are not known."
    if [own[i] for i in sorted(own)] != labels:
        return "The base has no score: its head for these labels is new."
    return ""

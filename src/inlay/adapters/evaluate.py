"""A saved adapter scored on labelled data, and its scores written next to it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from inlay.adapters.file import AdapterFile, expand_path, read_adapter
from inlay.adapters.load import LoadedAdapter, load_adapter
from inlay.adapters.notes import check_writable, write_note
from inlay.adapters.precision import lay_out_channels_last
from inlay.adapters.tables import make_table
from inlay.bases.device import Device
from inlay.errors import BadInput
from inlay.tasks.adapter import Adapter
from inlay.tasks.evaluation import Evaluation, Request, Split, Training, class_title, interval_note, title

KEY = "evaluations"  # in metrics.json: by the name of the data


class Measured(Adapter, Protocol):
    """An adapter that is loaded, or a model that stands for one, and what is known of its training."""

    @property
    def metrics(self) -> dict[str, Any]:
        """As in metrics.json."""


def evaluate(
    adapter: Measured | str | Path,
    data: str | Path,
    *,
    base: str | Path | None = None,
    split: Split | None = None,
    limit: int | None = None,
    compare: bool = True,
    group: str | None = None,
    encoder: str | Path | None = None,
    resamples: int = 1000,
    write: bool = False,
    device: Device | None = None,
    options: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Score an adapter on labelled data: all scores of its task with 95 % intervals, compared with those of its base.

    Args:
        adapter: From `load_adapter`, `load_exported` or `load_trained`, or the folder or Hub id of an adapter.
        data: As the recipes of its task take it. Labels are matched by name, and may be some of the adapter's.
        base: Load the adapter on this one, not on its own.
        split: `validation`, `test`, `train` or `all`; by itself what a recipe would score. Data without a split is
            scored whole; but if the adapter was trained on it, the part that was held out.
        limit: Score so many images, prompts or scans at most, spread evenly; paint from so many seeds.
        compare: Score the base without the adapter too, where that means something.
        group: Of labels, in a combination of classifiers: choose among its classes only.
        encoder: Of an adapter that paints: the folder or Hub id of a DINO, a CLIP or another image model by whose
            features images are compared; default: an embedded one.
        resamples: Of the images, prompts, scans or seeds, for the intervals (bootstrap).
        write: Put the scores into the adapter's metrics.json and README.md, under the name of the data.
        device: As in `load_adapter`.
        options: Of the adapter's task, by the names of its `score_options`, such as {"tolerance_mm": 2.0} for scans.

    Raises:
        InlayError: Whatever `load_adapter` and the task's loader of data find; labels that the adapter does not know;
            `write` to what is no folder of one's own; an option that the task has not.
    """
    request = Request(split, limit, compare, group, None if encoder is None else str(encoder), resamples)
    loaded = None if isinstance(adapter, str | Path) else adapter
    if loaded is not None and not base is device is None:
        raise BadInput("this adapter is loaded already; leave base and device out, or give the adapter's folder.")
    file = loaded.file if isinstance(loaded, LoadedAdapter) else None
    if write:  # before all the work
        if loaded is not None and file is None:
            raise BadInput(f"scores are written next to an adapter, and {loaded.name!r} is none; leave write out.")
        check_writable(file or _read_own(str(adapter)))
    if loaded is None:
        opened = load_adapter(adapter, base, device=device)  # type: ignore[arg-type]
        loaded, file = opened, opened.file
        lay_out_channels_last(opened)
    if group is not None and not loaded.task.classifies:
        raise BadInput(
            f"adapter {loaded.name!r} is for {loaded.task.name} and has no groups of labels; leave group out."
        )
    if encoder is not None and not loaded.task.compares_images:
        raise BadInput(f"adapter {loaded.name!r} is for {loaded.task.name} and paints nothing; leave encoder out.")
    own = loaded.task.score_options
    if strange := [name for name in options or {} if name not in own]:
        has = f"has {', '.join(own)}" if own else "has none"
        raise BadInput(f"unknown option {strange[0]!r}; evaluating an adapter for {loaded.task.name} {has}.")
    values = {name: option.default for name, option in own.items()} | dict(options or {})
    # A model without an adapter has nothing to be compared with.
    request = replace(
        request, training=Training.from_metrics(loaded.metrics), compare=compare and file is not None, options=values
    )
    found = loaded.task.evaluate(loaded, str(data), request)
    notes = [*found.notes, *interval_note(found.count, found.unit), *_note_precision(loaded.model)]
    found = replace(found, notes=notes)
    if write and file is not None:
        write_evaluation(file.folder, found)
    return found


def _note_precision(model: Any) -> list[str]:
    """A sentence where scores are not those of float32, from which they may differ in the last digits."""
    precision = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    name = str(precision).removeprefix("torch.")
    return [] if name == "float32" else [f"Computed in {name}: in float32 the scores may differ in their last digits."]


def write_evaluation(folder: str | Path, evaluation: Evaluation) -> None:
    """Put an evaluation into metrics.json and README.md of an adapter, in the place of an earlier one on that data.

    The folder is replaced whole or stays as it was; weights and config are those of before.

    Raises:
        InlayError: No adapter, or one in the Hub's cache.
    """
    file = read_adapter(folder)
    earlier, name = file.metrics.get(KEY), _told(evaluation.data)
    kept = {**(earlier if isinstance(earlier, dict) else {}), evaluation.data: evaluation.summary()}
    write_note(file, KEY, kept, f"evaluation of {name}", _section(name, evaluation))


def _read_own(folder: str) -> AdapterFile | None:
    """An adapter on this disk; None for a Hub id."""
    path = expand_path(folder)
    return read_adapter(path) if path.exists() else None


def _section(name: str, evaluation: Evaluation) -> str:
    """Heading, scores with intervals, classes, and how it was scored."""
    base = evaluation.base
    header = ("metric", "with the adapter", *(() if base is None else ("base only",)))
    rows = [
        (title(key), str(score), *(() if base is None else (str(base.get(key, "")),)))
        for key, score in evaluation.scores.items()
    ]
    classes = evaluation.per_class
    names = list(classes[0]) if classes else []
    cells = [tuple(_cell(row.get(key)) for key in names) for row in classes[:50]]
    count = f"{evaluation.count:,} {evaluation.unit}{'' if evaluation.count == 1 else 's'}"
    parts = [
        f"## Evaluation on {name}",
        f"{count} ({evaluation.split}), with 95 % bootstrap intervals over them.",
        make_table(header, rows),
        make_table(tuple(class_title(key) for key in names), cells),
        *(_told_note(note, evaluation.data, name) for note in evaluation.notes),
    ]
    return "\n\n".join(filter(None, parts))


def _told(data: str) -> str:
    """The data as the world may read it: of a path on this machine its last part."""
    shown = data.rstrip("/").rpartition("/")[2] if data.startswith(("/", "~", ".")) else data
    return " ".join(shown.replace("--", "- -").split()) or "data"  # `--` would end a comment


def _told_note(note: str, data: str, name: str) -> str:
    return note.replace(repr(data), repr(name))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

"""Several methods on one task, over several seeds: quality with its spread, beside what each costs."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import set_seed
from torch import nn

from inlay.adapters.file import WEIGHTS
from inlay.adapters.save import save_adapter
from inlay.bases.processors import load_processor, load_tokenizer
from inlay.errors import InlayError
from inlay.files.atomic import write_json
from inlay.measure import footprint
from inlay.measure.memory import measure_peak
from inlay.methods import METHODS
from inlay.methods._peft import PeftModel
from inlay.tasks.base import load_base, load_skeleton
from inlay.tasks.images.data import load_images
from inlay.tasks.images.view import Augment, ImageView
from inlay.tasks.metrics import Accuracy
from inlay.tasks.text.data import load_texts
from inlay.tasks.text.generate import Decoding, judge
from inlay.tasks.text.loss import NextToken
from inlay.tasks.text.processor import TextProcessor
from inlay.tasks.text.view import TextView
from inlay.train.config import TrainConfig
from inlay.train.launch import enable_checkpointing
from inlay.train.loop import FitResult, fit
from inlay.train.run import WEIGHTS as TRAINED


@dataclass(frozen=True)
class Compared:
    """One method on one task.

    Attributes:
        method: Name in METHODS.
        learning_rate: That it was trained with.
        trainable: Parameters, head included.
        scores: By name, of the best evaluation of each run, one per seed: accuracy from 0 to 1 on the validation data;
            BLEU and ROUGE-L from 0 to 100 on the test data, perplexity on the validation data.
        steps_per_second: Median over the seeds.
        file_bytes: What is stored, head included: the adapter's weights, or all that was trained.
        peak_bytes: Largest sum of all tensors in a training step, of texts alone.
    """

    method: str
    learning_rate: float
    trainable: int
    scores: dict[str, list[float]]
    steps_per_second: float
    file_bytes: int
    peak_bytes: int | None = None


@dataclass(frozen=True)
class _Task:
    """One training: what is adapted, how it is fitted, and what comes of it."""

    base: Callable[[], nn.Module]
    fit: Callable[[nn.Module, TrainConfig, dict[str, Any]], FitResult]
    scores: Callable[[nn.Module, FitResult], dict[str, float]]
    processor: Any
    scored_by: dict[str, Any] = field(default_factory=dict)  # what the scores depend on beside the run
    peak: Callable[[nn.Module], int] | None = None


def compare_images(
    model: str,
    dataset: str,
    train: TrainConfig,
    *,
    methods: Sequence[str] = ("probe", "lora", "full"),
    learning_rates: Sequence[float] = (),
    seeds: Sequence[int] = (0, 1, 2),
    width: int = 8,
    augment: Augment = "crop",
) -> list[Compared]:
    """Train every method on the same data in the same order, each from the same new head, at its own learning rate.

    `learning_rates` are given in the order of `methods`; without them METHODS has one for each.

    The folder `train.output_dir` holds one run per method and seed, so a comparison that is broken off goes on where it
    was. Seeds change the split (where the data has none), the order, the augmentation and the new weights.

    Raises:
        InlayError: An unknown method, no seed, or what load_base, load_images and fit raise.
    """

    def task(seed: int) -> _Task:
        data, processor = load_images(dataset, seed=seed), load_processor(model)
        views = ImageView(data.train, processor, augment), ImageView(data.validation, processor)
        return _Task(
            base=lambda: load_base(model, labels=data.labels),
            fit=lambda adapted, config, settings: fit(
                adapted, *views, config, metrics=[Accuracy()], settings={**settings, "augment": augment}
            ),
            scores=lambda adapted, result: {"accuracy": result.metrics["accuracy"]},
            processor=processor,
        )

    _check(methods, learning_rates, seeds)
    settings = {"model": model, "dataset": dataset, "width": width}
    return _compare(task, train, methods, learning_rates, seeds, width, settings)


def compare_texts(
    model: str,
    dataset: str,
    train: TrainConfig,
    *,
    methods: Sequence[str] = ("lora", "full"),
    learning_rates: Sequence[float] = (),
    seeds: Sequence[int] = (0, 1, 2),
    width: int = 8,
    max_length: int | None = None,
    label_smoothing: float = 0.0,
    decoding: Decoding | None = None,
) -> list[Compared]:
    """As `compare_images`, of language models: perplexity, and how close to the references is what they write.

    Raises:
        InlayError: What `compare_images` says; a text for which the base has no room; a method that does not suit these
            settings.
    """

    def task(seed: int) -> _Task:
        data = load_texts(dataset, seed=seed)
        processor = TextProcessor(load_tokenizer(model), separator=data.separator, max_length=max_length)
        examples, held_out = (TextView(rows, processor, block=data.plain) for rows in (data.train, data.validation))
        loss, collate = NextToken(label_smoothing), examples.collate

        def scores(adapted: nn.Module, result: FitResult) -> dict[str, float]:
            written = judge(adapted, processor, data, decoding)
            return {"perplexity": math.exp(result.metrics["loss"]), **(written.total if written else {})}

        def peak(adapted: nn.Module) -> int:
            longest = sorted(range(len(examples)), key=lambda i: -examples.lengths[i])[: train.batch_size]
            return measure_peak(adapted, collate([examples[i] for i in longest]), loss=loss)

        return _Task(
            base=lambda: load_base(model),
            fit=lambda adapted, config, settings: fit(
                adapted,
                examples,
                held_out,
                config,
                collate=collate,
                loss=loss,
                settings={**settings, "max_length": max_length},
            ),
            scores=scores,
            processor=processor,
            scored_by=asdict(decoding or Decoding()),
            peak=peak,
        )

    _check(methods, learning_rates, seeds)
    some = load_texts(dataset, seed=seeds[0])
    for name in methods:  # what would stop the last of them is found before the first one is trained
        plain = "lora" if name == "pissa" else name  # which would decompose the weights that a skeleton does not have
        skeleton = METHODS[plain].adapt(load_skeleton(model), width)
        (decoding or Decoding()).check(skeleton, some)
        if train.gradient_checkpointing:
            enable_checkpointing(skeleton)
    settings = {"model": model, "dataset": dataset, "width": width, "label_smoothing": label_smoothing}
    return _compare(task, train, methods, learning_rates, seeds, width, settings)


def _check(methods: Sequence[str], learning_rates: Sequence[float], seeds: Sequence[int]) -> None:
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods or not seeds:
        raise InlayError(
            f"expected methods among {', '.join(METHODS)} and one seed or more, got {methods} and {seeds}."
        )
    if learning_rates and len(learning_rates) != len(methods):
        raise InlayError(f"expected one learning rate for each of {len(methods)} methods, got {len(learning_rates)}.")


def _compare(
    task: Callable[[int], _Task],
    train: TrainConfig,
    methods: Sequence[str],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    width: int,
    settings: dict[str, Any],
) -> list[Compared]:
    task = cache(task)
    rows = []
    for name, rate in zip(methods, learning_rates or [METHODS[name].learning_rate for name in methods], strict=True):
        scores: dict[str, list[float]] = {}
        rates, trainable, size = [], 0, 0
        peaks: list[int] = []
        for seed in seeds:
            one = task(seed)
            set_seed(seed)
            adapted = METHODS[name].adapt(one.base(), width)
            trainable = footprint(adapted).trainable
            peaks += [one.peak(adapted)] if one.peak and not peaks else []
            folder = Path(train.output_dir) / f"{name}-{seed}"
            config = replace(train, output_dir=str(folder), seed=seed, learning_rate=rate)
            result = one.fit(adapted, config, {**settings, "method": name})
            for key, value in _scored(folder / "scores.json", one, adapted, result).items():
                scores.setdefault(key, []).append(value)
            rates.append(result.steps_per_second)
            weights = folder / "best" / TRAINED
            if isinstance(adapted, PeftModel):
                weights = save_adapter(adapted, folder / "adapter", processor=one.processor) / WEIGHTS
            size = weights.stat().st_size
        peak = max(peaks, default=None)
        rows.append(Compared(name, rate, trainable, scores, statistics.median(rates), size, peak))
    return rows


def _scored(path: Path, task: _Task, adapted: nn.Module, result: FitResult) -> dict[str, float]:
    """The scores of a finished run, read back where they were computed before in the same way."""
    how = json.loads(json.dumps(task.scored_by))
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if result.resumed and stored["by"] == how:
            return stored["scores"]
    scores = task.scores(adapted, result)
    if PartialState().is_main_process:
        write_json(path, {"by": how, "scores": scores})
    return scores


_DIGITS = {"accuracy": 4, "perplexity": 2}  # others 1


def table(rows: Sequence[Compared]) -> str:
    """The comparison as a Markdown table; scores are mean ± sample standard deviation over the seeds."""
    names = list(rows[0].scores) if rows else []
    memory = any(row.peak_bytes for row in rows)
    heads = ["trained parameters", "learning rate", *names, "ms per step", *["peak MB"] * memory, "file, kB"]
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for row in rows:
        cells = [
            row.method,
            f"{row.trainable:,}",
            f"{row.learning_rate:g}",
            *(_spread(row.scores[name], _DIGITS.get(name, 1)) for name in names),
            f"{1000 / row.steps_per_second:.0f}",
            *[f"{(row.peak_bytes or 0) / 1e6:,.1f}"] * memory,
            f"{row.file_bytes / 1000:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean

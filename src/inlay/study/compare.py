"""Several methods on one task, over several seeds: quality with its spread, and what each costs."""

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
from inlay.errors import BadInput, Unsupported
from inlay.files.atomic import write_json
from inlay.measure import footprint
from inlay.measure.memory import measure_peak
from inlay.methods import METHODS
from inlay.methods._peft import PeftModel
from inlay.tasks.base import load_skeleton
from inlay.tasks.images.options import ImageTask
from inlay.tasks.options import TaskData, TaskOptions
from inlay.tasks.text.data import load_texts
from inlay.tasks.text.generate import Decoding, judge
from inlay.tasks.text.options import TextTask
from inlay.train.config import TrainConfig
from inlay.train.launch import enable_checkpointing
from inlay.train.loop import FitResult
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
        peak_bytes: Largest sum of all tensors in a training step; only of texts.
    """

    method: str
    learning_rate: float
    trainable: int
    scores: dict[str, list[float]]
    steps_per_second: float
    file_bytes: int
    peak_bytes: int | None = None


@dataclass(frozen=True)
class _SeedRun:
    """The data of one seed, and how a run on it is scored."""

    data: TaskData
    scores: Callable[[nn.Module, FitResult], dict[str, float]]
    scored_by: dict[str, Any] = field(default_factory=dict)  # what the scores depend on besides the run
    peak: Callable[[nn.Module], int] | None = None


def compare_images(
    task: ImageTask,
    train: TrainConfig,
    *,
    methods: Sequence[str] = ("probe", "lora", "full"),
    learning_rates: Sequence[float] = (),
    seeds: Sequence[int] = (0, 1, 2),
    width: int = 8,
) -> list[Compared]:
    """Train every method on the same data in the same order, each from the same new head, at its own learning rate.

    `learning_rates` are given in the order of `methods`; without them METHODS has one for each. The method `all` is
    every method that suits a vision transformer.

    The folder `train.output_dir` holds one run per method and seed: a comparison that is interrupted goes on where it
    was. Seeds change the split (where the data has none), the order, the augmentation and the new weights.

    Raises:
        InlayError: An unknown method, no seed, weights in 8 or 4 bits that a method trains, or what load_base,
            load_images and fit raise.
    """
    methods = _choose_methods(task, methods, learning_rates, seeds, "vision")

    def job(seed: int) -> _SeedRun:
        data = task.load(seed)
        return _SeedRun(data, lambda adapted, result: {"accuracy": result.metrics["accuracy"]})

    return _train_and_score(task, job, train, methods, learning_rates, seeds, width)


def compare_texts(
    task: TextTask,
    train: TrainConfig,
    *,
    methods: Sequence[str] = ("lora", "full"),
    learning_rates: Sequence[float] = (),
    seeds: Sequence[int] = (0, 1, 2),
    width: int = 8,
    decoding: Decoding | None = None,
) -> list[Compared]:
    """As `compare_images`, of language models: perplexity, and how close to the references is what they write.

    Raises:
        InlayError: What `compare_images` says; a text for which the base has no room; a method that does not suit these
            settings.
    """
    methods = _choose_methods(task, methods, learning_rates, seeds, "text")
    texts = load_texts(task.dataset, seed=seeds[0])
    for name in methods:  # what would stop the last of them is found before the first one is trained
        skeleton = METHODS[name].adapt(load_skeleton(task.model), width)
        (decoding or Decoding()).check(skeleton, texts)
        if train.gradient_checkpointing:
            enable_checkpointing(skeleton)

    def job(seed: int) -> _SeedRun:
        data = task.load(seed)
        examples = data.train

        def scores(adapted: nn.Module, result: FitResult) -> dict[str, float]:
            written = judge(adapted, data.processor, data.source, decoding)
            return {"perplexity": math.exp(result.metrics["loss"]), **(written.total if written else {})}

        def peak(adapted: nn.Module) -> int:
            longest = sorted(range(len(examples)), key=lambda i: -examples.lengths[i])[: train.batch_size]
            return measure_peak(adapted, examples.collate([examples[i] for i in longest]), loss=data.loss)

        return _SeedRun(data, scores, scored_by=asdict(decoding or Decoding()), peak=peak)

    return _train_and_score(task, job, train, methods, learning_rates, seeds, width)


def _choose_methods(
    task: TaskOptions, methods: Sequence[str], learning_rates: Sequence[float], seeds: Sequence[int], base: str
) -> Sequence[str]:
    """The methods to compare, those of `all` by name; pissa is left out of these, as it changes the base.

    Raises:
        InlayError: What is asked for makes no comparison.
    """
    if list(methods) == ["all"]:
        methods = [name for name, method in METHODS.items() if base in method.bases and not method.starts_from_weights]
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods or not seeds:
        raise BadInput(
            f"cannot compare the methods {list(methods)} over the seeds {list(seeds)}; give one seed or more, and "
            f"methods among {', '.join(METHODS)}."
        )
    if learning_rates and len(learning_rates) != len(methods):
        raise BadInput(
            f"there are {len(learning_rates)} learning rates for {len(methods)} methods; give one for each, or none."
        )
    whole = [name for name in methods if name in ("full", "partial")]
    if task.quantize and whole:
        raise Unsupported(f"{' and '.join(whole)} cannot train weights in 8 or 4 bits; leave quantize or them out.")
    return methods


@dataclass(frozen=True)
class _Choice:
    """What a run of the comparison depends on besides the task and the training."""

    method: str
    width: int


def _train_and_score(
    task: TaskOptions,
    job: Callable[[int], _SeedRun],
    train: TrainConfig,
    methods: Sequence[str],
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    width: int,
) -> list[Compared]:
    job = cache(job)
    rows = []
    for name, rate in zip(methods, learning_rates or [METHODS[name].learning_rate for name in methods], strict=True):
        scores: dict[str, list[float]] = {}
        rates, trainable, size = [], 0, 0
        peaks: list[int] = []
        for seed in seeds:
            one = job(seed)
            set_seed(seed)
            adapted = METHODS[name].adapt(task.base(one.data), width)
            trainable = footprint(adapted).trainable
            peaks += [one.peak(adapted)] if one.peak and not peaks else []
            folder = Path(train.output_dir) / f"{name}-{seed}"
            config = replace(train, output_dir=str(folder), seed=seed, learning_rate=rate)
            result = task.fit(adapted, one.data, config, _Choice(name, width))
            for key, value in _read_or_compute_scores(folder / "scores.json", one, adapted, result).items():
                scores.setdefault(key, []).append(value)
            rates.append(result.steps_per_second)
            weights = folder / "best" / TRAINED
            if isinstance(adapted, PeftModel):
                weights = save_adapter(adapted, folder / "adapter", processor=one.data.processor) / WEIGHTS
            size = weights.stat().st_size
        peak = max(peaks, default=None)
        rows.append(Compared(name, rate, trainable, scores, statistics.median(rates), size, peak))
    return rows


def _read_or_compute_scores(path: Path, job: _SeedRun, adapted: nn.Module, result: FitResult) -> dict[str, float]:
    """The scores of a finished run, read back where they were computed before in the same way."""
    how = json.loads(json.dumps(job.scored_by))
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if result.resumed and stored["by"] == how:
            return stored["scores"]
    scores = job.scores(adapted, result)
    if PartialState().is_main_process:
        write_json(path, {"by": how, "scores": scores})
    return scores


def save_comparison(rows: Sequence[Compared], folder: str | Path, title: str) -> None:
    """Write comparison.json, and print the title with the table, once for all processes."""
    if PartialState().is_main_process:
        write_json(Path(folder) / "comparison.json", [asdict(row) for row in rows])
        print(f"\n{title}\n\n{table(rows)}")


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
            *(_format_spread(row.scores[name], _DIGITS.get(name, 1)) for name in names),
            f"{1000 / row.steps_per_second:.0f}",
            *[f"{(row.peak_bytes or 0) / 1e6:,.1f}"] * memory,
            f"{row.file_bytes / 1000:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _format_spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean

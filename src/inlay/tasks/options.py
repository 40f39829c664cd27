"""What the recipes of all tasks share: the options of a task, and the five steps that follow from them.

    data = task.load(seed)                      both splits as the base takes them (load_parts: and a test part)
    model = task.base(data)                     the frozen base
    model = get_peft_model(model, config)       the method, which is the recipe's own
    result = task.fit(model, data, train, method)
    report = task.report(model, data, result)   what metrics.json holds

No import here is slow: a recipe reads its command line before it waits for torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from inlay.errors import BadInput, Unreachable, Unsupported
from inlay.options import check_options, option
from inlay.tasks.folds import FOLDS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from inlay.tasks.evaluation import Split, Training
    from inlay.train.callback import Callback
    from inlay.train.config import TrainConfig
    from inlay.train.loop import FitResult
    from inlay.train.losses import Loss


@dataclass(frozen=True)
class TaskData:
    """What a task has loaded, and what `fit` takes with it.

    Attributes:
        source: The data itself: ImageData, TextData, MaskData or VolumeData.
        train: View of the training split, or a Stream.
        validation: View of the held-out split.
        processor: Makes the base's inputs; saved with the adapter.
        metrics: Scores of an evaluation; the first chooses the best step. Without any the loss does.
        collate: Makes a batch of items; None: torch's default.
        loss: What is made small; None: the model's own.
        example: One example as a batch of one, without labels, to measure what a forward pass costs.
    """

    source: Any
    train: Any
    validation: Any
    processor: Any
    metrics: Sequence[Any]
    collate: Callable[[list[Any]], dict[str, Any]] | None
    loss: Loss | None
    example: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Parts:
    """A data set in three parts without an example in two of them: to train on, to choose by, and to test.

    Attributes:
        data: To train with; `validation` is the part that chooses.
        test_split: Where `evaluate` finds the test part, together with `training`: the data's own test split, or else
            what `load` holds out.
        training: How the data was split, for `Request`.
        counts: Examples of `train`, `validation` and `test`: images, texts, pairs of prompt and completion, scans; of
            running text documents.
    """

    data: TaskData
    test_split: Split
    training: Training
    counts: dict[str, int]


@dataclass(frozen=True)
class Report:
    """What is known of a trained adapter.

    Attributes:
        metrics: What metrics.json holds: scores, data, history, cost, and the settings of the training.
        summary: The scores in one line.
    """

    metrics: dict[str, Any]
    summary: str

    def announce(self, folder: Path) -> None:
        """Print the scores and where the adapter is saved, once for all processes."""
        from accelerate import PartialState

        PartialState().print(f"{self.summary}; saved {folder}")


@dataclass
class TaskOptions:
    """Options of every task. A task adds its own, and says how its data is loaded and scored.

    Attributes:
        default_folds: Of what the data does not split itself, one part in so many is held out.
    """

    default_folds: ClassVar[int] = FOLDS
    model: str
    dataset: str
    quantize: Literal["8bit", "4bit"] | None = option(
        None, "Hold the frozen base in 8 or 4 bits (bitsandbytes); methods that train its own weights cannot."
    )
    group: str | None = option(
        None,
        "Keep together: a column of the data, or a regular expression whose match in a file's path names the patient, "
        "slide or site.",
    )
    fold: int | None = option(
        None,
        "Which fold of training data without a validation split is held out, from 0; default: the first. Groups stay "
        "whole.",
        least=0,
    )
    folds: int | None = option(None, "Number of folds; default: 5, and 10 of prompts.", least=2)
    attention: Literal["sdpa", "flash", "eager"] | None = option(
        None,
        "Code that computes the base's attention in training; flash needs flash-attn, a CUDA GPU and --precision bf16. "
        "Default: what transformers chooses, mostly sdpa.",
    )

    def __post_init__(self) -> None:
        self.model, self.dataset = os.fspath(self.model), os.fspath(self.dataset)  # of a caller with a pathlib.Path
        check_options(self)
        if self.folds is not None and self.fold is None:
            raise BadInput(f"folds = {self.folds} needs fold, the one to hold out, from 0 to {self.folds - 1}.")
        if self.fold is not None:
            self.folds = self.folds or self.default_folds
            if self.fold >= self.folds:
                raise BadInput(f"fold must be from 0 to {self.folds - 1}, got {self.fold}.")

    @property
    def split(self) -> dict[str, Any]:
        """What every loader takes to know what to hold out, besides the seed."""
        share = 1 / (self.folds or self.default_folds)
        return {"group": self.group, "validation": share, "fold": self.fold}

    def load(self, seed: int, *, test: bool = False) -> TaskData:
        """Both splits as the base takes them.

        Args:
            seed: Chooses what is held out where the data does not, whole groups where `group` names them; all global
                generators start from it, so that the new weights are the same in each run.
            test: Keep a third part, `source.test`, that is neither trained on nor chooses; see `load_parts`.
        """
        raise NotImplementedError

    def load_parts(self, seed: int = 0) -> Parts:
        """The data in three parts: nothing that is chosen by `data.validation` has seen the test part.

        The test part is the data's own test split where it has one with labels, or else what `load` holds out. What
        chooses is the data's own validation split, or else held out of training in the same way.

            parts = task.load_parts(seed)
            request = Request(parts.test_split, compare=False, training=parts.training)
            TASKS[name].evaluate(adapter, task.dataset, request)     scores the test part

        Raises:
            InlayError: As `load`; too few examples for three parts; flash attention, as trials are scored in float32.
        """
        from inlay.tasks.evaluation import Training

        if self.attention == "flash":
            raise Unsupported("a study scores its trials in float32, which flash attention does not know; choose sdpa.")
        data = self.load(seed, test=True)
        counts = {part: len(getattr(data.source, part)) for part in ("train", "validation", "test")}
        return Parts(data, data.source.test_split, Training(self.dataset, {**asdict(self), "seed": seed}), counts)

    def base(self, data: TaskData) -> Any:
        """The frozen base."""
        from inlay.tasks.base import load_base

        with self.offering_embedded_base():
            base = load_base(self.model, quantize=self.quantize, attention=self.attention)
        return self._announced(base)

    def fit_method(self, config: Any, model: nn.Module, data: TaskData) -> Any:
        """peft's config of a method, as this data needs it; most methods need nothing of it."""
        return config

    def fit(self, model: nn.Module, data: TaskData, train: TrainConfig, method: Any) -> FitResult:
        """Say what memory a step will take, then train; the best weights stay in the model.

        Args:
            model: The base with an adapter in it.
            data: Of `load`.
            train: How to train.
            method: The recipe's own options, a dataclass: a run goes on only under the same ones.
        """
        from accelerate import PartialState

        from inlay.bases.attention import check_precision, leave_flash_attention
        from inlay.measure.memory import describe_memory
        from inlay.train.loop import fit
        from inlay.train.stream import Stream

        check_precision(model, train.precision)
        shown = data.validation if isinstance(data.train, Stream) else data.train
        PartialState().print(describe_memory(model, shown, train, collate=data.collate, loss=data.loss))
        result = fit(
            model,
            self.complete_training(data.train, train),
            data.validation,
            train,
            metrics=data.metrics,
            collate=data.collate,
            loss=data.loss,
            settings={**asdict(self), **asdict(method)},
            callback=self.make_callback(model, data),
        )
        leave_flash_attention(model)
        return result

    def complete_training(self, view: Any, train: TrainConfig) -> Any:
        """The training view with what is made for this run only; most tasks add nothing."""
        return view

    def make_callback(self, model: nn.Module, data: TaskData) -> Callback | None:
        """What is done in the course of a run besides the steps; most tasks do nothing."""
        return None

    @contextmanager
    def offering_embedded_base(self) -> Iterator[None]:
        """Name this task's embedded base in the error of one that cannot be reached."""
        try:
            yield
        except Unreachable as error:
            embedded = next(field.default for field in fields(self) if field.name == "model")
            raise Unreachable(f"{str(error).removesuffix('.')}, or use --model {embedded}.") from error

    def _announced(self, base: Any) -> Any:
        """The base, after a word on what of it is held in few bits."""
        from accelerate import PartialState

        from inlay.measure.footprint import describe_quantized

        if self.quantize:
            PartialState().print(describe_quantized(base))
        return base


@dataclass
class StreamOptions(TaskOptions):
    """Options of the tasks whose data can be streamed."""

    stream: bool | None = option(
        None, "Read a Hub dataset or a folder of shards (.tar, .parquet, .jsonl) as it is needed; a glob always is."
    )
    shuffle_buffer: int | None = option(
        None, "Rows of a stream that are shuffled together, per process; default: 1,000.", least=1
    )

    def is_streamed(self, test: bool = False) -> bool:
        """Whether the data is read as it is needed.

        Raises:
            InlayError: A fold or a test part is wanted of a stream.
        """
        from inlay.tasks.shards import is_streamed

        streamed = is_streamed(self.dataset, self.stream)
        if streamed and self.fold is not None:
            raise Unsupported(
                f"{self.dataset!r} is streamed, of which one example in twenty is held out, so it has no folds; leave "
                "fold out, or pass data that is loaded."
            )
        if streamed and test:
            raise Unsupported(
                f"{self.dataset!r} is streamed, so it is not split into three parts to compare on; pass data that is "
                "loaded, such as a few of its shards in a folder of images."
            )
        return streamed


def describe_run(model: nn.Module, data: TaskData, result: FitResult) -> dict[str, Any]:
    """The part of metrics.json that is alike for all tasks: scores, data, history, cost and settings."""
    from inlay.measure import cost

    return {
        "validation": result.metrics,
        "dataset": data.source.name,
        "history": result.history,
        "cost": cost(model, data.example()),
        "training": {**result.settings, "steps": result.steps, "seconds": round(result.seconds, 1)},
    }

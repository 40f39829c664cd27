"""What a task is: the one contract between what a model is for and everything that trains, saves, checks and serves it.

A task is one folder of inlay.tasks, and one row of TASKS. Nothing here and nothing in a task's `task.py` imports torch
or transformers before a method is called, so that a command line can ask which tasks there are at no cost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from inlay.errors import BadInput, Unsupported

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inlay.tasks.adapter import Adapter
    from inlay.tasks.evaluation import Evaluation, Request, Training
    from inlay.tasks.options import TaskOptions
    from inlay.tasks.serving import Answering
    from inlay.train.losses import Loss

Record = dict[str, Any]  # what inlay keeps inside an adapter's file


@dataclass(frozen=True)
class Option:
    """An option of `inlay predict` or `inlay evaluate` that belongs to one task.

    Attributes:
        kind: Its type, as typer takes it.
        help: One sentence.
        default: None where it may be left out.
        metavar: What stands for the value in the help; default: what typer makes of the type.
        least: Smallest value of a number.
    """

    kind: Any
    help: str
    default: Any = None
    metavar: str | None = None
    least: float | None = None


@dataclass(frozen=True)
class Answer:
    """What an adapter says of its inputs: `lines` for people, `facts` as JSON takes them."""

    lines: list[str]
    facts: Any


@dataclass(frozen=True)
class LabelledBatches:
    """Examples of a task for a model that is already there: what `combine` fits its weights on.

    Attributes:
        view: Items by index.
        collate: Makes a batch of items.
        loss: Of a batch.
        rows: Items in a batch.
    """

    view: Any
    collate: Callable[[list[Any]], dict[str, Any]]
    loss: Loss
    rows: int


@dataclass(frozen=True)
class PlannedData:
    """What is said of the data of a training that is planned; None where it is not.

    Attributes:
        labels: Number of classes; of scans without the background.
        crop: Voxels (D, H, W) of a scan that a model sees at a time.
        channels: Number of channels of a scan.
        spacing_mm: Between the voxels of a scan, (D, H, W).
    """

    labels: int | None = None
    crop: Sequence[int] | None = None
    channels: int | None = None
    spacing_mm: Sequence[float] | None = None


class Task(ABC):
    """One row of TASKS.

    Attributes:
        name: As the Hub, a record and a user call it.
        auto_class: transformers' class that loads a base for it.
        base_noun: What such a base is, with its article, for messages.
        hub_tag: The Hub's pipeline tag.
        base_kinds: What the rows of METHODS call its bases.
        classifies: Labels can be given to a base, whose head is then new; the adapter holds that head.
        stores_few_bits: A merged model can be stored in 8 or 4 bits.
        compares_images: `evaluate` compares what it paints by the features of an encoder.
        library: That loads a merged model.
        peft_task_type: What plain peft calls it in a config, where peft names it.
        function: Of inlay, that uses such an adapter.
        limits: A sentence for the card: what to beware of.
        usage: Python for the card that uses an adapter; FOLDER stands for where it is.
        inputs: What the inputs of `inlay predict` are.
        options: Those of `inlay predict`, by name.
        score_options: Those of `inlay evaluate`, by name.
        main_score: The score of `evaluate` by which adapters are compared.
        smaller_is_better: Of the main score.
        graph_module: The part of a model that an exported graph computes; empty: the whole.
        graph_output: What the graph gives, by its name in the output of that module.
        token_inputs: Inputs of the graph whose second axis is as long as the text.
        own_data: By the name of an embedded base, embedded data of what that was pre-trained for, which it never saw.
        own_examples: So many of them tell what a base can do.
        forgotten: What the fall of `score_batches` after adaptation is called in a study.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    base_noun: ClassVar[str]
    hub_tag: ClassVar[str]
    base_kinds: ClassVar[Sequence[str]]
    classifies: ClassVar[bool] = False
    stores_few_bits: ClassVar[bool] = True
    compares_images: ClassVar[bool] = False
    library: ClassVar[str] = "transformers"
    peft_task_type: ClassVar[str | None] = None
    function: ClassVar[str]
    limits: ClassVar[str]
    usage: ClassVar[str]
    inputs: ClassVar[str]
    options: ClassVar[Mapping[str, Option]] = {}
    score_options: ClassVar[Mapping[str, Option]] = {}
    main_score: ClassVar[str]
    smaller_is_better: ClassVar[bool] = False
    graph_module: ClassVar[str] = ""
    graph_output: ClassVar[str] = "logits"
    token_inputs: ClassVar[Sequence[str]] = ()
    own_data: ClassVar[Mapping[str, str]] = {}
    own_examples: ClassVar[int] = 512
    forgotten: ClassVar[str] = "own_task"

    # Bases.

    @abstractmethod
    def takes_base(self, config: Any) -> bool:
        """Whether the config of a transformers model is that of a base for this task, unless another is asked for."""

    def could_take_base(self, config: Any) -> bool:
        """Whether it can be loaded for this task when that is asked for; most bases have one task only."""
        return self.takes_base(config)

    def complete_base(self, base: Any) -> None:
        """Give a model, in place, what it needs for this task besides its weights and labels; most need nothing."""
        return

    def check_method(self, model: nn.Module) -> None:
        """Raise InlayError where the method of a PeftModel does not work on bases of this task; most do."""
        return

    def leave_out_idle_layers(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of an adapter without those that no training for this task reaches, and that change nothing."""
        return weights

    # Processors: what makes a model's input.

    @abstractmethod
    def takes_processor(self, processor: Any) -> bool:
        """Whether this is the kind of processor that the task's adapters are trained with."""

    @abstractmethod
    def load_processor(self, base_name: str, settings: Record | None) -> Any:
        """The processor that `settings` of a record describe, or without them the one that the base comes with."""

    def processor_settings(self, processor: Any) -> Record:
        """What `load_processor` needs, as JSON takes it."""
        return dict(processor.to_dict())

    def save_processor(self, processor: Any, folder: Any) -> None:
        """Write it next to a merged model, as transformers reads it."""
        processor.save_pretrained(folder)

    # The record of an adapter.

    def labels(self, base: Any, method: Any) -> list[str]:
        """Class names, in the order of the outputs, of a model with `method` (peft's config) on it; most have none."""
        return []

    def restore_labels(self, method: Any, labels: Sequence[str]) -> None:
        """Give the class names of a record, in their order, to a loaded config that holds them too; most hold none."""
        return

    # The golden input.

    @abstractmethod
    def golden_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        """One fixed input, through the whole preprocessing, on the CPU; floats are float32."""

    @abstractmethod
    def golden_values(self, output: Any, count: int) -> Tensor:
        """At most `count` numbers of what the model makes of it, spread over the whole."""

    # Merging into the base.

    def check_merges(self, name: str) -> None:
        """Raise InlayError where the task's adapters cannot become a plain model of transformers."""
        return

    def loading_code(self, model: nn.Module, folder: str) -> list[str]:
        """Lines of Python that load a merged model from its folder with `library` only."""
        return [
            f"from transformers import {self.auto_class}",
            "",
            f'model = {self.auto_class}.from_pretrained("{folder}")',
        ]

    @abstractmethod
    def random_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        """Inputs without a meaning, the same at each call, on which the error of merging is measured."""

    # Exporting.

    def graph_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        """Inputs without a meaning of the module that is exported, the same at each call, at least two rows of each."""
        return self.random_inputs(model, processor)

    # Training.

    @abstractmethod
    def training_options(self) -> type[TaskOptions]:
        """The dataclass whose fields are the options of the task's recipes."""

    def find_main_score(self, scores: Mapping[str, float]) -> float:
        """The main score of held-out data, in its unit, from the loss and metrics of a training run."""
        return scores[self.main_score]

    # Data.

    @abstractmethod
    def load_labelled(
        self,
        adapter: Adapter,
        data: str,
        count: int,
        seed: int,
        training: Training,
        *,
        held_out: bool = False,
    ) -> LabelledBatches:
        """Up to `count` training examples of labelled data, as this adapter's model takes them.

        Args:
            adapter: Says which labels, and makes inputs.
            data: Its name.
            count: Of examples.
            seed: Chooses them.
            training: Of the adapter: what it held out of this data is held out again.
            held_out: Take validation examples instead.

        Raises:
            InlayError: Data of other labels, or none of this task.
        """

    def classify_batch(self, model: Callable[..., Any], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Predicted and true classes (N,) of a batch of `load_labelled`, by which two forms of a model are compared.

        Raises:
            InlayError: The task has no classes to compare.
        """
        raise Unsupported(f"inlay does not compare the answers of models for {self.name} yet.")

    def score_batches(self, model: Callable[..., Any], batches: Sequence[dict[str, Tensor]], loss: Loss) -> float:
        """The main score of a model on batches of `load_labelled`, of which more is better; here the accuracy.

        Raises:
            InlayError: The task has no classes to compare, and no score of its own.
        """
        answers = [self.classify_batch(model, batch) for batch in batches]
        right = sum(int((predicted == true).sum()) for predicted, true in answers)
        return right / sum(len(true) for _, true in answers)

    def compute_features(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The last features of a model, which its head reads: one row for each example, token or position, (N, D).

        Raises:
            InlayError: The model has no features that a base without its adapter would have too.
        """
        from inlay.tasks.features import read_head_inputs

        return read_head_inputs(model, batch)

    def fit_planned(self, config: Any, base: Any, data: PlannedData) -> Any:
        """The config of a method, fitted to planned data as `TaskOptions.fit_method` fits it to real data.

        Raises:
            InlayError: What is said of the data does not fit the task.
        """
        given = [name for name in ("crop", "channels", "spacing_mm") if getattr(data, name) is not None]
        if given:
            raise BadInput(
                f"{' and '.join(given)} can be given for scans only, but this is a plan for {self.name}; leave "
                f"{'it' if len(given) == 1 else 'them'} out, or choose the method 'spatial' and a SAM."
            )
        return config

    @abstractmethod
    def planned_batch(
        self, base: Any, rows: int, length: int, added: int, crop: Sequence[int] | None = None
    ) -> tuple[dict[str, Tensor], Loss | None]:
        """A batch of the size of a training step, and its loss, for planning memory.

        Args:
            base: The model, which may be on the meta device.
            rows: Examples.
            length: Tokens of a text.
            added: Tokens that a method puts in front of it.
            crop: Voxels (D, H, W) of a scan; default: those of the recipe.
        """

    def forward_inputs(self, base: Any, rows: int, length: int, size: int | None = None) -> dict[str, Tensor]:
        """What one forward pass takes, without labels, for measuring what it costs.

        Args:
            base: The model, which may be on the meta device.
            rows: Examples.
            length: Tokens of a text.
            size: Pixels or voxels a side, where it is not that of the base's config.

        Raises:
            InlayError: A size for a base that takes no pixels by their side.
        """
        batch, _ = self.planned_batch(base, rows, length, 0)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if size is not None:
            pixels = inputs.get("pixel_values")
            if pixels is None or pixels.ndim < 4:
                raise BadInput(f"{type(base).__name__} takes no images of a side that can be chosen; leave size out.")
            inputs["pixel_values"] = pixels.new_zeros(*pixels.shape[:2], *[size] * (pixels.ndim - 2))
        return inputs

    # Use.

    @abstractmethod
    def prepare(self, inputs: Sequence[str], options: Mapping[str, Any]) -> Callable[[Adapter], Answer]:
        """What `inlay predict` does with these inputs and the values of `options`, once the adapter is loaded.

        Raises:
            InlayError: Whatever can be found wrong before that.
        """

    def evaluate(self, adapter: Adapter, data: str, request: Request) -> Evaluation:
        """All scores of an adapter on labelled data.

        Raises:
            InlayError: Data that is none of this task, or with labels that the adapter does not know.
        """
        raise Unsupported(f"inlay does not score adapters for {self.name} yet.")

    def serving(self) -> Answering:
        """How requests to a server are read, computed and answered.

        Raises:
            InlayError: A server does not answer for this task.
        """
        raise Unsupported(f"inlay does not serve {self.name} yet.")

    # Words.

    def describe_inputs(self, record: Record) -> list[str]:
        """A heading without `#`, and paragraphs for the card: classes, and how inputs are given."""
        return []

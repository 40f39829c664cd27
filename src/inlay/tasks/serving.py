"""How a task answers requests that come one by one, such as over HTTP: values become rows, and rows replies.

A request is read by the settings of its adapter (`Answering.read`), computed, and answered for people or programs
(`reply`). Most tasks compute a request in one forward pass, in a batch with those of other adapters (`Serving`). One
that writes a text says how its prompt is continued, token by token (`Writing`); one that needs many passes is computed
by itself (`SingleServing`). Only the model is computed on the thread that owns it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from inlay.tasks.adapter import Adapter

DataType = Literal["BOOL", "UINT8", "INT32", "INT64", "FP32", "BYTES"]
Finish = Literal["stop", "length"]  # an end token or string, or as many tokens as were asked for


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a request or a reply, as the Open Inference Protocol describes it.

    Attributes:
        name: Of the tensor.
        datatype: By the protocol's name; BYTES are files or texts.
        shape: Without the axis of the batch; -1 is any size.
        help: One sentence.
        optional: A request may leave it out.
        is_text: BYTES are a text, and no file.
    """

    name: str
    datatype: DataType
    shape: tuple[int, ...]
    help: str
    optional: bool = False
    is_text: bool = False


@dataclass(frozen=True)
class Limits:
    """The most that a request may hold. They are checked before anything is decoded.

    Attributes:
        pixels: Of an image.
        voxels: Of a scan.
        tokens: Of a text.
        new_tokens: To generate.
    """

    pixels: int = 50_000_000
    voxels: int = 200_000_000
    tokens: int = 4_096
    new_tokens: int = 1_024


@dataclass(frozen=True)
class ServedAdapter:
    """What a request must know of its adapter.

    Attributes:
        name: For messages.
        processor: Makes its inputs.
        labels: Class names in the order of the outputs; none for what has no classes.
        groups: Of labels, of a combination of classifiers, as `AdapterFile.groups`.
        config: Of its model, with as many labels as it has.
    """

    name: str
    processor: Any
    labels: Sequence[str] = ()
    groups: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    config: Any = None

    def route(self, group: str | None) -> tuple[list[str], list[int]]:
        """Class names of one group of labels, and which logits stand for them; None: all classes.

        Raises:
            InlayError: There is no such group.
        """
        from inlay.tasks.adapter import route_group  # which needs torch

        return route_group(f"adapter {self.name!r}", list(self.labels), self.groups, group)


@dataclass(frozen=True)
class Row:
    """One input of a model.

    Attributes:
        inputs: What `collate` or `compute` needs.
        shape: Rows with equal ones may be in one batch.
        source: What `reply` needs, such as the size of the image.
    """

    inputs: Mapping[str, Any]
    shape: Hashable = None
    source: Any = None


@dataclass(frozen=True)
class Reply:
    """What an adapter says of one input, in the form that was asked for.

    Attributes:
        facts: For people, as JSON takes them.
        tensors: For programs, by the names of `Answering.outputs`, without the axis of the batch; texts and files as a
            list.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray | list[str] | list[bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class AnnotatedModel:
    """What a program for annotating must know of an adapter.

    Attributes:
        classes: Names by their numbers in the masks that it gets: 1..K in order, as 3D Slicer takes them.
        options: Switches of a request, with their defaults.
    """

    classes: Mapping[str, int]
    options: Mapping[str, bool]


class Annotating(ABC):
    """How a task answers programs in which people annotate scans, such as 3D Slicer, in the terms of MONAI Label.

    Attributes:
        outputs: Names of tensors that `Answering.reply` makes for it: of `Answering.outputs`, or for it only.
    """

    outputs: ClassVar[Sequence[str]]

    @abstractmethod
    def describe(self, adapter: ServedAdapter) -> AnnotatedModel:
        """The classes of an adapter, and what can be asked of it."""

    @abstractmethod
    def check(self, scan: bytes, limits: Limits) -> None:
        """Refuse a file that is no scan.

        Raises:
            InlayError: It cannot be read, or is over a limit.
        """

    @abstractmethod
    def read(
        self, scan: bytes, params: Mapping[str, Any], adapter: ServedAdapter, label: bytes | None = None
    ) -> dict[str, Any]:
        """The values of a request for `Answering.read`, and `suffix`, that of the file with the mask.

        Args:
            scan: Its file.
            params: Of the request: clicks and switches, and the `result_extension` that the mask shall have.
            adapter: That is asked.
            label: The file of a label map: a mask to correct, and what was painted over it.

        Raises:
            InlayError: Clicks that are no voxels, paint that belongs to no class, or a format that masks do not have.
        """

    @abstractmethod
    def reply(self, tensors: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
        """The mask as a file, and what is said of it."""


class Answering(ABC):
    """How one task answers.

    Attributes:
        action: What people ask of it: the last part of its route, such as /v1/classify. None: it has routes of its own.
        inputs: What a request holds, whatever the adapter.
        outputs: What a reply holds; -1 stands for the number of classes too.
        makes_files: A reply holds masks or files, which take longer to make than an event loop should wait.
        annotating: How programs for annotating ask; None: they cannot.
    """

    action: ClassVar[Literal["classify", "segment"] | None] = None
    inputs: ClassVar[Sequence[TensorSpec]]
    outputs: ClassVar[Sequence[TensorSpec]]
    makes_files: ClassVar[bool] = False
    annotating: ClassVar[Annotating | None] = None

    def list_inputs(self, adapter: ServedAdapter) -> Sequence[TensorSpec]:
        """What a request to this adapter holds: `inputs`, where adapters do not differ."""
        return self.inputs

    @abstractmethod
    def read(self, values: Mapping[str, Any], adapter: ServedAdapter, limits: Limits) -> Any:
        """What the model needs of a request: a Row, or a Prompt; called on any thread.

        Args:
            values: By the names of `list_inputs`: an array without the axis of the batch, bytes of a file, or a text.
            adapter: That is asked.
            limits: Of the server.

        Raises:
            InlayError: Values that cannot be read, or over a limit.
        """

    @abstractmethod
    def reply(self, found: Any, row: Any, adapter: ServedAdapter, tensors: Collection[str] | None) -> Reply:
        """What is answered; called on any thread.

        Args:
            found: What was computed: a row of `take_rows`, a Written, or what `compute` gives.
            row: From `read`.
            adapter: That was asked.
            tensors: Names of `outputs` that a program wants; None: facts for people.
        """


class Serving(Answering):
    """How a task answers whose requests are computed in one forward pass, in a batch with others."""

    def largest_batch(self, config: Any) -> int | None:
        """How many rows a base of this config computes at once, for its memory; None: as many as the server allows."""
        return None

    @abstractmethod
    def collate(self, rows: Sequence[Row], weight: Tensor) -> dict[str, Tensor]:
        """The batch that the model takes, of rows of equal shape, on the device and in the type of its weights."""

    @abstractmethod
    def take_rows(self, output: Any, count: int) -> list[dict[str, Tensor]]:
        """What the model made of each of so many rows, on the CPU, in float32."""


class Writer(ABC):
    """Makes the text of one answer of its tokens, as they come.

    Attributes:
        stopped: The text has come to one of the strings that end it.
    """

    stopped: bool = False

    @abstractmethod
    def add(self, token: int) -> str:
        """What the text goes on with for sure; nothing while a character, or a string that would end it, is begun."""

    @abstractmethod
    def finish(self) -> str:
        """The rest, once no token follows."""

    @abstractmethod
    def name(self, token: int) -> str:
        """A token by itself as text."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0, or too small to divide by: the most probable one.
        top_p: Among the most probable ones that hold this share.
        top_k: Among so many; 0: all.
        seed: The same gives the same text, whatever else is in the batch; None: another one each time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Prompt:
    """Tokens that a model continues.

    Attributes:
        ids: The tokens.
        text: The same as text; empty of a chat.
        ends: Tokens that end the text.
        max_new_tokens: None: as many as the base has positions for and the server allows.
        make_writer: For the text.
        sampling: How tokens are chosen.
        logprobs: How many probable tokens are told at each step, besides the chosen one; None: not even that.
    """

    ids: Sequence[int]
    text: str
    ends: frozenset[int]
    max_new_tokens: int | None
    make_writer: Callable[[], Writer]
    sampling: Sampling = Sampling()
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenScore:
    """The logarithm of a token's probability before it is shaped by the temperature.

    Attributes:
        token: As text.
        logprob: Of the chosen token.
        top: Of the most probable tokens, in order.
    """

    token: str
    logprob: float
    top: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True)
class Piece:
    """What one more token adds to a text.

    Attributes:
        text: Empty while it is not certain.
        finish: Why it ends here; None: it goes on.
        score: Where the prompt asks for it.
    """

    text: str
    finish: Finish | None = None
    score: TokenScore | None = None


@dataclass(frozen=True)
class Written:
    """A whole text.

    Attributes:
        text: Without the string that ended it.
        tokens: How many the model made, the end token included.
        finish: As in a Piece.
        scores: One a token, where the prompt asks for them.
    """

    text: str
    tokens: int
    finish: Finish
    scores: list[TokenScore] = field(default_factory=list)


class Writing(Answering):
    """How a task answers with a text; `read` gives a Prompt, and `reply` takes a Written."""

    @abstractmethod
    def take_base(self, model: Any) -> None:
        """Remember what `read` needs to know of the base."""


class SingleServing(Answering):
    """How a task answers whose requests take many forward passes each, under one adapter in a model of its own."""

    @abstractmethod
    def compute(self, row: Row, adapter: Adapter, limits: Limits, before_pass: Callable[[], None]) -> Mapping[str, Any]:
        """What the adapter makes of a row.

        Args:
            row: From `read`.
            adapter: Loaded.
            limits: Of the server.
            before_pass: To be called before each forward pass; what it raises ends the work.

        Raises:
            InlayError: Values that cannot be read.
        """

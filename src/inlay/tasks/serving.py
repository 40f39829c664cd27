"""How a task answers requests that come one by one, such as over HTTP: values become rows, and rows replies.

A request is read by the settings of its adapter (`read`) and answered for people and programs (`reply`). In between a
task of one forward pass (`Serving`) makes batches of requests of different adapters: `collate`, the model, `take_rows`.
One that writes a text (`Writing`) says how its prompt is continued, token by token. Only the model is computed on the
thread that owns it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

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
class Row:
    """One input of a model.

    Attributes:
        inputs: What `collate` needs.
        shape: Rows with equal ones may be in one batch.
        source: What `reply` needs, such as the size of the image.
    """

    inputs: dict[str, Tensor]
    shape: Hashable = None
    source: Any = None


@dataclass(frozen=True)
class Reply:
    """What an adapter says of one input.

    Attributes:
        facts: For people, as JSON takes them.
        tensors: By the names of `Serving.outputs`, without the axis of the batch; texts as a list.
    """

    facts: dict[str, Any]
    tensors: dict[str, np.ndarray | list[str]] = field(default_factory=dict)


class Answering(ABC):
    """How one task answers.

    Attributes:
        inputs: What a request holds.
        outputs: What a reply holds; -1 stands for the number of classes too.
    """

    inputs: ClassVar[Sequence[TensorSpec]]
    outputs: ClassVar[Sequence[TensorSpec]]

    @abstractmethod
    def read(self, values: Mapping[str, Any], processor: Any, limits: Limits) -> Any:
        """What the model needs of a request: a Row, or a Prompt; called on any thread.

        Args:
            values: By the names of `inputs`: an array without the axis of the batch, bytes of a file, or a text.
            processor: Of the adapter.
            limits: Of the server.

        Raises:
            InlayError: Values that cannot be read, or over a limit.
        """

    @abstractmethod
    def reply(self, found: Any, row: Any, labels: Sequence[str], config: Any) -> Reply:
        """What is answered; called on any thread.

        Args:
            found: From `take_rows`, or a Written.
            row: From `read`.
            labels: Of the adapter.
            config: Of the base.
        """


class Serving(Answering):
    """How a task answers in one forward pass."""

    @abstractmethod
    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The batch that the model takes, of rows of equal shape."""

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


def reply_with_labels(logits: Tensor, probabilities: Tensor, labels: Sequence[str]) -> Reply:
    """The classes of one input, the most probable first.

    Args:
        logits: One for each class, (K,).
        probabilities: Theirs, (K,).
        labels: Class names in the order of the logits.
    """
    values, places = probabilities.sort(descending=True)
    names = [labels[place] for place in places.tolist()]
    facts = {"label": names[0], "probabilities": dict(zip(names, values.tolist(), strict=True))}
    return Reply(facts, {"logits": logits.numpy(), "probabilities": probabilities.numpy(), "label": [names[0]]})

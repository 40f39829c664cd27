"""How a task answers requests that come one by one, such as over HTTP: values become rows, and rows replies.

A request is read by the settings of its adapter (`Serving.read`), computed in a batch with requests of other adapters
(`collate`, the model, `take_rows`), and answered for people and programs (`reply`). Only the model is computed on the
thread that owns it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DataType = Literal["BOOL", "UINT8", "INT32", "INT64", "FP32", "BYTES"]


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


class Serving(ABC):
    """How one task answers.

    Attributes:
        inputs: What a request holds.
        outputs: What a reply holds; -1 stands for the number of classes too.
    """

    inputs: ClassVar[Sequence[TensorSpec]]
    outputs: ClassVar[Sequence[TensorSpec]]

    @abstractmethod
    def read(self, values: Mapping[str, Any], processor: Any, limits: Limits) -> Row:
        """The row of a request; called on any thread.

        Args:
            values: By the names of `inputs`: an array without the axis of the batch, bytes of a file, or a text.
            processor: Of the adapter.
            limits: Of the server.

        Raises:
            InlayError: Values that cannot be read, or over a limit.
        """

    @abstractmethod
    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The batch that the model takes, of rows of equal shape."""

    @abstractmethod
    def take_rows(self, output: Any, count: int) -> list[dict[str, Tensor]]:
        """What the model made of each of so many rows, on the CPU, in float32."""

    @abstractmethod
    def reply(self, found: Mapping[str, Tensor], row: Row, labels: Sequence[str], config: Any) -> Reply:
        """What is answered; called on any thread.

        Args:
            found: From `take_rows`.
            row: From `read`.
            labels: Of the adapter.
            config: Of the base.
        """


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

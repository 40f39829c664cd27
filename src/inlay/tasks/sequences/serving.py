"""Texts, or pairs of them, that are classified one by one."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from inlay.errors import BadInput
from inlay.tasks.adapter import place_inputs
from inlay.tasks.classifier_serving import Choice, ClassifierServing, read_choice
from inlay.tasks.sequences.processor import SequenceProcessor
from inlay.tasks.serving import Limits, Row, ServedAdapter, TensorSpec

SHORTEST = 32  # tokens: texts of up to so many share a batch, and longer ones with those of the same power of two
CHARACTERS = 16  # a text of more for each token of the limit is refused before it is tokenized


@dataclass(frozen=True)
class TextChoice(Choice):
    """Among which classes a text is classified, and what pads it."""

    processor: SequenceProcessor | None = None


class SequenceServing(ClassifierServing):
    """A request has a text, or the two texts of a pair; what is longer than the adapter reads is cut."""

    inputs: ClassVar = (
        TensorSpec("text", "BYTES", (), "A text, or the first of a pair.", is_text=True),
        TensorSpec("pair", "BYTES", (), "The second text of a pair.", optional=True, is_text=True),
        *ClassifierServing.choices,
    )

    def __init__(self) -> None:
        self._lock = threading.Lock()  # a tokenizer is set to cut or not by each call, and so belongs to one at a time

    @override
    def read(self, values: Mapping[str, Any], adapter: ServedAdapter, limits: Limits) -> Row:
        choice, processor = read_choice(values, adapter), adapter.processor
        if "text" not in values:
            raise BadInput("a request has a text, which is missing.")
        text, pair = values["text"], values.get("pair")
        length, most = len(text) + len(pair or ""), CHARACTERS * limits.tokens
        if length > most:
            raise BadInput(f"the text has {length:,} characters; the limit is {most:,}.")
        with self._lock:
            rows, _ = processor.encode([text], None if pair is None else [pair])
        tokens = len(rows[0]["input_ids"])
        if tokens > limits.tokens:
            raise BadInput(f"the text has {tokens:,} tokens; the limit is {limits.tokens:,}.")
        bucket = max(SHORTEST, 1 << (tokens - 1).bit_length())
        return Row(rows[0], (bucket, *rows[0]), TextChoice(choice.group, choice.top, processor))

    @override
    def collate(self, rows: Sequence[Row], weight: Tensor) -> dict[str, Tensor]:
        return place_inputs(rows[0].source.processor.pad_rows([dict(row.inputs) for row in rows]), weight)

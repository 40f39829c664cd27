"""Prompts that are continued one by one: texts, tokens or chats."""

import math
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from inlay.errors import BadInput
from inlay.tasks.serving import Limits, Prompt, Reply, Sampling, ServedAdapter, TensorSpec, Writing, Written
from inlay.tasks.text.generate import Decoding, find_end_tokens
from inlay.tasks.text.processor import TextProcessor
from inlay.tasks.text.vocabulary import check_vocabulary, vocabulary_of
from inlay.tasks.text.writer import TextWriter

MOST_LOGPROBS = 20
MOST_STOPS, LONGEST_STOP = 4, 256  # strings that end a text, and characters of one


class TextServing(Writing):
    """A request has a prompt as text, as tokens or as a chat. It is read as the adapter was trained: with its
    separator, or as what a user says first where it was trained with chats."""

    inputs: ClassVar = (
        TensorSpec("prompt", "BYTES", (1,), "The text to continue.", optional=True, is_text=True),
        TensorSpec("input_ids", "INT64", (-1,), "Its tokens, which are continued as they are.", optional=True),
        TensorSpec("max_tokens", "INT32", (1,), "Tokens to write at most; default 64.", optional=True),
        TensorSpec("temperature", "FP32", (1,), "Of sampling; 0, the default: the most probable.", optional=True),
        TensorSpec("top_p", "FP32", (1,), "Share of the probability to sample among.", optional=True),
        TensorSpec("top_k", "INT32", (1,), "Tokens to sample among; 0: all.", optional=True),
        TensorSpec("seed", "INT64", (1,), "Of sampling.", optional=True),
        TensorSpec("stop", "BYTES", (1,), "A text that ends the answer.", optional=True, is_text=True),
    )
    outputs: ClassVar = (TensorSpec("text", "BYTES", (1,), "What follows the prompt.", is_text=True),)

    def __init__(self) -> None:
        self._base: PreTrainedModel | None = None

    @override
    def take_base(self, model: Any) -> None:
        self._base = model

    @override
    def read(self, values: Mapping[str, Any], adapter: ServedAdapter, limits: Limits) -> Prompt:
        """`values` may also hold messages, a list as chat templates take it, and logprobs, a number."""
        assert self._base is not None
        processor: TextProcessor = adapter.processor
        ids, text, prompt = self._read_tokens(values, processor, limits)
        most = values.get("max_tokens", Decoding().max_new_tokens)
        if most is not None:
            most = _read_number("max_tokens", most, int, 1, limits.new_tokens)
        stop = _read_stop(values.get("stop"))
        logprobs = values.get("logprobs")
        return Prompt(
            ids=ids,
            text=text,
            ends=frozenset(find_end_tokens(self._base, processor, [prompt])),
            max_new_tokens=most,
            make_writer=lambda: TextWriter(processor.tokenizer, ids, stop),
            sampling=_read_sampling(values),
            logprobs=None if logprobs is None else _read_number("logprobs", logprobs, int, 0, MOST_LOGPROBS),
        )

    @override
    def reply(self, found: Written, row: Prompt, adapter: ServedAdapter, tensors: Collection[str] | None) -> Reply:
        if tensors is not None:
            return Reply(tensors={"text": [found.text]})
        return Reply({"text": found.text, "finish_reason": found.finish, "tokens": found.tokens})

    def _read_tokens(
        self, values: Mapping[str, Any], processor: TextProcessor, limits: Limits
    ) -> tuple[list[int], str, Any]:
        """Tokens of the prompt, its text, and what was asked with it: a text or a chat."""
        given = [name for name in ("prompt", "input_ids", "messages") if values.get(name) is not None]
        if len(given) != 1:
            raise BadInput(f"a request has either a prompt or its tokens, got {' and '.join(given) or 'none'}.")
        value = values[given[0]]
        prompt: Any = ""
        if given == ["input_ids"]:
            ids = _read_ids(value)
            text = processor.tokenizer.decode(ids)
        else:
            texts = [value] if given == ["prompt"] else [message["content"] for message in value]
            _check_characters("".join(texts), processor.tokenizer, limits)
            prompt = processor.conversation(value)
            ids = processor.encode_prompt(prompt)
            text = value if isinstance(value, str) else ""
        if not ids:
            raise BadInput("the prompt has no tokens.")
        if len(ids) > limits.tokens:
            raise BadInput(f"the prompt has {len(ids):,} tokens; this server reads {limits.tokens:,} at most.")
        assert self._base is not None
        check_vocabulary(str(self._base.name_or_path), max(ids), vocabulary_of(self._base))
        return ids, text, prompt


def _read_ids(value: Any) -> list[int]:
    ids = value.tolist() if isinstance(value, np.ndarray) else value
    if not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise BadInput("a prompt of tokens must be a list of whole numbers of at least 0, and at least one.")
    return ids


def _check_characters(text: str, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
    """Refuse what cannot be tokenised: more characters than the tokens of the limit can hold, and half characters."""
    most = limits.tokens * _longest_token(tokenizer)
    if len(text) > most:
        raise BadInput(
            f"the prompt has {len(text):,} characters, which is more than {limits.tokens:,} tokens can hold."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"the prompt has half of a character (a surrogate) at {error.start}; leave it out.") from error


@lru_cache(maxsize=16)
def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """In characters."""
    return max(map(len, tokenizer.get_vocab()))


def _read_sampling(values: Mapping[str, Any]) -> Sampling:
    seed = values.get("seed")
    return Sampling(
        temperature=_read_number("temperature", values.get("temperature", 0.0), float, 0, 100),
        top_p=_read_number("top_p", values.get("top_p", 1.0), float, 0, 1),
        top_k=_read_number("top_k", values.get("top_k", 0), int, 0, 2**31),
        seed=None if seed is None else _read_number("seed", seed, int, -(2**63), 2**63 - 1),
    )


def _read_number(name: str, value: Any, kind: type, least: float, most: float) -> Any:
    """A number within its bounds; of an array its one number."""
    number = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
    is_number = type(number) is int or (kind is float and type(number) is float and math.isfinite(number))
    if not is_number or not least <= number <= most:
        what = "a whole number" if kind is int else "a number"
        raise BadInput(f"{name} must be {what} from {least:,} to {most:,}, got {number!r}.")
    return kind(number)


def _read_stop(value: Any) -> list[str]:
    stop = [value] if isinstance(value, str) else value or []
    is_list = isinstance(stop, list) and len(stop) <= MOST_STOPS
    if not is_list or not all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in stop):
        raise BadInput(f"stop must be at most {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters.")
    return stop

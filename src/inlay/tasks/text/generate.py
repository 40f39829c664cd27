"""Texts written by a language model, with or without an adapter: greedy, by beam search or sampled."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from inlay.bases.eval_mode import eval_mode
from inlay.errors import BadInput, InlayError
from inlay.tasks.text.vocabulary import check_vocabulary, vocabulary_of

# A recipe reads its command line with Decoding before it waits for torch.
if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

    from inlay.bases.device import Device
    from inlay.tasks.text.data import TextData
    from inlay.tasks.text.processor import TextProcessor
    from inlay.tasks.text.scores import TextScores

logger = logging.getLogger(__name__)


@dataclass
class Decoding:
    """How text is written. The LoRA paper's E2E set-up is beams 10, length_penalty 0.9, no_repeat_ngram 4."""

    max_new_tokens: int = field(default=64, metadata={"help": "Longest text, in tokens."})
    beams: int = field(default=1, metadata={"help": "Beams of the search; 1: greedy, or sampled with temperature."})
    temperature: float = field(default=0.0, metadata={"help": "Of sampling, e.g. 0.7; 0: the most probable token."})
    top_p: float = field(
        default=1.0, metadata={"help": "Sample among the most probable tokens that hold this share, 0 to 1."}
    )
    length_penalty: float = field(
        default=1.0,
        metadata={"help": "Beams are ranked by log probability / length^penalty: over 1 favours long ones."},
    )
    no_repeat_ngram: int = field(
        default=0, metadata={"help": "No n tokens stand twice in prompt and text together, n at least 2; 0: no rule."}
    )
    sample_seed: int = field(default=0, metadata={"help": "Seed of sampling."})
    decode_batch: int = field(default=32, metadata={"help": "Prompts at a time."})

    def __post_init__(self) -> None:
        at_least = {"max_new_tokens": 1, "beams": 1, "no_repeat_ngram": 0, "sample_seed": 0, "decode_batch": 1}
        for name, least in at_least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise BadInput(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or not math.isfinite(self.length_penalty):
            got = f"{self.temperature}, {self.top_p} and {self.length_penalty}"
            raise BadInput(
                "temperature must be at least 0, top_p over 0 and at most 1, and length_penalty a finite number, "
                f"got {got}."
            )
        if self.no_repeat_ngram == 1:
            raise BadInput("no_repeat_ngram 1 would forbid every word of the prompt. Set it to 2 or more, or to 0.")
        if self.beams > 1 and self.temperature:
            raise BadInput(
                f"beams {self.beams} is beam search and temperature {self.temperature} sampling; set beams to 1 or "
                "temperature to 0."
            )
        if self.top_p < 1 and not self.temperature:
            raise BadInput(f"top_p {self.top_p} needs sampling, but temperature is 0. Set a temperature.")
        if self.length_penalty != 1 and self.beams == 1:
            raise BadInput(f"length_penalty {self.length_penalty} ranks beams, but there is 1. Set beams.")

    def check(self, model: nn.Module, data: TextData) -> None:
        """Raise before a training what `judge` would raise after it: an InlayError if no room is left for a prompt."""
        if not data.plain:
            _count_room(model, _language_model_of(model), self)


def generate(
    model: nn.Module,
    processor: TextProcessor,
    prompts: Sequence[Any],
    decoding: Decoding | None = None,
    *,
    device: Device | None = None,
) -> list[str]:
    """Continue each prompt, in their order, until the end token or `max_new_tokens`.

    A prompt gets the same text whatever others are in its batch, but for rounding: batches are padded on the left and
    positions count from each prompt's own first token, in peft's prompt tuning too, which counts the padding. Sampled
    texts depend on `sample_seed` and the prompt's place in the list, and on no global generator. Of the model's own
    generation settings only the end tokens are used: a text ends there, at the tokenizer's eos, or where the chat
    template ends an answer.

    Args:
        model: Causal language model of transformers, or a PeftModel on one, of any method; its mode is kept.
        processor: Turns prompts into tokens and tokens into text.
        prompts: Texts, or chats as lists of messages; a text is a user's first message where the processor is of chats.
            What is too long for the base's positions is cut at its start, behind the tokenizer's own start tokens, with
            a warning.
        decoding: Greedy with at most 64 tokens if not given.
        device: Move the model there first, such as to "cuda:1"; default: where it is.

    Raises:
        InlayError: The model writes no text, max_new_tokens leaves no room for a prompt, or a chat has no template.
    """
    import torch
    from tqdm.auto import tqdm

    from inlay.bases.device import move_model

    decoding = decoding or Decoding()
    move_model(model, device)
    base = _language_model_of(model)
    if isinstance(prompts, str):
        raise BadInput("prompts must be a list, got a string; wrap it in a list.")
    prompts = [processor.conversation(prompt) for prompt in prompts]
    settings = _generation_config(processor, decoding, find_end_tokens(base, processor, prompts))
    ids = _cut_prompts(processor.encode_prompts(prompts), _count_room(model, base, decoding), processor.start)
    check_vocabulary(base.name_or_path, max((max(row) for row in ids), default=0), vocabulary_of(base))
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # alike in length, and memory runs out first if it does
    batches = [order[begin : begin + decoding.decode_batch] for begin in range(0, len(order), decoding.decode_batch)]
    texts = [""] * len(ids)
    # disable=None: no bar where the output is no terminal
    bar = tqdm(batches, desc="generate", disable=None if batches[1:] else True)
    with _prepare_model(model, base, settings), torch.inference_mode():
        for rows in bar:
            tokens, mask = _pad_left([ids[i] for i in rows], settings.pad_token_id, base.device)
            draws = _sampling_processors(decoding, rows, base.device)
            output = model.generate(
                input_ids=tokens, attention_mask=mask, generation_config=settings, logits_processor=draws
            )
            for i, new in zip(rows, output[:, tokens.shape[1] :].tolist(), strict=True):
                end = next((k for k, token in enumerate(new) if token in settings.eos_token_id), None)
                texts[i] = processor.decode(new[:end])
    return texts


def judge(
    model: nn.Module, processor: TextProcessor, data: TextData, decoding: Decoding | None = None
) -> TextScores | None:
    """Write a text for every prompt of the test split, or else of the validation, and score it by all its references.

    None for running text, which has no prompts. Arguments and errors are those of `generate`.
    """
    from inlay.tasks.text.data import group_by_prompt
    from inlay.tasks.text.scores import score_texts

    if data.plain:
        return None
    references = group_by_prompt(data.test or data.validation)
    written = generate(model, processor, list(references), decoding)
    asked = [prompt if isinstance(prompt, str) else [dict(message) for message in prompt] for prompt in references]
    return score_texts(written, list(references.values()), asked)


def _language_model_of(model: nn.Module) -> PreTrainedModel:
    """The language model under an adapter, if there is one."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "generate") or base.config.is_encoder_decoder:
        raise BadInput(f"{type(base).__name__} writes no text; use a causal language model, or an adapter of one.")
    return base


def _generation_config(processor: TextProcessor, decoding: Decoding, ends: list[int]) -> GenerationConfig:
    """All settings of transformers' `generate`."""
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        num_beams=decoding.beams,
        do_sample=False,  # sampling is _DrawnTokens'
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=processor.pad,
    )
    if decoding.beams > 1:
        settings.length_penalty = decoding.length_penalty
    if decoding.no_repeat_ngram:
        settings.no_repeat_ngram_size = decoding.no_repeat_ngram
    return settings


def find_end_tokens(base: PreTrainedModel, processor: TextProcessor, prompts: Sequence[Any]) -> list[int]:
    """Tokens that end a text: the tokenizer's, the model's and those with which the template ends an answer."""
    own = base.generation_config.eos_token_id
    ends = {processor.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    chat = next((prompt for prompt in prompts if not isinstance(prompt, str)), None)
    if chat is not None:
        with suppress(InlayError):  # a template that can ask but not answer was not trained with
            ends |= processor.special.intersection(processor.encode_completion("a", chat))
    return sorted(ends)


def _count_room(model: nn.Module, base: PreTrainedModel, decoding: Decoding) -> int | None:
    """Tokens that a prompt may have; None for a base without a limit."""
    positions = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return None
    virtual = model.active_peft_config.num_virtual_tokens if _learns_prompt(model) else 0
    room = positions - virtual - decoding.max_new_tokens
    if room < 1:
        got = f"max_new_tokens {decoding.max_new_tokens}" + (f" and {virtual} virtual tokens" if virtual else "")
        raise BadInput(
            f"the base reads {positions} tokens, which leaves no room for a prompt with {got}; lower max_new_tokens."
        )
    return room


def _learns_prompt(model: nn.Module) -> bool:
    """Whether the active adapter is one of peft's that put virtual tokens first: prompt, p-tuning, prefix ..."""
    from inlay.methods._peft import PeftModel

    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning


def _cut_prompts(ids: Sequence[list[int]], room: int | None, start: list[int]) -> list[list[int]]:
    """Prompts of at most `room` tokens; what is cut stands behind the tokenizer's start tokens."""
    over = [i for i, prompt in enumerate(ids) if room is not None and len(prompt) > room]
    if room is None or not over:
        return list(ids)
    logger.warning("cut %d of %d prompts at their start to the %d tokens that fit.", len(over), len(ids), room)
    kept = start if len(start) < room else []
    fitted = list(ids)
    for i in over:
        begin = kept if ids[i][: len(kept)] == kept else []  # a chat's template need not write them
        fitted[i] = begin + ids[i][len(ids[i]) - room + len(begin) :]
    return fitted


def _pad_left(ids: Sequence[list[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, B N, padded on the left."""
    import torch

    longest = max(map(len, ids))
    tokens = torch.tensor([[pad] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    return tokens.to(device), mask.to(device)


@contextmanager
def _prepare_model(model: nn.Module, base: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """In eval mode, with these settings only, and with positions where peft has none; all is put back.

    transformers leaves out a mask of ones, and then takes a prompt that begins with eos for a padded one, and says so.
    """
    # transformers fills what a GenerationConfig leaves open from the model's own, peft sets that too.
    kept, base.generation_config = base.generation_config, settings
    drops = _learns_prompt(model) and "position_ids" in inspect.signature(base.forward).parameters
    hook = base.register_forward_pre_hook(_add_positions, with_kwargs=True) if drops else None
    speaker = logging.getLogger("transformers.modeling_utils")
    speaker.addFilter(_hides_mask_warning)
    try:
        with eval_mode(model), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Position ids are not supported")
            yield
    finally:
        base.generation_config = kept
        speaker.removeFilter(_hides_mask_warning)
        if hook:
            hook.remove()


def _hides_mask_warning(record: logging.LogRecord) -> bool:
    return "passing in an `attention_mask`" not in str(record.msg)


def _add_positions(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Count positions from the mask where peft drops them, as transformers does: padding stands behind a prompt's
    virtual tokens, so that all after it would move by its length."""
    if kwargs.get("position_ids") is None and kwargs.get("attention_mask") is not None:
        entering = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        positions = (kwargs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)  # B N
        kwargs["position_ids"] = positions[:, -entering.shape[1] :]
    return args, kwargs


class _DrawnTokens:
    """Leaves each row the one token that its random number falls on, at each step.

    In place of transformers' sampling, whose one generator makes a text depend on the others in its batch.
    """

    def __init__(self, uniform: Tensor) -> None:
        self.uniform, self.step = uniform, 0  # B T, over 0 and up to 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        import torch

        cumulated = scores.softmax(-1).cumsum(-1)  # B V
        chosen = torch.searchsorted(cumulated, self.uniform[:, self.step, None] * cumulated[:, -1:])
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _sampling_processors(decoding: Decoding, rows: Sequence[int], device: Any) -> LogitsProcessorList:
    """What sampling does to the logits of these prompts; nothing without a temperature."""
    import numpy as np
    import torch
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    if not decoding.temperature:
        return LogitsProcessorList()
    numbers = [np.random.default_rng((decoding.sample_seed, i)).random(decoding.max_new_tokens) for i in rows]
    uniform = torch.from_numpy(1 - np.stack(numbers)).to(device, torch.float32)
    nucleus = [TopPLogitsWarper(decoding.top_p)] if decoding.top_p < 1 else []
    return LogitsProcessorList([TemperatureLogitsWarper(float(decoding.temperature)), *nucleus, _DrawnTokens(uniform)])

"""Texts that a language model writes at the same time, each under an adapter of its own; they join and leave between
tokens.

transformers has continuous batching too (generation.continuous_batching), which packs all texts into one row of a
batch. A bank chooses adapters by row, so that a text is a row here: padded on the left, in a cache of all rows.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from inlay.errors import Unsupported
from inlay.serve.bank import Bank, Held

SPARE = 64  # tokens for which a layer of the cache gets memory at a time


class GrowingLayer(DynamicLayer):
    """Keys and values (B, heads, S, size) of one block, with room for the tokens to come behind them.

    transformers' own layer is copied for every token.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self._rooms: tuple[torch.Tensor, torch.Tensor] | None = None  # what keys and values are the first part of

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of new tokens; gives all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, new = self.get_seq_length(), key_states.shape[-2]
        if self._rooms is None or length + new > self._rooms[0].shape[-2]:
            self._rooms = self._widen(key_states, length + new), self._widen(value_states, length + new)
            if length:
                self._rooms[0][..., :length, :] = self.keys
                self._rooms[1][..., :length, :] = self.values
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., length : length + new, :] = states
        self.keys, self.values = (room[..., : length + new, :] for room in self._rooms)
        return self.keys, self.values

    def cut(self, begin: int) -> None:
        """Forget the first tokens, without a copy."""
        self.keys, self.values = self.keys[..., begin:, :], self.values[..., begin:, :]
        if self._rooms is not None:
            self._rooms = self._rooms[0][..., begin:, :], self._rooms[1][..., begin:, :]

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold other rows."""
        self.keys, self.values, self._rooms = keys, values, None

    def _widen(self, states: torch.Tensor, length: int) -> torch.Tensor:
        return states.new_empty(*states.shape[:-2], length + SPARE, states.shape[-1])


class Text(Protocol):
    """What a batch needs to know of a text."""

    @property
    def held(self) -> Held | None:
        """Its adapter; None: the plain base."""

    @property
    def ids(self) -> Sequence[int]:
        """Tokens of its prompt."""

    @property
    def last(self) -> int:
        """The token that the model reads next, once the prompt is read."""


T = TypeVar("T", bound=Text)


class DecodingBatch(Generic[T]):
    """The texts under way: their keys and values, and which of these are padding.

    The row of a text that has left stays until another one takes it, so that the cache need not be copied for each that
    comes or goes; when more than a quarter of the rows are free, they are taken out.

    Args:
        bank: Of a decoder whose cache is keys and values of all tokens.

    Raises:
        InlayError: Another cache, such as the state of a recurrent model, or a model that takes no positions.

    Attributes:
        token_bytes: What one token takes in the cache.
    """

    def __init__(self, bank: Bank) -> None:
        check_cache(bank.model)
        self.bank = bank
        self._keeps_some = "logits_to_keep" in signature(bank.model.forward).parameters
        self.clear()
        fresh, _, _ = self._read([[0]], [None])
        self.token_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in fresh.layers)

    @property
    def texts(self) -> list[T]:
        """Those under way, in the order of their rows."""
        return [text for text in self._rows if text is not None]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and tokens of each in the cache, free rows and padding included."""
        return self._mask.shape[0], self._mask.shape[1]

    def clear(self) -> None:
        """Forget all texts."""
        self._rows: list[T | None] = []
        self._cache = Cache(layer_class_to_replicate=GrowingLayer)
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=self.bank.model.device)  # B S

    def join(self, texts: Sequence[T]) -> torch.Tensor:
        """Read the prompts of new texts; gives the logits behind each, (len(texts), V).

        Should that fail, those under way are as they were.
        """
        fresh, mask, logits = self._read([text.ids for text in texts], [text.held for text in texts])
        if not self._rows:
            self._rows, self._cache, self._mask = list(texts), fresh, mask
            return logits
        width = max(self._mask.shape[1], mask.shape[1])
        self._pad_to(width)
        mask = pad(mask, (width - mask.shape[1], 0))
        free = [row for row, text in enumerate(self._rows) if text is None][: len(texts)]
        place = torch.tensor(free, dtype=torch.long, device=mask.device)
        more = len(texts) > len(free)
        for layer, new in zip(self._layers(), fresh.layers, strict=True):
            begin = width - new.keys.shape[2]
            layer.keys[place, :, begin:] = new.keys[: len(free)]
            layer.values[place, :, begin:] = new.values[: len(free)]
            if more:
                pairs = (layer.keys, new.keys[len(free) :]), (layer.values, new.values[len(free) :])
                layer.replace(*(torch.cat([states, _pad_left(added, width)]) for states, added in pairs))
        self._mask[place] = mask[: len(free)]
        self._mask = torch.cat([self._mask, mask[len(free) :]])
        for row, text in zip(free, texts, strict=False):
            self._rows[row] = text
        self._rows += texts[len(free) :]
        return logits

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Append the last token of each of `texts`; gives the logits behind it, (len(texts), V)."""
        texts = self.texts
        live = [row for row, text in enumerate(self._rows) if text is not None]
        filled = [text or texts[0] for text in self._rows]  # a free row computes something that nobody reads
        ids = torch.tensor([text.last for text in filled], device=self._mask.device)[:, None]
        if len(live) < len(filled):
            self._mask[[row for row, text in enumerate(self._rows) if text is None]] = 0
        self._mask = pad(self._mask, (0, 1), value=1)
        with self.bank.rows([text.held for text in filled]) as model:
            output = model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=self._mask.sum(1, keepdim=True) - 1,
                past_key_values=self._cache,
                use_cache=True,
            )
        logits = output.logits[:, -1]
        return logits if len(live) == len(filled) else logits[live]

    def leave(self, texts: Sequence[T]) -> None:
        """Let texts go, and cut the padding that all others have."""
        self._rows = [None if any(text is left for left in texts) else text for text in self._rows]
        live = [row for row, text in enumerate(self._rows) if text is not None]
        if not live:
            self.clear()
            return
        kept = torch.tensor(live, device=self._mask.device)
        begin = int(self._mask[kept].argmax(1).min())  # of the longest row
        self._mask = self._mask[:, begin:]
        shrinks = 4 * len(live) < 3 * len(self._rows)
        for layer in self._layers():
            layer.cut(begin)
            if shrinks:
                layer.replace(layer.keys.index_select(0, kept), layer.values.index_select(0, kept))
        if shrinks:
            self._mask = self._mask[kept]
            self._rows = [self._rows[row] for row in live]

    @torch.no_grad()
    def _read(
        self, texts: Sequence[Sequence[int]], holds: Sequence[Held | None]
    ) -> tuple[Cache, torch.Tensor, torch.Tensor]:
        """A cache with these prompts, which of it is no padding (B, S), and the logits behind each (B, V)."""
        fresh = Cache(layer_class_to_replicate=GrowingLayer)
        longest = max(map(len, texts))
        device = self._mask.device
        ids = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts], device=device)
        mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts], device=device)
        with self.bank.rows(list(holds)) as model:
            inputs, length = self.bank.prompts.prepend_prompts(model, {"input_ids": ids, "attention_mask": mask})
            mask = inputs["attention_mask"]
            if length:  # padding between a prompt and its text goes to the front
                order = mask.argsort(dim=1, stable=True)
                mask = mask.gather(1, order)
                embeds = inputs.pop("inputs_embeds")
                inputs["inputs_embeds"] = embeds.gather(1, order[..., None].expand_as(embeds))
            inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
            if self._keeps_some:
                inputs["logits_to_keep"] = 1
            output = model(**inputs, past_key_values=fresh, use_cache=True)
        return fresh, mask, output.logits[:, -1]

    def _pad_to(self, width: int) -> None:
        if width == self._mask.shape[1]:
            return
        self._mask = pad(self._mask, (width - self._mask.shape[1], 0))
        for layer in self._layers():
            layer.replace(_pad_left(layer.keys, width), _pad_left(layer.values, width))

    def _layers(self) -> list[GrowingLayer]:
        return self._cache.layers


def check_cache(model: PreTrainedModel) -> None:
    """Raise InlayError if texts of this model cannot share a padded cache.

    Layers with a sliding window may: they keep all tokens here, and their mask leaves out those beyond the window.
    """
    name = type(model).__name__
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    others = sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})
    if others or getattr(model, "_is_stateful", False):
        raise Unsupported(
            f"a server batches texts whose cache is keys and values, and {name} has another one "
            f"({', '.join(others) or 'a state'}); use inlay predict."
        )
    if "position_ids" not in signature(model.forward).parameters:
        raise Unsupported(f"{name} takes no positions, which texts of different lengths in a batch need.")


def _pad_left(states: torch.Tensor, width: int) -> torch.Tensor:
    return pad(states, (0, 0, width - states.shape[2], 0))

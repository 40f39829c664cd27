"""Texts that a language model writes at the same time, each under an adapter of its own; they join and leave between
tokens.

transformers has continuous batching too (generation.continuous_batching), which packs all texts into one row of a
batch. A bank chooses adapters by row, so that a text is a row here: padded on the left, in a cache of all rows.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any

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
        self._rooms: tuple[torch.Tensor, torch.Tensor] | None = None

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

    def replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold other rows."""
        self.keys, self.values, self._rooms = keys, values, None

    def _widen(self, states: torch.Tensor, length: int) -> torch.Tensor:
        return states.new_empty(*states.shape[:-2], length + SPARE, states.shape[-1])


class DecodingBatch:
    """The texts under way: their keys and values, and which of these are padding.

    Args:
        bank: Of a decoder whose cache is keys and values of all tokens.

    Raises:
        InlayError: Another cache, such as the state of a recurrent model, or a model that takes no positions.

    Attributes:
        holds: The adapter of each row.
        token_bytes: What one token takes in the cache.
    """

    def __init__(self, bank: Bank) -> None:
        check_cache(bank.model)
        self.bank = bank
        self._keeps_some = "logits_to_keep" in signature(bank.model.forward).parameters
        self.clear()
        self._join([[0]], [None])
        self.token_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in self._layers())
        self.clear()

    def __len__(self) -> int:
        return len(self.holds)

    @property
    def width(self) -> int:
        """Tokens in the cache of each row, padding included."""
        return self._mask.shape[1]

    def clear(self) -> None:
        """Forget all rows."""
        self.holds: list[Held] = []
        self._cache = Cache(layer_class_to_replicate=GrowingLayer)
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=self.bank.model.device)  # B S

    def join(self, texts: Sequence[Sequence[int]], holds: Sequence[Held]) -> torch.Tensor:
        """Read the tokens of new texts, which become the last rows; gives the logits behind each, (B, V).

        Should that fail, the rows that are here are as they were.
        """
        logits = self._join(texts, holds)
        self.holds += holds
        return logits

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to each row; gives the logits behind it, (B, V)."""
        ids = torch.tensor(tokens, device=self._mask.device)[:, None]
        self._mask = pad(self._mask, (0, 1), value=1)
        with self.bank.rows(self.holds) as model:
            positions = self._mask.sum(1, keepdim=True) - 1
            output = model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            )
        return output.logits[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows, in this order; what is padding in all of them is cut."""
        if not rows:
            self.clear()
            return
        chosen = torch.tensor(rows, device=self._mask.device)
        mask = self._mask[chosen]
        begin = int(mask.argmax(1).min())  # of the longest row
        self._mask = mask[:, begin:]
        self.holds = [self.holds[row] for row in rows]
        for layer in self._layers():
            keys, values = (states[:, :, begin:].index_select(0, chosen) for states in (layer.keys, layer.values))
            layer.replace(keys, values)

    @torch.no_grad()
    def _join(self, texts: Sequence[Sequence[int]], holds: Sequence[Held | None]) -> torch.Tensor:
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
        self._append(fresh, mask)
        return output.logits[:, -1]

    def _append(self, fresh: Cache, mask: torch.Tensor) -> None:
        if not len(self._mask):
            self._cache, self._mask = fresh, mask
            return
        width = max(self._mask.shape[1], mask.shape[1])
        masks = [pad(each, (width - each.shape[1], 0)) for each in (self._mask, mask)]
        for layer, new in zip(self._layers(), fresh.layers, strict=True):
            pairs = (layer.keys, new.keys), (layer.values, new.values)
            keys, values = (torch.cat([_pad_left(states, width) for states in pair]) for pair in pairs)
            layer.replace(keys, values)
        self._mask = torch.cat(masks)

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

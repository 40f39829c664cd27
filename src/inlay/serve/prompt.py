"""peft's prompts and prefixes for language models in a bank: tokens in front of a text, and a filled cache.

Rows differ in how many they have, so the shorter ones are filled up with tokens that a mask takes out of all attention.
"""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from inlay.errors import Unsupported
from inlay.serve.bank_layer import KEY_START, Rows, Stacks

TABLE = "prompt_embeddings"  # the one tensor that a file of either method holds


def is_prompt(config: Mapping[str, Any]) -> bool:
    """True for tokens in front of a text, which no layer of a bank adds."""
    return config["peft_type"] == "PROMPT_TUNING"


def is_cached_prefix(config: Mapping[str, Any]) -> bool:
    """True for keys and values in the cache, which a bank holds as an attention prefix."""
    return config["peft_type"] == "PREFIX_TUNING"


def split_cached_prefix(attention: Sequence[str], table: torch.Tensor) -> dict[str, torch.Tensor]:
    """The keys and values that peft's prefix puts into a cache, as those of an attention prefix.

    Args:
        attention: Modules, one per block.
        table: (P, 2 blocks size): key and value of the first block, of the second one ...
    """
    if table.shape[1] % (2 * len(attention)):
        return {}
    pairs = table.reshape(len(table), len(attention), 2, -1)
    return {
        f"{KEY_START}{name}.inlay_attention_prefix_{what}": pairs[:, i, k]
        for i, name in enumerate(attention)
        for k, what in enumerate(("key", "value"))
    }


def shift_positions(model: PreTrainedModel, rows: Rows) -> RemovableHandle:
    """Let each row's text have the positions behind its tokens in the cache; removing the handle ends that."""
    takes_positions = "position_ids" in signature(model.forward).parameters

    def shift(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if rows.ahead is None:
            return args, kwargs
        if not takes_positions:
            raise Unsupported(f"a {type(model).__name__} takes no positions, which rows behind peft's prefixes need.")
        tokens = next(x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if x is not None)
        positions = kwargs.get("position_ids")
        if positions is None:
            cache = kwargs.get("past_key_values")
            start = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        return args, {**kwargs, "position_ids": positions + rows.expand(rows.ahead, len(tokens))[:, None]}

    return model.register_forward_pre_hook(shift, with_kwargs=True)


class PromptStacks(Stacks):
    """peft's prompts, (P, D) each: tokens that no layer adds, but that stand in front of a text's embeddings."""

    def prepend_prompts(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """A batch with each row's prompt in front, padded on the left, and how long that is.

        Positions count from a row's own first token, so that a row gets what it would get by itself.
        """
        lengths = [self.sizes.get(slot, 0) for slot in self.rows.slots]
        longest = max(lengths, default=0)
        if not longest:
            return dict(inputs), 0
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")  # B N
        mask = torch.ones_like(ids) if mask is None else mask
        embeds = model.get_input_embeddings()(ids)
        place = torch.arange(longest, device=ids.device) - longest  # -P ... -1
        place = place + torch.tensor(lengths, device=ids.device)[:, None]  # B P, negative where there is padding
        prompts = self.take_rows("prompt", len(ids))
        prompts = prompts.gather(1, place.clamp(min=0)[..., None].expand(-1, -1, prompts.shape[-1]))
        mask = torch.cat([(place >= 0).to(mask.dtype), mask], dim=1)
        rest = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        rest |= {"inputs_embeds": torch.cat([prompts.to(embeds.dtype), embeds], dim=1), "attention_mask": mask}
        if "position_ids" in signature(model.forward).parameters:
            rest["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return rest, longest

"""What a bank does for adapters that are tokens: prefixes, deep and shallow visual prompts, prompts of texts.

Rows differ in how many they have, so the shorter ones are filled up with tokens that a mask takes out of all attention.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from typing_extensions import override

from inlay.errors import InlayError
from inlay.methods.attention_prefix import AttentionPrefixLayer, WindowPrefixLayer
from inlay.methods.visual_prompt import hide
from inlay.methods.window_attention import attend
from inlay.serve.layers import BankLayer, Rows, Stacks, Tensors


class PrefixBank(BankLayer, AttentionPrefixLayer):
    """Keys and values in front of those of the tokens, of an attention of transformers.

    A deep visual prompt is one, too: only its key and its value reach the tokens of its block, which drops the rest.
    """

    rank = 2

    @override
    def stored(self, tensors: Tensors, settings: Any) -> dict[str, torch.Tensor]:
        if "inlay_visual_prompt_tokens" in tensors:
            key, value = self.of_prompt(tensors["inlay_visual_prompt_tokens"].float(), settings)
        else:
            key, value = (tensors[f"inlay_attention_prefix_{what}"].float() for what in ("key", "value"))
        return {"key": key, "value": value}

    @override
    def size_of(self, values: Tensors) -> int:
        return len(values["key"]) if values else 0

    def of_prompt(self, tokens: torch.Tensor, settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What the block makes of its prompts p (P, D) as keys and values, in its own k and v projections."""
        block, *projections = settings
        found: list[torch.Tensor] = []
        hooks = [p.register_forward_hook(lambda m, args, output: found.append(output)) for p in projections]
        weight = next(p for p in block.parameters() if p.is_floating_point())
        masks = {name: None for name in signature(block.forward).parameters if name.endswith("attention_mask")}
        try:
            with torch.no_grad():
                block(tokens[None].to(weight.device, weight.dtype), **masks)
        finally:
            for hook in hooks:
                hook.remove()
        key, value = (x[0].float() for x in found)  # P x size
        return key, value

    @override
    def banked(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)  # its attention function asks for `gathered`

    @override
    def gathered(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        lengths = self.lengths()
        longest = max(lengths, default=0)
        if not longest:
            return None
        if self.rows.only is not None:
            key, value = (self.stacks._buffers[what][self.rows.only, :longest][None] for what in ("key", "value"))
        else:
            key, value = (self.stacks.take(what, rows)[:, :longest] for what in ("key", "value"))
        return key, value, self.counts(lengths, rows)


class WindowPrefixBank(PrefixBank):
    """The same around SAM's attention, with its own form of a prompt."""

    hook = WindowPrefixLayer.hook
    leave = WindowPrefixLayer.leave

    @override
    def of_prompt(self, tokens: torch.Tensor, settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            weight = self.get_base_layer().qkv(tokens.to(self.rows.device))
        _, key, value = weight.float().chunk(3, dim=-1)
        return key, value

    @override
    def banked(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        found = self.gathered(len(hidden))
        return attend(self.base_layer, hidden, *found) if found else self.base_layer(*args, **kwargs)


class TravelBank(BankLayer):
    """Shallow visual prompts: tokens that enter the first block behind those of the image, and leave the last."""

    rank = 4

    @override
    def check(self, settings: Any) -> None:
        place = (settings.enter, settings.drop)
        if self.options.setdefault("bank", place) != place:
            raise InlayError(
                "the shallow prompts of a bank travel through the same blocks; give others their own bank."
            )
        if "attention_mask" not in signature(self.get_base_layer().forward).parameters:
            kind = type(self.get_base_layer()).__name__
            raise InlayError(f"rows cannot differ in shallow prompts here, as {kind} takes no mask; use deep ones.")

    @override
    def stored(self, tensors: Tensors, settings: Any) -> dict[str, torch.Tensor]:
        tokens = {"tokens": tensors["inlay_visual_prompt_tokens"].float()} if settings.enter else {}
        return {"length": torch.tensor([float(settings.length)]), **tokens}

    @override
    def size_of(self, values: Tensors) -> int:
        return int(values["length"]) if values else 0

    @override
    def banked(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths = self.lengths()
        longest = max(lengths)
        if not longest:
            return self.base_layer(x, *args, **kwargs)
        enter, drop = self.options["bank"]
        if enter:
            here = self.stacks.take("tokens", len(x))[:, :longest].to(x.dtype)
            x = torch.cat([x, here], dim=1)
        tokens = x.shape[1] - longest
        if (counts := self.counts(lengths, len(x))) is not None:
            unseen = torch.zeros_like(counts, dtype=x.dtype).masked_fill(~counts, torch.finfo(x.dtype).min)
            mask = F.pad(unseen, (tokens, 0))[:, None, None]  # B 1 1 N+P
            args, kwargs = (mask, *args[1:]) if args else (), kwargs if args else {**kwargs, "attention_mask": mask}
        output = self.base_layer(x, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        hide(tokens, x[:, :tokens], hidden[:, :tokens])
        hidden = hidden[:, :tokens] if drop else hidden
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextmanager
def moved_on(model: PreTrainedModel, rows: Rows, ahead: Sequence[int]) -> Iterator[None]:
    """Inside the block each row's texts stand behind so many tokens in the cache: their positions go on from there."""
    if not any(ahead):
        yield
        return
    if "position_ids" not in signature(model.forward).parameters:
        raise InlayError(f"a {type(model).__name__} takes no positions, which rows behind peft's prefixes need.")
    steps = torch.tensor(list(ahead), device=rows.device)

    def move(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tokens = next(x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if x is not None)
        positions = kwargs.get("position_ids")
        if positions is None:
            cache = kwargs.get("past_key_values")
            start = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        return args, {**kwargs, "position_ids": positions + rows.expand(steps, len(tokens))[:, None]}

    hook = model.register_forward_pre_hook(move, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class PromptStacks(Stacks):
    """peft's prompts, (P, D) each: tokens that no layer adds, but that stand in front of a text's embeddings."""

    def front(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """A batch with each row's prompt in front, padded on the left, and how long that is.

        Positions count from a row's own first token, so that a row gets what it would get alone.
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
        prompts = self.take("prompt", len(ids))
        prompts = prompts.gather(1, place.clamp(min=0)[..., None].expand(-1, -1, prompts.shape[-1]))
        mask = torch.cat([(place >= 0).to(mask.dtype), mask], dim=1)
        rest = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        rest |= {"inputs_embeds": torch.cat([prompts.to(embeds.dtype), embeds], dim=1), "attention_mask": mask}
        if "position_ids" in signature(model.forward).parameters:
            rest["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return rest, longest

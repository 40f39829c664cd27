"""Visual prompts in a bank: shallow ones travel through the blocks; deep ones are kept as keys and values."""

from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from typing_extensions import override

from inlay.bases.sites import sites
from inlay.errors import Unsupported
from inlay.methods.hidden_states import hide_prompts
from inlay.methods.visual_prompt import VisualPromptLayer, WindowPromptLayer
from inlay.serve.attention_prefix import PrefixBank, WindowPrefixBank
from inlay.serve.bank_layer import BankLayer, Site, Tensors


class TravelBank(BankLayer):
    """Shallow visual prompts: tokens that enter the first block behind those of the image, and leave the last."""

    nesting = 4
    stands_for = VisualPromptLayer

    @classmethod
    @override
    def make_site(cls, base: nn.Module, name: str, layer: Any, keys: dict[str, str]) -> Site:
        """Of deep prompts at the attention of their block, which is where they have their effect: as a prefix."""
        if isinstance(layer, WindowPromptLayer):
            return Site(name, WindowPrefixBank, keys)
        place = layer.options["default"]
        if not (place.enter and place.drop):
            return Site(name, cls, keys, place)
        there = sites(base)
        i = there.blocks.index(name)
        return Site(there.attention[i], PrefixBank, keys, (name, there.k[i], there.v[i]))

    @classmethod
    @override
    def reason_against_mixing(cls, layer: Any) -> str | None:
        if not (layer.options["default"].enter and layer.options["default"].drop):
            return None
        return "a bank keeps deep prompts as the keys and values that the base makes of them"

    @override
    def check_settings(self, settings: Any) -> None:
        place = (settings.enter, settings.drop)
        if self.options.setdefault("bank", place) != place:
            raise Unsupported(
                "the shallow prompts of a bank travel through the same blocks; give others their own bank."
            )
        if "attention_mask" not in signature(self.get_base_layer().forward).parameters:
            kind = type(self.get_base_layer()).__name__
            raise Unsupported(f"rows cannot differ in shallow prompts here, as {kind} takes no mask; use deep ones.")

    @override
    def make_stack_values(self, tensors: Tensors, settings: Any) -> dict[str, torch.Tensor]:
        tokens = {"tokens": tensors["inlay_visual_prompt_tokens"].float()} if settings.enter else {}
        return {"length": torch.tensor([float(settings.length)]), **tokens}

    @override
    def size_of(self, values: Tensors) -> int:
        return int(values["length"]) if values else 0

    @override
    def forward_rows(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths = self.prompt_lengths()
        longest = max(lengths)
        if not longest:
            return self.base_layer(x, *args, **kwargs)
        enter, drop = self.options["bank"]
        if enter:
            here = self.stacks.take_rows("tokens", len(x))[:, :longest].to(x.dtype)
            x = torch.cat([x, here], dim=1)
        tokens = x.shape[1] - longest
        if (counts := self.mask_prompts(lengths, len(x))) is not None:
            unseen = torch.zeros_like(counts, dtype=x.dtype).masked_fill(~counts, torch.finfo(x.dtype).min)
            mask = F.pad(unseen, (tokens, 0))[:, None, None]  # B 1 1 N+P
            args, kwargs = (mask, *args[1:]) if args else (), kwargs if args else {**kwargs, "attention_mask": mask}
        output = self.base_layer(x, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        hide_prompts(tokens, x[:, :tokens], hidden[:, :tokens])
        hidden = hidden[:, :tokens] if drop else hidden
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

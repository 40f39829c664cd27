"""Attention prefixes in a bank.

Rows differ in how many keys they have, so the shorter prefixes are filled up with keys that a mask takes out of all
attention.
"""

from inspect import signature
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import override

from inlay.methods.attention_prefix import AttentionPrefixLayer, WindowPrefixLayer
from inlay.methods.window_attention import attend_with_prefix
from inlay.serve.bank_layer import BankLayer, Tensors


class PrefixBank(BankLayer, AttentionPrefixLayer):
    """Keys and values in front of those of the tokens, of an attention of transformers.

    A deep visual prompt is one, too: only its key and its value reach the tokens of its block, which drops the rest.
    """

    nesting = 2
    stands_for: ClassVar[type[nn.Module] | None] = AttentionPrefixLayer

    @override
    def make_stack_values(self, tensors: Tensors, settings: Any) -> dict[str, torch.Tensor]:
        if "inlay_visual_prompt_tokens" in tensors:
            key, value = self.project_prompt(tensors["inlay_visual_prompt_tokens"].float(), settings)
        else:
            key, value = (tensors[f"inlay_attention_prefix_{what}"].float() for what in ("key", "value"))
        return {"key": key, "value": value}

    @override
    def size_of(self, values: Tensors) -> int:
        return len(values["key"]) if values else 0

    def project_prompt(self, tokens: torch.Tensor, settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
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
    def forward_rows(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)  # its attention function asks for `gather_prefixes`

    @override
    def gather_prefixes(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        lengths = self.prompt_lengths()
        longest = max(lengths, default=0)
        if not longest:
            return None
        if self.rows.only is not None:
            key, value = (self.stacks._buffers[what][self.rows.only, :longest][None] for what in ("key", "value"))
        else:
            key, value = (self.stacks.take_rows(what, rows)[:, :longest] for what in ("key", "value"))
        return key, value, self.mask_prompts(lengths, rows)


class WindowPrefixBank(PrefixBank):
    """The same around SAM's attention, with its own form of a prompt."""

    stands_for = WindowPrefixLayer
    redirect_attention = WindowPrefixLayer.redirect_attention
    undo_changes = WindowPrefixLayer.undo_changes

    @override
    def project_prompt(self, tokens: torch.Tensor, settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            weight = self.get_base_layer().qkv(tokens.to(self.rows.device))
        _, key, value = weight.float().chunk(3, dim=-1)
        return key, value

    @override
    def forward_rows(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        found = self.gather_prefixes(len(hidden))
        return attend_with_prefix(self.base_layer, hidden, *found) if found else self.base_layer(*args, **kwargs)

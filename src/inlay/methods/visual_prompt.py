"""Visual prompt tuning: learned tokens next to those of the image.

    shallow     P tokens enter the first block, pass through all, and are dropped after the last
    deep        every block gets P tokens of its own, and drops them again at its end

    [x_i, _] = block_i([x_{i-1}, p_{i-1}])          x: class token and patches, p: P x D, trained

The prompts stand behind the image's tokens, which attention does not notice: class token and positions stay where they
are, for any size of image. No later module, nor a caller that asks for hidden states or attentions, sees a prompt.

In SAM and SAM 2, whose blocks work on (B, H, W, C) and attend within windows, prompts are tokens at the entry of each
attention, seen by every window, padded or not (deep only: there is no sequence in which they could travel).

Jia et al. 2022, arXiv:2203.12119.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from inlay.bases.sites import Sites
from inlay.errors import BadInput, Unsupported
from inlay.methods._peft import PeftType, register_method
from inlay.methods.base import AdapterConfig, AdapterLayer, AdapterTuner, Groups
from inlay.methods.hidden_states import hide_prompts
from inlay.methods.method import Method
from inlay.methods.window_attention import WINDOWED, attend_with_prefix, gather_prefix
from inlay.peft_types import PEFT_TYPES

# Encoders whose blocks take (B, N, D) without a mask; in others a prompt would have to be hidden from it.
ENCODERS = (
    "vit",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "clip",
    "clip_vision_model",
    "siglip",
    "siglip_vision_model",
)


@dataclass
class VisualPromptConfig(AdapterConfig):
    """Settings of visual prompts; `target_modules` are blocks (in SAM and SAM 2 attention modules)."""

    length: int = field(default=10, metadata={"help": "Prompt length P, in every block that has prompts."})
    deep: bool = field(default=True, metadata={"help": "New prompts in every block, rather than only in the first."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the prompts."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["INLAY_VISUAL_PROMPT"]
        if not isinstance(self.length, int) or self.length < 1:
            raise BadInput(f"length must be a whole number of at least 1, got {self.length!r}.")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout must be within 0 to 1, got {self.dropout}.")


@dataclass(frozen=True)
class _PromptsOfBlock:
    """One adapter at one block: whether its prompts enter and are dropped there."""

    length: int
    dropout: float
    enter: bool
    drop: bool


class VisualPromptLayer(AdapterLayer):
    """Wraps a block of a ViT-like encoder.

    Attributes:
        inlay_visual_prompt_tokens: By adapter, p of shape (P, D), where prompts enter.
    """

    nesting = 4
    adapter_layer_names = ("inlay_visual_prompt_tokens",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.inlay_visual_prompt_tokens = nn.ParameterDict()

    @override
    def add(self, name: str, config: VisualPromptConfig, tuner: AdapterTuner, key: str) -> None:
        order = tuner.list_blocks(config)
        self.options[name] = _PromptsOfBlock(
            config.length, config.dropout, config.deep or key == order[0], config.deep or key == order[-1]
        )
        if self.options[name].enter:
            size = _token_size(self.get_base_layer())
            patch = getattr(tuner.model.config, "patch_size", None) or 16
            patch = patch[0] if isinstance(patch, list | tuple) else patch
            bound = (6 / (3 * patch * patch + size)) ** 0.5  # as in section 4.1 of the paper: Xavier for a patch
            self.inlay_visual_prompt_tokens[name] = nn.Parameter(
                torch.empty(config.length, size).uniform_(-bound, bound)
            )

    @override
    def forward_adapted(self, groups: Groups, *args: Any, **kwargs: Any) -> Any:
        travelling = {sum(self.options[n].length for n in names if not self.options[n].enter) for names, _ in groups}
        leaving = {sum(self.options[n].length for n in names if not self.options[n].drop) for names, _ in groups}
        if len(travelling) > 1 or len(leaving) > 1:
            raise Unsupported(
                "rows of one batch cannot carry different numbers of shallow prompts from block to block; use "
                "deep=True, or one batch per adapter."
            )
        return self.by_rows(groups, self._prompted, *args, **kwargs)

    def _prompted(self, names: list[str], x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block on (B, N, D), or (B, N + those that travel, D)."""
        if any(torch.is_tensor(a) for a in (*args, kwargs.get("attention_mask"))):
            raise Unsupported(
                "visual prompts do not work where a block gets an attention mask; use an encoder that needs none."
            )
        places = [self.options[name] for name in names]
        travelling = sum(place.length for place in places if not place.enter)
        tokens = x.shape[1] - travelling
        here = [self._tokens(name, x) for name in names if self.options[name].enter]
        output = self.base_layer(torch.cat([x, *here], dim=1), *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        hide_prompts(tokens, x[:, :tokens], hidden[:, :tokens])
        kept, at = [hidden[:, :tokens]], tokens
        for place in sorted(places, key=lambda place: place.enter):  # those that came with x stand in front
            if not place.drop:
                kept.append(hidden[:, at : at + place.length])
            at += place.length
        hidden = torch.cat(kept, dim=1) if len(kept) > 1 else kept[0]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _tokens(self, name: str, x: torch.Tensor) -> torch.Tensor:
        tokens = self.inlay_visual_prompt_tokens[name].to(x.dtype).expand(len(x), -1, -1)
        dropout = self.options[name].dropout
        return nn.functional.dropout(tokens, dropout, self.training) if dropout else tokens

    @override
    def why_not_merged(self, names: Sequence[str]) -> str | None:
        return (
            f"visual prompts {', '.join(names)} cannot be merged: they are tokens, not weights; keep them as an "
            "adapter, or train LoRA where a merged model is needed."
        )


class WindowPromptLayer(VisualPromptLayer):
    """The same around the attention of SAM and SAM 2.

    What a prompt gives as a query is dropped, so only its key and value matter.
    """

    @override
    def forward_adapted(self, groups: Groups, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]

        def key_value(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            _, key, value = self.base_layer.qkv(self._tokens(name, hidden[:1, 0])[0]).chunk(3, dim=-1)
            return key, value

        key, value, counts = gather_prefix(groups, key_value, len(hidden))
        return attend_with_prefix(self.base_layer, hidden, key, value, counts)


def _token_size(block: nn.Module) -> int:
    """D: what the first linear layer or layer norm of a block takes."""
    for module in block.modules():
        if isinstance(module, nn.LayerNorm):
            return module.normalized_shape[-1]
        if isinstance(module, nn.Linear):
            return module.in_features
    raise Unsupported(
        f"visual prompts go into transformer blocks, got {type(block).__name__}; give other target_modules."
    )


class VisualPromptModel(AdapterTuner):
    """The tuner of VisualPromptConfig."""

    prefix = "inlay_visual_prompt_"
    tuner_layer_cls = VisualPromptLayer

    @override
    def targets(self, config: VisualPromptConfig, found: Sites) -> Sequence[str]:
        if found.attention and all(isinstance(self.model.get_submodule(n), WINDOWED) for n in found.attention):
            if not config.deep:
                raise Unsupported("SAM's blocks have no sequence in which prompts could travel; use deep=True.")
            return found.attention
        kind = getattr(getattr(self.model, "config", None), "model_type", "no model_type")
        if kind not in ENCODERS:
            raise Unsupported(
                f"visual prompts are for encoders of images ({', '.join(ENCODERS)}, sam, sam2), got {kind}; "
                "for text use peft's PromptTuningConfig or AttentionPrefixConfig."
            )
        return found.blocks

    @override
    def layer_class(self, target: nn.Module) -> type[AdapterLayer]:
        return WindowPromptLayer if isinstance(target, WINDOWED) else VisualPromptLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        order = self.list_blocks(peft_config)
        if not peft_config.deep and order:
            siblings = [n for n, _ in self.model.named_modules() if n.rpartition(".")[0] == order[0].rpartition(".")[0]]
            start = siblings.index(order[0])
            if siblings[start : start + len(order)] != order:
                raise BadInput(
                    "shallow prompts travel from block to block, so the blocks must follow one another, got "
                    f"{', '.join(order)}; name those between, or use deep=True."
                )
        return peft_config

    def list_blocks(self, config: VisualPromptConfig) -> list[str]:
        """Names of the blocks that the adapter targets, in running order."""
        return [n for n, _ in self.model.named_modules() if self._check_target_module_exists(config, n)]


register_method("inlay_visual_prompt", VisualPromptConfig, VisualPromptModel)

_PAPER = PEFT_TYPES["INLAY_VISUAL_PROMPT"].paper
DEEP = Method(
    name="visual-prompt",
    paper=f"{_PAPER}, deep",
    attaches="every block",
    width="prompt length",
    merges=False,
    kind="prompt",
    learning_rate=3e-2,
    config=lambda model, length: VisualPromptConfig(length=length),
    bases=("vision", "sam"),
)
SHALLOW = Method(
    name="visual-prompt-shallow",
    paper=_PAPER,
    attaches="the first block",
    width="prompt length",
    merges=False,
    kind="prompt",
    learning_rate=3e-2,
    config=lambda model, length: VisualPromptConfig(length=length, deep=False),
    bases=("vision",),
)
ROWS = (DEEP, SHALLOW)

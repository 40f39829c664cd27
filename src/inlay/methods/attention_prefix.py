"""Prefix tuning inside the attention: learned keys and values in front of those of the tokens.

With P learned keys P_k and values P_v in every chosen block, and q, k, v of the tokens x,

    attention = softmax(q · [P_k; x W_k]ᵀ / √d) [P_v; x W_v]

Every query sees every prefix key, also under a causal mask; prefix keys have no position. Unlike peft's prefix tuning,
which fills a decoder's cache, this works where there is no cache (ViT, BERT, SAM's windows), under gradient
checkpointing, and together with other methods.

Li & Liang 2021, arXiv:2101.00190. Their re-parameterisation (`projection`) makes keys and values of a smaller table by
an MLP while training; the file holds only the keys and values.
"""

import copy
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typing_extensions import override

from inlay.bases.sites import Sites
from inlay.errors import BadInput, Unsupported
from inlay.methods._peft import PeftType, register_method
from inlay.methods.base import AdapterConfig, AdapterLayer, AdapterTuner, Groups
from inlay.methods.method import Method
from inlay.methods.window_attention import WINDOWED, attend_with_prefix, gather_prefix
from inlay.peft_types import PEFT_TYPES

_NAME = "inlay_attention_prefix"
_SUPPORTED = ("eager", "sdpa")
_KEY, _FUSED = {"k_proj", "key", "k_lin", "to_k"}, {"qkv", "c_attn", "query_key_value"}


@dataclass
class AttentionPrefixConfig(AdapterConfig):
    """Settings of prefix tuning; `target_modules` are attention modules."""

    length: int = field(default=16, metadata={"help": "Prefix length P: keys and values per block."})
    projection: int | None = field(
        default=None, metadata={"help": "Hidden size of an MLP that makes the prefix while training; default: none."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["INLAY_ATTENTION_PREFIX"]
        for name in ("length", "projection"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise BadInput(f"{name} must be a whole number of at least 1, got {value!r}.")


class _Projection(nn.Module):
    """Keys and values of one block from a table of P rows: table -> tanh -> both."""

    def __init__(self, length: int, hidden: int, size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(length, size).normal_(std=0.02))
        self.inner = nn.Linear(size, hidden)
        self.outer = nn.Linear(hidden, 2 * size)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self.outer(torch.tanh(self.inner(self.table))).chunk(2, dim=-1)
        return key, value


class AttentionPrefixLayer(AdapterLayer):
    """Wraps an attention module of transformers that computes through an attention function of its config.

    Attributes:
        inlay_attention_prefix_key: By adapter, P_k of shape (P, key heads x head size).
        inlay_attention_prefix_value: By adapter, P_v of the same shape.
        inlay_attention_prefix_projection: By adapter, what makes them while training, where there is one.
    """

    nesting = 2
    adapter_layer_names = (
        "inlay_attention_prefix_key",
        "inlay_attention_prefix_value",
        "inlay_attention_prefix_projection",
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.inlay_attention_prefix_key = nn.ParameterDict()
        self.inlay_attention_prefix_value = nn.ParameterDict()
        self.inlay_attention_prefix_projection = nn.ModuleDict()
        self.groups: Groups = []
        self.redirect_attention()

    def redirect_attention(self) -> None:
        """Lead the attention function of the wrapped module here, by a config of its own."""
        base = self.get_base_layer()
        self.own_config = base.config
        base.config = copy.copy(base.config)
        base.config._attn_implementation_internal = _NAME
        base.inlay_prefix = (self,)  # in a tuple, or it would become a child of its own child

    @override
    def undo_changes(self) -> None:
        base = self.get_base_layer()
        base.config = self.own_config
        del base.inlay_prefix

    @override
    def add(self, name: str, config: AttentionPrefixConfig, tuner: AdapterTuner, key: str) -> None:
        size = _key_size(self.get_base_layer())
        if config.projection and not config.inference_mode:
            self.inlay_attention_prefix_projection[name] = _Projection(config.length, config.projection, size)
        else:
            for table in (self.inlay_attention_prefix_key, self.inlay_attention_prefix_value):
                table[name] = nn.Parameter(torch.empty(config.length, size).normal_(std=0.02))
        self.options[name] = config

    def replace_projection(self, name: str) -> None:
        """Put keys and values in the place of the MLP that makes them."""
        if name in self.inlay_attention_prefix_projection:
            projection = self.inlay_attention_prefix_projection[name]
            trained = next(projection.parameters()).requires_grad
            with torch.no_grad():
                key, value = projection()
            del self.inlay_attention_prefix_projection[name]
            self.inlay_attention_prefix_key[name] = nn.Parameter(key.clone(), trained)
            self.inlay_attention_prefix_value[name] = nn.Parameter(value.clone(), trained)

    def prefix(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """P_k and P_v of one adapter, (P, key heads x head size) each."""
        if name in self.inlay_attention_prefix_projection:
            key, value = self.inlay_attention_prefix_projection[name]()
            return key, value
        return self.inlay_attention_prefix_key[name], self.inlay_attention_prefix_value[name]

    @override
    def forward_adapted(self, groups: Groups, *args: Any, **kwargs: Any) -> Any:
        if groups[0][1] is None:
            return self.base_layer(*args, **kwargs)  # its attention function finds the active adapters
        self.groups = groups
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            self.groups = []

    def active_groups(self) -> Groups:
        """Which adapters act in the forward that is under way."""
        return self.groups or self._groups(None, None)

    def gather_prefixes(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """Keys and values of the forward under way, as `gather_prefix` gives them; None where there are none."""
        groups = self.active_groups()
        return gather_prefix(groups, self.prefix, rows) if groups else None

    @override
    def why_not_merged(self, names: Sequence[str]) -> str | None:
        return (
            f"prefix {', '.join(names)} cannot be merged: it adds keys and values that no weight gives; keep it as an "
            "adapter, or train LoRA where a merged model is needed."
        )


class WindowPrefixLayer(AttentionPrefixLayer):
    """The same around the attention of SAM and SAM 2: each window of a batch, padded or not, sees the prefix."""

    @override
    def redirect_attention(self) -> None:
        pass  # SAM has no attention functions to choose from, and SAM 2 calls them with windows for rows

    @override
    def undo_changes(self) -> None:
        pass

    @override
    def forward_adapted(self, groups: Groups, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        key, value, mask = gather_prefix(groups, self.prefix, len(hidden))
        return attend_with_prefix(self.base_layer, hidden, key, value, mask)


def prefixed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention function of wrapped modules: theirs, with the prefix in front of keys and values.

    Args:
        module: The attention module.
        query: (B, heads, L, head size).
        key: (B, key heads, S, head size), from the cache too.
        value: As key.
        attention_mask: (B or 1, heads or 1, L, S): bool, or added to the scores; None: causal if the module is.

    Returns:
        (B, L, heads, head size), and the weights (B, heads, L, S) where the implementation gives them: those of the
        tokens, which sum up to less than one.
    """
    layer = module.inlay_prefix[0]
    inner = layer.own_config._attn_implementation or "eager"
    if inner not in _SUPPORTED:
        raise Unsupported(
            f"a prefix does not work with the attention {inner!r}; load the base with {' or '.join(_SUPPORTED)}."
        )
    eager = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
    function = ALL_ATTENTION_FUNCTIONS.get_interface(inner, eager)
    batch, heads, tokens, size = key.shape
    found = layer.gather_prefixes(batch)
    if found is None:
        return function(module, query, key, value, attention_mask, **kwargs)

    extra_key, extra_value, counts = found
    extra_key, extra_value = (  # B P (G d) -> B G P d
        extra.to(key.dtype).unflatten(-1, (heads, size)).transpose(1, 2).expand(batch, -1, -1, -1)
        for extra in (extra_key, extra_value)
    )
    length = extra_key.shape[2]
    causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", False) if causal is None else causal
    mask = _widen(attention_mask, length, counts, query, tokens, causal)
    if inner == "eager" and mask is not None and mask.dtype == torch.bool:  # it adds the mask to the scores
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    output, weights = function(
        module,
        query,
        torch.cat([extra_key, key], dim=2),
        torch.cat([extra_value, value], dim=2),
        mask,
        is_causal=False,
        **kwargs,
    )
    return output, None if weights is None else weights[..., length:]


def _widen(
    mask: torch.Tensor | None,
    length: int,
    counts: torch.Tensor | None,
    query: torch.Tensor,
    tokens: int,
    causal: bool,
) -> torch.Tensor | None:
    """The mask (B or 1, heads or 1, L, S) with columns for the prefix in front, (.., L, P + S); None: all is seen."""
    rows = query.shape[2]
    if mask is None:
        if (not causal or rows == 1) and counts is None:
            return None
        mask = torch.ones(rows, tokens, dtype=torch.bool, device=query.device)
        # Token i sees keys 0 to i, as with is_causal of torch: a static cache has more keys, which are still empty.
        mask = (mask.tril() if causal and rows > 1 else mask)[None, None]
    if mask.ndim != 4:
        raise Unsupported(
            f"a prefix does not work with an attention mask of shape {tuple(mask.shape)}; give one of four axes, "
            "(B, heads, L, S)."
        )
    seen, unseen = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    front = mask.new_full((*mask.shape[:3], length), seen)
    if counts is not None:
        front = front.expand(len(counts), -1, -1, -1).masked_fill(~counts[:, None, None], unseen)
        mask = mask.expand(len(counts), -1, -1, -1)
    return torch.cat([front, mask[..., :tokens]], dim=-1)


AttentionInterface.register(_NAME, prefixed_attention)


class AttentionPrefixModel(AdapterTuner):
    """The tuner of AttentionPrefixConfig."""

    prefix = "inlay_attention_prefix_"
    tuner_layer_cls = AttentionPrefixLayer

    @override
    def targets(self, config: AttentionPrefixConfig, found: Sites) -> Sequence[str]:
        return found.attention

    @override
    def layer_class(self, target: nn.Module) -> type[AdapterLayer]:
        if isinstance(target, WINDOWED):
            return WindowPrefixLayer
        names = inspect.unwrap(type(target).forward).__code__.co_names
        if "ALL_ATTENTION_FUNCTIONS" not in names or not hasattr(target, "config"):
            raise Unsupported(
                f"a prefix needs an attention of transformers that calls an attention function, or SAM's; "
                f"{type(target).__name__} does not: choose another method, or other target_modules."
            )
        return AttentionPrefixLayer

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Any],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Any]:
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for name, layer in model.named_modules():
            if isinstance(layer, AttentionPrefixLayer) and adapter_name in layer.inlay_attention_prefix_projection:
                beginning = f"{name}.inlay_attention_prefix_"
                found = {k: v for k, v in found.items() if not k.startswith(f"{beginning}projection.{adapter_name}.")}
                with torch.no_grad():
                    key, value = layer.prefix(adapter_name)
                found[f"{beginning}key.{adapter_name}"] = key
                found[f"{beginning}value.{adapter_name}"] = value
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        for layer in model.modules():
            if isinstance(layer, AttentionPrefixLayer):
                layer.replace_projection(adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _key_size(attention: nn.Module) -> int:
    """Features of the keys: of the projection that makes them, or a third of those of one for q, k and v."""
    for name, layer in attention.named_children():
        features = getattr(layer, "out_features", getattr(layer, "nf", None))  # nf: GPT-2's Conv1D
        if features and name in _KEY:
            return features
        if features and name in _FUSED:
            return features // 3
    raise Unsupported(
        f"found no key projection in {type(attention).__name__}, only {[n for n, _ in attention.named_children()]}; "
        "give attention modules as target_modules."
    )


register_method("inlay_attention_prefix", AttentionPrefixConfig, AttentionPrefixModel)

ATTENTION_PREFIX = Method(
    name="attention-prefix",
    paper=PEFT_TYPES["INLAY_ATTENTION_PREFIX"].paper,
    attaches="attention",
    width="prefix length",
    merges=False,
    kind="prompt",
    learning_rate=5e-2,
    config=lambda model, length: AttentionPrefixConfig(length=length),
)
ROWS = (ATTENTION_PREFIX,)

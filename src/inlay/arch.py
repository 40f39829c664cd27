"""Where adapters attach in a model, found by structure: linear layers, point-wise convolutions, head."""

from collections.abc import Iterator
from typing import Literal

from torch import nn

from inlay.errors import InlayError

Sites = Literal["all", "attention"]

# Query and value projections by leaf name, in the spellings of transformers' models; a fused projection stands
# alone.
_QUERY_VALUE = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("to_q", "to_v"),
    ("qkv",),
    ("c_attn",),
)

# Poolers of a backbone: computed, but not used by a classifier that takes the mean or the first token (SigLIP, BERT).
_POOLING = {"head", "pooler"}


def head_modules(model: nn.Module) -> list[str]:
    """Names of the task head: the parameter-holding children of a transformers model beside its backbone.

    Raises:
        InlayError: The model has no backbone and head to tell apart.
    """
    children = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
    backbone = [name for name in (getattr(model, "base_model_prefix", ""), "vision_model") if name in children][:1]
    heads = [name for name in children if name not in backbone]
    if not backbone or not heads:
        raise InlayError(
            f"expected a backbone and a task head in {type(model).__name__}, found the children "
            f"{', '.join(children) or 'none'}; name the head by modules_to_save yourself."
        )
    return heads


def lora_targets(model: nn.Module, sites: Sites = "all") -> list[str]:
    """Names of the modules that LoRA adapts by default.

    Args:
        model: A transformers model with a head.
        sites: `all` takes every linear layer and every point-wise (1x1, ungrouped) convolution outside the head, as
            QLoRA does (Dettmers et al. 2023, arXiv:2305.14314); `attention` the query and value projections alone (Hu
            et al. 2021, section 7.1), or all where there is no attention. Grouped convolutions are left out: LoRA on
            them is larger than they are.

    Raises:
        InlayError: Nothing of the kind is there.
    """
    if sites not in ("all", "attention"):
        raise InlayError(f"sites must be all or attention, got {sites!r}.")
    inner = dict(_outside(model, head_modules(model)))
    for leaves in _QUERY_VALUE if sites == "attention" else ():
        found = [name for name, m in inner.items() if name.rpartition(".")[2] in leaves and _is_linear(m)]
        if found:
            return found
    found = [name for name, m in inner.items() if _is_linear(m) or _is_pointwise(m)]
    if not found:
        raise InlayError(f"found no linear layer or 1x1 convolution in {type(model).__name__}; give target_modules.")
    return found


def _outside(model: nn.Module, heads: list[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[0] not in heads and not _POOLING.intersection(parts):
            yield name, module


def _is_linear(module: nn.Module) -> bool:
    """True for nn.Linear and its quantised subclasses, and for GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1

"""Where adapters attach in a model, found by structure: attention projections, point-wise convolutions, head."""

from collections.abc import Iterator

from torch import nn

from inlay.errors import InlayError

# Query and value projections by leaf name, in the spellings of transformers' models (LoRA's own choice of sites: Hu et
# al. 2021, section 7.1); a fused projection stands alone.
_QUERY_VALUE = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("to_q", "to_v"),
    ("qkv",),
    ("c_attn",),
)


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


def lora_targets(model: nn.Module) -> list[str]:
    """Names of the modules that LoRA adapts by default.

    The query and value projections where there is attention; else the point-wise (1x1, ungrouped) convolutions; else
    every linear layer outside the head. Grouped convolutions are left out: LoRA on them is larger than they are.

    Raises:
        InlayError: Nothing of the kind is there.
    """
    inner = dict(_outside(model, head_modules(model)))
    for leaves in _QUERY_VALUE:
        found = [name for name in inner if name.rpartition(".")[2] in leaves and _is_linear(inner[name])]
        if found:
            return found
    pointwise = [
        name for name, m in inner.items() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.groups == 1
    ]
    linear = [name for name, m in inner.items() if _is_linear(m)]
    if not (pointwise or linear):
        raise InlayError(
            f"found no attention, 1x1 convolution or linear layer in {type(model).__name__}; give target_modules."
        )
    return pointwise or linear


def _outside(model: nn.Module, heads: list[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if name.split(".")[0] not in heads:
            yield name, module


def _is_linear(module: nn.Module) -> bool:
    """True for nn.Linear and its quantised subclasses, and for GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"

"""What an adapter has at which module of a base, by the layers that its method makes there."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from inlay.adapters.file import AdapterFile
from inlay.adapters.load import inject_checked, set_head
from inlay.adapters.task import task_of_file
from inlay.bases.sites import is_linear, is_pointwise, sites
from inlay.errors import InlayError
from inlay.methods._peft import PeftModel, adapter_shapes, plain_name
from inlay.methods.attention_prefix import AttentionPrefixConfig, AttentionPrefixLayer, WindowPrefixLayer
from inlay.methods.bottleneck import BottleneckLayer
from inlay.methods.partial import PartialLayer
from inlay.methods.visual_prompt import VisualPromptLayer, WindowPromptLayer
from inlay.serve.layers import BankLayer, BottleneckBank, HeadBank, LoraBank
from inlay.serve.tokens import PrefixBank, TravelBank, WindowPrefixBank
from inlay.serve.weights import ConvolutionBank, EmbeddingBank, FactorBank, VectorBank, holds_vectors

_START = "base_model.model."


@dataclass(frozen=True)
class Site:
    """One module at which adapters of one config have tensors.

    Attributes:
        module: Its name in the base.
        kind: The layer of a bank that goes around it.
        keys: Names of the tensors in a file, by what they are called in the layer.
        settings: What else the layer must know: a scale, a config, or names of modules.
    """

    module: str
    kind: type[BankLayer]
    keys: dict[str, str]
    settings: Any


def find_sites(model: PreTrainedModel, file: AdapterFile, weights: dict[str, torch.Tensor]) -> list[Site]:
    """Where an adapter goes in a bank on `model`: its method is asked, on a copy of the structure without weights.

    Names and shapes of its tensors are those that its config makes there; of peft's prefix those that `split_cache`
    makes. None for peft's prompts, which wrap nothing.

    Raises:
        InlayError: Tensors that do not fit; a method, or a form of one, that does not add to each row by itself.
    """
    skeleton = _skeleton(model)
    if file.labels and task_of_file(file, model.config).classifies:
        set_head(skeleton, file)
    adapted = inject_checked(file, skeleton, weights)
    if not adapted.active_peft_config.is_prompt_learning:
        return _sites_of(adapted, list(weights))
    kind, table = file.config["peft_type"], weights["prompt_embeddings"]
    if kind == "PROMPT_TUNING":
        return []
    if kind != "PREFIX_TUNING":
        raise InlayError(f"a bank holds no {kind} ({file.name}); load it with load_adapter.")
    fresh = get_peft_model(_skeleton(model), AttentionPrefixConfig(length=len(table)))
    shapes = adapter_shapes(fresh)
    found = split_cache(sites(fresh.get_base_model()).attention, table)
    if {key: tuple(value.shape) for key, value in found.items()} != shapes:
        raise InlayError(
            f"the prefix {file.name!r} of {tuple(table.shape)} has no keys and values for each attention of this base; "
            "load it with load_adapter."
        )
    return _sites_of(fresh, list(found))


def _skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """The structure of a base, without weights."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        skeleton = type(model)(config)
    skeleton.name_or_path = model.name_or_path
    return skeleton


def split_cache(attention: Sequence[str], table: torch.Tensor) -> dict[str, torch.Tensor]:
    """The keys and values that peft's prefix puts into a cache, as those of an attention prefix.

    Args:
        attention: Modules, one per block.
        table: (P, 2 blocks size): key and value of the first block, of the second one ...
    """
    if table.shape[1] % (2 * len(attention)):
        return {}
    pairs = table.reshape(len(table), len(attention), 2, -1)
    return {
        f"{_START}{name}.inlay_attention_prefix_{what}": pairs[:, i, k]
        for i, name in enumerate(attention)
        for k, what in enumerate(("key", "value"))
    }


def _sites_of(adapted: PeftModel, keys: list[str]) -> list[Site]:
    base = adapted.get_base_model()
    found = []
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            found.append((plain_name(name), module))
    wrapped = [name for name, _ in found]
    if len(set(wrapped)) < len(wrapped):
        raise InlayError("a bank holds adapters of one method at each module; load this one with load_adapter.")
    own: dict[str, dict[str, str]] = {name: {} for name in wrapped}
    for key in keys:
        inside = key.removeprefix(_START)
        name = max((n for n in wrapped if inside.startswith(f"{n}.")), key=len, default=None)
        if name is None:
            raise InlayError(
                f"a bank holds what methods add to a base, not {inside} of the base itself; use load_adapter."
            )
        own[name][inside[len(name) + 1 :]] = key
    if any(_is_deep(m) for _, m in found) and not all(_is_deep(m) or _is_head(m) for _, m in found):
        raise InlayError(
            "a bank keeps deep prompts as the keys and values that the base makes of them, so it holds none that have "
            "another method beside them; load this adapter with load_adapter."
        )
    return [_site(base, name, module, own[name]) for name, module in found]


def _is_deep(module: nn.Module) -> bool:
    return isinstance(module, VisualPromptLayer) and module.options["default"].enter and module.options["default"].drop


def _is_head(module: nn.Module) -> bool:
    return isinstance(module, AuxiliaryTrainingWrapper)


def _site(base: nn.Module, name: str, module: Any, keys: dict[str, str]) -> Site:
    if isinstance(module, LoraLayer):
        return _lora(name, module, keys)
    if isinstance(module, BottleneckLayer):
        return Site(name, BottleneckBank, keys, module.options["default"])
    if isinstance(module, AttentionPrefixLayer):
        kind = WindowPrefixBank if isinstance(module, WindowPrefixLayer) else PrefixBank
        return Site(name, kind, keys, None)
    if isinstance(module, WindowPromptLayer):
        return Site(name, WindowPrefixBank, keys, None)
    if isinstance(module, VisualPromptLayer):
        return _prompt(base, name, module, keys)
    if isinstance(module, PartialLayer):
        return _partial(name, module, keys)
    if isinstance(module, IA3Layer) and is_linear(module.get_base_layer()):
        return Site(name, FactorBank, keys, bool(module.is_feedforward))
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _head(name, module, keys)
    raise InlayError(
        f"a bank holds LoRA, (IA)³, bottlenecks, prefixes, prompts, biases, norms and heads, not what "
        f"{type(module).__name__} adds at {name}; load this adapter with load_adapter."
    )


def _lora(name: str, layer: Any, keys: dict[str, str]) -> Site:
    inner, scale = layer.get_base_layer(), float(layer.scaling["default"])
    if not layer.lora_variant and set(keys) <= {"lora_A.weight", "lora_B.weight", "lora_B.bias"}:
        if is_linear(inner) or is_pointwise(inner):
            return Site(name, LoraBank, keys, scale)
        if isinstance(inner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            return Site(name, ConvolutionBank, keys, scale)
    if not layer.lora_variant and isinstance(inner, nn.Embedding) and inner.max_norm is None:
        return Site(name, EmbeddingBank, keys, scale)
    raise InlayError(
        f"a bank holds LoRA whose update is B·A, not DoRA and other variants of it ({name}); load this adapter with "
        "load_adapter, or merge it."
    )


def _partial(name: str, layer: PartialLayer, keys: dict[str, str]) -> Site:
    leaves = {key.rpartition(".")[2] for key in keys}
    if not holds_vectors(layer.get_base_layer(), leaves):
        raise InlayError(
            f"a bank holds biases and norms of partial fine-tuning, not whole weights, of which each row would need "
            f"its own ({name}, {', '.join(sorted(leaves))}); load this adapter with load_adapter, or merge it."
        )
    return Site(name, VectorBank, keys, None)


def _prompt(base: nn.Module, name: str, layer: Any, keys: dict[str, str]) -> Site:
    """A deep one at the attention of its block, which is where it has its effect."""
    place = layer.options["default"]
    if not (place.enter and place.drop):
        return Site(name, TravelBank, keys, place)
    there = sites(base)
    i = there.blocks.index(name)
    return Site(there.attention[i], PrefixBank, keys, (name, there.k[i], there.v[i]))


def _head(name: str, wrapper: Any, keys: dict[str, str]) -> Site:
    """Around the one linear layer that a head consists of."""
    head = wrapper.original_module
    inside = [(leaf, module) for leaf, module in head.named_modules() if module._parameters]
    if len(inside) != 1 or not isinstance(inside[0][1], nn.Linear):
        raise InlayError(f"a bank holds heads of one linear layer, and {name} is not; load it with load_adapter.")
    leaf = inside[0][0]
    start = f"{leaf}." if leaf else ""
    return Site(f"{name}.{leaf}" if leaf else name, HeadBank, {k.removeprefix(start): v for k, v in keys.items()}, None)

"""What an adapter has at which module of a base, by the layers that its method makes there."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from inlay._peft import PeftModel, plain_name
from inlay.arch import is_linear, is_pointwise, sites
from inlay.errors import InlayError
from inlay.infer.bank_layers import BankLayer, BottleneckBank, HeadBank, LoraBank
from inlay.infer.bank_tokens import PrefixBank, TravelBank, WindowPrefixBank
from inlay.methods.attention_prefix import AttentionPrefixLayer, WindowPrefixLayer
from inlay.methods.bottleneck import BottleneckLayer
from inlay.methods.visual_prompt import VisualPromptLayer, WindowPromptLayer
from inlay.store.file import AdapterFile
from inlay.store.load import inject_checked, set_head

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

    Names and shapes of its tensors are those that its config makes there. None for peft's prompts, which wrap nothing.

    Raises:
        InlayError: Tensors that do not fit; a method, or a form of one, that does not add to each row by itself.
    """
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        skeleton = type(model)(config)
    skeleton.name_or_path = model.name_or_path
    if file.labels and file.record.get("task") == "image-classification":
        set_head(skeleton, file)
    adapted = inject_checked(file, skeleton, weights)
    if not adapted.active_peft_config.is_prompt_learning:
        return _sites_of(adapted, list(weights))
    if file.config["peft_type"] != "PROMPT_TUNING":
        kind = file.config["peft_type"]
        raise InlayError(
            f"a bank holds no {kind} ({file.name}); load it with load_adapter, or use AttentionPrefixConfig."
        )
    return []


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
        if name is not None:
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
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _head(name, module, keys)
    raise InlayError(
        f"a bank holds LoRA, bottlenecks, prefixes, prompts and heads, not what {type(module).__name__} adds at "
        f"{name}; load this adapter with load_adapter."
    )


def _lora(name: str, layer: Any, keys: dict[str, str]) -> Site:
    inner = layer.get_base_layer()
    plain = set(keys) == {"lora_A.weight", "lora_B.weight"} and not layer.lora_variant
    if not plain or not (is_linear(inner) or is_pointwise(inner)):
        what = "DoRA, biases and other variants of LoRA" if not plain else f"LoRA around a {type(inner).__name__}"
        raise InlayError(
            f"a bank holds plain LoRA on linear layers and 1x1 convolutions, not {what} ({name}); load this adapter "
            "with load_adapter, or merge it."
        )
    return Site(name, LoraBank, keys, float(layer.scaling["default"]))


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

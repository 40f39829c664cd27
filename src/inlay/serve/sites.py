"""What an adapter has at which module of a base, by the layers that its method makes there."""

import copy

import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedModel

from inlay.adapters.file import AdapterFile
from inlay.adapters.load import inject_checked, set_head
from inlay.adapters.task import find_task_of_file
from inlay.bases.sites import sites
from inlay.errors import Unsupported, WrongBase
from inlay.methods._peft import AuxiliaryTrainingWrapper, BaseTunerLayer, PeftModel, adapter_shapes, name_in_base
from inlay.methods.attention_prefix import AttentionPrefixConfig
from inlay.serve.attention_prefix import PrefixBank, WindowPrefixBank
from inlay.serve.bank_layer import KEY_START, BankLayer, Site
from inlay.serve.bottleneck import BottleneckBank
from inlay.serve.conv_adapter import ConvAdapterBank
from inlay.serve.conv_lora import ConvLoraBank
from inlay.serve.convpass import ConvPassBank
from inlay.serve.head import HeadBank
from inlay.serve.ia3 import FactorBank
from inlay.serve.lora import LoraBank
from inlay.serve.partial import VectorBank
from inlay.serve.prompt import TABLE, is_cached_prefix, is_prompt, split_cached_prefix
from inlay.serve.ssf import SsfBank
from inlay.serve.visual_prompt import TravelBank

_BANK_LAYERS: tuple[type[BankLayer], ...] = (
    LoraBank,
    ConvLoraBank,
    FactorBank,
    SsfBank,
    BottleneckBank,
    ConvPassBank,
    ConvAdapterBank,
    PrefixBank,
    WindowPrefixBank,
    TravelBank,
    VectorBank,
    HeadBank,
)
BANK_LAYER_OF = {each.stands_for: each for each in _BANK_LAYERS}  # by the layer of the method


def find_sites(model: PreTrainedModel, file: AdapterFile, weights: dict[str, torch.Tensor]) -> list[Site]:
    """Where an adapter goes in a bank on `model`: its method is asked, on a copy of the structure without weights.

    Names and shapes of its tensors are those that its config makes there; of peft's prefix those that
    `split_cached_prefix` makes. None for peft's prompts, which wrap nothing.

    Raises:
        InlayError: Tensors that do not fit; a method, or a form of one, that does not add to each row by itself.
    """
    skeleton = _skeleton(model)
    if file.labels and find_task_of_file(file, model.config).classifies:
        set_head(skeleton, file)
    adapted = inject_checked(file, skeleton, weights)
    if not adapted.active_peft_config.is_prompt_learning:
        return _sites_of(adapted, list(weights))
    if is_prompt(file.config):
        return []
    if not is_cached_prefix(file.config):
        raise Unsupported(f"a bank holds no {file.config['peft_type']} ({file.name}); load it with load_adapter.")
    table = weights[TABLE]
    fresh = get_peft_model(_skeleton(model), AttentionPrefixConfig(length=len(table)))
    shapes = adapter_shapes(fresh)
    found = split_cached_prefix(sites(fresh.get_base_model()).attention, table)
    if {key: tuple(value.shape) for key, value in found.items()} != shapes:
        raise WrongBase(
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


def _sites_of(adapted: PeftModel, keys: list[str]) -> list[Site]:
    base = adapted.get_base_model()
    found = []
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            found.append((name_in_base(name), module))
    wrapped = [name for name, _ in found]
    if len(set(wrapped)) < len(wrapped):
        raise Unsupported("a bank holds adapters of one method at each module; load this one with load_adapter.")
    own: dict[str, dict[str, str]] = {name: {} for name in wrapped}
    for key in keys:
        inside = key.removeprefix(KEY_START)
        name = max((n for n in wrapped if inside.startswith(f"{n}.")), key=len, default=None)
        if name is None:
            raise Unsupported(
                f"a bank holds what methods add to a base, not {inside} of the base itself; use load_adapter."
            )
        own[name][inside[len(name) + 1 :]] = key
    kinds = [_bank_layer_of(layer) for _, layer in found]
    reasons = [kind and kind.reason_against_mixing(layer) for kind, (_, layer) in zip(kinds, found, strict=True)]
    reason = next(filter(None, reasons), None)
    if reason and not all(why or kind is HeadBank for why, kind in zip(reasons, kinds, strict=True)):
        raise Unsupported(
            f"{reason}, so it holds none that are combined with another method; load this adapter with load_adapter."
        )
    made = []
    for kind, (name, layer) in zip(kinds, found, strict=True):
        if kind is None:
            raise Unsupported(
                f"a bank holds LoRA, (IA)³, SSF, bottlenecks, bypasses, Conv-Adapters, prefixes, prompts, biases, "
                f"norms and heads, not what {type(layer).__name__} adds at {name}; load this adapter with load_adapter."
            )
        made.append(kind.make_site(base, name, layer, own[name]))
    return made


def _bank_layer_of(layer: nn.Module) -> type[BankLayer] | None:
    """The class of a bank that stands for the class of a layer, or for the nearest one that it is made of."""
    return next((BANK_LAYER_OF[each] for each in type(layer).__mro__ if each in BANK_LAYER_OF), None)

"""All that inlay knows of peft's internals."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftModelForCausalLM, PeftModelForSequenceClassification, PeftType
from peft.helpers import rescale_adapter_scale
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, get_peft_config
from peft.tuners.ia3 import IA3Layer
from peft.tuners.ia3.layer import _ConvNd as IA3Convolution
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import _ConvNd as LoraConvolution
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_adapters_to_merge,
    check_target_module_exists,
)
from peft.utils import get_peft_model_state_dict, merge_utils, register_peft_method, set_peft_model_state_dict
from peft.utils.other import (
    AuxiliaryTrainingWrapper,
    TrainableTokensWrapper,
    _get_module_names_tied_with_embedding,
    set_additional_trainable_modules,
)

from inlay.bases.sites import uses_weight_linearly
from inlay.errors import InlayError, Unsupported

# What peft documents as its API is imported from peft; these are not, and may move with any release of it.
__all__ = [
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "IA3Layer",
    "LoraLayer",
    "PeftModel",
    "PeftType",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "get_peft_config",
    "set_additional_trainable_modules",
]

# transformers' MobileNets read these from the convolution before they call it (`apply_tf_padding`); peft's wrapper has
# none of them, so a wrapped MobileNet fails with an AttributeError.
_MIRRORED = ("stride", "kernel_size", "dilation", "padding", "groups", "in_channels", "out_channels")


def mirror_convolutions() -> None:
    """Let peft's wrapped convolutions answer for the geometry of the convolution inside, once per process."""
    for wrapper in (LoraConvolution, IA3Convolution):
        for name in _MIRRORED:
            if name not in vars(wrapper):
                setattr(wrapper, name, property(_of_base_layer(name)))


def _of_base_layer(name: str) -> Callable[[BaseTunerLayer], Any]:
    return lambda layer: getattr(layer.get_base_layer(), name)


def merge_updates(function: str, updates: list[torch.Tensor], weights: torch.Tensor, **settings: Any) -> torch.Tensor:
    """One update of several of one shape, by a function of peft.utils.merge_utils, such as `ties`."""
    return getattr(merge_utils, function)(updates, weights, **settings)


def find_unknown_settings(settings: dict[str, Any]) -> list[str]:
    """What a config says that this peft would drop or misread: names unknown to its method, texts for yes or no.

    peft drops what it does not know with no more than a warning, and takes any text for yes. Settings that say nothing
    (null, false, empty) do not count, whatever their name.
    """
    known = {field.name: field for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(settings["peft_type"])])}
    set_ones = {name: value for name, value in settings.items() if value not in (None, False, "", [], {})}
    unknown = [name for name in set_ones if name not in known and name != "runtime_config"]
    switches = [name for name, field in known.items() if field.type in (bool, "bool") and name in settings]
    return sorted(unknown + [name for name in switches if not isinstance(settings[name], bool)])


def inject_empty_adapter(model: torch.nn.Module, config: PeftConfig) -> PeftModel:
    """Wrap `model` with the adapter of `config`, its weights on the meta device: nothing is allocated.

    Except for prompts and prefixes, which peft allocates at once: compare `count_virtual_tokens` with the file before.
    """
    config.inference_mode = True
    writes_text = config.task_type == "CAUSAL_LM" or config.is_prompt_learning
    # On quantised layers peft's DoRA would put the base's weight on the meta device too, and lose it, and its (IA)3
    # moves what is on the meta device to the base's, which torch refuses.
    needs_values = getattr(config, "use_dora", False) or config.peft_type == PeftType.IA3
    whole = needs_values and getattr(model, "is_quantized", False)
    kind = PeftModelForCausalLM if writes_text else PeftModel
    if config.is_prompt_learning and config.task_type == "SEQ_CLS":
        kind = PeftModelForSequenceClassification
    return kind(model, config, low_cpu_mem_usage=not whole)


def count_virtual_tokens(config: PeftConfig) -> int:
    """How many tokens peft's prompt or prefix tuning adds in front of a text; 0 for other methods."""
    return int(config.num_virtual_tokens) if config.is_prompt_learning else 0


def fills_cache(model: torch.nn.Module) -> bool:
    """True under peft's prefix tuning, whose keys and values stand in the cache, which checkpointing does without."""
    return isinstance(model, PeftModel) and model.active_peft_config.peft_type == PeftType.PREFIX_TUNING


def adapter_shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor that a file of this adapter holds."""
    return {key: tuple(value.shape) for key, value in adapter_tensors(model).items()}


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Every tensor that a file of the active adapter holds, by its key there."""
    return get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)


def adapter_parameters(model: PeftModel) -> dict[str, str]:
    """By the key that a tensor has in a file of this adapter: the name of its parameter in the model."""
    names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: names[value.data_ptr()] for key, value in saved.items() if value.data_ptr() in names}


def fill_injected_adapter(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    """Put the tensors of a file, checked against `adapter_shapes`, into an injected adapter.

    As in training, the head has the type of the base and the rest float32. The first call makes tensors of the
    meta ones, but rounds them to the base's type; the second one puts the values in unrounded. A base in float32 needs
    no second one.
    """
    kinds = {key: value.dtype for key, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    weights = {key: value.to(kinds[key]) for key, value in weights.items()}
    set_peft_model_state_dict(model, weights, low_cpu_mem_usage=True)
    if model.active_peft_config.is_prompt_learning:
        return
    model.base_model._cast_adapter_dtype(adapter_name=model.active_adapter)
    if any(p.dtype != torch.float32 for p in model.parameters() if p.is_floating_point()):
        set_peft_model_state_dict(model, weights)


def set_adapter_values(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    """Give the active adapter the values of a file's tensors; each parameter keeps its type."""
    set_peft_model_state_dict(model, dict(weights), adapter_name=model.active_adapter)


def carries_adapter(model: torch.nn.Module) -> bool:
    """True if an adapter, or a part of one, is wrapped around modules of `model`."""
    return any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules())


def remove_all_adapters(model: torch.nn.Module) -> None:
    """Take all adapters out of a base, also one of which peft has injected only a part before it failed."""
    for layers in take_layers_out(model).values():
        for layer in layers:
            undo_layer_changes(layer)
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            model.set_submodule(name, module.original_module)
    vars(model).pop("peft_config", None)
    undo_layer_changes(model)


def register_method(name: str, config: type[PeftConfig], tuner: type[BaseTuner]) -> None:
    """Make a method known to peft, as its own are; a second call changes nothing.

    peft's enum of methods is closed, so the member is added by hand; Python 3.12 looks members up as class attributes.
    """
    label = name.upper()
    if label in PeftType.__members__:
        return
    member = str.__new__(PeftType, label)
    member._name_, member._value_, member._sort_order_ = label, label, len(PeftType.__members__)
    type.__setattr__(PeftType, label, member)
    PeftType._member_map_[label] = PeftType._value2member_map_[label] = member
    PeftType._member_names_.append(label)
    register_peft_method(name=name, config_cls=config, model_cls=tuner)


def name_import_in_card(folder: str | Path, method: str) -> None:
    """Say in the card that peft or transformers wrote next to an adapter, or in a new one, what loading it needs."""
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: peft\n---\n"
    if "import inlay" not in text:
        how = f"import inlay  # makes {method} known to peft; without it: KeyError: '{method}'"
        path.write_text(f"{text.rstrip()}\n\n### Loading\n\n```python\n{how}\n```\n", encoding="utf-8")


# Adapter layers of several methods around one module, and around modules inside one another: by the name that the
# module has in the base, innermost first.
Layers = dict[str, list[BaseTunerLayer]]


def take_layers_out(model: torch.nn.Module, keep: type | tuple[type, ...] = ()) -> Layers:
    """Take the adapter layers out of `model`, but those of the classes `keep`, so that the tree is the base's."""
    heads = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper))
    taken: Layers = {}
    for name, module in reversed(list(model.named_modules())):  # from the inside out
        if isinstance(module, BaseTunerLayer) and not isinstance(module, keep) and not name.startswith(heads):
            taken.setdefault(name_in_base(name), []).append(module)
            model.set_submodule(name, module.base_layer)
    return taken


def put_layers_back(model: torch.nn.Module, layers: Layers) -> None:
    """Put the adapter layers of a stripped model back, those around one module in the order of their `nesting`."""
    for name in sorted(layers, key=lambda name: -name.count(".")):
        for layer in sorted(layers[name], key=lambda layer: getattr(layer, "nesting", 1)):
            layer.base_layer = model.get_submodule(name)
            model.set_submodule(name, layer)


@contextmanager
def layers_taken_out(model: torch.nn.Module, keep: type | tuple[type, ...] = ()) -> Iterator[Layers]:
    """The base's own tree for as long as an adapter is injected: peft does not look inside modules that are wrapped.

    Gives the layers that were taken out; the caller may move one back into the tree, and then takes it off that list.
    """
    taken = take_layers_out(model, keep)
    try:
        yield taken
    finally:
        for name, layers in take_layers_out(model).items():
            taken.setdefault(name, []).extend(layers)
        put_layers_back(model, taken)


def name_in_base(name: str) -> str:
    """The name of a module or parameter without the wrappers on the way to it."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def undo_layer_changes(layer: torch.nn.Module) -> None:
    """Let a layer that has been taken out, or a model that had one, undo what that changed."""
    if hasattr(layer, "undo_changes"):
        layer.undo_changes()


def merge_keeping_weights(model: PeftModel) -> tuple[torch.nn.Module, Callable[[], PeftModel]]:
    """The base with the active adapter folded in, and what makes it `model` again, bit for bit.

    All that merging changes is kept (weights, wrappers, ties), as subtracting would not give it back. peft's
    `safe_merge` and our methods put new tensors in the place of old ones, so this takes only the memory of those.

    Weights that modules share (GPT-2's token embedding and head) stay one where the adapter changes them as one, as
    with peft's new tokens or `ensure_weight_tying`. Elsewhere each module gets its own, and the config says so.

    Raises:
        InlayError: An adapter that no weight can stand for; the model is then as it was.
    """
    if strange := find_changed_weights(model):
        raise Unsupported(
            f"{strange[0]} makes another weight of its own before it computes, so that an adapter next to it is no "
            "update of that weight; use it unmerged, or train lora-conv, which changes the weight itself."
        )
    restore = _remember_model(model)
    try:
        _merge_new_tokens_below_adapters(model)
        ties = _untie_adapted_weights(model)
        model.base_model.merge_adapter(safe_merge=True)  # all, before the first wrapper is taken out
        for (first, name), *others in ties:
            for module, leaf in others:
                module._parameters[leaf] = first._parameters[name]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied")
            merged = model.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft's layers say it in many ways; its (IA)³ fails on a head that is a Sequential
        restore()
        if isinstance(error, InlayError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Unsupported(f"this adapter cannot be merged ({reason}); use it unmerged.") from error
    _record_untied_embeddings(merged)

    def unmerge() -> PeftModel:
        device = next(merged.parameters()).device
        restore()
        return model if device == next(model.parameters()).device else model.to(device)

    return merged, unmerge


def find_changed_weights(model: PeftModel) -> list[str]:
    """Modules with an adapter of peft around them that do not compute with their weight as it is: BiT's convolutions.

    An adapter works there, but is no update of the weight, as peft makes its factors by the class of the module.
    """
    base = model.get_base_model()
    layers = [(name, m) for name, m in base.named_modules() if type(m).__module__.startswith("peft.tuners.")]
    wrapped = [(name, m.get_base_layer()) for name, m in layers if isinstance(m, BaseTunerLayer)]
    return [name for name, module in wrapped if not uses_weight_linearly(module)]


def _remember_model(model: PeftModel) -> Callable[[], None]:
    """What brings back the modules, tensors and configs that merging changes."""
    base = model.get_base_model()
    children = [
        (kept, dict(kept))
        for module in model.modules()
        for kept in (module._modules, module._parameters, module._buffers)
    ]
    values = [(parameter, parameter.data) for parameter in model.parameters()]
    layers = [vars(module) for module in model.modules() if isinstance(module, BaseTunerLayer)]
    states = [
        (layer, name, copy.copy(layer[name])) for layer in layers for name in _CHANGED_BY_MERGING if name in layer
    ]
    configs = vars(base).get("peft_config")
    ties = [(config, config.tie_word_embeddings) for config in _embedding_configs(base)]

    def restore() -> None:
        for kept, names in children:
            kept.clear()
            kept.update(names)
        for parameter, value in values:
            parameter.data = value
        for layer, name, state in states:
            layer[name] = copy.copy(state)
        if configs is not None:
            base.peft_config = configs
        for config, tied in ties:
            config.tie_word_embeddings = tied

    return restore


# Attributes of a layer, peft's or ours, that say what is merged into its module, and what was there before.
_CHANGED_BY_MERGING = ("merged_adapters", "_caches", "_kept")


def _merge_new_tokens_below_adapters(model: PeftModel) -> None:
    """Give a module that has new tokens below another adapter (LoRA on a tied head) the weight with these tokens.

    peft merges such a LoRA into a tensor that it forgets.
    """
    for layer in model.modules():
        inner = getattr(layer, "base_layer", None)
        if isinstance(layer, BaseTunerLayer) and isinstance(inner, TrainableTokensWrapper):
            tokens = inner.token_adapter
            module = tokens.get_base_layer()
            if not inner.disable_adapters:
                weight = tokens.get_merged_weights(tokens.active_adapters).detach()
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
            layer.base_layer = module


def _untie_adapted_weights(model: PeftModel) -> list[list[tuple[torch.nn.Module, str]]]:
    """Give each adapted module that shares a parameter with another one its own, to merge into.

    Returns:
        Modules, and their parameter, that one and the same adapter changes: they are to be tied again.
    """
    adapted: dict[torch.nn.Module, list[BaseTunerLayer]] = {}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            adapted.setdefault(layer.get_base_layer(), []).append(layer)
    owners: dict[torch.nn.Parameter, list[tuple[torch.nn.Module, str]]] = {}
    for _, module in base_modules(model, originals=True):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((module, leaf))

    ties = []
    for parameter, shared in owners.items():
        by_adapter: dict[frozenset[int], list[tuple[torch.nn.Module, str]]] = {}
        for module, leaf in shared if len(shared) > 1 else []:
            if module in adapted:
                module._parameters[leaf] = torch.nn.Parameter(parameter.data, requires_grad=False)
                by_adapter.setdefault(_adapter_storages(adapted[module]), []).append((module, leaf))
        ties += [modules for modules in by_adapter.values() if len(modules) > 1]
    return ties


def _adapter_storages(layers: list[BaseTunerLayer]) -> frozenset[int]:
    """Where the tensors of an adapter's layers lie in memory: layers that peft has tied have the same."""
    tensors = [
        parameter
        for layer in layers
        for name in layer.adapter_layer_names
        for holder in [getattr(layer, name)]
        for parameter in (holder.parameters() if isinstance(holder, torch.nn.Module) else [])
    ]
    return frozenset(parameter.untyped_storage().data_ptr() for parameter in tensors)


def _embedding_configs(model: torch.nn.Module) -> list[Any]:
    """The configs of a model of transformers that say whether its embedding and output projection are one weight."""
    config: Any = getattr(model, "config", None)
    found = [config, config.get_text_config() if hasattr(config, "get_text_config") else None]
    return [each for each in found if hasattr(each, "tie_word_embeddings")]


def _record_untied_embeddings(model: torch.nn.Module) -> None:
    """Let the configs say where embedding and output projection are two weights now, or loading would tie them."""
    configs = [config for config in _embedding_configs(model) if config.tie_word_embeddings]
    if not configs:
        return
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    if first is not None and last is not None and first.weight is not last.weight:
        for config in configs:
            config.tie_word_embeddings = False


def tie_filled_adapter(model: PeftModel) -> None:
    """Make the tensors of an adapter one again that peft ties: filling an injected adapter makes two of them."""
    config, name = model.active_peft_config, model.active_adapter
    base = model.get_base_model()
    for path in getattr(config, "target_modules_to_tie", None) or ():
        layer, first = base.get_submodule(path), base.get_input_embeddings()
        for own, tied in ((layer.lora_A, first.lora_embedding_B), (layer.lora_B, first.lora_embedding_A)):
            own[name].weight = torch.nn.Parameter(tied[name].T, requires_grad=own[name].weight.requires_grad)
    for path in getattr(config, "modules_to_tie", None) or ():
        first = base.get_input_embeddings()
        base.get_submodule(path).modules_to_save[name].weight = first.modules_to_save[name].weight


def find_tied_modules(config: PeftConfig) -> dict[str, set[str]]:
    """Modules that peft has tied to the embedding in an adapter, by the setting that named them; it saves no names.

    Without a name, loading ties again only what is tied to an `embed_tokens`: GPT-2's `wte` it does not recognise.
    """
    kinds = {"target_modules": "target_modules_to_tie", "modules_to_save": "modules_to_tie"}
    return {setting: set(found) for setting, kind in kinds.items() if (found := getattr(config, kind, None))}


def name_tied_modules(config: PeftConfig, model: torch.nn.Module, keys: Iterable[str]) -> None:
    """Name in a config the modules tied to the embedding that a file has tensors of, where peft has left them out."""
    if not getattr(config, "ensure_weight_tying", False):
        return
    saved = tuple(keys)
    tied = _get_module_names_tied_with_embedding(model)
    names = [name for name in tied if any(key.startswith(f"base_model.model.{name}.") for key in saved)]
    if not names:
        return
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    for setting in ("target_modules", "modules_to_save"):
        given = getattr(config, setting)
        if isinstance(given, list | set) and any(f".{embedding}".endswith(f".{name}") for name in given):
            setattr(config, setting, type(given)([*given, *names]))


@contextmanager
def layers_disabled(model: PeftModel) -> Iterator[None]:
    """The base with the head that was trained with the adapter, but without the adapter, inside the block."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    states = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, state in zip(layers, states, strict=True):
            layer._disable_adapters = state


@contextmanager
def base_with_own_head(model: PeftModel) -> Iterator[None]:
    """The base with its own head inside the block; afterwards, unlike peft's, what required a gradient does again."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with adapter_disabled(model):
            yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad = requires_grad


@contextmanager
def adapter_disabled(model: PeftModel) -> Iterator[None]:
    """As peft's `disable_adapter`, which fails on a prompt or prefix of a base that generates nothing: a classifier."""
    if not model.active_peft_config.is_prompt_learning or hasattr(model, "prepare_inputs_for_generation"):
        with model.disable_adapter():
            yield
        return
    model.forward = model.base_model.forward
    model._adapters_disabled = True
    try:
        yield
    finally:
        del model.forward
        model._adapters_disabled = False


@contextmanager
def scale_adapter(model: torch.nn.Module, weight: float) -> Iterator[None]:
    """A LoRA adapter of the model times a weight inside the block, by peft's `rescale_adapter_scale`.

    Raises:
        InlayError: A weight other than 1 for a model that has no LoRA layer to scale, or one that is merged.
    """
    if weight == 1:
        yield
        return
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers or not all(isinstance(layer, LoraLayer) and not layer.merged for layer in layers):
        raise Unsupported(
            f"weight {weight:g} scales unmerged LoRA layers, and this model has others or none; leave it."
        )
    with rescale_adapter_scale(model, weight):
        yield


def acts_as_saved(model: PeftModel) -> bool:
    """True if exactly one adapter acts, unmerged and enabled: the state in which a model computes what it saves."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return len(model.active_adapters) == 1 and not any(m.merged or m.disable_adapters for m in layers)


def dequantize_weight(module: torch.nn.Module) -> torch.Tensor:
    """The weight of a linear layer of bitsandbytes as (out, in) floats; the layer stays as it is.

    peft's `dequantize_module_weight` replaces an int8 weight by one that has lost its scales, if it was never used.
    """
    weight: Any = module.weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    scales = weight.SCB if weight.SCB is not None else module.state.SCB  # they move there at the first use
    return weight.data.float() * scales.float().view(-1, 1) / 127


def knows_method(name: Any) -> bool:
    """True if this peft can load a config whose `peft_type` is `name`."""
    return name in PeftType.__members__


def base_modules(model: torch.nn.Module, originals: bool = False) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules of the base under the names they have without an adapter; adapters are left out.

    So are modules that are saved whole (heads), unless the base's `originals` of them are asked for.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    yield from _descend("", model, originals)


def _descend(name: str, module: torch.nn.Module, originals: bool) -> Iterator[tuple[str, torch.nn.Module]]:
    while isinstance(module, AuxiliaryTrainingWrapper | BaseTunerLayer):  # new tokens may stand inside a LoRA
        if isinstance(module, AuxiliaryTrainingWrapper) and not originals:
            return
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.base_layer
    yield name, module
    for child, inner in module.named_children():
        yield from _descend(f"{name}.{child}" if name else child, inner, originals)

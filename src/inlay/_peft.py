"""All that inlay knows of peft's internals."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.lora.layer import _ConvNd
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper

# transformers' MobileNets read these from the convolution before they call it (`apply_tf_padding`); peft's wrapper has
# none of them, so a wrapped MobileNet fails with an AttributeError.
_MIRRORED = ("stride", "kernel_size", "dilation", "padding", "groups", "in_channels", "out_channels")


def mirror_convolutions() -> None:
    """Let peft's wrapped convolutions answer for the geometry of the convolution inside, once per process."""
    for name in _MIRRORED:
        if name not in vars(_ConvNd):
            setattr(_ConvNd, name, property(_of_base_layer(name)))


def _of_base_layer(name: str) -> Callable[[BaseTunerLayer], Any]:
    return lambda layer: getattr(layer.get_base_layer(), name)


# Initialisations that move a part of the base's weights into the adapter: on the base as it was, the adapter is wrong.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def changes_base(config: PeftConfig) -> str | None:
    """The name of the initialisation of `config` if it is one that changes the base's weights."""
    init = getattr(config, "init_lora_weights", None)
    return init if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE) else None


def inject(model: torch.nn.Module, config: PeftConfig) -> PeftModel:
    """Wrap `model` with the adapter of `config`, its weights on the meta device: nothing is allocated."""
    mirror_convolutions()
    config.inference_mode = True
    return PeftModel(model, config, low_cpu_mem_usage=True)


def adapter_shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor that a file of this adapter holds."""
    return {
        key: tuple(value.shape) for key, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def fill(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    """Put the tensors of a file, checked against `adapter_shapes`, into an injected adapter.

    As in training, the head has the type of the base and the rest float32. The first call makes tensors of the
    meta ones, but rounds them to the base's type; the second one puts the values in unrounded.
    """
    kinds = {key: value.dtype for key, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    weights = {key: value.to(kinds[key]) for key, value in weights.items()}
    set_peft_model_state_dict(model, weights, low_cpu_mem_usage=True)
    model.base_model._cast_adapter_dtype(adapter_name=model.active_adapter)
    set_peft_model_state_dict(model, weights)


def carries_adapter(model: torch.nn.Module) -> bool:
    """True if an adapter, or a part of one, is wrapped around modules of `model`."""
    return any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules())


def release(model: torch.nn.Module) -> None:
    """Take all adapters out of a base, also one of which peft has injected only a part before it failed."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            model.set_submodule(name, module.original_module)
        elif isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    vars(model).pop("peft_config", None)


def plainly_active(model: PeftModel) -> bool:
    """True if exactly one adapter acts, unmerged and enabled: the state in which a model computes what it saves."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return len(model.active_adapters) == 1 and not any(m.merged or m.disable_adapters for m in layers)


def dequantized(module: torch.nn.Module) -> torch.Tensor:
    """The weight of a linear layer of bitsandbytes as (out, in) floats; the layer stays as it is.

    peft's `dequantize_module_weight` replaces an int8 weight by one that has lost its scales, if it was never used.
    """
    weight: Any = module.weight
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    scales = weight.SCB if weight.SCB is not None else module.state.SCB  # they move there at the first use
    return weight.data.float() * scales.float().view(-1, 1) / 127


def known_method(name: Any) -> bool:
    """True if this peft can load a config whose `peft_type` is `name`."""
    return name in PeftType.__members__


def base_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules of the base under the names they have without an adapter; adapters and saved heads are left out."""
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    yield from _descend("", model)


def _descend(name: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    yield name, module
    for child, inner in module.named_children():
        yield from _descend(f"{name}.{child}" if name else child, inner)

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


def inject(model: torch.nn.Module, config: PeftConfig) -> PeftModel:
    """Wrap `model` with the adapter of `config`, its weights on the meta device: nothing is allocated."""
    config.inference_mode = True
    return PeftModel(model, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)


def adapter_shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor that a file of this adapter holds."""
    return {
        key: tuple(value.shape) for key, value in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def fill(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    """Put the tensors of a file, checked against `adapter_shapes`, into an injected adapter."""
    set_peft_model_state_dict(model, weights, low_cpu_mem_usage=True)


def dequantized(module: torch.nn.Module) -> torch.Tensor:
    """The weight of a linear layer of bitsandbytes as (out, in) floats."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module)


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

"""Weights in shards: with FSDP2 and DeepSpeed ZeRO 3 each process holds a part of every weight.

A checkpoint, the best weights and the model that `fit` leaves are whole all the same. All processes take part when
something is gathered, and all get it; the main one writes it.

Both put hooks into the modules that they shard, and neither takes them out again. So a twin of the model is sharded,
which has the same tensors in modules of its own, and which goes when the training ends.
"""

import copy
from contextlib import suppress
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_canonicalize_names
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from inlay.train.frozen_cache.frozen_blocks import find_blocks
from inlay.train.frozen_cache.states import NotCacheable


def has_shards(accelerator: Accelerator) -> bool:
    """Whether each process holds only a part of every weight."""
    plugin = accelerator.state.deepspeed_plugin
    return accelerator.is_fsdp2 or (plugin is not None and plugin.zero_stage == 3)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds only a part of a weight of this model."""
    under_fsdp2 = any(isinstance(module, FSDPModule) for module in model.modules())
    return under_fsdp2 or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def choose_model_to_train(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model itself, or its twin if the weights will be in shards."""
    if not has_shards(accelerator):
        return model
    twin = make_twin(model)
    if accelerator.is_fsdp2:
        _shard_by_blocks(twin, accelerator.state.fsdp_plugin)
        try:
            twin.get_input_embeddings()
        except (AttributeError, NotImplementedError):  # a convolutional network has none, but accelerate asks for them
            twin.get_input_embeddings = lambda: None
    return twin


def _shard_by_blocks(model: nn.Module, plugin: Any) -> None:
    """Let FSDP2 gather one block of the base after the other, where the launch file names no classes of modules.

    transformers' own list of classes names the embeddings of a ViT too, which accelerate then shards twice.
    """
    if plugin.transformer_cls_names_to_wrap is None:
        with suppress(NotCacheable):  # the blocks of this base are not known
            blocks = find_blocks(model).values()
            plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks})


def make_twin(model: nn.Module) -> nn.Module:
    """A copy of all modules with the same tensors in parameters of its own; 4-bit weights stay shared and whole."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        own = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
        memo[id(parameter)] = own if type(parameter) is nn.Parameter else parameter
    return copy.deepcopy(model, memo)


def drop_weights(model: nn.Module, twin: nn.Module) -> None:
    """Free the weights of a model whose twin is sharded; `join_weights` brings them back."""
    if twin is model:
        return
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            parameter.data = parameter.data.new_empty(0)


def join_weights(model: nn.Module, twin: nn.Module, device: torch.device) -> None:
    """Fill a model whose weights were dropped with the whole weights of its twin.

    They go to `device` if they fit next to the shards, else to the CPU. FSDP2 trains in float32 what it computes in
    half precision; such weights get their type back. DeepSpeed holds all in the precision of the run, and they keep it.
    """
    if twin is model:
        return
    shards = named_parameters(twin)
    size = sum(find_shape(shard).numel() * shard.element_size() for shard in shards.values())
    if device.type == "cuda" and size > torch.cuda.mem_get_info(device)[0]:
        device = torch.device("cpu")
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            shard = shards[name]
            parameter.data = gather_whole(shard).to(device, parameter.dtype if isinstance(shard, DTensor) else None)
    model.to(device)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by the names that they had before accelerate wrapped modules in others.

    An evaluation leaves some of FSDP2's whole, in the precision of its forward pass; they are shards again afterwards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    named: dict[str, nn.Parameter] = fsdp2_canonicalize_names(dict(model.named_parameters()))
    return named


def find_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole weight."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def gather_whole(parameter: Tensor) -> Tensor:
    """A copy of the whole weight."""
    value = parameter.detach()
    if isinstance(value, DTensor):
        return value.full_tensor()
    if not hasattr(parameter, "ds_id"):
        return value.clone()
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(parameter):
        return parameter.detach().clone()


def set_whole(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a weight new values, of which a shard takes its part; `value` is whole, and the same in all processes."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            parameter.copy_(_shard_like(parameter, value))
        elif not hasattr(parameter, "ds_id"):
            parameter.copy_(value)
        else:
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters(parameter, modifier_rank=0):
                parameter.copy_(value)


def _shard_like(parameter: DTensor, value: Tensor) -> DTensor:
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


class WholeStates:
    """An optimiser of FSDP2's weights whose state is whole, as that of the same run without shards."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """The state, gathered."""
        state = self.optimizer.state_dict()
        whole = {
            index: {key: gather_whole(value).cpu() if isinstance(value, Tensor) else value for key, value in of.items()}
            for index, of in state["state"].items()
        }
        return {**state, "state": whole}

    def load_state_dict(self, whole: dict[str, Any]) -> None:
        """Take the part of this process of a whole state."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state = {
            index: {
                key: _shard_like(parameters[index], value) if value.shape == parameters[index].shape else value
                for key, value in of.items()
            }
            for index, of in whole["state"].items()
        }
        self.optimizer.load_state_dict({**whole, "state": state})

"""Layers of a bank around convolutions and embeddings, and for what are vectors: biases, norms and factors.

A row's kernel is one of its own, so that the batch becomes the groups of one convolution; a row's change of an
embedding is looked up in its own table; vectors are added to what a module gives, or multiplied with it.
"""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from typing_extensions import override

from inlay.bases.sites import is_norm
from inlay.serve.layers import BankLayer, Tensors

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvolutionBank(BankLayer):
    """LoRA of each row around a convolution: A is a kernel over all channels, B of a group sees the group's units."""

    rank = 1

    @override
    def stored(self, tensors: Tensors, settings: float) -> dict[str, torch.Tensor]:
        groups = self.get_base_layer().groups
        down = tensors["lora_A.weight"].float().unflatten(0, (groups, -1))  # G r inputs k ...
        up = (tensors["lora_B.weight"].float() * settings).flatten(1).unflatten(0, (groups, -1))  # G outputs r
        values = {"down": down, "up": up}
        if (bias := tensors.get("lora_B.bias")) is not None:
            values["bias"] = bias.float() * settings
        return values

    @override
    def banked(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result, inner = self.base_layer(x, *args, **kwargs), self.get_base_layer()
        x, rows = x.to(torch.float32), len(x)
        convolve: Any = _CONVOLVE[x.ndim - 2]
        if self.rows.only is not None:
            kernel, up = (self.stacks._buffers[key][self.rows.only] for key in ("down", "up"))
            hidden = convolve(x, kernel.flatten(0, 1), None, inner.stride, inner.padding)
        else:
            kernel, up = self.stacks.take("down", rows), self.stacks.take("up", rows)
            side_by_side = x.reshape(1, -1, *x.shape[2:])  # 1 (B inputs) H W, a group a row
            hidden = convolve(side_by_side, kernel.flatten(0, 2), None, inner.stride, inner.padding, groups=rows)
        hidden = hidden.reshape(rows, up.shape[-3], up.shape[-1], -1)  # B G r HW
        added = (up @ hidden).reshape(result.shape)
        if "bias" in self.stacks._buffers:
            added = added + self.row("bias", rows).mT.reshape(-1, added.shape[1], *[1] * (added.ndim - 2))
        return result + added.to(result.dtype)


class EmbeddingBank(BankLayer):
    """LoRA of each row around an embedding; a scale that the embedding itself has is that of LoRA, too."""

    rank = 1

    @override
    def stored(self, tensors: Tensors, settings: float) -> dict[str, torch.Tensor]:
        scale = settings * float(getattr(self.get_base_layer(), "embed_scale", 1.0))
        down, up = tensors["lora_embedding_A"].float(), tensors["lora_embedding_B"].float()
        return {"table": down.T, "up": up * scale}  # words x r, size x r

    @override
    def banked(self, ids: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(ids)
        table = self.stacks._buffers["table"]
        assert table is not None
        if self.rows.only is not None:
            hidden = F.embedding(ids, table[self.rows.only]).flatten(1, -2)
        else:
            each = ids.expand(max(len(ids), len(self.rows.slots)), *ids.shape[1:])  # positions are given once for all
            slots = self.rows.expand(self.rows.index, len(each))
            hidden = table[slots.reshape(-1, *[1] * (ids.ndim - 1)), each].flatten(1, -2)  # B T r
        added = self.product(hidden, "up")
        return result + added.reshape(-1, *ids.shape[1:], added.shape[-1]).to(result.dtype)


class VectorBank(BankLayer):
    """What partial fine-tuning has added to the biases of each row, and to the weights of norms."""

    rank = 0

    @override
    def stored(self, tensors: Tensors, settings: None) -> dict[str, torch.Tensor]:
        return {key.rpartition(".")[2]: value.float() for key, value in tensors.items()}

    @override
    def banked(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result, inner = self.base_layer(x, *args, **kwargs), self.get_base_layer()
        here = self.stacks._buffers
        if "weight" in here:
            result = result + self._of("weight", result) * _normalised(inner, x, *args, **kwargs).to(result.dtype)
        return result + self._of("bias", result) if "bias" in here else result

    def _of(self, key: str, result: torch.Tensor) -> torch.Tensor:
        """Each row's vector in the shape of the output, whose features stand last, but for convolutions second."""
        vector = self.row(key, len(result))[:, 0].to(result.dtype)  # B or 1, features
        axes = [1] * (result.ndim - 2)
        return (
            vector.reshape(len(vector), -1, *axes)
            if _channels_first(self.get_base_layer())
            else vector.reshape(len(vector), *axes, -1)
        )


def _channels_first(module: nn.Module) -> bool:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    return isinstance(module, kinds) or getattr(module, "data_format", "") == "channels_first"


def _normalised(norm: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What a norm multiplies its weight with, whatever it makes of it (Gemma's adds one)."""
    ones, zeros = ({k: torch.full_like(p, v) for k, p in norm.named_parameters()} for v in (1.0, 0.0))
    ones |= {key: zeros[key] for key in zeros if key != "weight"}
    found: torch.Tensor = functional_call(norm, ones, args, kwargs) - functional_call(norm, zeros, args, kwargs)
    return found


class FactorBank(BankLayer):
    """(IA)³ of each row: factors for the inputs or the outputs of a linear layer, stored less one."""

    rank = 1

    @override
    def stored(self, tensors: Tensors, settings: bool) -> dict[str, torch.Tensor]:
        return {"inputs" if settings else "outputs": tensors["ia3_l"].float().flatten() - 1}

    @override
    def banked(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "inputs" in self.stacks._buffers:
            x = self._times(x, "inputs")
        result = self.base_layer(x, *args, **kwargs)
        return self._times(result, "outputs") if "outputs" in self.stacks._buffers else result

    def _times(self, x: torch.Tensor, key: str) -> torch.Tensor:
        factor = 1 + self.row(key, len(x))[:, 0]
        return (x * factor.reshape(len(factor), *[1] * (x.ndim - 2), -1)).to(x.dtype)


def holds_vectors(module: nn.Module, leaves: set[str]) -> bool:
    """Whether what is trained of a module can be one vector a row, added to what it gives."""
    if is_norm(module):
        return leaves <= {"weight", "bias"}
    linear = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or type(module).__name__ == "Conv1D"
    return linear and leaves == {"bias"}

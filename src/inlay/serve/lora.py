"""LoRA in a bank, around linear layers, convolutions and embeddings.

A row's kernel is one of its own, so that the batch becomes the groups of one convolution; a row's change of an
embedding is looked up in its own table.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from typing_extensions import override

from inlay.bases.sites import is_linear, is_pointwise, uses_weight_linearly
from inlay.errors import Unsupported
from inlay.methods._peft import LoraLayer
from inlay.serve.bank_layer import BankLayer, Site, Tensors

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoraBank(BankLayer):
    """B·A·x of each row, around a linear layer or a 1x1 convolution; the scale is in B."""

    nesting = 1
    stands_for = LoraLayer

    @classmethod
    @override
    def make_site(cls, base: nn.Module, name: str, layer: Any, keys: dict[str, str]) -> Site:
        inner, scale = layer.get_base_layer(), float(layer.scaling["default"])
        if not uses_weight_linearly(inner):
            raise Unsupported(
                f"peft makes the factors of a {type(inner).__name__} of its class, so that they are no plain B·A "
                f"({name}); load this adapter with load_adapter."
            )
        if not layer.lora_variant and set(keys) <= {"lora_A.weight", "lora_B.weight", "lora_B.bias"}:
            if is_linear(inner) or is_pointwise(inner):
                return Site(name, LoraBank, keys, scale)
            if isinstance(inner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                return Site(name, LoraConvolutionBank, keys, scale)
        if not layer.lora_variant and isinstance(inner, nn.Embedding) and inner.max_norm is None:
            return Site(name, LoraEmbeddingBank, keys, scale)
        raise Unsupported(
            f"a bank holds LoRA whose update is B·A, not DoRA and other variants of it ({name}); load this adapter "
            "with load_adapter, or merge it."
        )

    @override
    def make_stack_values(self, tensors: Tensors, settings: float) -> dict[str, torch.Tensor]:
        down, up = tensors["lora_A.weight"].float(), tensors["lora_B.weight"].float()
        values = {"down": down.flatten(1), "up": up.flatten(1) * settings}  # r x inputs, outputs x r
        if (bias := tensors.get("lora_B.bias")) is not None:
            values["bias"] = bias.float() * settings
        return values

    @override
    def forward_rows(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        inner = self.get_base_layer()
        if isinstance(inner, nn.Conv2d):  # B C H W: positions are tokens
            step_y, step_x = inner.stride
            x = x[..., ::step_y, ::step_x].movedim(1, -1)
            total = result.movedim(1, -1)
        else:
            total = result
        width = x.shape[-1]
        tokens = x.reshape(len(x), -1, width).to(torch.float32)
        if total.dtype == torch.float32:
            total = self.multiply_rows(
                self.multiply_rows(tokens, "down"), "up", total.reshape(len(x), -1, total.shape[-1])
            )
        else:
            added = self.multiply_rows(self.multiply_rows(tokens, "down"), "up")
            total = total.reshape(len(x), -1, total.shape[-1]) + added.to(total.dtype)
        if "bias" in self.stacks._buffers:
            total = total + self.take_vectors("bias", len(x)).to(total.dtype)
        if isinstance(inner, nn.Conv2d):
            return total.movedim(-1, 1).reshape(result.shape)
        return total.reshape(result.shape)


class LoraConvolutionBank(BankLayer):
    """LoRA of each row around a convolution: A is a kernel over all channels, B of a group sees the group's units."""

    nesting = 1

    @override
    def make_stack_values(self, tensors: Tensors, settings: float) -> dict[str, torch.Tensor]:
        groups = self.get_base_layer().groups
        down = tensors["lora_A.weight"].float().unflatten(0, (groups, -1))  # G r inputs k ...
        up = (tensors["lora_B.weight"].float() * settings).flatten(1).unflatten(0, (groups, -1))  # G outputs r
        values = {"down": down, "up": up}
        if (bias := tensors.get("lora_B.bias")) is not None:
            values["bias"] = bias.float() * settings
        return values

    @override
    def forward_rows(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result, inner = self.base_layer(x, *args, **kwargs), self.get_base_layer()
        x, rows = x.to(torch.float32), len(x)
        convolve: Any = _CONVOLVE[x.ndim - 2]
        if self.rows.only is not None:
            kernel, up = (self.stacks._buffers[key][self.rows.only] for key in ("down", "up"))
            hidden = convolve(x, kernel.flatten(0, 1), None, inner.stride, inner.padding)
        else:
            kernel, up = self.stacks.take_rows("down", rows), self.stacks.take_rows("up", rows)
            side_by_side = x.reshape(1, -1, *x.shape[2:])  # 1 (B inputs) H W, a group a row
            hidden = convolve(side_by_side, kernel.flatten(0, 2), None, inner.stride, inner.padding, groups=rows)
        hidden = hidden.reshape(rows, up.shape[-3], up.shape[-1], -1)  # B G r HW
        added = (up @ hidden).reshape(result.shape)
        if "bias" in self.stacks._buffers:
            added = added + self.take_vectors("bias", rows).mT.reshape(-1, added.shape[1], *[1] * (added.ndim - 2))
        return result + added.to(result.dtype)


class LoraEmbeddingBank(BankLayer):
    """LoRA of each row around an embedding; a scale that the embedding itself has is that of LoRA, too."""

    nesting = 1

    @override
    def make_stack_values(self, tensors: Tensors, settings: float) -> dict[str, torch.Tensor]:
        scale = settings * float(getattr(self.get_base_layer(), "embed_scale", 1.0))
        down, up = tensors["lora_embedding_A"].float(), tensors["lora_embedding_B"].float()
        return {"table": down.T, "up": up * scale}  # words x r, size x r

    @override
    def forward_rows(self, ids: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(ids)
        table = self.stacks._buffers["table"]
        assert table is not None
        if self.rows.only is not None:
            hidden = F.embedding(ids, table[self.rows.only]).flatten(1, -2)
        else:
            each = ids.expand(max(len(ids), len(self.rows.slots)), *ids.shape[1:])  # positions are given once for all
            slots = self.rows.expand(self.rows.index, len(each))
            hidden = table[slots.reshape(-1, *[1] * (ids.ndim - 1)), each].flatten(1, -2)  # B T r
        added = self.multiply_rows(hidden, "up")
        return result + added.reshape(-1, *ids.shape[1:], added.shape[-1]).to(result.dtype)

"""LoRA on convolutions in a bank: each row has kernels of its own, so the batch becomes groups of one convolution."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from typing_extensions import override

from inlay.bases.sites import computes_as_torch
from inlay.errors import Unsupported
from inlay.methods.conv_lora import ConvLoraLayer
from inlay.serve.bank_layer import BankLayer, Site, Tensors

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvLoraBank(BankLayer):
    """ΔW of each row, around a linear layer or a convolution: as factors, whole, or, of different adapters, both."""

    nesting = 1
    stands_for = ConvLoraLayer

    @classmethod
    @override
    def make_site(cls, base: nn.Module, name: str, layer: Any, keys: dict[str, str]) -> Site:
        inner = layer.get_base_layer()
        if not computes_as_torch(inner):
            raise Unsupported(
                f"a bank adds to what a layer gives, and {name}, a {type(inner).__name__}, makes another weight or "
                "input of its own first; load this adapter with load_adapter, or merge it."
            )
        return Site(name, cls, keys, layer.options["default"])

    @override
    def make_stack_values(self, tensors: Tensors, settings: float) -> dict[str, torch.Tensor]:
        groups, linear = getattr(self.get_base_layer(), "groups", 1), isinstance(self.get_base_layer(), nn.Linear)
        found = {key.removeprefix("inlay_conv_lora_"): value.float() for key, value in tensors.items()}
        if "down" in found:
            found["down"] = found["down"].unflatten(0, (groups, -1))  # G r inputs k ...
            found["up"] = settings * found["up"].unflatten(0, (groups, -1))  # G outputs r
        for key in ("down", "delta"):
            if linear and key in found:
                found[key] = found[key][..., None]  # a convolution over the tokens
        return found

    @override
    def forward_rows(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result, inner = self.base_layer(x, *args, **kwargs), self.get_base_layer()
        x, here = x.to(torch.float32), self.stacks._buffers
        if isinstance(inner, nn.Linear):
            x = x.reshape(len(x), -1, x.shape[-1]).mT  # B inputs T
        added = torch.zeros((), device=x.device)
        if "down" in here:
            hidden = self._convolve(x, self.stacks.take_rows("down", len(x)).flatten(1, 2))  # B (G r) H W
            up = self.stacks.take_rows("up", len(x))  # B G outputs r
            added = (up @ hidden.reshape(len(x), up.shape[1], up.shape[3], -1)).flatten(1, 2)
            added = added.unflatten(-1, hidden.shape[2:])
        if "delta" in here:
            added = added + self._convolve(x, self.stacks.take_rows("delta", len(x)))
        if isinstance(inner, nn.Linear):
            added = added.mT.reshape(result.shape)
        return result + added.to(result.dtype)

    def _convolve(self, x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """Each row (B, inputs, H, W) with kernels of its own (B, outputs, inputs / G, k, k)."""
        inner, rows = self.get_base_layer(), len(x)
        form = {} if isinstance(inner, nn.Linear) else {k: getattr(inner, k) for k in ("stride", "padding", "dilation")}
        side_by_side = x.reshape(1, -1, *x.shape[2:])  # 1 (B inputs) H W, the groups of a row after those of another
        groups = rows * getattr(inner, "groups", 1)
        found = _CONVOLVE[x.ndim - 2](side_by_side, kernels.flatten(0, 1), None, groups=groups, **form)
        return found.reshape(rows, -1, *found.shape[2:])

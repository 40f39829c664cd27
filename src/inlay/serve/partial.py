"""Partial fine-tuning in a bank, as far as it is vectors: biases, and the weights of norms."""

from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from typing_extensions import override

from inlay.bases.sites import is_channels_first, is_norm
from inlay.errors import Unsupported
from inlay.methods.partial import PartialLayer
from inlay.serve.bank_layer import BankLayer, Site, Tensors


class VectorBank(BankLayer):
    """What partial fine-tuning has added to the biases of each row, and to the weights of norms."""

    nesting = 0
    stands_for = PartialLayer

    @classmethod
    @override
    def make_site(cls, base: nn.Module, name: str, layer: Any, keys: dict[str, str]) -> Site:
        leaves = {key.rpartition(".")[2] for key in keys}
        if not _holds_vectors(layer.get_base_layer(), leaves):
            raise Unsupported(
                f"a bank holds biases and norms of partial fine-tuning, not whole weights, of which each row would "
                f"need its own ({name}, {', '.join(sorted(leaves))}); load this adapter with load_adapter, or merge it."
            )
        return Site(name, cls, keys)

    @override
    def make_stack_values(self, tensors: Tensors, settings: None) -> dict[str, torch.Tensor]:
        return {key.rpartition(".")[2]: value.float() for key, value in tensors.items()}

    @override
    def forward_rows(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result, inner = self.base_layer(x, *args, **kwargs), self.get_base_layer()
        here = self.stacks._buffers
        if "weight" in here:
            result = result + self._of("weight", result) * _normalised(inner, x, *args, **kwargs).to(result.dtype)
        return result + self._of("bias", result) if "bias" in here else result

    def _of(self, key: str, result: torch.Tensor) -> torch.Tensor:
        """Each row's vector in the shape of the output, whose features stand last, but for convolutions second."""
        vector = self.take_vectors(key, len(result))[:, 0].to(result.dtype)  # B or 1, features
        axes = [1] * (result.ndim - 2)
        return (
            vector.reshape(len(vector), -1, *axes)
            if is_channels_first(self.get_base_layer())
            else vector.reshape(len(vector), *axes, -1)
        )


def _normalised(norm: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What a norm multiplies its weight with, whatever it makes of it (Gemma's adds one)."""
    ones, zeros = ({k: torch.full_like(p, v) for k, p in norm.named_parameters()} for v in (1.0, 0.0))
    ones |= {key: zeros[key] for key in zeros if key != "weight"}
    found: torch.Tensor = functional_call(norm, ones, args, kwargs) - functional_call(norm, zeros, args, kwargs)
    return found


def _holds_vectors(module: nn.Module, leaves: set[str]) -> bool:
    """Whether what is trained of a module can be one vector a row, added to what it gives."""
    if is_norm(module):  # one with an activation in it (BiT) gives another sum
        return leaves <= {"weight", "bias"} and not any(True for _ in module.children())
    linear = isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or type(module).__name__ == "Conv1D"
    return linear and leaves == {"bias"}

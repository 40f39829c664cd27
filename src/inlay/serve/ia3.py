"""(IA)³ in a bank."""

from typing import Any

import torch
from torch import nn
from typing_extensions import override

from inlay.bases.sites import is_linear
from inlay.errors import Unsupported
from inlay.methods._peft import IA3Layer
from inlay.serve.bank_layer import BankLayer, Site, Tensors


class FactorBank(BankLayer):
    """(IA)³ of each row: factors for the inputs or the outputs of a linear layer, stored less one."""

    nesting = 1
    stands_for = IA3Layer

    @classmethod
    @override
    def make_site(cls, base: nn.Module, name: str, layer: Any, keys: dict[str, str]) -> Site:
        if not is_linear(layer.get_base_layer()):
            raise Unsupported(
                f"a bank holds (IA)³ around linear layers, and {name} is a {type(layer.get_base_layer()).__name__}; "
                "load this adapter with load_adapter."
            )
        return Site(name, cls, keys, bool(layer.is_feedforward))

    @override
    def make_stack_values(self, tensors: Tensors, settings: bool) -> dict[str, torch.Tensor]:
        return {"inputs" if settings else "outputs": tensors["ia3_l"].float().flatten() - 1}

    @override
    def forward_rows(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "inputs" in self.stacks._buffers:
            x = self._multiply(x, "inputs")
        result = self.base_layer(x, *args, **kwargs)
        return self._multiply(result, "outputs") if "outputs" in self.stacks._buffers else result

    def _multiply(self, x: torch.Tensor, key: str) -> torch.Tensor:
        factor = 1 + self.take_vectors(key, len(x))[:, 0]
        return (x * factor.reshape(len(factor), *[1] * (x.ndim - 2), -1)).to(x.dtype)

"""Heads in a bank: modules that were trained whole and saved with an adapter."""

import math
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from inlay.errors import Unsupported
from inlay.methods._peft import AuxiliaryTrainingWrapper
from inlay.serve.bank_layer import BankLayer, Rows, Site, Tensors


class HeadBank(BankLayer):
    """A head of each row. Rows with fewer labels than others of the batch get -inf for those that they do not have."""

    nesting = 1
    stands_for = AuxiliaryTrainingWrapper

    @classmethod
    @override
    def make_site(cls, base: nn.Module, name: str, layer: Any, keys: dict[str, str]) -> Site:
        """Around the one linear layer that a head consists of."""
        inside = [(leaf, module) for leaf, module in layer.original_module.named_modules() if module._parameters]
        if len(inside) != 1 or not isinstance(inside[0][1], nn.Linear):
            raise Unsupported(f"a bank holds heads of one linear layer, and {name} is not; load it with load_adapter.")
        leaf = inside[0][0]
        start = f"{leaf}." if leaf else ""
        return Site(f"{name}.{leaf}" if leaf else name, cls, {k.removeprefix(start): v for k, v in keys.items()})

    def __init__(self, base_layer: nn.Module, rows: Rows) -> None:
        super().__init__(base_layer, rows)
        self.base_values = self.make_stack_values({k: p.detach() for k, p in base_layer.named_parameters()}, None)
        for slot in range(rows.capacity):
            self.stacks.fill_slot(slot, self.values_if_absent())
            self.stacks.sizes[slot] = self.size_of(self.base_values)

    @override
    def make_stack_values(self, tensors: Tensors, settings: Any) -> dict[str, torch.Tensor]:
        return {key: value.float() for key, value in tensors.items()}  # K x d, K

    @override
    def values_if_absent(self) -> dict[str, torch.Tensor]:
        return self.base_values  # adapters without a head, and the plain base, have the base's

    @override
    def size_of(self, values: Tensors) -> int:
        return len(values["weight"])

    @override
    def forward_rows(self, x: torch.Tensor) -> torch.Tensor:
        sizes = [self.stacks.sizes[slot] for slot in self.rows.slots]
        tokens = x.reshape(len(x), -1, x.shape[-1]).float()
        bias = self.take_vectors("bias", len(x)) if "bias" in self.stacks._buffers else None
        logits = self.multiply_rows(tokens, "weight", bias)[..., : max(sizes)]
        if min(sizes) < max(sizes):
            limits = self.rows.expand(torch.tensor(sizes, device=x.device), len(x))[:, None, None]
            logits = logits.masked_fill(torch.arange(max(sizes), device=x.device) >= limits, -math.inf)
        return logits.reshape(*x.shape[:-1], -1).to(x.dtype)

"""Conv-Adapter in a bank: a row's kernel is one of its own, so that the batch becomes the groups of one convolution.

Adapters of different widths differ in the groups of their depth-wise kernels. Here a kernel is spread over all
channels, with zeros for those that a unit does not see, so that they share a stack.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from typing_extensions import override

from inlay.errors import Unsupported
from inlay.methods.conv_adapter import ConvAdapterLayer, check_added_shape
from inlay.serve.bank_layer import BankLayer, Site, Tensors


class ConvAdapterBank(BankLayer, ConvAdapterLayer):
    """Conv-Adapters of one placement and non-linearity; α is in W_up and b_up."""

    stands_for = ConvAdapterLayer

    @classmethod
    @override
    def make_site(cls, base: nn.Module, name: str, layer: Any, keys: dict[str, str]) -> Site:
        return Site(name, cls, keys, layer.options["default"])

    @override
    def check_settings(self, settings: Any) -> None:
        own = self.options.get("bank", settings)
        if own != settings:
            raise Unsupported(
                f"the Conv-Adapters of a bank are alike in placement and activation: here they have {own}, this "
                f"adapter has {settings}; give this adapter a bank of its own."
            )

    @override
    def make_stack_values(self, tensors: Tensors, settings: Any) -> dict[str, torch.Tensor]:
        self.options["bank"] = settings
        kernel, up = tensors["inlay_conv_adapter_kernel"].float(), tensors["inlay_conv_adapter_up"].float()
        down_bias, up_bias = tensors["inlay_conv_adapter_bias"].float().split([up.shape[1], len(up)])
        scale = tensors["inlay_conv_adapter_scale"].float()
        values = {"kernel": _spread_groups(kernel), "down_bias": down_bias}
        return values | {"up": up * scale[:, None], "up_bias": up_bias * scale}

    @override
    def forward_rows(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_adapted([(["bank"], None)], *args, **kwargs)  # which asks for `_branch`

    @override
    def _branch(self, name: str, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        here, rows, x = self.options[name], len(x), x.to(torch.float32)
        if self.rows.only is not None:
            kernel, bias = (self.stacks._buffers[key][self.rows.only] for key in ("kernel", "down_bias"))
            h = F.conv2d(x, kernel, bias, here.stride, here.padding, here.dilation)
        else:
            kernel, bias = self.stacks.take_rows("kernel", rows), self.stacks.take_rows("down_bias", rows)
            side_by_side = x.reshape(1, -1, *x.shape[2:])  # 1 (B inputs) H W, a group a row
            h = F.conv2d(
                side_by_side, kernel.flatten(0, 1), bias.flatten(), here.stride, here.padding, here.dilation, rows
            )
            h = h.reshape(rows, -1, *h.shape[2:])
        tokens = ACT2FN[here.activation](h).flatten(2).mT  # B HW m
        added = self.multiply_rows(tokens, "up", self.take_vectors("up_bias", rows)).mT
        added = added.reshape(rows, -1, *h.shape[2:])
        check_added_shape(added, hidden, self.get_base_layer())
        return added.to(hidden.dtype)


def _spread_groups(kernel: torch.Tensor) -> torch.Tensor:
    """A kernel (G, m / G, C / G, k, k) over all channels, (m, C, k, k)."""
    groups, units, inputs, *size = kernel.shape
    spread = kernel.new_zeros(groups, units, groups, inputs, *size)
    every = torch.arange(groups)
    spread[every, :, every] = kernel
    return spread.reshape(groups * units, groups * inputs, *size)

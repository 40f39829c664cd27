"""Bottleneck adapters in a bank."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from typing_extensions import override

from inlay.errors import Unsupported
from inlay.methods.bottleneck import BottleneckLayer
from inlay.serve.bank_layer import BankLayer, Site, Tensors


class BottleneckBank(BankLayer, BottleneckLayer):
    """Bottlenecks of one placement and non-linearity; the scale is in W_up and b_up."""

    nesting = 3
    stands_for = BottleneckLayer

    @classmethod
    @override
    def make_site(cls, base: nn.Module, name: str, layer: Any, keys: dict[str, str]) -> Site:
        return Site(name, cls, keys, layer.options["default"])

    @override
    def check_settings(self, settings: Any) -> None:
        own = self.options.get("bank")
        for what in ("placement", "activation", "layer_norm"):
            if own is not None and getattr(own, what) != getattr(settings, what):
                raise Unsupported(
                    f"the bottlenecks of a bank are alike in {what}: here it is {getattr(own, what)}, this adapter has "
                    f"{getattr(settings, what)}; give this adapter a bank of its own."
                )

    @override
    def make_stack_values(self, tensors: Tensors, settings: Any) -> dict[str, torch.Tensor]:
        self.options["bank"] = settings
        weight = tensors["inlay_bottleneck_weight"].float()
        learned = tensors.get("inlay_bottleneck_scale")
        scale = torch.tensor([settings.scale]) if learned is None else learned.float()  # (1,) or (d,)
        after = settings.layer_norm == "after"
        up = weight[1].T  # d x m
        values = {"down": weight[0], "up": up if after else up * scale[:, None]}
        if (bias := tensors.get("inlay_bottleneck_bias")) is not None:
            down_bias, up_bias = bias.float().split([weight.shape[1], weight.shape[2]])
            values |= {"down_bias": down_bias, "up_bias": up_bias if after else up_bias * scale}
        if settings.layer_norm:
            for leaf in ("weight", "bias"):
                norm = tensors[f"inlay_bottleneck_norm.{leaf}"].float()
                values[f"norm_{leaf}"] = norm * scale if after else norm
        return values

    @override
    def forward_rows(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_adapted([(["bank"], None)], *args, **kwargs)  # which asks for `_sum`

    @override
    def _sum(self, x: torch.Tensor, groups: Any) -> torch.Tensor:
        if self.channels_first:
            x = x.movedim(1, -1)
        config, here = self.options["bank"], self.stacks._buffers
        h = x.reshape(len(x), -1, x.shape[-1]).to(torch.float32)
        h = self._norm(h) if config.layer_norm == "before" else h
        h = self.multiply_rows(h, "down", self.take_vectors("down_bias", len(x)) if "down_bias" in here else None)
        h = h if config.activation is None else ACT2FN[config.activation](h)
        h = self.multiply_rows(h, "up", self.take_vectors("up_bias", len(x)) if "up_bias" in here else None)
        h = self._norm(h) if config.layer_norm == "after" else h
        total = h.reshape(x.shape).to(x.dtype)
        return total.movedim(-1, 1) if self.channels_first else total

    def _norm(self, h: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(h, h.shape[-1:])
        return normed * self.take_vectors("norm_weight", len(h)) + self.take_vectors("norm_bias", len(h))

"""ConvPass in a bank: a row's kernel is one of its own, so that the batch becomes the groups of one convolution."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from typing_extensions import override

from inlay.bases.sites import sites
from inlay.errors import Unsupported
from inlay.methods.convpass import ConvPassConfig, ConvPassLayer
from inlay.methods.patch_grid import find_patch_grid
from inlay.serve.bank_layer import BankLayer, Site, Tensors


class ConvPassBank(BankLayer, ConvPassLayer):
    """Bypasses of one non-linearity; the scale is in W_up and b_up."""

    stands_for = ConvPassLayer

    @classmethod
    @override
    def make_site(cls, base: nn.Module, name: str, layer: Any, keys: dict[str, str]) -> Site:
        """Its settings: the config, the size of the windows, and what makes tokens of images."""
        return Site(name, cls, keys, (layer.options["default"], layer.window, sites(base).embeddings[0]))

    @override
    def check_settings(self, settings: tuple[ConvPassConfig, int, nn.Module]) -> None:
        own, other = self.options.get("bank"), settings[0]
        if own is not None and own.activation != other.activation:
            raise Unsupported(
                f"the bypasses of a bank are alike in activation: here it is {own.activation}, this adapter has "
                f"{other.activation}; give this adapter a bank of its own."
            )

    @override
    def make_stack_values(
        self, tensors: Tensors, settings: tuple[ConvPassConfig, int, nn.Module]
    ) -> dict[str, torch.Tensor]:
        config, window, embeddings = settings
        self.options["bank"] = config
        self.read_grid(find_patch_grid(embeddings), window)
        down, up = tensors["inlay_convpass_weight"].float()
        size = [len(down), len(down), down.shape[1]]
        down_bias, bias, up_bias = tensors["inlay_convpass_bias"].float().split(size)
        kernel = tensors["inlay_convpass_kernel"].float()
        values = {"down": down, "kernel": kernel, "centre": kernel[:, :, 1, 1], "up": up.T * config.scale}
        return values | {"down_bias": down_bias, "bias": bias, "up_bias": up_bias * config.scale}

    @override
    def forward_rows(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_adapted([(["bank"], None)], *args, **kwargs)  # which asks for `_branch`

    @override
    def _branch(self, name: str, x: torch.Tensor) -> torch.Tensor:
        act = ACT2FN[self.options[name].activation]
        h = act(self._project(x.to(torch.float32), "down"))
        patches, others = self.split_patches(h)
        patches, others = self._convolve(patches), self._project(others, "centre", "bias")
        h = act(self.join_patches(patches, others, x))
        return self._project(h, "up").to(x.dtype)

    def _project(self, x: torch.Tensor, key: str, bias: str | None = None) -> torch.Tensor:
        """Each row of x (B, ..., n) by its own matrix and bias."""
        flat = self.multiply_rows(x.flatten(1, -2), key, self.take_vectors(bias or f"{key}_bias", len(x)))
        return flat.unflatten(1, x.shape[1:-1])

    def _convolve(self, maps: torch.Tensor) -> torch.Tensor:
        """Each image of (B, H, W, m) by its own kernel."""
        rows, x = len(maps), maps.movedim(-1, 1)
        if self.rows.only is not None:
            kernel, bias = (self.stacks._buffers[key][self.rows.only] for key in ("kernel", "bias"))
            return F.conv2d(x, kernel, bias, padding=1).movedim(1, -1)
        kernel, bias = self.stacks.take_rows("kernel", rows), self.stacks.take_rows("bias", rows)
        side_by_side = x.reshape(1, -1, *x.shape[2:])
        convolved = F.conv2d(side_by_side, kernel.flatten(0, 1), bias.flatten(), padding=1, groups=rows)
        return convolved.reshape(rows, -1, *x.shape[2:]).movedim(1, -1)

"""Sums of Conv-Adapters: channels side by side, weights and scales in the way out.

The convolution in front is depth-wise, so that the channels of two adapters do not see each other, and the sum is exact
for any non-linearity that all parts share. Adapters may differ in their groups: the sum has their greatest common
divisor, in which all of them can be written, with zeros for channels that a unit did not see.
"""

from math import gcd
from typing import Any

import numpy as np
from typing_extensions import override

from inlay.combine.method_sum import (
    Leaves,
    Sum,
    Update,
    find_activation_leaves,
    make_common_config,
    require_equal_settings,
)
from inlay.combine.norms import norm
from inlay.combine.parts import Array, Part
from inlay.errors import WrongBase

_NAME = "inlay_conv_adapter"
_KERNEL, _UP, _BIAS, _SCALE = f"{_NAME}_kernel", f"{_NAME}_up", f"{_NAME}_bias", f"{_NAME}_scale"


class ConvAdapterSum(Sum):
    """Several Conv-Adapters as one; as a config has one width, sites with fewer channels are filled up with zeros."""

    peft_type = "INLAY_CONV_ADAPTER"
    key_prefix = "inlay_conv_adapter_"
    title = "a Conv-Adapter"

    @override
    def decide_config(self) -> dict[str, Any]:
        require_equal_settings(
            "Conv-Adapters", self.parts, ["activation"], "the channels would be one layer, which has one non-linearity"
        )
        require_equal_settings(
            "Conv-Adapters", self.parts, ["placement"], "those next to a module and those behind it read other maps"
        )
        self.refuse_width("has its channels in groups, so that none can go")
        acting = [(part, site) for site in self.names for part in self.acting_parts(site)]
        self.groups = gcd(*(part.shape(site, _KERNEL)[0] for part, site in acting))
        widest = max(sum(p.shape(site, _UP)[1] for p in self.acting_parts(site)) for site in self.names)
        self.channels = -(-widest // self.groups) * self.groups
        return make_common_config(self.parts, self.names, width=self.channels, groups=self.groups)

    @property
    @override
    def width(self) -> int:
        return self.channels

    @classmethod
    @override
    def update_at(cls, part: Part, site: str) -> Update | None:
        """W_up K over all channels: the nearest thing to an update, as the non-linearity is left out."""
        up = part.read(site, _UP) * part.read(site, _SCALE)[:, None] * np.float32(part.weight)
        return up, spread_groups(part.read(site, _KERNEL), 1).reshape(up.shape[1], -1)

    @override
    def shapes_at(self, site: str) -> Leaves:
        here = self.acting_parts(site)
        kernels = {part.name: part.shape(site, _KERNEL) for part in here}
        if len({(groups * inputs, *size) for groups, _, inputs, *size in kernels.values()}) > 1:
            raise WrongBase(f"the kernels at {site} are {kernels}; only adapters of one base can be combined.")
        own = find_activation_leaves(here, site, f"{_NAME}_act", "Conv-Adapters")
        groups, _, inputs, *size = kernels[here[0].name]
        outputs, width = here[0].shape(site, _UP)[0], self.channels
        kernel = (self.groups, width // self.groups, groups * inputs // self.groups, *size)
        shapes: Leaves = {_KERNEL: kernel, _UP: (outputs, width), _BIAS: (width + outputs,), _SCALE: (outputs,)}
        return shapes | {leaf: here[0].shape(site, leaf) for leaf in own}

    @override
    def make(self, site: str) -> dict[str, Array]:
        """The channels of a group stand together: those of the first adapter, then those of the next."""
        shapes, groups, here = self.shapes[site], self.groups, self.acting_parts(site)
        outputs, width = shapes[_UP]
        kernel, ups = np.zeros(shapes[_KERNEL], np.float32), np.zeros((outputs, groups, width // groups), np.float32)
        bias, up_bias = np.zeros((groups, width // groups), np.float32), np.zeros(outputs, np.float32)
        patch = np.random.default_rng(1).standard_normal((groups * kernel.shape[2], *kernel.shape[3:]))  # C_in k k
        wanted, at = np.zeros(outputs), 0
        for part in here:
            own, own_up, own_bias, scale = (part.read(site, leaf) for leaf in (_KERNEL, _UP, _BIAS, _SCALE))
            channels, scale = own_up.shape[1], scale * np.float32(part.weight)
            down_bias, out = np.split(own_bias, [channels])
            place = slice(at, at + channels // groups)
            kernel[:, place] = spread_groups(own, groups)
            ups[:, :, place] = (scale[:, None] * own_up).reshape(outputs, groups, -1)
            bias[:, place] = down_bias.reshape(groups, -1)
            up_bias += scale * out
            wanted += scale * (own_up @ np.abs(_convolve(own, patch) + down_bias) + out)
            at += channels // groups
        up, flat = ups.reshape(outputs, width), bias.ravel()
        hidden = np.abs(_convolve(kernel, patch) + flat)
        self.check(site, up @ hidden + up_bias, wanted, max(norm(wanted), norm(up) * norm(hidden) + norm(up_bias)))
        self.errors[site] = 0.0
        ones = np.ones(outputs, np.float32)
        made = {_KERNEL: kernel, _UP: up, _BIAS: np.concatenate([flat, up_bias]), _SCALE: ones}
        return made | {leaf: here[0].read(site, leaf) for leaf in shapes if leaf not in made}


def spread_groups(kernel: Array, groups: int) -> Array:
    """A kernel (G, m / G, C / G, k, k) in fewer groups, a divisor of G: zeros where a unit did not see a channel."""
    each, units, inputs, *size = len(kernel) // groups, *kernel.shape[1:]
    spread = np.zeros((groups, each, units, each, inputs, *size), np.float32)
    for i, own in enumerate(np.split(kernel.reshape(groups, each, units, inputs, *size), each, axis=1)):
        spread[:, i, :, i] = own[:, 0]
    return spread.reshape(groups, each * units, each * inputs, *size)


def _convolve(kernel: Array, patch: Any) -> Any:
    """What each unit gives for one patch (C, k, k): (m,)."""
    return np.einsum("guchw,gchw->gu", kernel, patch.reshape(len(kernel), -1, *patch.shape[1:])).ravel()

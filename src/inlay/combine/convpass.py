"""Sums of convolutional bypasses: channels side by side, weights and scales in the way out.

The kernel of a sum is block-diagonal, so that the channels of one adapter do not see those of another, and the sum is
exact for any non-linearity that all parts share.
"""

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

_NAME = "inlay_convpass"
_WEIGHT, _KERNEL, _BIAS = f"{_NAME}_weight", f"{_NAME}_kernel", f"{_NAME}_bias"


class ConvPassSum(Sum):
    """Several bypasses as one; as a config has one width, sites with fewer channels are filled up with zeros."""

    peft_type = "INLAY_CONVPASS"
    key_prefix = "inlay_convpass_"
    title = "a convolutional bypass"

    @override
    def decide_config(self) -> dict[str, Any]:
        require_equal_settings(
            "bypasses", self.parts, ["activation"], "the channels would be one layer, which has one non-linearity"
        )
        self.refuse_width("mixes its channels in the convolution, so that none can go")
        self.channels = max(sum(_count_channels(p, site) for p in self.acting_parts(site)) for site in self.names)
        sites = list(dict.fromkeys(name for part in self.parts for name in part.config.get("sites") or []))
        return make_common_config(self.parts, self.names, width=self.channels, scale=1.0, sites=sites)

    @property
    @override
    def width(self) -> int:
        return self.channels

    @classmethod
    @override
    def update_at(cls, part: Part, site: str) -> Update | None:
        """W_up K W_down at the centre of K: the nearest thing to an update, as non-linearities are left out."""
        down, up = part.read(site, _WEIGHT)
        return up.T * _find_factor(part), part.read(site, _KERNEL)[:, :, 1, 1] @ down

    @override
    def shapes_at(self, site: str) -> Leaves:
        here, width = self.acting_parts(site), self.channels
        sizes = {part.shape(site, _WEIGHT)[2] for part in here}
        if len(sizes) > 1:
            raise WrongBase(f"{site} has {sizes} features; only adapters of one base can be combined.")
        size = sizes.pop()
        own = find_activation_leaves(here, site, f"{_NAME}_act", "bypasses")
        shapes: Leaves = {_WEIGHT: (2, width, size), _KERNEL: (width, width, 3, 3), _BIAS: (2 * width + size,)}
        return shapes | {leaf: here[0].shape(site, leaf) for leaf in own}

    @override
    def make(self, site: str) -> dict[str, Array]:
        shapes, width, here = self.shapes[site], self.channels, self.acting_parts(site)
        weight, kernel, bias = (np.zeros(shapes[leaf], np.float32) for leaf in (_WEIGHT, _KERNEL, _BIAS))
        down_bias, kernel_bias, up_bias = np.split(bias, [width, 2 * width])  # views of it
        x = np.random.default_rng(1).standard_normal((shapes[_WEIGHT][2], 3, 3))  # a patch and those around it
        wanted, at = np.zeros(len(x)), 0
        for part in here:
            own, own_kernel, own_bias = (part.read(site, leaf) for leaf in (_WEIGHT, _KERNEL, _BIAS))
            factor, channels = _find_factor(part), own.shape[1]
            place = slice(at, at + channels)
            weight[0, place], weight[1, place] = own[0], factor * own[1]
            kernel[place, place] = own_kernel
            down_bias[place], kernel_bias[place], out = np.split(own_bias, [channels, 2 * channels])
            up_bias += factor * out
            wanted += factor * _compute_centre(own, own_kernel, own_bias, x)
            at += channels
        scale = norm(weight[1]) * norm(kernel) * norm(weight[0]) + norm(bias)
        self.check(site, _compute_centre(weight, kernel, bias, x), wanted, max(norm(wanted), scale))
        self.errors[site] = 0.0
        made = {_WEIGHT: weight, _KERNEL: kernel, _BIAS: bias}
        return made | {leaf: here[0].read(site, leaf) for leaf in shapes if leaf not in made}


def _count_channels(part: Part, site: str) -> int:
    return part.shape(site, _WEIGHT)[1]


def _find_factor(part: Part) -> np.float32:
    """What the output of a bypass is multiplied with: its weight in the sum and its own scale."""
    return np.float32(part.weight * part.config.get("scale", 1.0))


def _compute_centre(weight: Array, kernel: Array, bias: Array, x: Any) -> Any:
    """What a bypass adds to the patch in the middle of x (d, 3, 3).

    Any non-linearity by itself on each channel would do to check a sum: here |x|.
    """
    (down, up), channels = weight, weight.shape[1]
    down_bias, kernel_bias, up_bias = np.split(bias, [channels, 2 * channels])
    h = np.abs(np.tensordot(down, x, 1) + down_bias[:, None, None])
    return up.T @ np.abs(np.tensordot(kernel, h, 3) + kernel_bias) + up_bias

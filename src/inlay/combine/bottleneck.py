"""Sums of bottlenecks: units side by side, weights and scales in the way out.

Units side by side do not see each other, so that the sum is exact for any non-linearity that all
parts share. A layer norm before W_down is part of it (W_down takes up its weight and bias); one after W_up is not.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from inlay.combine.low_rank import decompose_factors
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
from inlay.combine.units import Activation, choose_width, keep_units, unit_errors
from inlay.errors import Unsupported, WrongBase

_NAME = "inlay_bottleneck"
_WEIGHT, _BIAS, _SCALE = f"{_NAME}_weight", f"{_NAME}_bias", f"{_NAME}_scale"
_NORM = (f"{_NAME}_norm.weight", f"{_NAME}_norm.bias")


def read_bottleneck(part: Part, site: str) -> tuple[Array, Array | None, Array, Array | None]:
    """W_down (m, d), b_down (m,), W_up (d, m) and b_up (d,), with scale but without weight; a norm before is in them.

    Raises:
        InlayError: A norm before W_down with a bias, where the bottleneck has none that could take it up.
    """
    down_bias = up_bias = None
    down, up_t = part.read(site, _WEIGHT)
    if _BIAS in part.sites[site]:
        down_bias, up_bias = np.split(part.read(site, _BIAS), [len(down)])
    if part.config.get("layer_norm") == "before":
        weight, bias = (part.read(site, leaf) for leaf in _NORM)
        if down_bias is not None:
            down_bias = down_bias + down @ bias
        elif np.any(bias):
            raise Unsupported(
                f"the layer norm of adapter {part.name!r} at {site} has a bias, but its bottleneck none that could "
                "take it up; these cannot be added."
            )
        down = down * weight
    scale = _read_scale(part, site)
    return down, down_bias, up_t.T * scale[:, None], None if up_bias is None else up_bias * scale


def _read_scale(part: Part, site: str) -> Array:
    """What the output is multiplied with: (1,), or (d,) where each channel has its own."""
    if _SCALE in part.sites[site]:
        return part.read(site, _SCALE)
    return np.array([part.config.get("scale", 1.0)], np.float32)


def _count_units(part: Part, site: str) -> int:
    return part.shape(site, _WEIGHT)[1]


class BottleneckSum(Sum):
    """Several bottlenecks as one; as a config has one width, sites with fewer units are filled up with zeros."""

    peft_type = "INLAY_BOTTLENECK"
    key_prefix = "inlay_bottleneck_"
    title = "a bottleneck"

    @override
    def decide_config(self) -> dict[str, Any]:
        require_equal_settings(
            "bottlenecks", self.parts, ["activation"], "the units would be one layer, which has one non-linearity"
        )
        require_equal_settings(
            "bottlenecks", self.parts, ["placement"], "serial and parallel ones read other hidden states"
        )
        require_equal_settings(
            "bottlenecks", self.parts, ["layer_norm"], "one normalises what it reads, the other does not"
        )
        self.config = self.parts[0].config
        for site in self.names:
            here = self.acting_parts(site)
            if len(here) > 1 and self.config.get("layer_norm") == "after":
                raise Unsupported(
                    f"bottlenecks with a layer norm after W_up do not add ({site}): the norm of a sum is no sum of "
                    "norms; train them without it."
                )
            find_activation_leaves(here, site, f"{_NAME}_act", "bottlenecks")
        self.linear = self.config.get("activation") is None
        widths = {site: sum(_count_units(part, site) for part in self.acting_parts(site)) for site in self.names}
        if self.options.width is not None and self.config.get("layer_norm") == "after":
            raise Unsupported("a layer norm after W_up mixes all units, so that none can go; leave width out.")
        self.units = max(widths.values())
        if self.options.width == "auto":
            self.units = min(self.units, self._find_narrowest_width())
        elif self.options.width is not None:
            self.units = min(self.units, self.options.width)
        sites = list(dict.fromkeys(name for part in self.parts for name in part.config.get("sites") or []))
        no_scale = {key: False for key in ("learn_scale", "channel_scale") if key in self.config}
        return make_common_config(self.parts, self.names, width=self.units, scale=1.0, sites=sites, **no_scale)

    @classmethod
    @override
    def update_at(cls, part: Part, site: str) -> Update | None:
        """W_up W_down: that of a linear bottleneck, and the nearest thing to one where there is a non-linearity."""
        down, _, up, _ = read_bottleneck(part, site)
        return up * np.float32(part.weight), down

    @property
    @override
    def width(self) -> int:
        return self.units

    def _find_narrowest_width(self) -> int:
        """The smallest width, one for all sites, that keeps to the error."""
        errors, norms = {}, {}
        for site in self.names:
            down, down_bias, up, _ = self._join_units(site)
            norms[site] = self._measure_update(down, up)
            if self.linear:
                values = decompose_factors(up, down).values
                errors[site] = np.array([norm(values[i:]) for i in range(len(values) + 1)]) / max(norm(values), 1e-30)
            else:
                inputs = self.options.activations.get(site)
                errors[site] = unit_errors(down, down_bias, up, Activation(self.config["activation"]), inputs)
        return choose_width(errors, norms, self.options.error)

    @override
    def shapes_at(self, site: str) -> Leaves:
        here = self.acting_parts(site)
        sizes = {_count_features(part, site) for part in here}
        biased = {_BIAS in part.sites[site] for part in here}
        if len(sizes) > 1 or len(biased) > 1:
            raise WrongBase(f"{site} has {sizes} features; only adapters of one base can be combined.")
        size = sizes.pop()
        shapes: Leaves = {_WEIGHT: (2, self.units, size)}
        if biased.pop():
            shapes[_BIAS] = (self.units + size,)
        if self.config.get("layer_norm"):
            shapes |= dict.fromkeys(_NORM, (size,))
        shapes |= {leaf: here[0].shape(site, leaf) for leaf in here[0].sites[site] if leaf.startswith(f"{_NAME}_act")}
        return shapes

    @override
    def make(self, site: str) -> dict[str, Array]:
        here, shapes = self.acting_parts(site), self.shapes[site]
        size = shapes[_WEIGHT][2]
        if self.config.get("layer_norm") == "after":
            return self._make_with_norm_after(site, here[0])
        down, down_bias, up, up_bias = self._join_units(site)
        self.errors[site], self.norms[site] = 0.0, self._measure_update(down, up)
        if len(down) > self.units:
            down, down_bias, up, up_bias = self._reduce_units(site, down, down_bias, up, up_bias)
        weight = np.zeros(shapes[_WEIGHT], np.float32)
        weight[0, : len(down)], weight[1, : len(down)] = down, up.T
        made = {_WEIGHT: weight}
        if _BIAS in shapes:
            made[_BIAS] = np.concatenate([np.pad(down_bias, (0, self.units - len(down))), up_bias])
        if _NORM[0] in shapes:
            made |= {_NORM[0]: np.ones(size, np.float32), _NORM[1]: np.zeros(size, np.float32)}
        made |= {leaf: here[0].read(site, leaf) for leaf in shapes if leaf.startswith(f"{_NAME}_act")}
        return made

    def _join_units(self, site: str) -> tuple[Array, Array, Array, Array]:
        """W_down, b_down, W_up and b_up of the exact sum, checked; biases of zeros where there are none."""
        here = self.acting_parts(site)
        read = [read_bottleneck(part, site) for part in here]
        down = np.concatenate([r[0] for r in read])
        up = np.concatenate([np.float32(p.weight) * r[2] for p, r in zip(here, read, strict=True)], axis=1)
        down_bias, up_bias = np.zeros(len(down), np.float32), np.zeros(len(up), np.float32)
        if any(r[1] is not None for r in read):
            down_bias = np.concatenate([r[1] for r in read if r[1] is not None])
        for part, (_, _, _, bias) in zip(here, read, strict=True):
            if bias is not None:
                up_bias += np.float32(part.weight) * bias
        self._check_sum(site, here, read, (down, down_bias, up, up_bias))
        return down, down_bias, up, up_bias

    def _measure_update(self, down: Array, up: Array) -> float:
        """How much a site changes, to compare sites: of a linear one ‖W_up W_down‖, else of its units one by one."""
        if self.linear:
            return float(np.sqrt(max(((up.T @ up) * (down @ down.T)).sum(dtype=np.float64), 0)))
        return norm(np.linalg.norm(up, axis=0) * np.linalg.norm(down, axis=1))

    def _make_with_norm_after(self, site: str, part: Part) -> dict[str, Array]:
        """The only adapter at a site, with a norm after W_up that takes up scale and weight."""
        own = part.read(site, _WEIGHT)  # 2 m d
        units = own.shape[1]
        weight = np.zeros(self.shapes[site][_WEIGHT], np.float32)
        weight[:, :units] = own
        made = {_WEIGHT: weight}
        if _BIAS in part.sites[site]:
            down_bias, up_bias = np.split(part.read(site, _BIAS), [units])
            made[_BIAS] = np.concatenate([np.pad(down_bias, (0, self.units - units)), up_bias])
        scale = _read_scale(part, site) * np.float32(part.weight)
        made |= {leaf: part.read(site, leaf) * scale for leaf in _NORM}
        self.errors[site] = 0.0
        return made | {leaf: part.read(site, leaf) for leaf in self.shapes[site] if leaf.startswith(f"{_NAME}_act")}

    def _reduce_units(self, site: str, down: Array, down_bias: Array, up: Array, up_bias: Array) -> tuple[Array, ...]:
        """As many units as the width allows: of a linear one the best, of others the most important."""
        inputs = self.options.activations.get(site)
        if self.linear:
            found = decompose_factors(up, down)
            self.errors[site] = found.error(self.units)
            up_bias = up_bias + up @ down_bias
            up, down = found.cut(self.units)
            return down, np.zeros(len(down), np.float32), up, up_bias
        act = Activation(self.config["activation"])
        kept, fitted, error = keep_units(down, down_bias, up, self.units, act, inputs)
        self.errors[site] = error
        if np.any(fitted[:, -1]) and _BIAS not in self.shapes[site]:
            raise Unsupported(
                f"the bottleneck at {site} has no bias, which least squares needs; leave activations out."
            )
        return down[kept], down_bias[kept], fitted[:, :-1], up_bias + fitted[:, -1]

    def _check_sum(self, site: str, here: Sequence[Part], read: Any, made: tuple[Array, ...]) -> None:
        """Any non-linearity by itself on each unit would do: here |x|."""
        x = np.random.default_rng(1).standard_normal((made[0].shape[1],))
        wanted = np.zeros(len(x))
        for part, (down, bias, up, out) in zip(here, read, strict=True):
            added = up @ np.abs(down @ x + (0 if bias is None else bias)) + (0 if out is None else out)
            wanted += part.weight * added
        down, down_bias, up, up_bias = made
        hidden = np.abs(down @ x + down_bias)
        self.check(site, up @ hidden + up_bias, wanted, norm(up) * norm(hidden) + norm(up_bias))


def _count_features(part: Part, site: str) -> int:
    return part.shape(site, _WEIGHT)[2]

"""Sums of bottlenecks, flat and spatial: units side by side, weights and scales in the way out.

Units that stand beside one another do not see each other, so that the sum is exact for any non-linearity that all
parts share. A layer norm before W_down is part of it (W_down takes up its weight and bias); one after W_up is not.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from inlay.combine.read import Array, Part
from inlay.combine.sums import Leaves, Sum, agree, common
from inlay.combine.widths import Activation, keep_units, norm, spectrum
from inlay.errors import InlayError

_NAME = "inlay_bottleneck"
_WEIGHT, _BIAS, _SCALE = f"{_NAME}_weight", f"{_NAME}_bias", f"{_NAME}_scale"
_NORM = (f"{_NAME}_norm.weight", f"{_NAME}_norm.bias")
_FIRST = tuple(f"{_NAME}_{side}.{what}" for side in ("down", "up") for what in ("weight", "bias"))  # of a first form


def bottleneck(part: Part, site: str) -> tuple[Array, Array | None, Array, Array | None]:
    """W_down (m, d), b_down (m,), W_up (d, m) and b_up (d,), with scale but without weight; a norm before is in them.

    Raises:
        InlayError: A norm before W_down with a bias, where the bottleneck has none that could take it up.
    """
    leaves = part.sites[site]
    down_bias = up_bias = None
    if _WEIGHT in leaves:
        down, up_t = part.read(site, _WEIGHT)
        if _BIAS in leaves:
            down_bias, up_bias = np.split(part.read(site, _BIAS), [len(down)])
    else:
        down, up_t = part.read(site, _FIRST[0]), part.read(site, _FIRST[2]).T
        if _FIRST[1] in leaves:
            down_bias, up_bias = part.read(site, _FIRST[1]), part.read(site, _FIRST[3])
    if part.config.get("layer_norm") == "before":
        weight, bias = (part.read(site, leaf) for leaf in _NORM)
        if down_bias is not None:
            down_bias = down_bias + down @ bias
        elif np.any(bias):
            raise InlayError(
                f"the layer norm of adapter {part.name!r} at {site} has a bias, but its bottleneck none that could "
                "take it up; these cannot be added."
            )
        down = down * weight
    factor = np.float32(_factor(part, site))
    return down, down_bias, up_t.T * factor, None if up_bias is None else up_bias * factor


def _factor(part: Part, site: str) -> float:
    return float(part.read(site, _SCALE)[0]) if _SCALE in part.sites[site] else float(part.config.get("scale", 1.0))


def _width(part: Part, site: str) -> int:
    return part.shape(site, _WEIGHT)[1] if _WEIGHT in part.sites[site] else part.shape(site, _FIRST[0])[0]


class BottleneckSum(Sum):
    """Several bottlenecks as one; as a config has one width, sites with fewer units get some of zeros."""

    method = "bottleneck"

    @override
    def settle(self) -> dict[str, Any]:
        agree("bottlenecks", self.parts, ["activation"], "the units would be one layer, which has one non-linearity")
        agree("bottlenecks", self.parts, ["placement"], "serial and parallel ones read other hidden states")
        agree("bottlenecks", self.parts, ["layer_norm"], "one normalises what it reads, the other does not")
        self.config = self.parts[0].config
        for site in self.names:
            here = self.acting(site)
            if len(here) > 1 and self.config.get("layer_norm") == "after":
                raise InlayError(
                    f"bottlenecks with a layer norm after W_up do not add ({site}): the norm of a sum is no sum of "
                    "norms; train them without it."
                )
            if len(here) > 1 and any(leaf.startswith(f"{_NAME}_act") for p in here for leaf in p.sites[site]):
                raise InlayError(
                    f"the activation {self.config['activation']} has a parameter of its own, so that bottlenecks with "
                    "it do not add; train them with another one."
                )
        self.linear = self.config.get("activation") is None
        widths = {site: sum(_width(part, site) for part in self.acting(site)) for site in self.names}
        self.width = max(widths.values())
        if self.plan.width == "auto" or (self.plan.width is not None and self.config.get("layer_norm") == "after"):
            raise InlayError(
                "a bottleneck, which is not linear, has no error bound to choose a width by; give a number."
            )
        if self.plan.width is not None:
            self.width = min(self.width, self.plan.width)
        sites = list(dict.fromkeys(name for part in self.parts for name in part.config.get("sites") or []))
        return common(self.parts, self.names, width=self.width, scale=1.0, learn_scale=False, sites=sites)

    @override
    def layout(self, site: str) -> Leaves:
        here = self.acting(site)
        sizes = {_size(part, site) for part in here}
        biased = {_BIAS in part.sites[site] or _FIRST[1] in part.sites[site] for part in here}
        if len(sizes) > 1 or len(biased) > 1:
            raise InlayError(f"{site} has {sizes} features; only adapters of one base can be combined.")
        size = sizes.pop()
        shapes: Leaves = {_WEIGHT: (2, self.width, size)}
        if biased.pop():
            shapes[_BIAS] = (self.width + size,)
        if self.config.get("layer_norm"):
            shapes |= dict.fromkeys(_NORM, (size,))
        shapes |= {leaf: here[0].shape(site, leaf) for leaf in here[0].sites[site] if leaf.startswith(f"{_NAME}_act")}
        return shapes

    @override
    def make(self, site: str) -> dict[str, Array]:
        here, shapes = self.acting(site), self.shapes[site]
        size = shapes[_WEIGHT][2]
        if self.config.get("layer_norm") == "after":
            return self._after(site, here[0])
        read = [bottleneck(part, site) for part in here]
        down = np.concatenate([r[0] for r in read])
        up = np.concatenate([np.float32(p.weight) * r[2] for p, r in zip(here, read, strict=True)], axis=1)
        down_bias, up_bias = np.zeros(len(down), np.float32), np.zeros(size, np.float32)
        if _BIAS in shapes:
            down_bias = np.concatenate([r[1] for r in read if r[1] is not None])
            for part, (_, _, _, bias) in zip(here, read, strict=True):
                if bias is not None:
                    up_bias += np.float32(part.weight) * bias
        self._check(site, here, read, (down, down_bias, up, up_bias))
        self.errors[site] = 0.0
        if len(down) > self.width:
            down, down_bias, up, up_bias = self._smaller(site, down, down_bias, up, up_bias)
        weight = np.zeros(shapes[_WEIGHT], np.float32)
        weight[0, : len(down)], weight[1, : len(down)] = down, up.T
        made = {_WEIGHT: weight}
        if _BIAS in shapes:
            made[_BIAS] = np.concatenate([np.pad(down_bias, (0, self.width - len(down))), up_bias])
        if _NORM[0] in shapes:
            made |= {_NORM[0]: np.ones(size, np.float32), _NORM[1]: np.zeros(size, np.float32)}
        made |= {leaf: here[0].read(site, leaf) for leaf in shapes if leaf.startswith(f"{_NAME}_act")}
        return made

    def _after(self, site: str, part: Part) -> dict[str, Array]:
        """One adapter alone, with a norm after W_up that takes up scale and weight."""
        down, down_bias, up, up_bias = bottleneck(part, site)
        factor = np.float32(_factor(part, site))
        weight = np.zeros(self.shapes[site][_WEIGHT], np.float32)
        weight[0, : len(down)], weight[1, : len(down)] = (
            part.read(site, _WEIGHT)
            if _WEIGHT in part.sites[site]
            else (
                down,
                up.T / factor,
            )
        )
        made = {_WEIGHT: weight}
        if down_bias is not None and up_bias is not None:
            own = up_bias / factor if factor else up_bias
            made[_BIAS] = np.concatenate([np.pad(down_bias, (0, self.width - len(down))), own])
        made |= {leaf: part.read(site, leaf) * factor * np.float32(part.weight) for leaf in _NORM}
        self.errors[site] = 0.0
        return made | {leaf: part.read(site, leaf) for leaf in self.shapes[site] if leaf.startswith(f"{_NAME}_act")}

    def _smaller(self, site: str, down: Array, down_bias: Array, up: Array, up_bias: Array) -> tuple[Array, ...]:
        """As many units as the width allows: of a linear one the best, of others the most important."""
        inputs = self.plan.activations.get(site)
        if self.linear:
            found = spectrum(up, down)
            self.errors[site], self.norms[site] = found.error(self.width), norm(found.values)
            up_bias = up_bias + up @ down_bias
            up, down = found.cut(self.width)
            return down, np.zeros(len(down), np.float32), up, up_bias
        act = Activation(self.config["activation"])
        kept, fitted, error = keep_units(down, down_bias, up, self.width, act, inputs)
        self.errors[site] = error
        self.norms[site] = norm(np.linalg.norm(up, axis=0) * np.linalg.norm(down, axis=1))
        if np.any(fitted[:, -1]) and _BIAS not in self.shapes[site]:
            raise InlayError(f"the bottleneck at {site} has no bias, which least squares needs; leave activations out.")
        return down[kept], down_bias[kept], fitted[:, :-1], up_bias + fitted[:, -1]

    def _check(self, site: str, here: Sequence[Part], read: Any, made: tuple[Array, ...]) -> None:
        """Any non-linearity by itself on each unit would do: here |x|."""
        x = np.random.default_rng(1).standard_normal((made[0].shape[1],))
        wanted = np.zeros(len(x))
        for part, (down, bias, up, out) in zip(here, read, strict=True):
            added = up @ np.abs(down @ x + (0 if bias is None else bias)) + (0 if out is None else out)
            wanted += part.weight * added
        down, down_bias, up, up_bias = made
        hidden = np.abs(down @ x + down_bias)
        self.check(site, up @ hidden + up_bias, wanted, norm(up) * norm(hidden) + norm(up_bias))


def _size(part: Part, site: str) -> int:
    return part.shape(site, _WEIGHT)[2] if _WEIGHT in part.sites[site] else part.shape(site, _FIRST[0])[1]


_ENCODER, _DECODER = "inlay_spatial3d_encoder.", "inlay_spatial3d_decoder."


class SpatialSum(Sum):
    """Several 3D spatial adapters as one: bottlenecks side by side, changes of SAM's weights added, one decoder kept.

    A decoder with the necks in front of it is a head: a network of its own, which has no sum.
    """

    method = "3D spatial adapter"

    @override
    def settle(self) -> dict[str, Any]:
        free = {"width", "reduction", "classes", "levels", "decoder_width", "prompts", "rounds", "reference"}
        free |= {"init_weights", "target_modules", "exclude_modules", "modules_to_save", "base_model_name_or_path"}
        free |= {"peft_version", "auto_mapping", "inference_mode", "revision", "task_type", "peft_type"}
        agree("3D spatial adapters", self.parts, [k for k in self.parts[0].config if k not in free], "train them alike")
        if any(part.config.get("reference") for part in self.parts) and len(self.parts) > 1:
            raise InlayError(
                "3D spatial adapters of the published kind have an activation after W_up, so that they do not add; "
                "train them with reference=False."
            )
        if self.plan.width == "auto":
            raise InlayError("a 3D spatial adapter is not linear, and has no error bound; give a number as width.")
        keep = [part for part in self.parts if part.name == self.plan.keep] or self.parts
        if len(keep) > 1:
            raise InlayError(
                "each of these adapters has a decoder of its own, a network that has no sum; say whose is kept: heads="
                + " or ".join(repr(part.name) for part in self.parts)
                + "."
            )
        self.kept = keep[0]
        widths = [self._units(part) for part in self.parts if part.weight != 0 or self.plan.zeros]
        self.full = sum(widths) or self._units(self.parts[0])
        self.width = self.full if self.plan.width is None else min(self.full, self.plan.width)
        own = {
            k: self.kept.config[k] for k in ("classes", "levels", "decoder_width", "prompts") if k in self.kept.config
        }
        return common(self.parts, self.parts[0].config.get("target_modules") or [], width=self.width, **own)

    def _units(self, part: Part) -> int:
        for site in part.sites:
            for leaf in part.sites[site]:
                if leaf.endswith(".adapter.down.weight"):
                    return part.shape(site, leaf)[0]
        raise InlayError(f"adapter {part.name!r} holds no spatial bottleneck; get it again.")

    @override
    def layout(self, site: str) -> Leaves:
        """Of the bottlenecks the width is another; all else is as it was."""
        shapes: Leaves = {}
        for leaf in self.kept.sites[site]:
            shape = self.kept.shape(site, leaf)
            if ".adapter." in leaf and not leaf.endswith("up.bias"):
                axis = 1 if leaf.endswith("up.weight") else 0
                shape = (*shape[:axis], self.width, *shape[axis + 1 :])
            elif not _is_head(leaf):
                for part in self.parts:
                    if leaf in part.sites[site] and part.shape(site, leaf) != shape:
                        raise InlayError(f"{leaf} is {part.shape(site, leaf)} in {part.name!r}, {shape} in others.")
            shapes[leaf] = shape
        return shapes

    @override
    def make(self, site: str) -> dict[str, Array]:
        made: dict[str, Array] = {}
        for leaf in self.shapes[site]:
            if _is_head(leaf):
                made[leaf] = self.kept.read(site, leaf)
            elif ".adapter." not in leaf:
                made[leaf] = self._added(site, leaf)
            elif leaf.endswith("down.weight"):
                made |= self._block(site, leaf.removesuffix("down.weight"))
        self.errors.setdefault(site, 0.0)
        return made

    def _added(self, site: str, leaf: str) -> Array:
        total = np.zeros(self.shapes[site][leaf], np.float32)
        for part in self.acting(site):
            total += np.float32(part.weight) * part.read(site, leaf)
        return total

    def _block(self, site: str, start: str) -> dict[str, Array]:
        """The bottleneck of one block; where it has to be smaller, the units with the largest product of norms stay."""
        here = self.acting(site)
        made: dict[str, Array] = {}
        own = [leaf for leaf in self.shapes[site] if leaf.startswith(start)]
        for leaf in own:
            read = [part.read(site, leaf) for part in here]
            if leaf.endswith(("up.weight", "up.bias")):
                read = [np.float32(part.weight) * x for part, x in zip(here, read, strict=True)]
            if leaf.endswith("up.bias"):
                made[leaf] = np.asarray(np.sum(read, axis=0), np.float32)
            else:
                made[leaf] = np.concatenate(read, axis=1 if leaf.endswith("up.weight") else 0)
        if self.width < self.full:
            up, down = made[f"{start}up.weight"], made[f"{start}down.weight"]
            weight = np.asarray(np.linalg.norm(up, axis=0) * np.linalg.norm(down, axis=1))
            if f"{start}conv.weight" in made:
                weight = weight * np.linalg.norm(made[f"{start}conv.weight"].reshape(len(weight), -1), axis=1)
            order = np.argsort(-weight, kind="stable")
            kept = np.sort(order[: self.width])
            for leaf in own:
                if not leaf.endswith("up.bias"):
                    made[leaf] = np.take(made[leaf], kept, axis=1 if leaf.endswith("up.weight") else 0)
            lost = norm(weight[order[self.width :]]) / max(norm(weight), 1e-30)
            self.errors[site] = max(self.errors.get(site, 0.0), lost)
        return made


def _is_head(leaf: str) -> bool:
    return leaf.startswith(_DECODER) or ".necks." in leaf

"""The sum of LoRAs on convolutions: factors by concatenation, group by group, differences of weights by addition.

The scale and the weight go into B. Where the sum of the ranks is so large that the method keeps a difference of weights
instead of factors, the sum is one, too; so is what a rule makes of the true updates.
"""

import math
from collections import Counter
from typing import Any

import numpy as np
from typing_extensions import override

from inlay.combine.method_sum import Leaves, Sum, Update, make_common_config, require_equal_shapes
from inlay.combine.parts import Array, Part
from inlay.errors import DamagedFile, Unsupported
from inlay.peft_types import has_factors

_DOWN, _UP, _DELTA = (f"inlay_conv_lora_{leaf}" for leaf in ("down", "up", "delta"))


class ConvLoraSum(Sum):
    """Several LoRAs on convolutions as one."""

    peft_type = "INLAY_CONV_LORA"
    key_prefix = "inlay_conv_lora_"
    title = "LoRA on convolutions"
    has_updates = True

    @override
    def decide_config(self) -> dict[str, Any]:
        self.refuse_width("has factors in some layers and whole differences in others")
        if self.options.rule.needs_factors:
            raise Unsupported(f"{self.options.rule.name} works on factors, which not all layers have; use ties.")
        self.ranks = {site: self._decide_rank(site) for site in self.names}
        usual = Counter(self.ranks.values()).most_common(1)[0][0]
        others = {site: rank for site, rank in self.ranks.items() if rank != usual}
        return make_common_config(self.parts, self.names, r=usual, scale=1.0, ranks=others)

    def _decide_rank(self, site: str) -> int:
        """The sum of the ranks; under a rule one that makes a whole difference of the layer."""
        here = self.acting_parts(site)
        if self.options.rule.merge is not None:
            return math.prod(_shape_of_weight(here[0], site))
        return sum(_rank_at(part, site) for part in here)

    @property
    @override
    def width(self) -> int:
        return int(self.config["r"])

    @override
    def shapes_at(self, site: str) -> Leaves:
        here, rank = self.acting_parts(site), self.ranks[site]
        weights = {_shape_of_weight(part, site) for part in here}
        if len(weights) > 1:
            for leaf in (_DOWN, _UP, _DELTA):
                require_equal_shapes([part for part in here if leaf in part.sites[site]], site, leaf)
            raise DamagedFile(f"{site} is of the shapes {sorted(weights)}; download these adapters again.")
        weight = weights.pop()
        if any(_DELTA in part.sites[site] for part in here):  # which a larger rank keeps
            return {_DELTA: weight}
        groups = here[0].shape(site, _DOWN)[0] // here[0].shape(site, _UP)[1]
        factors = {_DOWN: (groups * rank, *weight[1:]), _UP: (weight[0], rank)}
        return factors if has_factors(weight, groups, rank) else {_DELTA: weight}

    @classmethod
    @override
    def update_at(cls, part: Part, site: str) -> Update | None:
        delta = _read_update(part, site)
        return delta.reshape(len(delta), -1) * np.float32(part.weight), None

    @override
    def make(self, site: str) -> dict[str, Array]:
        here, shapes = self.acting_parts(site), self.shapes[site]
        self.errors[site] = 0.0
        deltas, weights = [_read_update(part, site) for part in here], [part.weight for part in here]
        if self.options.rule.merge is not None:
            flat = [delta.reshape(len(delta), -1) for delta in deltas]
            merged = self.options.rule.merge(flat, weights, self.options.settings, site)
            self.check(site, merged, merged)
            return {_DELTA: merged.reshape(shapes[_DELTA])}
        wanted = np.zeros_like(deltas[0])
        for weight, delta in zip(weights, deltas, strict=True):
            wanted += np.float32(weight) * delta
        if _DELTA in shapes:
            self.check(site, wanted, wanted)
            return {_DELTA: wanted}
        groups = shapes[_DOWN][0] // self.ranks[site]
        down = [part.read(site, _DOWN).reshape(groups, -1, *shapes[_DOWN][1:]) for part in here]
        up = [np.float32(part.weight * part.config["scale"]) * part.read(site, _UP) for part in here]
        made = {_DOWN: np.concatenate(down, axis=1).reshape(shapes[_DOWN]), _UP: np.concatenate(up, axis=1)}
        size = sum(abs(w) * float(np.linalg.norm(delta)) for w, delta in zip(weights, deltas, strict=True))
        self.check(site, _multiply(made[_DOWN], made[_UP]), wanted, size)
        return made


def _rank_at(part: Part, site: str) -> int:
    return int(part.config.get("ranks", {}).get(site, part.config["r"]))


def _shape_of_weight(part: Part, site: str) -> tuple[int, ...]:
    if _DELTA in part.sites[site]:
        return part.shape(site, _DELTA)
    return (part.shape(site, _UP)[0], *part.shape(site, _DOWN)[1:])


def _read_update(part: Part, site: str) -> Array:
    """ΔW of one adapter, of the shape of the weight, with the scale in it."""
    if _DELTA in part.sites[site]:
        return part.read(site, _DELTA)
    return np.float32(part.config["scale"]) * _multiply(part.read(site, _DOWN), part.read(site, _UP))


def _multiply(down: Array, up: Array) -> Array:
    """B_g A_g of each group: (G r, d_in / G, k, k) and (d_out, r) to (d_out, d_in / G, k, k)."""
    groups = len(down) // up.shape[1]
    product: Array = up.reshape(groups, -1, up.shape[1]) @ down.reshape(groups, up.shape[1], -1)
    return product.reshape(len(up), *down.shape[1:])

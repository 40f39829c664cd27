"""The sum of partial fine-tunings: differences to the base's weights add."""

from typing import Any

import numpy as np
from typing_extensions import override

from inlay.combine.method_sum import Leaves, Sum, Update, make_common_config, require_equal_shapes
from inlay.combine.norms import norm
from inlay.combine.parts import Array, Part
from inlay.errors import Unsupported


class PartialSum(Sum):
    """Differences to the base's weights, as they are in partial fine-tuning."""

    peft_type = "INLAY_PARTIAL"
    key_prefix = "inlay_partial_"
    title = "partial fine-tuning"
    has_updates = True

    @override
    def decide_config(self) -> dict[str, Any]:
        self.refuse_width("has no width")
        self.refuse_factors("differences of weights")
        kinds = {str(part.config.get("train", "all")) for part in self.parts}
        train = kinds.pop() if len(kinds) == 1 else "all"
        if kinds:  # another one: the result names whole modules
            for site in self.names:
                leaves = {leaf for part in self.parts if site in part.sites for leaf in part.sites[site]}
                if leaves == {"inlay_partial_delta.bias"}:
                    raise Unsupported(
                        f"{site} has only its bias trained, other modules all of their weights, which one config "
                        "cannot say; combine adapters with the same train=."
                    )
        return make_common_config(self.parts, self.names, train=train, last=None)

    def refuse_factors(self, has: str) -> None:
        """Raise InlayError for a rule that needs the factors of an update, which these have not."""
        rule = self.options.rule
        if rule.needs_factors:
            raise Unsupported(f"{rule.name} works on the factors of low-rank updates; use ties for {has}.")

    @classmethod
    def start_of(cls, leaf: str) -> float:
        """What a tensor holds that changes nothing."""
        return 0.0

    @classmethod
    @override
    def update_at(cls, part: Part, site: str) -> Update | None:
        leaf = max(part.sites[site], key=lambda leaf: np.prod(part.shape(site, leaf)))
        delta = part.read(site, leaf) - np.float32(cls.start_of(leaf))
        return delta.reshape(len(delta), -1) * np.float32(part.weight), None

    @override
    def shapes_at(self, site: str) -> Leaves:
        here = [part for part in self.parts if site in part.sites]
        leaves = dict.fromkeys(leaf for part in here for leaf in part.sites[site])
        return {leaf: require_equal_shapes([p for p in here if leaf in p.sites[site]], site, leaf) for leaf in leaves}

    @override
    def make(self, site: str) -> dict[str, Array]:
        return {leaf: self._add_deltas(site, leaf) for leaf in self.shapes[site]}

    def _add_deltas(self, site: str, leaf: str) -> Array:
        here = [part for part in self.acting_parts(site) if leaf in part.sites[site]]
        start = np.float32(self.start_of(leaf))
        self.errors[site] = 0.0
        if self.options.rule.merge is not None and here:
            deltas = [part.read(site, leaf) - start for part in here]
            weights = [part.weight for part in here]
            merged = self.options.rule.merge(deltas, weights, self.options.settings, f"{site}.{leaf}")
            self.check(site, merged, merged)
            return merged + start
        total = np.zeros(self.shapes[site][leaf], np.float32)
        wanted = size = 0.0
        for part in here:
            if part.weight == 0:
                continue
            delta = part.read(site, leaf)
            delta -= start
            wanted += part.weight * _sum_entries(delta)
            size += abs(part.weight) * norm(delta)
            delta *= np.float32(part.weight)
            total += delta
            del delta  # before the next one is there
        self.check(site, np.array(_sum_entries(total)), np.array(wanted), size)
        total += start
        return total


def _sum_entries(delta: Array) -> float:
    """One number that all entries go into, in float64 by pieces."""
    flat = delta.ravel()
    return float(sum(flat[i : i + 16384].sum(dtype=np.float64) for i in range(0, len(flat), 16384)))

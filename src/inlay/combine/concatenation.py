"""Sums of prefixes and prompts: what all adapters have, one after the other, so that the softmax runs over all of it.

A multiple of a key has no such meaning: the weights are 1, or 0 for an adapter that is left out.
"""

from typing import Any

import numpy as np
from typing_extensions import override

from inlay.combine.method_sum import Leaves, Sum, make_common_config
from inlay.combine.parts import Array
from inlay.errors import BadInput, WrongBase


class ConcatenationSum(Sum):
    """Tokens, or keys and values, of all adapters, one after the other."""

    has_multiples = False

    @override
    def decide_config(self) -> dict[str, Any]:
        self.refuse_width("cannot be made shorter without data")
        if all(part.weight == 0 for part in self.parts):
            raise BadInput(f"{self.title} of length 0 cannot be saved: give one adapter the weight 1.")
        self.check_alike()
        lengths = {
            sum(p.shape(site, next(iter(p.sites[site])))[0] for p in self.acting_parts(site)) for site in self.names
        }
        if len(lengths) > 1:
            raise BadInput(
                f"{self.title} has one length at all its modules, but the union would have {sorted(lengths)} in "
                "different ones; combine adapters of the same modules."
            )
        self.length = lengths.pop()
        return self.make_settings(self.length)

    @property
    @override
    def width(self) -> int:
        return self.length

    def check_alike(self) -> None:
        """Raise InlayError where settings differ that must be one for a concatenation to mean anything."""

    def make_settings(self, length: int) -> dict[str, Any]:
        """The config of a result of so many tokens, or keys and values."""
        return make_common_config(self.parts, self.names, length=length)

    @override
    def shapes_at(self, site: str) -> Leaves:
        here, shapes = self.acting_parts(site), {}
        for leaf in here[0].sites[site]:
            if len({part.shape(site, leaf)[1:] for part in here if leaf in part.sites[site]}) > 1:
                raise WrongBase(f"{site}.{leaf} has other sizes in other adapters; combine those of one base.")
            shapes[leaf] = (sum(part.shape(site, leaf)[0] for part in here), *here[0].shape(site, leaf)[1:])
        return shapes

    @override
    def make(self, site: str) -> dict[str, Array]:
        here, made = self.acting_parts(site), {}
        for leaf, shape in self.shapes[site].items():
            made[leaf] = np.empty(shape, np.float32)
            at = 0
            for part in here:
                rows = part.shape(site, leaf)[0]
                part.tensors.read_into(part.sites[site][leaf], made[leaf][at : at + rows])
                at += rows
        self.errors[site] = 0.0
        return made

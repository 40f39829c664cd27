"""The sum of (IA)³: what it multiplies with, less one, is a difference to the base's weights, which adds."""

import re
from typing import Any

from typing_extensions import override

from inlay.combine.method_sum import make_common_config, match_whole_names
from inlay.combine.partial import PartialSum
from inlay.combine.parts import Part
from inlay.errors import Unsupported


class Ia3Sum(PartialSum):
    """(IA)³: ΔW = (l - 1) W along rows, or W (l - 1) along columns before a feed-forward layer."""

    peft_type = "IA3"
    key_prefix = "ia3_"
    title = "(IA)³"

    @classmethod
    @override
    def start_of(cls, leaf: str) -> float:
        return 1.0

    @override
    def decide_config(self) -> dict[str, Any]:
        self.refuse_width("has no width")
        self.refuse_factors("(IA)³")
        forward = set()
        for site in self.names:
            said = {_is_forward(part, site) for part in self.parts if site in part.sites}
            if len(said) > 1:
                raise Unsupported(
                    f"{site} is a feed-forward module in one adapter and none in another; these do not add."
                )
            forward |= {site} if said.pop() else set()
        # in a list peft takes a name for every module that ends so
        endings = any(other != name and other.endswith(name) for name in forward for other in self.names)
        named = match_whole_names(sorted(forward)) if endings else sorted(forward)
        return make_common_config(self.parts, self.names, feedforward_modules=named)


def _is_forward(part: Part, site: str) -> bool:
    """As peft tells by names or their endings; of a linear layer by the shape of l, which is a row there."""
    shape = part.shape(site, "ia3_l")
    if len(shape) == 2 and shape[0] != shape[1]:
        return shape[0] == 1
    named = part.config.get("feedforward_modules") or []
    if isinstance(named, str):
        return re.fullmatch(named, site) is not None
    return any(site.endswith(name) for name in named)

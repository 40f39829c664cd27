"""The sum of (IA)³: what it multiplies with, less one, is a difference to the base's weights, which adds."""

from typing import Any

from typing_extensions import override

from inlay.combine.method_sum import make_common_config, require_equal_settings
from inlay.combine.partial import PartialSum
from inlay.combine.parts import Part
from inlay.errors import Unsupported


class Ia3Sum(PartialSum):
    """(IA)³: ΔW = (l - 1) W along rows, or W (l - 1) along columns before a feed-forward layer."""

    peft_type = "IA3"
    key_prefix = "ia3_"
    title = "(IA)³"
    start = 1.0

    @override
    def decide_config(self) -> dict[str, Any]:
        self.refuse_width("has no width")
        self.refuse_factors("(IA)³")
        require_equal_settings(
            "(IA)³ adapters", self.parts, ["fan_in_fan_out"], "only adapters of one base can be combined"
        )
        forward = set()
        for site in self.names:
            said = {_is_forward(part, site) for part in self.parts if site in part.sites}
            if len(said) > 1:
                raise Unsupported(
                    f"{site} is a feed-forward module in one adapter and none in another; these do not add."
                )
            forward |= {site} if said.pop() else set()
        return make_common_config(self.parts, self.names, feedforward_modules=sorted(forward))


def _is_forward(part: Part, site: str) -> bool:
    """As peft tells by names or their endings; by the shape of l, which is a row there, where it can be seen."""
    rows, columns = (*part.shape(site, "ia3_l"), 1)[:2]
    if rows != columns:
        return rows == 1
    named = part.config.get("feedforward_modules") or []
    return any(site == name or site.endswith(f".{name}") for name in ([named] if isinstance(named, str) else named))

"""The sum of SSF: γ less one, and β, are differences to the base's weights and biases, which add."""

from typing import Any

from typing_extensions import override

from inlay.combine.method_sum import make_common_config
from inlay.combine.partial import PartialSum


class SsfSum(PartialSum):
    """SSF: ΔW = (γ - 1) W along rows, and Δb = (γ - 1) b + β."""

    peft_type = "INLAY_SSF"
    key_prefix = "inlay_ssf_"
    title = "SSF"

    @classmethod
    @override
    def start_of(cls, leaf: str) -> float:
        return 1.0 if leaf == "inlay_ssf_scale" else 0.0

    @override
    def decide_config(self) -> dict[str, Any]:
        self.refuse_width("has no width")
        self.refuse_factors("SSF")
        biased = any(part.config.get("add_biases") for part in self.parts)
        return make_common_config(self.parts, self.names, add_biases=biased)

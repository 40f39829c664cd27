"""The sum of attention prefixes."""

from typing import Any

from typing_extensions import override

from inlay.combine.concatenation import ConcatenationSum
from inlay.combine.method_sum import make_common_config


class AttentionPrefixSum(ConcatenationSum):
    """Keys and values in front of those of the tokens."""

    peft_type = "INLAY_ATTENTION_PREFIX"
    key_prefix = "inlay_attention_prefix_"
    title = "an attention prefix"

    @override
    def make_settings(self, length: int) -> dict[str, Any]:
        return make_common_config(self.parts, self.names, length=length, projection=None)

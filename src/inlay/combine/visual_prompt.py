"""The sum of visual prompts."""

from typing import Any

from typing_extensions import override

from inlay.combine.concatenation import ConcatenationSum
from inlay.combine.method_sum import make_common_config, require_equal_settings


class VisualPromptSum(ConcatenationSum):
    """Tokens next to those of the image; of shallow ones the first block has them all."""

    peft_type = "INLAY_VISUAL_PROMPT"
    key_prefix = "inlay_visual_prompt_"
    title = "a visual prompt"

    @override
    def check_alike(self) -> None:
        require_equal_settings("visual prompts", self.parts, ["deep"], "shallow ones travel, deep ones do not")
        self.blocks = list(self.parts[0].config.get("target_modules") or [])
        if not self.parts[0].config.get("deep", True):
            require_equal_settings(
                "shallow visual prompts", self.parts, ["target_modules"], "they travel through the same blocks"
            )
        else:
            self.blocks = self.names

    @override
    def make_settings(self, length: int) -> dict[str, Any]:
        return make_common_config(self.parts, self.blocks, length=length)

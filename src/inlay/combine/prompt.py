"""The sums of the prompts and prefixes for language models that peft itself has."""

from typing import Any

from typing_extensions import override

from inlay.combine.concatenation import ConcatenationSum
from inlay.combine.method_sum import require_equal_settings
from inlay.errors import DamagedFile, Unsupported


class PromptSum(ConcatenationSum):
    """Tokens in front of a text, one table for the whole model."""

    peft_type = "PROMPT_TUNING"
    key_prefix = "prompt_embeddings"
    title = "a prompt"
    wraps_modules = False

    @override
    def check_alike(self) -> None:
        fields = ["token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"]
        require_equal_settings("prompts", self.parts, fields, "only adapters of one base can be combined")
        if self.names != [""] or (self.parts[0].config.get("num_transformer_submodules") or 1) != 1:
            raise Unsupported(
                "prompts of encoder-decoder models cannot be combined: their table has one part for each."
            )
        for part in self.parts:
            rows, said = part.shape("", self.key_prefix)[0], part.config.get("num_virtual_tokens")
            if rows != said:
                raise DamagedFile(
                    f"adapter {part.name!r} holds {rows} tokens, but its config says {said}; download it again."
                )

    @override
    def make_settings(self, length: int) -> dict[str, Any]:
        config = {**self.parts[0].config, "num_virtual_tokens": length}
        return {**config, "prefix_projection": False} if "prefix_projection" in config else config


class PrefixSum(PromptSum):
    """Keys and values in the cache of every block, in the same kind of table."""

    peft_type = "PREFIX_TUNING"
    title = "a prefix"

"""The tokenizers of a pipeline, one for each text encoder."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer


def load_tokenizers(where: str, text_encoders: Sequence[str], revision: str | None = None) -> dict[str, Any]:
    """The tokenizer of each text encoder, by its name in the pipeline: `tokenizer`, `tokenizer_2`, `tokenizer_3`.

    Args:
        where: Folder or Hub id of the pipeline.
        text_encoders: Their names, such as `text_encoder_2`.
        revision: Of a Hub id.

    Raises:
        Exception: Whatever transformers raises for files that it cannot read.
    """
    names = [name.replace("text_encoder", "tokenizer") for name in text_encoders]
    return {
        name: AutoTokenizer.from_pretrained(where, subfolder=name, revision=revision, trust_remote_code=False)
        for name in names
    }

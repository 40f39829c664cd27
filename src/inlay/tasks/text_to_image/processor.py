"""Prompts as tokens of every text encoder of a pipeline, and images as the pixels that its VAE reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inlay.bases.diffusion.config import is_diffusion
from inlay.bases.diffusion.families import T5_TOKENS
from inlay.bases.load import explain_load_error, read_config, resolve_base
from inlay.bases.processors import MAX_SIDE
from inlay.errors import BadInput, DamagedFile

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from inlay.tasks.task import Record


@dataclass(frozen=True)
class PromptProcessor:
    """What makes a pipeline's inputs.

    Attributes:
        tokenizers: By the names of the pipeline: `tokenizer`, `tokenizer_2`, `tokenizer_3`.
        image_size: Pixels a side of the images, a multiple of `latent_scale`.
        latent_shape: Of the latents of one image: channels, height and width.
    """

    tokenizers: dict[str, Any]
    image_size: int
    latent_shape: tuple[int, int, int]

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids`, and of further text encoders `input_ids_2` and `input_ids_3`, (B, N) each; long ones are cut."""
        found = {}
        for name, tokenizer in self.tokenizers.items():
            length = T5_TOKENS if name == "tokenizer_3" else tokenizer.model_max_length
            made = tokenizer(
                list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            found[name.replace("tokenizer", "input_ids")] = made.input_ids
        return found

    def read_pixels(self, image: Image.Image) -> Tensor:
        """(3, S, S) from -1 to 1: the middle square of an image, resized."""
        import torch
        from PIL import ImageOps
        from PIL.Image import Resampling

        square = ImageOps.fit(image.convert("RGB"), (self.image_size, self.image_size), Resampling.LANCZOS)
        pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
        return pixels.view(self.image_size, self.image_size, 3).permute(2, 0, 1) / 127.5 - 1

    def to_dict(self) -> Record:
        """What `load_prompt_processor` needs; the tokenizers are the base's own."""
        return {"image_size": self.image_size}


def load_prompt_processor(base_name: str, settings: Record | None, image_size: int | None = None) -> PromptProcessor:
    """The processor that `settings` of a record describe, or without them the one that a base comes with.

    Args:
        base_name: As `load_base` takes it.
        settings: Of a record.
        image_size: Pixels a side, in place of what the base was trained on.

    Raises:
        InlayError: No pipeline; tokenizers that cannot be read; a size that the VAE cannot halve often enough.
    """
    from inlay.bases.diffusion.tokenizers import load_tokenizers

    where = resolve_base(base_name)
    config = read_config(base_name, where, None)
    if not is_diffusion(config):
        raise BadInput(f"{base_name} is no text-to-image pipeline; give a folder or Hub id of one.")
    size = image_size or (settings or {}).get("image_size") or config.image_size
    if not isinstance(size, int) or not 0 < size <= MAX_SIDE or size % config.latent_scale:
        raise DamagedFile(
            f"images for {base_name} must have a multiple of {config.latent_scale} pixels a side, at most {MAX_SIDE}; "
            f"got {size!r}."
        )
    try:
        tokenizers = load_tokenizers(where, config.text_encoders)
    except Exception as error:  # tokenizer files are data from anywhere: they fail in any way
        raise explain_load_error(base_name, error) from error
    side = size // config.latent_scale
    return PromptProcessor(tokenizers, size, (config.latent_channels, side, side))

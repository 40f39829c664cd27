"""Features of images, by which painted ones are compared: of an embedded model, a DINO, a CLIP or any image model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from inlay.bases.device import Device, choose_device
from inlay.bases.load import explain_load_error, quiet_loading, read_config, resolve_base
from inlay.bases.networks.configs import NETWORK_TYPES
from inlay.bases.processors import load_processor, load_tokenizer
from inlay.errors import BadInput, DamagedFile
from inlay.tasks.adapter import place_inputs
from inlay.tasks.image_decoding import open_for_processor
from inlay.tasks.images.processing import process_images

AT_ONCE = 32  # images in one forward pass


@dataclass(frozen=True)
class ImageEncoder:
    """A model whose features tell how alike two images are, and of a CLIP how well a text describes one.

    Attributes:
        name: As given to `load_encoder`.
        model: In eval mode.
        processor: Of images.
        tokenizer: Of a CLIP or SigLIP; None for models of images only.
        has_pooler: Whether the weights have all of the model's own pooling; without it the first token is read.
    """

    name: str
    model: Any
    processor: Any
    tokenizer: Any
    has_pooler: bool

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Features of length 1, (N, D) in float32 on the CPU."""
        weight, found = next(self.model.parameters()), []
        for start in range(0, len(images), AT_ONCE):
            opened = [open_for_processor(image, self.processor) for image in images[start : start + AT_ONCE]]
            inputs = place_inputs(process_images(self.processor, opened), weight)
            if self.tokenizer is not None:
                features = self.model.get_image_features(**inputs).pooler_output
            else:
                features = self._pool(self.model(**inputs))
            found.append(features.float().cpu())
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Features of length 1 in the space of the images, (N, D) in float32 on the CPU."""
        weight = next(self.model.parameters())
        made = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        inputs = place_inputs({"input_ids": made.input_ids, "attention_mask": made.attention_mask}, weight)
        features = self.model.get_text_features(**inputs).pooler_output
        return torch.nn.functional.normalize(features.float().cpu(), dim=-1)

    def _pool(self, output: Any) -> Tensor:
        """One row for each image, (B, D)."""
        if self.has_pooler and getattr(output, "pooler_output", None) is not None:
            return output.pooler_output.flatten(1)
        states = output.last_hidden_state
        return states.mean((2, 3)) if states.ndim == 4 else states[:, 0]


def load_encoder(name: str | Path, device: Device | None = None) -> ImageEncoder:
    """Load a model of images for its features.

    Args:
        name: An embedded classifier, or the folder or Hub id of an image model of transformers, such as DINOv2 or CLIP.
        device: Such as "cpu" or "cuda:1", or that of another model; default: the best that this machine has.

    Raises:
        InlayError: What `read_config` and `load_processor` say; weights that are missing; a model of no images.
    """
    name = str(name)
    where = resolve_base(name)
    config = read_config(name, where, None)
    if config.model_type not in {*IMAGE_PROCESSOR_MAPPING_NAMES, *NETWORK_TYPES}:
        raise BadInput(f"{name} ({config.model_type}) gives no features of images; give the folder of a DINO or CLIP.")
    processor = load_processor(name)
    try:
        with quiet_loading(local=Path(where).is_dir()):
            model, report = AutoModel.from_pretrained(
                where,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # whatever a strange config or damaged weights make transformers raise
        raise explain_load_error(name, error) from error
    missing = list(report["missing_keys"])
    if lacking := [key for key in missing if "pooler" not in key]:
        raise DamagedFile(f"the weights of {name} lack {len(lacking)} tensors ({lacking[0]}); download it again.")
    tokenizer = load_tokenizer(name) if hasattr(model, "get_text_features") else None
    model.requires_grad_(False).eval().to(device if isinstance(device, torch.device) else choose_device(device))
    return ImageEncoder(name, model, processor, tokenizer, has_pooler=not missing)

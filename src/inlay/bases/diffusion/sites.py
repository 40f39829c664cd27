"""Where adapters attach in a text-to-image base: in its denoiser, and where asked in its text encoders."""

from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from inlay.errors import BadInput, Unsupported

# By the last parts of their names in diffusers 0.42: attention of a denoiser (`add_` reads the prompt in SD 3) ...
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# ... and of the text encoders in transformers: CLIP, T5.
_TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj", "q", "k", "v", "o")
# The text encoder whose last layer a pipeline does not read: SDXL takes the states before it, and pools only its other.
_LAST_UNREAD = {"StableDiffusionXLPipeline": "text_encoder"}


def pipeline_targets(
    model: nn.Module,
    sites: Literal["attention", "all"] = "attention",
    *,
    convolutions: bool = False,
    text_encoders: bool = False,
) -> list[str]:
    """Names of the modules of a text-to-image base that LoRA adapts; never those of the VAE.

    Args:
        model: A `DiffusionModel`, which `load_base` gives for a pipeline of diffusers.
        sites: `attention` takes the projections of the attention in the denoiser's blocks, as the scripts of diffusers
            do; `all` every linear layer and 1x1 convolution in them.
        convolutions: Take the convolutions in its blocks too.
        text_encoders: Take the projections of the attention in all text encoders too, where a pipeline reads them.

    Raises:
        InlayError: The model is no text-to-image base, or nothing of the kind is there.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", "") != "diffusion":
        raise BadInput(f"{type(model).__name__} is no text-to-image base; use lora_targets.")
    found = []
    for name, module in list_denoiser_layers(model):
        pointwise = isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)
        if (
            name.endswith(tuple(f".{leaf}" for leaf in _ATTENTION))
            or (sites == "all" and (isinstance(module, nn.Linear) or pointwise))
            or (convolutions and isinstance(module, nn.Conv2d))
        ):
            found.append(name)
    if text_encoders:
        for part in config.text_encoders:
            inside = model.get_submodule(part).named_modules()
            linear = [name for name, module in inside if isinstance(module, nn.Linear)]
            if part == _LAST_UNREAD.get(config.pipeline):
                last = config.parts[part]["config"]["num_hidden_layers"] - 1
                linear = [name for name in linear if f".layers.{last}." not in name]
            found += [f"{part}.{name}" for name in linear if name.rpartition(".")[2] in _TEXT_ATTENTION]
    if not found:
        raise Unsupported(f"found no attention in the blocks of the {config.denoiser}; give target_modules.")
    return found


def list_denoiser_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and convolutions in the blocks of the denoiser, by their name in the base.

    Outside the blocks are what reads latents, prompt and noise level, and what writes the prediction.
    """
    part = model.config.denoiser
    for name, module in getattr(model, part).named_modules():
        if "block" in name.partition(".")[0] and isinstance(module, nn.Linear | nn.Conv2d):
            yield f"{part}.{name}", module

"""Where methods attach in a SAM: in its image encoder, in its mask decoder, or in both."""

from typing import Literal

from torch import nn

from inlay.bases.sites import decoder_parts, decoder_targets, lora_targets, sites

Where = Literal["encoder", "decoder", "both"]
Kind = Literal["linear", "output", "attention", "block"]


def sam_targets(model: nn.Module, kind: Kind, where: Where = "both") -> list[str]:
    """Names of a SAM's modules, to be a method's `target_modules`.

    Args:
        model: A SamModel or Sam2Model.
        kind: `linear`: its linear layers, for LoRA; `output`: the last layer of each attention and MLP, behind which a
            bottleneck goes; `attention`: its attention modules, for a prefix; `block`: what partial tuning trains as it
            is, the last block and the neck of the encoder and nearly all of the decoder.
        where: In which part.

    Raises:
        InlayError: The model has no mask decoder.
    """
    found, linear = sites(model), decoder_targets(model)
    encoder: list[str]
    decoder: list[str]
    if kind == "linear":
        encoder, decoder = lora_targets(model), linear
    elif kind == "output":
        encoder = [*found.out, *found.mlp_out]
        decoder = [name for name in linear if name.endswith((".out_proj", ".lin2", ".o_proj", ".proj_out"))]
    elif kind == "attention":
        encoder = list(found.attention)
        decoder = [name.removesuffix(".q_proj") for name in linear if name.endswith(".q_proj")]
    else:
        encoder, decoder = [found.blocks[-1], "vision_encoder.neck"], decoder_parts(model)
    return {"encoder": encoder, "decoder": decoder, "both": [*encoder, *decoder]}[where]

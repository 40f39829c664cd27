"""How the parts of each kind of pipeline work together: prompts to what the denoiser reads, and what it predicts.

Each function follows `encode_prompt` and `__call__` of the pipeline's class in diffusers 0.42, from tokens on.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

Conditions = dict[str, Any]  # keyword arguments of the denoiser


class Family(NamedTuple):
    """One kind of pipeline.

    Attributes:
        encode: Conditions of a model for tokens by the name of the text encoder, and the pixels a side (H, W).
        spread_timesteps: The noise levels, of `count` numbers in [0, 1), at which the denoiser is trained.
    """

    encode: Callable[[Any, Mapping[str, Tensor], tuple[int, int]], Conditions]
    spread_timesteps: Callable[[int], Tensor]


def _encode_stable_diffusion(model: Any, tokens: Mapping[str, Tensor], size: tuple[int, int]) -> Conditions:
    """Rombach et al. 2022, arXiv:2112.10752: the last states of one CLIP text encoder."""
    return {"encoder_hidden_states": model.text_encoder(tokens["text_encoder"])[0]}


def _encode_xl(model: Any, tokens: Mapping[str, Tensor], size: tuple[int, int]) -> Conditions:
    """Podell et al. 2023, arXiv:2307.01952: the states before the last of two encoders, and the sizes of the image."""
    states, pooled = _encode_with_clip(model, tokens)
    sizes = torch.tensor([*size, 0, 0, *size], device=states.device, dtype=states.dtype)
    added = {"text_embeds": pooled[-1], "time_ids": sizes.expand(len(states), -1)}
    return {"encoder_hidden_states": states, "added_cond_kwargs": added}


def _encode_sd3(model: Any, tokens: Mapping[str, Tensor], size: tuple[int, int]) -> Conditions:
    """Esser et al. 2024, arXiv:2403.03206: two CLIP encoders next to T5, which may be left out."""
    states, pooled = _encode_with_clip(model, tokens)
    width = model.transformer.config.joint_attention_dim
    states = pad(states, (0, width - states.shape[-1]))
    if "text_encoder_3" in tokens:
        other = model.text_encoder_3(tokens["text_encoder_3"])[0]
    else:
        other = states.new_zeros(len(states), T5_TOKENS, width)
    return {"encoder_hidden_states": torch.cat([states, other], 1), "pooled_projections": torch.cat(pooled, -1)}


def _encode_with_clip(model: Any, tokens: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The states before the last of both CLIP encoders side by side (B N C), and the pooled output of each."""
    outputs = [getattr(model, name)(tokens[name], output_hidden_states=True) for name in CLIP if name in tokens]
    return torch.cat([output.hidden_states[-2] for output in outputs], -1), [output[0] for output in outputs]


def _draw_evenly(count: int) -> Tensor:
    return torch.rand(count)


def _draw_around_middle(count: int) -> Tensor:
    """Logit-normal: mostly the levels in the middle, where the direction is hardest to tell (arXiv:2403.03206, 3.1)."""
    return torch.randn(count).sigmoid()


CLIP = ("text_encoder", "text_encoder_2")
T5_TOKENS = 256  # of a prompt, as StableDiffusion3Pipeline has them
FAMILIES = {
    "StableDiffusionPipeline": Family(_encode_stable_diffusion, _draw_evenly),
    "StableDiffusionXLPipeline": Family(_encode_xl, _draw_evenly),
    "StableDiffusion3Pipeline": Family(_encode_sd3, _draw_around_middle),
}

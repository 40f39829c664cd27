"""Pre-train the autoencoder of the embedded text-to-image model on generated paintings, on one CPU core.

    python recipes/pretrain/paint_autoencoder.py             # runs/paint/vae, about 15 minutes on a quiet core

The first stage of a latent diffusion model (Rombach et al. 2022, arXiv:2112.10752): 16 x 16 latents of 4 channels for
images of 64 x 64. The second is paint.py, which saves both.
"""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderTiny
from transformers import get_scheduler

from inlay import option, run_recipe
from inlay.builtin.painters import to_pixels
from inlay.builtin.paintings import generate_paintings

CHANNELS = 4  # of the latents


@dataclass
class Pretraining:
    """How long, and where to."""

    folder: str = option("runs/paint/vae", "Where the autoencoder is saved.")
    images: int = option(4000, "Paintings that it is trained on.", least=1)
    steps: int = option(12_000, "Optimiser steps, of 8 crops each.", least=1)
    seed: int = option(0, "Seed of weights, paintings and noise.", least=0)


def new_autoencoder() -> Any:
    """16 x 16 latents of 4 channels for images of 64 x 64; its convolutions see a few pixels, so it learns on crops."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32,) * 3,
        decoder_block_out_channels=(32,) * 3,
        num_encoder_blocks=(0, 1, 1),
        num_decoder_blocks=(1, 1, 0),
        latent_channels=CHANNELS,
    )


def recolour(pixels: torch.Tensor) -> torch.Tensor:
    """Half of the images with their channels exchanged and stretched: the autoencoder is to know all colours."""
    changed = pixels.clone()
    for image in changed[: len(pixels) // 2]:
        scale, shift = torch.empty(3, 1, 1).uniform_(0.5, 1), torch.empty(3, 1, 1).uniform_(-0.3, 0.3)
        image.copy_((image[torch.randperm(3)] * scale + shift).clamp(-1, 1))
    return changed


def train(recipe: Pretraining, pool: torch.Tensor) -> Any:
    """An autoencoder whose latents have about mean 0 and variance 1, taught on crops of 32 x 32.

    In the last third the encoder stays, and the decoder learns what is made of its latents.
    """
    torch.manual_seed(recipe.seed)
    model = new_autoencoder().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.99), weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, 50, recipe.steps)
    for step in range(recipe.steps):
        if step == recipe.steps * 2 // 3:
            model.encoder.requires_grad_(False)
        top, left = (4 * torch.randint(9, (2,))).tolist()
        pixels = pool[torch.randint(len(pool), (8,)), :, top : top + 32, left : left + 32]
        if step % 2:
            pixels = recolour(pixels)
        latents = model.encode(pixels).latents
        error = model.decode(latents + 0.05 * torch.randn_like(latents)).sample - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        spread = latents.mean((0, 2, 3)).square().mean() + (latents.std((0, 2, 3)) - 1).square().mean()
        (error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 0.02 * spread).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 500 == 499:
            print(f"step {step + 1}/{recipe.steps}  error {error.abs().mean().item():.4f}", flush=True)
    model = model.half().float().eval()
    with torch.inference_mode():
        model.register_to_config(scaling_factor=round(1 / float(model.encode(pool[:500]).latents.std()), 4))
    return model


def main(recipe: Pretraining) -> None:
    """Generate, train, save."""
    # 1. data
    pool = to_pixels(generate_paintings(recipe.images, seed=1_000_000 * (recipe.seed + 1) + 1).images)

    # 2. model and training
    model = train(recipe, pool)

    # 3. save
    model.save_pretrained(recipe.folder)
    print(recipe.folder)


if __name__ == "__main__":
    run_recipe(main, Pretraining())

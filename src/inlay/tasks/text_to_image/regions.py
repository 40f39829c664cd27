"""Several subjects next to each other in one image, each painted by an adapter of its own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from inlay.bases.eval_mode import eval_mode
from inlay.errors import BadInput
from inlay.tasks.text_to_image.paint import (
    Sampling,
    check_painted,
    check_prompts,
    check_seeds,
    check_size,
    choose_settings,
    find_pipeline,
    split_models,
)

EMBEDDINGS = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)  # in the order in which the pipelines return them; those of Stable Diffusion 1 and 2 have the first two


class AdaptersByRow(Protocol):
    """A base whose rows have adapters of their own, such as a `Bank`."""

    def rows(self, adapters: Sequence[str | None]) -> AbstractContextManager[PreTrainedModel]:
        """The base, whose batch inside the block has these adapters, one per row; None is the plain base."""


@dataclass(frozen=True)
class Region:
    """A part of an image: what it shows, and the name of the adapter that paints it (None: the plain base)."""

    adapter: str | None
    prompt: str


def paint_regions(
    bank: AdaptersByRow,
    regions: Sequence[Region],
    *,
    seeds: Sequence[int] = (0,),
    overlap: float = 0.25,
    sampling: Sampling | None = None,
) -> list[Image.Image]:
    """Paint subjects next to each other, from left to right, each by its own adapter and from its own prompt.

    Adding adapters often loses one of two subjects, as both change every place of the image. Here each adapter changes
    its own: a region is a window as large as the images that the base paints, and windows overlap. In each step all
    windows are denoised in one batch, each row under its adapter; where they overlap, the window whose middle is nearer
    decides for both. It is MultiDiffusion (Bar-Tal et al. 2023, arXiv:2302.08113) with an adapter for each window, and
    without averaging.

    Args:
        bank: The base and its adapters.
        regions: From left to right.
        seeds: One image of each.
        overlap: Share of a window that the next one covers, from 0 to below 1.
        sampling: How images are painted. `image_size` is that of a window, `weight` is 1.

    Returns:
        RGB images of one window in height and `1 + (len(regions) - 1) * (1 - overlap)` windows in width.

    Raises:
        InlayError: No regions or seeds; sizes and numbers that cannot be; adapters that do not fit the base; images
            that the model computes as NaN.
    """
    sampling = sampling or Sampling()
    check_prompts([region.prompt for region in regions])
    check_seeds(seeds)
    if not 0 <= overlap < 1:
        raise BadInput(f"overlap must be at least 0 and below 1, got {overlap!r}.")
    if sampling.weight != 1:
        raise BadInput("adapters of regions have the weight 1; to weaken one, combine it with itself: a=0.5.")
    names = [region.adapter for region in regions]
    with bank.rows(names) as model:
        _, base = split_models(model)
    size = sampling.image_size or base.config.image_size
    check_size(base, size)
    windows = _Windows.lay_out(size // base.config.latent_scale, len(regions), overlap)
    at_once = max(1, sampling.batch_size // len(regions))
    images: list[Image.Image] = []
    starts = range(0, len(seeds), at_once)
    with eval_mode(base), torch.no_grad():
        for start in tqdm(starts, desc="paint", disable=None if starts[1:] else True):
            batch = seeds[start : start + at_once]
            latents = _denoise(bank, base, list(regions) * len(batch), batch, windows, size, sampling)
            pixels = base.decode_latents(latents)
            check_painted(pixels, [("; ".join(region.prompt for region in regions), seed) for seed in batch])
            images += find_pipeline(base).image_processor.postprocess(pixels, output_type="pil")
    return images


@dataclass(frozen=True)
class _Windows:
    """Windows of one size in a row, and the columns that each of them decides.

    Attributes:
        size: Columns and rows of a window.
        starts: First column of each window.
        bounds: First column that each window decides, and the width of the whole.
    """

    size: int
    starts: tuple[int, ...]
    bounds: tuple[int, ...]

    @classmethod
    def lay_out(cls, size: int, count: int, overlap: float) -> _Windows:
        step = max(1, round(size * (1 - overlap)))
        starts = tuple(step * i for i in range(count))
        middles = [start + (size - step) // 2 for start in starts[1:]]
        return cls(size, starts, (0, *middles, starts[-1] + size))

    def join(self, latents: Tensor) -> Tensor:
        """Windows (B R c h w) as wholes (B c h W)."""
        parts = zip(self.starts, self.bounds, self.bounds[1:], strict=False)
        return torch.cat([latents[:, i, ..., a - s : b - s] for i, (s, a, b) in enumerate(parts)], -1)

    def cut(self, wholes: Tensor) -> Tensor:
        """The inverse of `join`."""
        return torch.stack([wholes[..., start : start + self.size] for start in self.starts], 1)

    def agree(self, latents: Tensor) -> Tensor:
        """Rows (B R, c, h, w) of windows, where they overlap all as the one that decides."""
        grouped = latents.unflatten(0, (-1, len(self.starts)))
        return self.cut(self.join(grouped)).flatten(0, 1)


def _denoise(
    bank: AdaptersByRow,
    base: Any,
    rows: list[Region],
    seeds: Sequence[int],
    windows: _Windows,
    size: int,
    sampling: Sampling,
) -> Tensor:
    """Latents of whole images (B c h W); rows are the windows of the first image, then those of the next."""
    pipeline, names = find_pipeline(base), [row.adapter for row in rows]
    settings = choose_settings(base, sampling)
    guided = settings.get("guidance_scale", _find_default(pipeline, "guidance_scale")) > 1
    with bank.rows(names):
        embedded = _embed_prompts(pipeline, base, [row.prompt for row in rows], guided, sampling.negative)
    shape = (base.config.latent_channels, windows.size, windows.bounds[-1])
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def agree(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"latents": windows.agree(values["latents"])}

    with bank.rows(names * 2 if guided else names):  # the pipeline puts the rows without a prompt in front
        latents = pipeline(
            **embedded,
            latents=windows.cut(noise).flatten(0, 1).to(base.device, base.denoiser.dtype),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds for _ in windows.starts],
            height=size,
            width=size,
            output_type="latent",
            callback_on_step_end=agree,
            **settings,
        ).images
    return windows.join(latents.unflatten(0, (-1, len(windows.starts))))


def _embed_prompts(
    pipeline: Any, base: Any, prompts: list[str], guided: bool, negative: str | None
) -> dict[str, Tensor | None]:
    """What the pipeline takes in the place of prompts."""
    known = inspect.signature(pipeline.encode_prompt).parameters
    others = {name: None for name in ("prompt_2", "prompt_3") if name in known}
    found = pipeline.encode_prompt(
        prompt=prompts,
        **others,
        device=base.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        negative_prompt=[negative] * len(prompts) if negative else None,
    )
    return dict(zip(EMBEDDINGS, found, strict=False))


def _find_default(pipeline: Any, name: str) -> Any:
    return inspect.signature(type(pipeline).__call__).parameters[name].default

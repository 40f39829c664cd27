"""Images painted by a text-to-image base with or without an adapter, and a sheet of them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from inlay.bases.device import Device, move_model
from inlay.bases.diffusion.model import DiffusionModel
from inlay.bases.eval_mode import eval_mode
from inlay.bases.processors import MAX_SIDE
from inlay.errors import BadInput, ComputationFailed
from inlay.files.atomic import replacing
from inlay.files.outputs import check_output_file, check_output_folder
from inlay.methods._peft import PeftModel, scale_adapter
from inlay.tasks.adapter import Adapter, check_task

# Steps and guidance by embedded base, where it paints best; the pipeline's own are made for far larger ones.
EMBEDDED = {"builtin:paint-tiny": (20, 3.0)}
PIPELINE_STEP = 8  # pixels; the pipelines of Stable Diffusion take multiples of it, whatever their VAE
_PIPELINES: WeakKeyDictionary[DiffusionModel, Any] = WeakKeyDictionary()


@dataclass(frozen=True)
class Sampling:
    """How images are painted. What is None is the pipeline's own, or what suits the embedded base.

    Attributes:
        steps: From noise to image.
        guidance: How far each step goes beyond what the prompt asks for (Ho & Salimans 2022, arXiv:2207.12598); 1 and
            less: no further.
        negative: What images should not show.
        image_size: Pixels a side; default: those that the adapter was trained on.
        weight: Of the adapter, 1 as it was trained, 0 the base.
        batch_size: Images at a time.

    Raises:
        InlayError: A value that cannot be.
    """

    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    image_size: int | None = None
    weight: float = 1.0
    batch_size: int = 4

    def __post_init__(self) -> None:
        for name in ("steps", "image_size", "batch_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise BadInput(f"{name} must be a whole number of at least 1, got {value!r}.")
        if self.guidance is not None and not 0 <= self.guidance < math.inf:
            raise BadInput(f"guidance must be a number of at least 0, got {self.guidance!r}.")
        if not math.isfinite(self.weight):
            raise BadInput(f"weight must be a finite number, got {self.weight!r}.")
        if self.negative and self.guidance is not None and self.guidance <= 1:
            raise BadInput(f"a negative prompt has no effect at guidance {self.guidance:g}; raise guidance over 1.")


def paint(
    adapter: Adapter | PreTrainedModel,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    image_size: int | None = None,
    weight: float = 1.0,
    batch_size: int = 4,
    device: Device | None = None,
) -> list[Image.Image]:
    """Paint an image of each prompt from each seed.

    An image depends on its prompt and seed, and not on the others of its batch, but for rounding.

    Args:
        adapter: From `load_adapter`, or a base from `load_base`.
        prompts: What to paint.
        seeds: Of the noise that each image starts from.
        steps: From noise to image; default here and below: the pipeline's own.
        guidance: Scale of classifier-free guidance; 1 and less: none.
        negative: What images should not show.
        image_size: Pixels a side; default: those that the adapter, or else the base, was trained on.
        weight: Of a LoRA adapter: 1 as it was trained, 0 the base.
        batch_size: Images at a time.
        device: Move the model there first, such as to "cuda:1"; default: where it is.

    Returns:
        Images in RGB, all of the first prompt first.

    Raises:
        InlayError: An adapter of another task; no prompts or seeds; sizes and numbers that cannot be; images that the
            model computes as NaN.
    """
    check_prompts(prompts)
    check_seeds(seeds)
    sampling = Sampling(steps, guidance, negative, image_size, weight, batch_size)
    move_model(adapter if isinstance(adapter, nn.Module) else adapter.model, device)
    return paint_pairs(adapter, [(prompt, seed) for prompt in prompts for seed in seeds], sampling)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise InlayError where there is nothing to paint."""
    if isinstance(prompts, str):
        raise BadInput("prompts must be a list, got a string; wrap it in a list.")
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise BadInput(f"there must be a prompt for each image, got {list(prompts)!r}; say what to paint.")


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise InlayError where there is no seed, or one that noise cannot be drawn from."""
    if not seeds:
        raise BadInput("there is no seed to paint from; give one or more whole numbers.")
    if wrong := [seed for seed in seeds if type(seed) is not int or not 0 <= seed < 2**63]:
        raise BadInput(f"a seed must be a whole number of at least 0, got {wrong[0]!r}.")


def paint_pairs(
    adapter: Adapter | nn.Module, pairs: Sequence[tuple[str, int]], sampling: Sampling | None = None
) -> list[Image.Image]:
    """One image of each prompt and seed, in their order. Otherwise as `paint`; a PeftModel is taken too."""
    sampling = sampling or Sampling()
    model, base = split_models(adapter)
    check_seeds([seed for _, seed in pairs])
    own_size = getattr(getattr(adapter, "processor", None), "image_size", None)
    size = sampling.image_size or own_size or base.config.image_size
    check_size(base, size)
    pipeline, settings = find_pipeline(base), choose_settings(base, sampling)
    starts = range(0, len(pairs), sampling.batch_size)
    images: list[Image.Image] = []
    # disable=None: no bar where the output is no terminal
    bar = tqdm(starts, desc="paint", disable=None if starts[1:] else True)
    with eval_mode(model), scale_adapter(model, sampling.weight):
        for start in bar:
            batch = pairs[start : start + sampling.batch_size]
            found = pipeline(
                [prompt for prompt, _ in batch],
                negative_prompt=[sampling.negative] * len(batch) if sampling.negative else None,
                height=size,
                width=size,
                generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
                output_type="np",
                **settings,
            ).images  # B H W 3, from 0 to 1
            check_painted(torch.from_numpy(found), batch)
            images += pipeline.numpy_to_pil(found)
    return images


def split_models(adapter: Adapter | nn.Module) -> tuple[nn.Module, DiffusionModel]:
    """The whole model, and the base in it; raises InlayError where that paints no images."""
    if not isinstance(adapter, nn.Module):
        check_task(adapter, "text-to-image")
    model = adapter if isinstance(adapter, nn.Module) else adapter.model
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, DiffusionModel):
        raise BadInput(f"{type(base).__name__} paints no images; give an adapter or a base for text-to-image.")
    return model, base


def choose_settings(base: DiffusionModel, sampling: Sampling) -> dict[str, Any]:
    """Steps and guidance for the pipeline of a base, where they are not its own."""
    if sampling.steps is not None and sampling.steps > base.config.train_timesteps:
        raise BadInput(f"this pipeline has {base.config.train_timesteps} noise levels, got steps {sampling.steps}.")
    steps, guidance = EMBEDDED.get(base.name_or_path, (None, None))
    asked = {
        "num_inference_steps": steps if sampling.steps is None else sampling.steps,
        "guidance_scale": guidance if sampling.guidance is None else sampling.guidance,
    }
    return {name: value for name, value in asked.items() if value is not None}


def check_painted(images: torch.Tensor, pairs: Sequence[tuple[str, int]]) -> None:
    """Raise InlayError where an image, of this prompt and seed, has NaN or Inf."""
    for (prompt, seed), pixels in zip(pairs, images, strict=True):
        if not bool(torch.isfinite(pixels).all()):
            raise ComputationFailed(
                f"the image of {prompt!r} from seed {seed} has values that are no numbers; load the base in "
                "float32 or bfloat16, or take a smaller weight."
            )


def find_pipeline(base: DiffusionModel) -> Any:
    """The pipeline around the modules of a base, made once."""
    if base not in _PIPELINES:
        _PIPELINES[base] = base.make_pipeline()
        _PIPELINES[base].set_progress_bar_config(disable=True)
    return _PIPELINES[base]


def check_size(base: DiffusionModel, size: int) -> None:
    """Raise InlayError where a base cannot paint images of so many pixels a side."""
    config = base.config
    denoiser = (config.parts or {})[config.denoiser]["config"]
    patch = config.latent_scale * (denoiser.get("patch_size") or 1)
    step = math.lcm(PIPELINE_STEP, patch)
    most = min(MAX_SIDE, patch * (denoiser.get("pos_embed_max_size") or MAX_SIDE))
    if not step <= size <= most or size % step:
        raise BadInput(f"this pipeline paints images of {step}, {2 * step} ... {most} pixels a side, not {size}.")


def draw_paintings(
    rows: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    path: str | Path,
    *,
    columns: Sequence[str] = (),
    side: int = 160,
) -> Path:
    """Save images as a sheet: a row for each caption, which stands above it.

    Args:
        rows: Images of each row, which may have different numbers of them.
        captions: What each row shows, such as its prompt; long ones are wrapped.
        path: Of the sheet; its suffix chooses the format.
        columns: What stands over the first row, such as the seeds; none: nothing.
        side: Width of an image in the sheet, in pixels; small ones are enlarged without smoothing.
    """
    font, gap, line = ImageFont.load_default(15), 10, 20
    width = max(map(len, rows)) * (side + gap) + gap
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength
    wrapped = [_wrap_text(caption, width - 2 * gap, lambda text: measure(text, font)) for caption in captions]
    head = line + gap if columns else gap
    heights = [max(1, *(round(side * image.height / image.width) for image in images)) for images in rows]
    height = head + sum(len(lines) * line + room + 2 * gap for lines, room in zip(wrapped, heights, strict=True))
    sheet = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(sheet), head
    for i, name in enumerate(columns):
        draw.text((gap + i * (side + gap) + side // 2, gap), name, "dimgray", font, anchor="ma")
    for images, lines, room in zip(rows, wrapped, heights, strict=True):
        for text in lines:
            draw.text((gap, top), text, "black", font)
            top += line
        for i, image in enumerate(images):
            smooth = Image.Resampling.NEAREST if image.width < side else Image.Resampling.LANCZOS
            fitted = image.resize((side, max(1, round(side * image.height / image.width))), smooth)
            sheet.paste(fitted, (gap + i * (side + gap), top))
        top += room + 2 * gap
    with replacing(path) as new:
        sheet.save(new)
    return Path(path)


def check_outputs(sheet: Path | None, folder: Path | None) -> None:
    """Raise InlayError where images would be kept nowhere, or cannot be saved under these names."""
    if sheet is folder is None:
        raise BadInput("nothing would keep the images; give --sheet FILE.png, --output FOLDER or both.")
    if sheet is not None:
        if sheet.suffix.lower() not in Image.registered_extensions():
            raise BadInput(f"'{sheet}' must be the name of an image, such as sheet.png.")
        check_output_file(sheet)
    if folder is not None:
        check_output_folder(folder)


def save_paintings(images: Sequence[Image.Image], pairs: Sequence[tuple[str, int]], folder: Path) -> list[Path]:
    """Save each image as a PNG whose name has the number of its prompt, the prompt and the seed.

    Args:
        images: From `paint_pairs`.
        pairs: The prompt and seed of each.
        folder: Made where it is missing.
    """
    folder = folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in pairs), 1)}
    paths = []
    for image, (prompt, seed) in zip(images, pairs, strict=True):
        words = re.sub(r"\W+", "_", prompt).strip("_")[:60]
        paths.append(folder / f"{numbers[prompt]}_{words}_{seed}.png")
        with replacing(paths[-1]) as new:
            image.save(new)
    return paths


def _wrap_text(text: str, room: float, measure: Any) -> list[str]:
    """Lines of words that are at most `room` wide; a longer word is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and measure(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
        while measure(lines[-1]) > room:
            fits = next(n for n in range(len(lines[-1]) - 1, 0, -1) if measure(lines[-1][:n]) <= room or n == 1)
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return lines

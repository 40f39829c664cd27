"""RandAugment and mixup: random changes of training images."""

import random
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import default_collate

from inlay.errors import Unsupported

OPERATIONS_AN_IMAGE = 2  # N of the paper
STRONGEST = 30  # magnitude; the paper's experiments reach it
GREY = 128


def rand_augment(image: Image.Image, magnitude: int) -> Image.Image:
    """Two random operations of fourteen, one after the other; all chance comes from Python's `random`.

    Args:
        image: Grey or RGB, of 8 bits.
        magnitude: How strong each of them is, 1 to 30: up to 30 degrees, 45 % of a side, 90 % of contrast.

    Source: Cubuk et al. 2019, arXiv:1909.13719, with the ranges of `torchvision.transforms.RandAugment`.
    """
    for _ in range(OPERATIONS_AN_IMAGE):
        operation = random.choice(OPERATIONS)
        sign = random.choice((-1, 1))
        image = operation(image, magnitude / STRONGEST, sign)
    return image


def _move(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=_grey(image))


def _rotate(image: Image.Image, strength: float, sign: int) -> Image.Image:
    return image.rotate(sign * 30 * strength, fillcolor=_grey(image))


def _grey(image: Image.Image) -> int | tuple[int, ...]:
    return GREY if image.mode == "L" else (GREY, GREY, GREY)


def _enhance(kind: Callable[[Image.Image], Any]) -> Callable[[Image.Image, float, int], Image.Image]:
    return lambda image, strength, sign: kind(image).enhance(1 + sign * 0.9 * strength)


# Each takes an image, a strength of 0 to 1, and -1 or 1 for those that have two directions.
OPERATIONS: list[Callable[[Image.Image, float, int], Image.Image]] = [
    lambda image, strength, sign: image,
    lambda image, strength, sign: ImageOps.autocontrast(image),
    lambda image, strength, sign: ImageOps.equalize(image),
    lambda image, strength, sign: ImageOps.posterize(image, 8 - round(4 * strength)),
    lambda image, strength, sign: ImageOps.solarize(image, round(255 * (1 - strength))),
    _rotate,
    lambda image, strength, sign: _move(image, 1, sign * 0.3 * strength, 0, 0, 1, 0),
    lambda image, strength, sign: _move(image, 1, 0, 0, sign * 0.3 * strength, 1, 0),
    lambda image, strength, sign: _move(image, 1, 0, sign * strength * image.width * 150 / 331, 0, 1, 0),
    lambda image, strength, sign: _move(image, 1, 0, 0, 0, 1, sign * strength * image.height * 150 / 331),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
]


def mix_images(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch in which each image is mixed with the one as far from the other end, by its own `share`.

    Items without `share`, as those of validation, stay as they are. Of several processes, each mixes its part of a
    batch.

    Args:
        items: Of `ImageView`, floats in `pixel_values` (C, H, W).

    Returns:
        `pixel_values`, `labels`, and of mixed images `share`, that of the first label, and `other_labels`.

    Raises:
        InlayError: A base that takes more than `pixel_values`, such as the sizes of patches.

    Source: Zhang et al. 2018, arXiv:1710.09412; partners as in `timm.data.Mixup`.
    """
    batch = default_collate(items)
    if "share" not in batch:
        return dict(batch)
    if others := batch.keys() - {"pixel_values", "labels", "share"}:
        raise Unsupported(
            f"mixup mixes pixels only, and this base takes {', '.join(sorted(others))} too; leave it out."
        )
    batch["share"] = batch["share"].float()
    share = batch["share"].view(-1, *[1] * (batch["pixel_values"].ndim - 1))
    batch["pixel_values"] = torch.lerp(batch["pixel_values"].flip(0), batch["pixel_values"], share)
    return {**batch, "other_labels": batch["labels"].flip(0)}

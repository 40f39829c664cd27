"""What a text-to-image model reads of paintings, what it is asked for, and how much of that the judge finds."""

import itertools
from typing import Any

import numpy as np
import torch

from inlay.builtin.paint_judge import judge_images, label_scene, score_paintings
from inlay.builtin.paintings import CLASSES, SHAPES, Scene, describe_scene, draw_scene

COUNT = 96  # paintings of each sort


def to_pixels(images: Any) -> torch.Tensor:
    """Images (N, H, W, 3) from 0 to 255 as (N, 3, H, W) from -1 to 1."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)
    return pixels / 127.5 - 1


# What is asked for: whether its first thing is held out, how many things there are, and of which kinds.
SORTS = {
    "one shape": (False, 1, set(SHAPES)),
    "one shape, held out": (True, 1, set(SHAPES)),
    "two shapes": (False, 2, set(SHAPES)),
    "a dog and a toy": (False, 2, set(CLASSES)),
}


def list_scenes(sort: str) -> list[Scene]:
    """Scenes to ask for of one of `SORTS`."""
    held_out, count, kinds = SORTS[sort]
    drawn = (draw_scene(np.random.default_rng((1, i)), held_out) for i in itertools.count())
    scenes = (s for s in drawn if len(s.things) == count and {thing.kind for thing in s.things} <= kinds)
    return list(itertools.islice((s for s in scenes if count == 1 or s.things[0].kind != s.things[1].kind), COUNT))


def paint_scenes(pipeline: Any, scenes: list[Scene], steps: int, guidance: float) -> Any:
    """Images (N, H, W, 3) of scenes, by their plain captions, with seeds 0, 1, 2 ..."""
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(scenes), 32):
        captions = [describe_scene(scene) for scene in scenes[start : start + 32]]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(captions))]
        made = pipeline(captions, num_inference_steps=steps, guidance_scale=guidance, generator=seeds, output_type="np")
        images.append((made.images * 255).round().astype(np.uint8))
    return np.concatenate(images)


def score_scenes(images: Any, scenes: list[Scene]) -> dict[str, float]:
    """Share of right backgrounds, shapes, colours and classes, as the judge sees them."""
    return score_paintings(judge_images(images), np.stack([label_scene(scene) for scene in scenes]))

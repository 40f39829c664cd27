"""What the embedded judge of paintings finds of what prompts name, and of the embedded subjects."""

import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from inlay.bases.load import quiet_loading
from inlay.builtin.paint_judge import KINDS, judge_images
from inlay.builtin.paintings import CLASSES
from inlay.tasks.text_to_image.scores import Values

JUDGE = "builtin:paint-judge"
JUDGED = "builtin:paint-tiny"  # the base whose images it knows
NAMED = ("background", "shape", "colour")  # of KINDS; what a prompt may name
FOUND = 0.5  # probability from which on the judge says that something is there


def find_named(prompt: str) -> list[tuple[str, str]]:
    """Kind and name of each background, shape and colour that a prompt names."""
    words = re.findall(r"\w+", prompt.lower())
    return [(kind, name) for kind in NAMED for name in KINDS[kind] if name in words]


def score_prompts(images: Sequence[Image.Image], prompts: Sequence[str]) -> Values:
    """Prompt fidelity: the share of what each prompt names that the judge finds, (N,); NaN where it names nothing."""
    said, shares = _ask_judge(images), []
    for i, prompt in enumerate(prompts):
        right = [said[kind][name][i] >= FOUND for kind, name in find_named(prompt)]
        shares.append(float(np.mean(right)) if right else np.nan)
    return np.array(shares)


def find_subjects(images: Sequence[Image.Image]) -> dict[str, Values]:
    """Presence: 1 or 0 for whether the embedded dog, and the embedded toy, are in each image, (N,) by their name."""
    said = _ask_judge(images)["subject"]
    return {name: (said[name] >= FOUND).astype(np.float64) for name in CLASSES}


def _ask_judge(images: Sequence[Image.Image]) -> dict[str, dict[str, np.ndarray]]:
    """The probability (N,) of each name of each kind."""
    with quiet_loading(local=True):
        return judge_images(np.stack([np.asarray(image.convert("RGB")) for image in images]))

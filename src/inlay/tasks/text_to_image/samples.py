"""Samples: images painted in the course of a run from the same prompts and seeds, in one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image

from inlay.files.atomic import writing
from inlay.tasks.text_to_image.paint import Sampling, draw_paintings, paint_pairs
from inlay.tasks.text_to_image.prior import Prior

FOLDER, SHEET = "samples", "sheet.png"  # of a run


@dataclass
class PaintingRun:
    """The `Callback` of a run: paints the prior before the first step, and samples after each evaluation.

    Attributes:
        model: That is trained.
        sampling: How images are painted.
        prior: What is painted first.
        prompts: Of the samples; none: no samples.
        seeds: Of the samples.
        folder: Of the run.
    """

    model: Any
    sampling: Sampling
    prior: Prior | None = None
    prompts: Sequence[str] = ()
    seeds: Sequence[int] = (0, 1, 2, 3)
    folder: Path = field(default=Path(), init=False)

    def begin(self, folder: Path) -> None:
        """Paint the prior, unless an earlier start of the run has."""
        self.folder = folder
        if self.prior is not None and self.prior.paint(self.model, folder, self.sampling):
            PartialState().print(f"painted {self.prior.count} images of {self.prior.prompt!r} for prior preservation")

    def evaluated(self, step: int) -> None:
        """Paint the samples of a step, and draw the sheet of all steps so far, those before a resumption included."""
        if not self.prompts:
            return
        pairs = {f"{i}_{seed}.png": (prompt, seed) for i, prompt in enumerate(self.prompts) for seed in self.seeds}
        (self.folder / FOLDER).mkdir(exist_ok=True)
        with writing(self.folder / FOLDER / f"{step:06}") as new:
            for name, image in zip(pairs, paint_pairs(self.model, [*pairs.values()], self.sampling), strict=True):
                image.save(new / name)
        # those of later steps are of a run that was killed before their checkpoint
        steps = sorted(int(path.name) for path in (self.folder / FOLDER).iterdir() if path.name.isdigit())
        rows, captions = [], []
        for i, prompt in enumerate(self.prompts):
            for painted in (each for each in steps if each <= step):
                files = [self.folder / FOLDER / f"{painted:06}" / f"{i}_{seed}.png" for seed in self.seeds]
                rows.append([_read_image(file) for file in files])
                captions.append(f"step {painted}: {prompt}")
        draw_paintings(rows, captions, self.folder / SHEET, columns=[f"seed {seed}" for seed in self.seeds])


def _read_image(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")

"""Prior preservation: images of the subject's class, painted by the base, are learned next to those of the subject.

Without them every dog becomes the dog that was learned, and new ones look alike (Ruiz et al. 2023, arXiv:2208.12242,
section 3.3).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.files.atomic import writing
from inlay.methods._peft import PeftModel, adapter_disabled
from inlay.tasks.text_to_image.data import Captioned
from inlay.tasks.text_to_image.paint import Sampling, paint_pairs

FOLDER = "prior"  # of a run


@dataclass(frozen=True)
class Prior:
    """Images that the base paints before the training.

    Attributes:
        prompt: Names the class, such as "a photo of a dog".
        count: Of images.
        weight: Of one of them in the loss; that of the subject's images is 1.
    """

    prompt: str
    count: int
    weight: float

    def list_images(self, run_folder: Path) -> list[Captioned]:
        """Where they are in the folder of the run, painted or not yet."""
        paths = [run_folder / FOLDER / f"{i:03}.png" for i in range(self.count)]
        return [Captioned(path.stem, path, self.prompt, self.weight) for path in paths]

    def paint(self, model: Any, run_folder: Path, sampling: Sampling) -> bool:
        """Let the base in a model paint them into the folder of the run; False if they are there already."""
        folder = run_folder / FOLDER
        if folder.is_dir():
            return False
        with adapter_disabled(model) if isinstance(model, PeftModel) else nullcontext(), writing(folder) as new:
            pairs = [(self.prompt, seed) for seed in range(self.count)]
            for i, image in enumerate(paint_pairs(model, pairs, sampling)):
                image.save(new / f"{i:03}.png")
        return True

"""Training on crops of scans, and scoring on whole ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from inlay.errors import BadInput
from inlay.tasks.volumes.scan import IGNORED, PADDING
from inlay.tasks.volumes.scores import overlap
from inlay.tasks.volumes.segment import most_probable
from inlay.tasks.volumes.windows import ScanPrompts, pad_to_window, probabilities, slide
from inlay.train.evaluation import count_rows

LEAST = 1e-7  # probability that counts in the logarithm, where a model gives a class none


@dataclass
class WholeScans:
    """What `WholeVolume` gives in evaluation: 2 bytes a voxel, whatever the number of classes.

    Attributes:
        loss: Of the batch, 0-dimensional.
        classes: The most probable class of each voxel, int16 (B, D, H, W) on the CPU; 0 beyond a scan.
        count: K, the classes without the background.
    """

    loss: torch.Tensor
    classes: torch.Tensor
    count: int


class WholeVolume:
    """The model's own loss on crops in training; in evaluation that of whole scans, put together from windows.

    Evaluation is without prompts, of each scan by itself. Windows overlap, and count most in their middle (MONAI's
    Gaussian blending), as in `inlay.segment`, which takes more of them. Probabilities are held for the planes of one
    window only.

    Args:
        window: Voxels (D, H, W) that the model sees at a time in evaluation: the crop it is trained on.
        overlap: Share of a window that the next one covers again, from 0 to below 1.
        windows: Windows that pass through the model at once.

    Raises:
        InlayError: A size, an overlap or a number of windows that is none.
    """

    def __init__(self, window: Sequence[int], overlap: float = 0.25, windows: int = 4) -> None:
        if len(window) != 3 or min(window) < 1 or not 0 <= overlap < 1 or windows < 1:
            raise BadInput(
                f"window must be three sizes, overlap from 0 to below 1 and windows at least 1, got {tuple(window)}, "
                f"{overlap} and {windows}."
            )
        self.window, self.overlap, self.windows = tuple(window), overlap, windows

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """In training what the model gives, in evaluation `WholeScans`."""
        if model.training:
            return model(**batch)
        sums = LossSums()
        classes = torch.zeros(batch["labels"].shape, dtype=torch.int16)
        for volume, labels, found in zip(batch["pixel_values"], batch["labels"], classes, strict=True):
            sums.begin_scan()
            inside = tuple(slice(0, n) for n in _find_shape(volume, labels))
            self._score(model, volume[(slice(None), *inside)], labels[inside], sums, found[inside])
        return WholeScans(sums.loss().to(batch["labels"].device), classes, sums.classes)

    def _score(
        self, model: nn.Module, volume: torch.Tensor, labels: torch.Tensor, sums: "LossSums", found: torch.Tensor
    ) -> None:
        """Slide windows over a scan (C, D, H, W): its sums go into `sums`, its classes into `found` (D, H, W)."""
        shape = labels.shape
        volume, before = pad_to_window(volume, self.window)
        _, h, w = (slice(first, first + n) for first, n in zip(before, shape, strict=True))
        planes = slide(
            partial(probabilities, model),
            volume,
            self.window,  # type: ignore[arg-type]
            ScanPrompts.none(),
            overlap=self.overlap,
            batch_size=self.windows,
        )
        done = 0  # planes of the scan that are scored
        for first, values in planes:
            start = done + before[0] - first  # a plane of the time before stands at the beginning
            end = min(values.shape[1], shape[0] + before[0] - first)
            if end <= start:
                continue
            part = values[:, start:end, h, w]
            rows = slice(done, done + end - start)
            sums.add(part, labels[rows].cpu())
            found[rows] = most_probable(part)
            done = rows.stop

    def weight(self, batch: dict[str, Any]) -> int:
        """The rows."""
        return count_rows(batch)

    def answers(self, output: WholeScans, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Voxels of each class in both answer and reference, in the answer, in the reference, (B, K, 3); and zeros."""
        labels = batch["labels"]
        counts = overlap(output.classes, labels.cpu(), output.count).to(labels.device)
        return counts, torch.zeros_like(counts[:, 0, 0])


class LossSums:
    """What `dice_cross_entropy` is made of, added up over parts of scans, so that no scan's scores are held whole.

    Attributes:
        classes: K; 0 before a part was added.
    """

    def __init__(self) -> None:
        self.classes = 0
        self._entropies = self._sizes = np.zeros(1)  # of the voxels of each class, the background first, (K + 1,)
        self._both: list[np.ndarray] = []  # for each scan, (K + 1,)
        self._all: list[np.ndarray] = []

    def begin_scan(self) -> None:
        """What is added from here on is of another scan."""
        self._both.append(np.zeros(1))
        self._all.append(np.zeros(1))

    def add(self, shares: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a part of a scan: probabilities (K + 1, d, h, w), and labels (d, h, w), of which -1 is ignored."""
        self.classes = len(shares) - 1
        counted = labels >= 0
        there = labels[counted].numpy()
        right = shares.gather(0, labels.clamp(min=0)[None])[0][counted].double()  # probability of the class there
        sizes = np.bincount(there, minlength=len(shares))
        predicted = [float(share.where(counted, 0.0).sum(dtype=torch.float64)) for share in shares]
        self._entropies = self._entropies + np.bincount(there, -right.clamp(min=LEAST).log().numpy(), len(shares))
        self._sizes = self._sizes + sizes
        self._both[-1] = self._both[-1] + np.bincount(there, right.numpy(), len(shares))
        self._all[-1] = self._all[-1] + sizes + predicted

    def loss(self) -> torch.Tensor:
        """As `dice_cross_entropy` of the logarithms of all probabilities, float32, 0-dimensional."""
        both, all_ = np.stack(self._both), np.stack(self._all)
        learned = (2 * both.sum(0) + 1) / (all_.sum(0) + 1)
        weights = (self._sizes.sum() / np.maximum(self._sizes, 1)) ** ((1 - learned) / 2)
        entropy = (self._entropies * weights).sum() / max((self._sizes * weights).sum(), 1)
        dice = (2 * both[:, 1:] + 1) / (all_[:, 1:] + 1)
        return torch.tensor((entropy + 1 - dice.mean()) / 2, dtype=torch.float32)


def _find_shape(volume: torch.Tensor, labels: torch.Tensor) -> list[int]:
    """D, H, W of a scan in a batch, without the planes at its ends that pad it: labels -1 where the image is 0."""
    inside = (labels != IGNORED) | (volume != PADDING).any(0)
    if not inside.any():
        return list(labels.shape)
    along = [inside.any(-1).any(-1), inside.any(-1).any(0), inside.any(0).any(0)]
    return [int(there.nonzero()[-1]) + 1 for there in along]

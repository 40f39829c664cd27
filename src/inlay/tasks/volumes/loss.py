"""Training on crops of scans, and scoring on whole ones."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from inlay.errors import BadInput
from inlay.methods.spatial.sam import VolumeOutput, dice_cross_entropy
from inlay.tasks.volumes.scores import overlap
from inlay.train.evaluation import count_rows


class WholeVolume:
    """The model's own loss on crops in training; in evaluation that of whole scans, put together from windows.

    Evaluation is without prompts, of each scan by itself. Windows overlap, and count most in their middle (MONAI's
    Gaussian blending), as in `inlay.segment`, which takes more of them.

    Args:
        window: Voxels (D, H, W) that the model sees at a time in evaluation: the crop it is trained on.
        overlap: Share of a window that the next one covers again, from 0 to below 1.
        windows: Windows that pass through the model at once.
    """

    def __init__(self, window: Sequence[int], overlap: float = 0.25, windows: int = 4) -> None:
        if len(window) != 3 or min(window) < 1 or not 0 <= overlap < 1 or windows < 1:
            raise BadInput(
                f"expected a window of three sizes, an overlap from 0 to below 1 and windows of at least 1, got "
                f"{tuple(window)}, {overlap} and {windows}."
            )
        self.window, self.overlap, self.windows = tuple(window), overlap, windows

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """`loss`, and `logits` (B, K + 1, D, H, W)."""
        if model.training:
            return model(**batch)
        rows = []
        for volume, labels in zip(batch["pixel_values"], batch["labels"], strict=True):
            d, h, w = (labels >= 0).nonzero().amax(0).add(1).tolist()  # behind it is what pads a batch
            logits = self._windows(model, volume[None, :, :d, :h, :w])
            pad = [n for axis, size in ((2, w), (1, h), (0, d)) for n in (0, labels.shape[axis] - size)]
            rows.append(nn.functional.pad(logits, pad))
        logits = torch.cat(rows)
        return VolumeOutput(loss=dice_cross_entropy(logits, batch["labels"]), logits=logits)

    def _windows(self, model: nn.Module, volume: torch.Tensor) -> torch.Tensor:
        """Logarithms of the probabilities of one scan (1, 1, D, H, W), which are blended as in `inlay.segment`."""
        from monai.inferers import sliding_window_inference

        shares = sliding_window_inference(
            volume,
            self.window,
            self.windows,
            lambda part: model(pixel_values=part).logits.float().softmax(1),
            overlap=self.overlap,
            mode="gaussian",
        )
        return shares.clamp(min=1e-7).log()

    def weight(self, batch: dict[str, Any]) -> int:
        """The rows."""
        return count_rows(batch)

    def answers(self, output: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Voxels of each class in both answer and reference, in the answer, in the reference, (B, K, 3); and zeros."""
        counts = overlap(output.logits.argmax(1), batch["labels"], output.logits.shape[1] - 1)
        return counts, torch.zeros_like(counts[:, 0, 0])

"""The loss of a promptable mask model: that of the best of its masks, and of the IoU that it predicts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, softplus


@dataclass
class MaskOutput:
    """What SAM answered to P prompts for each of B images, with M masks a prompt.

    Attributes:
        loss: Mean over the masks that were asked for.
        logits: (B, P, M, h, w).
        scores: (B, P, M), the IoU that the model predicts.
    """

    loss: Tensor
    logits: Tensor
    scores: Tensor


class MaskLoss:
    """20 times the focal loss plus Dice, of the best of the masks, plus the squared error of all predicted IoUs.

    Batches: what the model takes, and `labels` (B, P, h, w) of the size of its logits: 1 in the mask, 0 outside, -1
    everywhere where fewer than P masks were asked for.

    Args:
        many: Ask for three masks and learn from the best, as a point may mean a part or the whole; or for a single one.

    Of a model that also says whether there is an object (SAM 2), the absolute error of the predicted IoUs, and the
    cross-entropy of that answer, which is yes for each mask that is asked for.

    Source: Kirillov et al. 2023, arXiv:2304.02643, "Losses and training"; Ravi et al. 2024, arXiv:2408.00714, appendix
    "Training".
    """

    def __init__(self, many: bool = True) -> None:
        self.many = many

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> MaskOutput:
        """Loss, logits and predicted IoU."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        output = model(**inputs, multimask_output=self.many)
        labels = batch["labels"]
        asked = labels[..., 0, 0] >= 0  # B P
        presence = getattr(output, "object_score_logits", None)  # B P 1
        truth = labels.clamp_min(0).float()
        each = mask_losses(output.pred_masks.float(), output.iou_scores.float(), truth, absolute=presence is not None)
        if presence is not None:
            each = each + softplus(-presence.float().squeeze(-1))
        return MaskOutput((each * asked).sum() / asked.sum().clamp_min(1), output.pred_masks, output.iou_scores)

    def weight(self, batch: dict[str, Any]) -> int:
        """The masks that are asked for."""
        return int((batch["labels"][..., 0, 0] >= 0).sum())

    def answers(self, output: MaskOutput, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Pixels (B, P, 2) in the intersection and in the union of truth and best predicted mask, and zeros (B,).

        Both are 0 for a mask that was not asked for.
        """
        said, truth = pick_predicted_best(output.logits, output.scores) > 0, batch["labels"]
        counts = [(said & (truth == 1)).sum((-2, -1)), (said & (truth == 0)).sum((-2, -1)) + (truth == 1).sum((-2, -1))]
        return torch.stack(counts, -1), truth.new_zeros(len(truth), dtype=torch.int64)


def mask_losses(
    logits: Tensor, scores: Tensor, targets: Tensor, *, balanced: bool = False, absolute: bool = False
) -> Tensor:
    """The loss of each prompt, as MaskLoss says.

    Args:
        logits: (..., M, h, w).
        scores: (..., M), the IoU predicted.
        targets: (..., h, w), from 0 to 1.
        balanced: Cross-entropy in the place of focal loss, half of it over the object and half over the rest: a model
            that knows nothing yet learns from focal loss to answer with nothing, and stays there.
        absolute: The absolute error of the predicted IoUs in the place of the squared one.
    """
    truth = targets.unsqueeze(-3).expand_as(logits)
    chance = logits.sigmoid()
    entropy = binary_cross_entropy_with_logits(logits, truth, reduction="none")
    if balanced:
        inside, whole = truth.sum((-2, -1), keepdim=True), truth.shape[-2] * truth.shape[-1]
        share = truth / inside.clamp_min(1) + (1 - truth) / (whole - inside).clamp_min(1)
        pixels = (entropy * share).sum((-2, -1)) / 2
    else:
        pixels = 20 * (entropy * (chance - truth).square()).mean((-2, -1))
    dice = 1 - (2 * (chance * truth).sum((-2, -1)) + 1) / (chance.sum((-2, -1)) + truth.sum((-2, -1)) + 1)
    said, true = logits.detach() > 0, truth > 0.5
    overlap = (said & true).sum((-2, -1)) / (said | true).sum((-2, -1)).clamp_min(1)
    wrong = (scores - overlap).abs() if absolute else (scores - overlap).square()
    return (pixels + dice).amin(-1) + wrong.mean(-1)


def pick_predicted_best(logits: Tensor, scores: Tensor) -> Tensor:
    """Of the masks (..., M, h, w) those whose IoU (..., M) the model predicts as the highest; (..., h, w)."""
    index = scores.argmax(-1)[..., None, None, None].expand(*scores.shape[:-1], 1, *logits.shape[-2:])
    return logits.gather(-3, index).squeeze(-3)

"""A user simulated: a prompt, then clicks where SAM's answer is wrong."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from inlay.tasks.masks.loss import pick_predicted_best
from inlay.tasks.masks.prompts import boxes_around, draw_points


def answer_clicks(
    model: Any, embeddings: Tensor, objects: Tensor, clicks: Sequence[int], boxes: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ask for P objects in each of B images in rounds; R = B P prompts are answered at a time.

    In the first round, which asks for three masks, each object gets `clicks[0]` points inside or a box that is not
    quite right; in each further one, which asks for a single mask, `clicks[i]` points where the answer before was
    wrong, and half the time that answer itself.

    Args:
        model: A SamModel.
        embeddings: Of its vision encoder, (B, E, t, t).
        objects: Boolean, (B, P, H, W), of the size of the images.
        clicks: Points of each round.
        boxes: Begin with boxes.

    Yields:
        Logits (R, M, h, w), predicted IoU (R, M) and the objects at that size (R, h, w), from 0 to 1.

    Source: Kirillov et al. 2023, arXiv:2304.02643, appendix A, "Training algorithm".
    """
    rows, flat = embeddings.repeat_interleave(objects.shape[1], 0), objects.flatten(0, 1)  # R E t t, R H W
    step = flat.shape[-1] // (4 * embeddings.shape[-1])
    targets = avg_pool2d(flat[:, None].float(), step)  # R 1 h w
    points, there = draw_points(flat[:, None], clicks[0])
    prompt: dict[str, Any] = {"input_points": points, "input_labels": there.long() * 2 - 1}  # R 1 N 2, R 1 N
    prompt = {"input_boxes": boxes_around(flat, jitter=0.07)[:, None]} if boxes else prompt
    for i in range(len(clicks)):
        output = model(image_embeddings=rows, multimask_output=i == 0, **prompt)
        logits, scores = output.pred_masks[:, 0], output.iou_scores[:, 0]  # R M h w, R M
        yield logits, scores, targets[:, 0]
        if i + 1 == len(clicks):
            return
        best = pick_predicted_best(logits.detach(), scores)[:, None]
        points, there = draw_points((best > 0) != (targets > 0.5), clicks[i + 1])
        cells = (points[..., 1] * targets.shape[-1] + points[..., 0]).long()
        labels = (targets.flatten(-2).gather(-1, cells) > 0.5).long().where(there, -1)
        new = {"input_points": points * step + (step - 1) / 2, "input_labels": labels}
        prompt |= {key: torch.cat([prompt[key], new[key]], 2) if key in prompt else new[key] for key in new}
        prompt.pop("input_masks", None)
        prompt |= {"input_masks": best} if torch.rand(()) < 0.5 else {}


@torch.no_grad()
def score_clicks(model: Any, pixels: Tensor, objects: Tensor) -> dict[str, Tensor]:
    """IoU (R,) of the masks that SAM thinks best, for `1 point`, `3 points` (two of them in errors) and `box`.

    Args:
        model: A SamModel.
        pixels: (B, 3, H, W).
        objects: Boolean, (B, P, H, W); R = B P.
    """
    embeddings = model.vision_encoder(pixels)[0]
    found = []
    for clicks, boxes in (([1, 1, 1], False), ([1], True)):
        for logits, scores, targets in answer_clicks(model, embeddings, objects, clicks, boxes):
            said, true = pick_predicted_best(logits, scores) > 0, targets > 0.5
            found.append((said & true).sum((1, 2)) / (said | true).sum((1, 2)).clamp_min(1))
    return {"1 point": found[0], "3 points": found[2], "box": found[3]}

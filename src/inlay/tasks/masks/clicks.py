"""A user simulated: a prompt, then clicks where SAM's answer is wrong."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from inlay.methods.spatial.prompts import clicks_at_centres
from inlay.tasks.masks.loss import pick_predicted_best
from inlay.tasks.masks.prompts import boxes_around, draw_points

Embeddings: TypeAlias = "Tensor | list[Tensor]"


def answer_clicks(
    model: Any, embeddings: Embeddings, objects: Tensor, clicks: Sequence[int], boxes: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ask for P objects in each of B images in rounds; R = B P prompts are answered at a time.

    In the first round, which asks for three masks, each object gets `clicks[0]` points inside or a box that is not
    quite right; in each further one, which asks for a single mask, `clicks[i]` points where the answer before was
    wrong, and half the time that answer itself.

    Args:
        model: A SamModel or Sam2Model.
        embeddings: What its `get_image_embeddings` gives: (B, E, t, t), of SAM 2 a list, the coarsest last.
        objects: Boolean, (B, P, H, W), of the size of the images.
        clicks: Points of each round.
        boxes: Begin with boxes.

    Yields:
        Logits (R, M, h, w), predicted IoU (R, M) and the objects at that size (R, h, w), from 0 to 1.

    Source: Kirillov et al. 2023, arXiv:2304.02643, appendix A, "Training algorithm".
    """
    rows, flat = _repeat_rows(embeddings, objects.shape[1]), objects.flatten(0, 1)  # R E t t, R H W
    step, targets = _shrink(flat, embeddings)  # R 1 h w
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


def answer_centres(
    model: Any, embeddings: Embeddings, objects: Tensor, count: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ask for P objects in each of B images by `count` clicks, one a round, each at the centre of the largest error.

    The first one is at the centre of the object, and asks for three masks; each further one asks for a single mask, and
    the model gets the answer before. An error is a connected component of what is missing or too much, as
    `clicks_at_centres` says; where nothing is wrong there is no further click.

    Args:
        model: As for `answer_clicks`.
        embeddings: The same.
        objects: The same.
        count: Rounds.

    Yields:
        As `answer_clicks`.

    Source: Sofiiuk et al. 2021 (RITM), arXiv:2102.06583, section 4.
    """
    rows, flat = _repeat_rows(embeddings, objects.shape[1]), objects.flatten(0, 1)  # R E t t, R H W
    step, targets = _shrink(flat, embeddings)  # R 1 h w
    labels, best = (targets > 0.5).long(), targets.new_full(targets.shape, -1.0)
    prompt: dict[str, Any] = {}
    for i in range(count):
        volume = torch.stack([-best, best], 1)  # R 2 1 h w: an image is a volume of one plane
        points, said = clicks_at_centres(volume, labels, 1)  # R 1 3, R 1
        new = {
            "input_points": points[:, None, :, 1:].flip(-1) * step + (step - 1) / 2,  # R 1 1 2
            "input_labels": said[:, None],
        }
        prompt |= {key: torch.cat([prompt[key], new[key]], 2) if key in prompt else new[key] for key in new}
        masks = {"input_masks": best} if i else {}
        output = model(image_embeddings=rows, multimask_output=i == 0, **prompt, **masks)
        logits, scores = output.pred_masks[:, 0], output.iou_scores[:, 0]  # R M h w, R M
        yield logits, scores, targets[:, 0]
        best = pick_predicted_best(logits.detach(), scores)[:, None]


def _repeat_rows(embeddings: Embeddings, count: int) -> Embeddings:
    """Those of an image for each of its objects."""
    if isinstance(embeddings, Tensor):
        return embeddings.repeat_interleave(count, 0)
    return [level.repeat_interleave(count, 0) for level in embeddings]


def _shrink(objects: Tensor, embeddings: Embeddings) -> tuple[int, Tensor]:
    """Objects (R, H, W) at the size of the model's logits, (R, 1, h, w), and how many pixels one of theirs is wide."""
    coarsest = embeddings if isinstance(embeddings, Tensor) else embeddings[-1]
    step = objects.shape[-1] // (4 * coarsest.shape[-1])
    return step, avg_pool2d(objects[:, None].float(), step)


@torch.no_grad()
def score_clicks(model: Any, pixels: Tensor, objects: Tensor) -> dict[str, Tensor]:
    """IoU (R,) of the masks that SAM thinks best, for `1 point`, `3 points` (two of them in errors) and `box`.

    Args:
        model: A SamModel or Sam2Model.
        pixels: (B, 3, H, W).
        objects: Boolean, (B, P, H, W); R = B P.
    """
    embeddings = model.get_image_embeddings(pixels)
    points = [measure_iou(*answer) for answer in answer_clicks(model, embeddings, objects, [1, 1, 1])]
    box = [measure_iou(*answer) for answer in answer_clicks(model, embeddings, objects, [1], boxes=True)]
    return {"1 point": points[0], "3 points": points[2], "box": box[0]}


@torch.no_grad()
def score_centres(model: Any, pixels: Tensor, objects: Tensor, count: int = 10) -> Tensor:
    """IoU (count, R) after each of `count` clicks, each at the centre of the largest error.

    Args:
        model: A SamModel or Sam2Model.
        pixels: (B, 3, H, W).
        objects: Boolean, (B, P, H, W); R = B P.
        count: Clicks for each object.
    """
    embeddings = model.get_image_embeddings(pixels)
    return torch.stack([measure_iou(*answer) for answer in answer_centres(model, embeddings, objects, count)])


def measure_iou(logits: Tensor, scores: Tensor, targets: Tensor) -> Tensor:
    """IoU (R,) of the masks that the model thinks best."""
    said, true = pick_predicted_best(logits, scores) > 0, targets > 0.5
    return (said & true).sum((1, 2)) / (said | true).sum((1, 2)).clamp_min(1)

"""A promptable mask model scored on images with maps: IoU for each object and kind of prompt, with that of its base."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from inlay.tasks.adapter import Adapter, check_task
from inlay.tasks.evaluation import EVERYTHING, Evaluation, Request, Score, count_units, pick_evenly
from inlay.tasks.groups import list_groups
from inlay.tasks.masks.data import load_masks_to_score
from inlay.tasks.masks.loss import MaskLoss
from inlay.tasks.masks.view import SCORED_OBJECTS, MaskView, Prompts, scoring_view
from inlay.tasks.progress import show_progress
from inlay.tasks.statistics import Indices, score_with_intervals

KINDS: tuple[Prompts, ...] = ("point", "points", "box")
AT_ONCE = 4  # images in one forward pass


def evaluate(adapter: Adapter, data: str, request: Request = EVERYTHING) -> Evaluation:
    """Ask for up to 16 objects of each image by a point, by three points and by a box, as recipes do when they score.

    Objects and prompts are drawn by a fixed seed, alike for adapter and base. Of the three masks of an answer the one
    counts that the model thinks best, at the size of its logits.

    Args:
        adapter: From `load_adapter`.
        data: As for `load_masks`.
        request: Which part, and how.

    Raises:
        InlayError: As `load_masks`; an adapter that answers no prompts.
    """
    check_task(adapter, "mask-generation")
    chosen, rows, notes = load_masks_to_score(data, split=request.split, training=request.training)
    picked, model = pick_evenly(len(rows), request.limit), adapter.model
    able = request.compare and hasattr(model, "disable_adapter")
    noted = request.training.settings
    crop = noted.get("crop") if type(noted.get("crop")) is int and noted["crop"] >= 16 else None
    meaning: Literal["instances", "classes"] = "classes" if noted.get("meaning") == "classes" else "instances"
    views = {kind: scoring_view(rows, adapter.processor, kind, crop=crop, meaning=meaning) for kind in KINDS}
    found: dict[bool, dict[str, list[dict[str, Any]]]] = {}
    for without in (False, True) if able else (False,):
        with model.disable_adapter() if without else nullcontext():
            found[without] = {kind: _answer_prompts(model, view, picked) for kind, view in views.items()}
    table = []
    for kind in KINDS:
        for k, row in enumerate(found[False][kind]):
            of_base = {"base_iou": round(found[True][kind][k]["iou"], 6)} if able else {}
            rounded = {"iou": round(row["iou"], 6), "predicted_iou": round(row["predicted_iou"], 6)}
            table.append({**row, **rounded, "image": rows[row["image"]].name, **of_base})
    groups = list_groups([rows[i] for i in picked])
    count, unit, counted = count_units(len(picked), "image", groups, request.training.group_for(data))
    resampled = ", which is the unit that was resampled" if groups is None else ""
    notes += [f"Up to {SCORED_OBJECTS} objects of an image{resampled}: {_count_objects(found[False])}.", *counted]
    if request.compare and not able:
        notes += ["The base was not scored: the adapter is merged into it."]
    return Evaluation(
        data=data,
        task="mask-generation",
        split=chosen,
        count=count,
        unit=unit,
        scores=_score_kinds(found[False], picked, groups, request.resamples),
        base=_score_kinds(found[True], picked, groups, request.resamples) if able else None,
        rows=table,
        notes=notes,
    )


@torch.inference_mode()
def _answer_prompts(model: Any, view: MaskView, picked: list[int]) -> list[dict[str, Any]]:
    """A row for each object that was asked for: the image's place in the view, IoU, and the IoU that was predicted."""
    loss, weight, rows = MaskLoss(), next(p for p in model.parameters() if p.is_floating_point()), []
    batches = DataLoader(Subset(view, picked), batch_size=AT_ONCE)
    for begin, batch in enumerate(show_progress(batches, len(batches), "score", "batch")):
        batch = {  # prompts stay float32: bfloat16 has no odd number over 256
            key: value.to(weight.device, weight.dtype if key == "pixel_values" else value.dtype)
            for key, value in batch.items()
        }
        output = loss(model, batch)
        counts = loss.answers(output, batch)[0].cpu().numpy()  # B P 2
        predicted, sizes = output.scores.max(-1).values.float().cpu().numpy(), (batch["labels"] == 1).sum((-2, -1))
        for b, p in zip(*np.nonzero(counts[..., 1]), strict=True):
            both, either = counts[b, p].tolist()
            rows.append(
                {
                    "image": picked[begin * AT_ONCE + b],
                    "object": int(p) + 1,
                    "prompt": view.prompts,
                    "iou": both / either,
                    "predicted_iou": float(predicted[b, p]),
                    "pixels": int(sizes[b, p]),
                }
            )
    return rows


def _score_kinds(
    found: dict[str, list[dict[str, Any]]], picked: list[int], groups: Sequence[str] | None, resamples: int
) -> dict[str, Score]:
    """Mean IoU over objects for each kind of prompt; images or groups are resampled, each with all its objects."""
    place = {image: i for i, image in enumerate(picked)}
    sums, counts = {}, {}
    for kind, rows in found.items():
        images = [place[row["image"]] for row in rows]
        sums[kind] = np.bincount(images, [row["iou"] for row in rows], minlength=len(picked))
        counts[kind] = np.bincount(images, minlength=len(picked))

    def statistic(rows: Indices) -> dict[str, float]:
        return {f"mean_iou_{kind}": float(sums[kind][rows].sum() / max(1, counts[kind][rows].sum())) for kind in found}

    return score_with_intervals(statistic, len(picked), groups=groups, resamples=resamples)


def _count_objects(found: dict[str, list[dict[str, Any]]]) -> str:
    count = len(found[KINDS[0]])
    return f"{count:,} object{'' if count == 1 else 's'} by each kind of prompt"

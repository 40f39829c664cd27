"""A painter scored on images of its subject: what it paints is compared with them, with its prompts and its base."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from inlay.tasks.adapter import Adapter, check_task, place_inputs
from inlay.tasks.evaluation import (
    EVERYTHING,
    Evaluation,
    Request,
    Score,
    pick_evenly,
)
from inlay.tasks.statistics import Indices, score_with_intervals
from inlay.tasks.text_to_image.data import Captioned, load_captioned_to_score, open_captioned
from inlay.tasks.text_to_image.encoder import ImageEncoder, load_encoder
from inlay.tasks.text_to_image.judge import JUDGE, JUDGED, find_subjects, score_prompts
from inlay.tasks.text_to_image.loss import DenoisingLoss
from inlay.tasks.text_to_image.paint import Sampling, paint_pairs, split_models
from inlay.tasks.text_to_image.scores import (
    Values,
    compare_own_images,
    compare_with_subject,
    measure_feature_drift,
    measure_pixel_drift,
)
from inlay.tasks.text_to_image.view import PromptView

SEEDS = 16  # images of each kind, unless a limit is given
STEPS = 25  # from noise to image
DENOISED = 8  # images of the data whose loss is computed at each seed
ENCODER = "builtin:vit-tiny"
UNRELATED = (  # prompts that say nothing of a subject
    "a red circle on grass",
    "a blue square on sand",
    "a yellow star at night",
    "a white triangle on water",
    "a green ring on snow",
    "a purple cross on brick",
)


def evaluate(adapter: Adapter, data: str, request: Request = EVERYTHING) -> Evaluation:
    """Paint the prompts of the data and prompts that have nothing to do with it, each from its own seed, and compare.

    `subject_fidelity` is how alike the images of the data's prompts and the data itself are; the base's is the floor,
    and `own_fidelity`, of the data's images among each other, the ceiling. `drift_features` and `drift_pixels` tell how
    far adapter and base are apart where neither is asked for the subject. `loss` is that of training, on the data with
    fixed noise. On the embedded base a judge says how often an embedded subject is there (`presence`), and how much of
    what the unrelated prompts name (`prompt_fidelity`).

    Args:
        adapter: From `load_adapter`.
        data: As for `load_captioned`; a few images of a subject are compared with as a whole.
        request: Which part, and how; its limit is the number of seeds, 16 by itself.

    Raises:
        InlayError: As `load_captioned_to_score` and `load_encoder`; an adapter of another task.
    """
    check_task(adapter, "text-to-image")
    model, base = split_models(adapter)
    prompt = request.training.settings.get("prompt")
    chosen, rows, notes = load_captioned_to_score(
        data, prompt if isinstance(prompt, str) else None, split=request.split, training=request.training
    )
    seeds = list(range(request.limit or SEEDS))
    judged = base.name_or_path == JUDGED
    encoder = load_encoder(request.encoder or (JUDGE if judged else ENCODER), next(model.parameters()).device)
    if request.encoder is None and not judged:
        notes.append(f"Features are those of {ENCODER}, which has seen drawn shapes only; give encoder a DINO or CLIP.")
    own = encoder.encode_images([open_captioned(row) for row in rows])
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    asked = [(prompts[i % len(prompts)], seed) for i, seed in enumerate(seeds)]
    unrelated = [(UNRELATED[i % len(UNRELATED)], seed) for i, seed in enumerate(seeds)]
    able = request.compare and hasattr(model, "disable_adapter")
    found: dict[bool, dict[str, Values]] = {}
    others: dict[bool, list[Image.Image]] = {}  # of unrelated prompts
    for without in (False, True) if able else (False,):
        with model.disable_adapter() if without else nullcontext():
            painted = paint_pairs(adapter, asked, Sampling(steps=STEPS))
            others[without] = paint_pairs(adapter, unrelated, Sampling(steps=STEPS)) if able or judged else []
            found[without] = {"loss": _compute_losses(adapter, rows, seeds)}
        found[without] |= _compare_images(encoder, painted, own, [prompt for prompt, _ in asked])
        if judged:
            found[without] |= _judge_images(data, painted, others[without], [prompt for prompt, _ in unrelated])
    if able:
        features = [encoder.encode_images(others[without]) for without in (False, True)]
        found[False]["drift_features"] = measure_feature_drift(*features)
        found[False]["drift_pixels"] = measure_pixel_drift(others[False], others[True])
    elif request.compare:
        notes.append("The base was not scored, nor drift from it: the adapter is merged into it.")
    scores = _summarise(found[False], request.resamples)
    if (ceiling := compare_own_images(own)) is not None:
        scores["own_fidelity"] = Score(ceiling)
    notes.append(
        f"Each seed paints one of {len(prompts)} prompts of the data and one of {len(UNRELATED)} unrelated ones in "
        f"{STEPS} steps, compared by {encoder.name} with {len(rows)} images."
    )
    return Evaluation(
        data=data,
        task="text-to-image",
        split=chosen,
        count=len(seeds),
        unit="seed",
        scores=scores,
        base=_summarise(found[True], request.resamples) if able else None,
        rows=_make_rows(asked, unrelated, found),
        notes=notes,
    )


def _compare_images(
    encoder: ImageEncoder, painted: Sequence[Image.Image], own: Tensor, prompts: Sequence[str]
) -> dict[str, Values]:
    """Of each painted image: how alike it is to the subject, and of a CLIP how well its prompt describes it."""
    features = encoder.encode_images(painted)
    found = {"subject_fidelity": compare_with_subject(features, own)}
    if encoder.tokenizer is not None:
        found["clip_score"] = 1 - measure_feature_drift(features, encoder.encode_texts(prompts))
    return found


def _judge_images(
    data: str, painted: Sequence[Image.Image], others: Sequence[Image.Image], prompts: Sequence[str]
) -> dict[str, Values]:
    """Whether an embedded subject is there where it is asked for, and what is there of what other prompts name."""
    subject = data.removeprefix("builtin:")
    presence = {"presence": find_subjects(painted)[subject]} if data.startswith("builtin:") else {}
    return {**presence, "prompt_fidelity": score_prompts(others, prompts)}


@torch.inference_mode()
def _compute_losses(adapter: Adapter, rows: Sequence[Captioned], seeds: Sequence[int]) -> Values:
    """Loss of the same images at the noise of each seed."""
    model, base = split_models(adapter)
    weight, loss = next(p for p in model.parameters() if p.is_floating_point()), DenoisingLoss()
    picked = [rows[i] for i in pick_evenly(len(rows), DENOISED)]
    losses = []
    for seed in seeds:
        view = PromptView(picked, adapter.processor, seed=seed, levels=base.config.train_timesteps)
        batch = place_inputs(default_collate([view[i] for i in range(len(view))]), weight)
        losses.append(float(loss(model, batch).loss))
    return np.array(losses)


def _summarise(found: dict[str, Values], resamples: int) -> dict[str, Score]:
    """Means over seeds, the main score first."""
    names = sorted(found, key=lambda name: name != "loss")

    def statistic(rows: Indices) -> dict[str, float]:
        return {name: float(found[name][rows].mean()) for name in names}

    return score_with_intervals(statistic, len(found["loss"]), resamples=resamples)


def _make_rows(
    asked: Sequence[tuple[str, int]], unrelated: Sequence[tuple[str, int]], found: dict[bool, dict[str, Values]]
) -> list[dict[str, Any]]:
    """Of each seed its prompts and values, those of the base with `base_` in front."""
    rows = []
    for i, (prompt, seed) in enumerate(asked):
        row: dict[str, Any] = {"seed": seed, "prompt": prompt, "unrelated_prompt": unrelated[i][0]}
        for without, values in found.items():
            row |= {f"{'base_' * without}{name}": round(float(value[i]), 6) for name, value in values.items()}
        rows.append(row)
    return rows

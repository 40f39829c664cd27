"""A classifier of texts scored on labelled texts or pairs: accuracy, per class, and calibration."""

from functools import partial
from typing import Any

import numpy as np
import torch

from inlay.methods.prompt import check_prompt
from inlay.tasks.adapter import Adapter, check_task
from inlay.tasks.classification import class_probabilities, evaluate_classifier
from inlay.tasks.evaluation import EVERYTHING, Evaluation, Request, pick_evenly
from inlay.tasks.progress import show_progress
from inlay.tasks.sequences.data import load_sequences_to_score
from inlay.tasks.sequences.stream import load_sequence_stream_to_score
from inlay.tasks.sequences.view import SequenceView
from inlay.tasks.shards import is_streamed

AT_ONCE = 32  # texts in one forward pass


def evaluate(adapter: Adapter, data: str, request: Request = EVERYTHING) -> Evaluation:
    """Score a classifier; a class that it knows and the data lacks can still be predicted, and is then wrong.

    Args:
        adapter: From `load_adapter`.
        data: As for `load_sequences`; its labels are matched by name.
        request: Which part, and how.

    Raises:
        InlayError: As `load_sequences`; labels that the adapter does not know; an adapter of another task.
    """
    check_task(adapter, "text-classification")
    check_prompt(adapter.model)
    labels, logits = adapter.route(request.group)
    training = request.training
    if is_streamed(data, training.asks_to_stream(data)):
        chosen, rows, notes = load_sequence_stream_to_score(data, labels, split=request.split, training=training)
    else:
        chosen, rows, notes = load_sequences_to_score(
            data, labels, adapter=adapter.name, split=request.split, training=training
        )
    rows = rows.select(pick_evenly(len(rows), request.limit))
    groups = rows["group"][:] if "group" in rows.column_names else None
    names = [{key: row[key] for key in ("text", "pair") if key in row} for row in rows]
    return evaluate_classifier(
        adapter,
        request,
        data=data,
        split=chosen,
        noun="text",
        groups=groups,
        labels=labels,
        true=np.array(rows["label"][:], np.int64),
        names=names,
        notes=notes,
        predict=partial(_probabilities, adapter.model, SequenceView(rows, adapter.processor), logits),
    )


@torch.inference_mode()
def _probabilities(model: Any, view: SequenceView, logits: list[int]) -> np.ndarray:
    """Of the classes that these logits stand for, (N, K)."""
    device = next(model.parameters()).device
    found = []
    begins = range(0, len(view), AT_ONCE)
    for begin in show_progress(begins, len(begins), "score", "batch"):
        batch = view.collate([view[i] for i in range(begin, min(begin + AT_ONCE, len(view)))])
        inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        output = model(**inputs).logits  # B K
        found.append(class_probabilities(output[:, logits].double(), model.config).cpu())
    return torch.cat(found).numpy()

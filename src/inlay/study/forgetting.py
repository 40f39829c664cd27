"""What a base has lost by adaptation: of its own task, of the text that it was trained on, of its features.

A base is looked at once, before any trial; each trained model is then compared with what was seen.
"""

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import PreTrainedModel

from inlay.bases.eval_mode import eval_mode
from inlay.errors import BadInput, InlayError, Unsupported
from inlay.methods._peft import PeftModel
from inlay.tasks.adapter import TaskModel, place_inputs
from inlay.tasks.base import load_base, read_task
from inlay.tasks.evaluation import Training, pick_evenly
from inlay.tasks.options import TaskData
from inlay.tasks.task import Task
from inlay.train.losses import Loss

logger = logging.getLogger(__name__)

EXAMPLES, ROWS = 256, 1024  # held-out examples whose features are compared, and rows of features of them, at most
AT_ONCE = 8
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class OwnScore:
    """How a base did in its own task on data of that.

    Attributes:
        own: The base with its own head, and the task that it was pre-trained for.
        batches: Of the data.
        loss: Of a batch.
        score: Of the base, of `Task.score_batches`.
    """

    own: TaskModel
    batches: list[Batch]
    loss: Loss
    score: float


@dataclass(frozen=True)
class RememberedBase:
    """A base before adaptation.

    Attributes:
        task: What it is adapted for.
        batches: Held-out inputs of that task.
        features: Of these inputs, (N, D); None where the base computes none.
        own: Of its own task; None where that is not known.
        remarks: Why something is missing.
    """

    task: Task
    batches: list[Batch]
    features: Tensor | None
    own: OwnScore | None
    remarks: list[str] = field(default_factory=list)


def remember_base(base: PreTrainedModel, task: Task, data: TaskData, *, base_data: str | None = None) -> RememberedBase:
    """Look at a base before it is adapted.

    Args:
        base: Untouched, from `TaskOptions.base`; its head may be new.
        task: What it is to be adapted for.
        data: Of that task; its held-out part is looked at.
        base_data: Data of what the base was pre-trained for, of which its labels are matched by name: a folder of
            images, a text file. Embedded bases have their own, unless they are adapted to just that.

    Raises:
        InlayError: `base_data` that does not exist or that the base's own task does not take.
    """
    remarks: list[str] = []
    batches: list[Batch] = []
    features = None
    try:
        features = _compute_features(base, task, _collate_held_out(data, into=batches))
    except (InlayError, RuntimeError, ValueError) as error:
        remarks.append(f"drift: {_first_line(error)}")
    own = None
    try:
        own = _score_own_task(base, task, data.source.name, base_data)
    except InlayError as error:
        if base_data is not None:
            raise
        remarks.append(f"own task: {error}")
    return RememberedBase(task, batches, features, own, remarks)


def measure_forgetting(model: nn.Module, base: RememberedBase) -> dict[str, float]:
    """What a trained model has lost compared with its base; what cannot be measured is absent.

    Args:
        model: A PeftModel, or a plain model that was trained, of the base that was remembered. It stays as it is.
        base: From `remember_base`.

    Returns:
        drift: 1 - linear CKA of the last features of held-out inputs before and after, 0 to 1. own_task: the fall of
        the base's main score in its own task, computed by its own head over the adapted body. text_loss, of a language
        model: the rise of the mean loss of a token of text like that of its pre-training, in nats.
    """
    found = {}
    try:
        if base.features is not None:
            found["drift"] = 1 - linear_cka(base.features, _compute_features(model, base.task, base.batches))
    except (InlayError, RuntimeError, ValueError) as error:
        logger.info("the drift of the features could not be measured (%s).", _first_line(error))
    try:
        if base.own is not None:
            found[base.own.own.task.forgotten] = base.own.score - _score_adapted(model, base.task, base.own)
    except (InlayError, RuntimeError, ValueError) as error:
        logger.info("the base's own task could not be scored after adaptation (%s).", _first_line(error))
    return {name: value for name, value in found.items() if value == value}


def linear_cka(x: Tensor, y: Tensor) -> float:
    """How alike two sets of features of the same inputs are, 0 to 1: 1 where one is the other rotated and scaled.

    Args:
        x: (N, D).
        y: (N, E).

    Returns:
        NaN where one of them is the same for all inputs.

    Source: Kornblith et al. 2019, arXiv:1905.00414, section 3: ‖yᵀx‖² / (‖xᵀx‖ ‖yᵀy‖) of centred features.
    """
    x, y = (each.double() - each.double().mean(0) for each in (x, y))
    norm = torch.linalg.matrix_norm
    alike = norm(y.T @ x).square() / (norm(x.T @ x) * norm(y.T @ y))
    return float(alike.clamp(max=1.0))


def _collate_held_out(data: TaskData, into: list[Batch]) -> Iterator[Batch]:
    """Held-out inputs, spread evenly over the part that chooses; those that are asked for are put into a list."""
    picked, collate = pick_evenly(len(data.validation), EXAMPLES), data.collate or default_collate
    for at in range(0, len(picked), AT_ONCE):
        into.append(collate([data.validation[i] for i in picked[at : at + AT_ONCE]]))
        yield into[-1]


@torch.no_grad()
def _compute_features(model: nn.Module, task: Task, batches: Iterable[Batch]) -> Tensor:
    """(N, D), of at most ROWS rows, spread evenly over those of the first batches; more than they need are not read."""
    parts, rows = [], 0
    with eval_mode(model):
        weight = _first_weight(model)
        for batch in batches:
            parts.append(task.compute_features(model, place_inputs(batch, weight)).float().cpu())
            rows += len(parts[-1])
            if rows >= ROWS * AT_ONCE:
                break
    return torch.cat(parts)[pick_evenly(rows, ROWS)]


@torch.no_grad()
def _score_own_task(base: PreTrainedModel, adapted_for: Task, trained_on: str, base_data: str | None) -> OwnScore:
    """Load a base with its own head, and data of its own task, and score it.

    Raises:
        InlayError: Its own task or data is not known, or is what it is adapted to; an adapted model that cannot be
            asked for it.
    """
    name = str(base.name_or_path)
    task = read_task(name)
    data = base_data or task.own_data.get(name)
    if data is None:
        raise Unsupported(f"inlay does not know what {name} was trained on; name data of its own task (--base-data).")
    if data == trained_on:
        raise BadInput(f"{data} is what {name} was pre-trained for and what it is adapted to; name other data.")
    weight = _first_weight(base)
    model: Any = load_base(name, task=task.name).to(weight.device, weight.dtype)
    if task is not adapted_for and model.base_model is model:
        raise Unsupported(f"a model for {adapted_for.name} has no head of {task.name} that could be put over it.")
    own = TaskModel(name, model, task, task.load_processor(name, None), task.labels(model, None))
    examples = task.load_labelled(own, data, task.own_examples, 0, Training())
    items = range(len(examples.view))
    batches = [
        place_inputs(examples.collate([examples.view[i] for i in items[at : at + examples.rows]]), weight)
        for at in items[:: examples.rows]
    ]
    with eval_mode(model):
        return OwnScore(own, batches, examples.loss, task.score_batches(model, batches, examples.loss))


@torch.no_grad()
def _score_adapted(model: nn.Module, task: Task, before: OwnScore) -> float:
    """The score of an adapted model in the base's own task, under the base's own head."""
    own, weight = before.own, _first_weight(model)
    batches = [place_inputs(batch, weight) for batch in before.batches]
    if own.task is task and not task.classifies:  # the head is a part of the base, and what was trained with it
        with eval_mode(model):
            return task.score_batches(model, batches, before.loss)
    own.model.to(weight.device)
    with eval_mode(model), _under_own_head(model, own.model) as joined:
        return own.task.score_batches(joined, batches, before.loss)


@contextmanager
def _under_own_head(model: nn.Module, own: PreTrainedModel) -> Iterator[nn.Module]:
    """The base with its own head and, in the place of its body, the adapted one.

    Raises:
        InlayError: The model has no body apart from a head.
    """
    prefix = own.base_model_prefix
    adapted: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    kept = getattr(own, prefix, None)
    if not isinstance(kept, nn.Module) or adapted.base_model is adapted:
        raise Unsupported(f"{type(own).__name__} has no body that could stand apart from its head.")
    setattr(own, prefix, adapted.base_model)
    try:
        yield _with_prompt(model, own)
    finally:
        setattr(own, prefix, kept)


def _with_prompt(model: nn.Module, own: PreTrainedModel) -> nn.Module:
    """`own` behind the learned prompt or prefix of `model`, which peft keeps outside of the body."""
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return own
    prompted = copy.copy(model)
    prompted._modules = {**model._modules, "base_model": own}
    return prompted


def _first_weight(model: nn.Module) -> Tensor:
    """Inputs go to its device, in its type."""
    return next(parameter for parameter in model.parameters() if parameter.is_floating_point())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""Load a frozen base for what it is for: `builtin:`, a local folder or a Hub id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from inlay.bases.attention import Attention
from inlay.bases.device import Device
from inlay.bases.load import Dtype, load_pretrained, load_structure, read_config, resolve_base, set_labels
from inlay.bases.quantize import Quantize
from inlay.errors import BadInput, Unsupported
from inlay.tasks import TASKS, find_task, task_of_base
from inlay.tasks.task import Task

if TYPE_CHECKING:
    from inlay.tasks.options import TaskOptions


def load_base(
    name: str | Path,
    *,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    dtype: Dtype = "float32",
    quantize: Quantize | None = None,
    revision: str | None = None,
    device: Device | None = None,
    attention: Attention | None = None,
) -> PreTrainedModel:
    """Load a base of one of TASKS with all its weights frozen.

    Args:
        name: An embedded base such as `builtin:vit-tiny`, a local folder, or a Hub id of any model that the auto class
            of a task loads.
        task: Name in TASKS, for a base that can be loaded for several; default: what its config says.
        labels: Class names of a classifier. If they are not the base's own, the head is new: of this size, drawn from
            torch's global generator (seed it before).
        dtype: Of the weights; under `quantize`, of those that are not quantised.
        quantize: `8bit` (LLM.int8) or `4bit` (NF4) for the linear layers outside the head (GPT-2's Conv1D too; of SAM
            those of the image encoder), through bitsandbytes. Under 4 bits, layers whose input is no multiple of 64
            stay whole.
        revision: Branch, tag or commit of a Hub id.
        device: Such as "cpu" or "cuda:1"; default: the CPU (quantised: the GPU), from where accelerate moves what it
            trains.
        attention: Code that computes the base's attention: torch's fused kernels (sdpa), FlashAttention 2 (flash: a
            CUDA GPU, the package flash-attn, 16 bits) or plain products (eager); default: what transformers chooses,
            sdpa where the model has it. It is no part of what an adapter was trained for: the others give the same
            outputs but for rounding.

    Returns:
        The model in eval mode, no parameter requiring a gradient; `model.name_or_path` is `name`, `model.new_head` says
        whether the head was drawn here.

    Raises:
        InlayError: Unknown name or task, no network, weights that are not safetensors or do not fit their own config, a
            model of another kind, labels for what has no classes, bitsandbytes missing or nothing in the model that it
            could quantise, no such device on this machine, an attention that the model or this machine lacks.
    """
    name = str(name)
    config = read_config(name, resolve_base(name, revision), revision)
    chosen = _chosen(name, config, task)
    if labels is not None and not chosen.classifies:
        raise BadInput(f"{name} is {chosen.base_noun}, which has no classes; leave labels out.")
    base = load_pretrained(
        name,
        chosen.auto_class,
        config,
        labels=labels,
        dtype=dtype,
        quantize=quantize,
        revision=revision,
        device=device,
        attention=attention,
    )
    chosen.complete_base(base)
    return base


def load_skeleton(
    name: str | Path,
    *,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    dtype: Dtype = "float32",
    quantize: Quantize | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """A base without its weights, on torch's meta device: its structure, for counting. Arguments as in `load_base`.

    `labels` is left aside for what has no classes.
    """
    name = str(name)
    config = read_config(name, resolve_base(name, revision), revision)
    chosen = _chosen(name, config, task)
    if labels is not None and chosen.classifies:
        set_labels(config, labels)
    return load_structure(name, chosen.auto_class, config, dtype=dtype, quantize=quantize)


def read_task(name: str | Path, revision: str | None = None) -> Task:
    """What a base is for, by its config only."""
    name = str(name)
    return task_of_base(name, read_config(name, resolve_base(name, revision), revision))


def make_task_options(base: str, data: str, task: str | None = None) -> TaskOptions:
    """The options of training a base on data, as the recipes of the task have them.

    Args:
        base: As for `load_base`.
        data: As the recipes take it.
        task: Name in TASKS; default: the task whose embedded data this is, or what the config of the base says.

    Raises:
        InlayError: As `load_base`.
    """
    config = read_config(base, resolve_base(base), None)
    own = [
        row.name
        for row in TASKS.values()
        if row.could_take_base(config) and data == _find_default(row.training_options(), "dataset")
    ]
    return _chosen(base, config, task or next(iter(own), None)).training_options()(model=base, dataset=data)


def _find_default(options: type[TaskOptions], name: str) -> Any:
    return next(field.default for field in fields(options) if field.name == name)


def _chosen(name: str, config: Any, task: str | None) -> Task:
    if task is None:
        return task_of_base(name, config)
    asked = find_task(task)
    if not asked.could_take_base(config):
        both = getattr(config, "is_encoder_decoder", False)
        reason = "it is an encoder-decoder" if both else f"{asked.auto_class} does not take it"
        raise Unsupported(f"{name} ({config.model_type}) cannot be loaded for {task}: {reason}. Use {asked.base_noun}.")
    return asked

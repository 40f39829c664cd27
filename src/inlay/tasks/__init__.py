"""TASKS: what models are for. A task is one folder and one row here; the first that a base is for is its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from inlay.errors import BadInput, Unsupported
from inlay.tasks.images.task import ImageClassification
from inlay.tasks.masks.task import MaskGeneration
from inlay.tasks.sequences.task import SequenceClassification
from inlay.tasks.task import Task
from inlay.tasks.text.task import TextGeneration
from inlay.tasks.text_to_image.task import TextToImage
from inlay.tasks.volumes.task import VolumeSegmentation

if TYPE_CHECKING:
    from inlay.tasks.options import TaskOptions

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ImageClassification(),
        TextGeneration(),
        MaskGeneration(),
        VolumeSegmentation(),
        SequenceClassification(),
        TextToImage(),
    )
}


def find_task(name: str) -> Task:
    """A row of TASKS.

    Raises:
        InlayError: There is none of that name.
    """
    if name not in TASKS:
        raise BadInput(f"unknown task {name!r}; choose one of {', '.join(TASKS)}.")
    return TASKS[name]


def task_of_options(options: TaskOptions) -> Task:
    """The task whose recipes take these options."""
    return next(task for task in TASKS.values() if isinstance(options, task.training_options()))


def task_of_base(name: str, config: Any, peft_task_type: str | None = None) -> Task:
    """What a base is for, by its config.

    Args:
        name: For the message.
        config: Of a transformers model.
        peft_task_type: What plain peft has written next to an adapter of it, where it has: a base that can be loaded
            for several tasks is for that one.

    Raises:
        InlayError: A base for none of TASKS.
    """
    said = [task for task in TASKS.values() if peft_task_type and task.peft_task_type == peft_task_type]
    for task in said:
        if task.could_take_base(config):
            return task
    for task in TASKS.values():
        if task.takes_base(config):
            return task
    if getattr(config, "is_encoder_decoder", False):
        raise Unsupported(
            f"{name} ({config.model_type}) is an encoder-decoder; texts are written here by decoders such as GPT-2, "
            "Llama or Qwen. Take one of these."
        )
    raise Unsupported(
        f"{name} ({config.model_type}) is a base for none of {', '.join(TASKS)}: transformers loads it with none of "
        f"{', '.join(dict.fromkeys(task.auto_class for task in TASKS.values()))}. Take one that it does, or wrap it "
        "with peft yourself."
    )


def task_of_model(model: Any, processor: Any) -> Task:
    """What a trained model is for: the task that takes its base and the processor that made its inputs.

    Raises:
        InlayError: None does.
    """
    for task in TASKS.values():
        if task.could_take_base(model.config) and task.takes_processor(processor):
            return task
    raise BadInput(
        f"no task takes {type(model).__name__} with {type(processor).__name__} as its processor; give the processor "
        "that makes the model's inputs."
    )

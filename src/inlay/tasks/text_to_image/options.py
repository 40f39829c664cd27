"""The options of a painter's task, and the steps of its recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from inlay.errors import BadInput
from inlay.options import option
from inlay.tasks.options import Report, TaskData, TaskOptions, describe_run

if TYPE_CHECKING:
    from torch import nn

    from inlay.train.loop import FitResult


@dataclass
class TextToImageTask(TaskOptions):
    """The painter: its base, the images of the subject, and the prompts that they go with."""

    model: str = option("builtin:paint-tiny", "Embedded base, local folder or Hub id of a diffusers pipeline.")
    dataset: str = option("builtin:dog", "Embedded subject, or folder of images.")
    prompt: str | None = option(None, "Of images without captions, with a rare word: a photo of sks dog.")
    image_size: int | None = option(None, "Pixels a side; default: those that the base was trained on.", least=8)
    flip: bool = option(False, "Mirror images at random, where left and right do not matter.")
    snr_gamma: float | None = option(None, "Count noise levels of a larger signal-to-noise ratio less.", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group is not None:
            raise BadInput("images of a subject are one group; leave group out.")

    def load(self, seed: int, *, test: bool = False) -> TaskData:
        """Images with prompts, as `TaskOptions.load` says; of fewer than ten nothing is held out."""
        from accelerate.utils import set_seed

        from inlay.bases.load import read_config, resolve_base
        from inlay.tasks.text_to_image.data import load_captioned
        from inlay.tasks.text_to_image.loss import DenoisingLoss
        from inlay.tasks.text_to_image.processor import load_prompt_processor
        from inlay.tasks.text_to_image.view import PromptView

        set_seed(seed)
        with self.offering_embedded_base():
            processor = load_prompt_processor(self.model, None, self.image_size)
            config = read_config(self.model, resolve_base(self.model), None)
        data = load_captioned(self.dataset, self.prompt, seed=seed, test=test)
        held = data.validation or data.train
        fixed = PromptView(held, processor, seed=seed, levels=config.train_timesteps)
        return TaskData(
            data,
            PromptView(data.train, processor, flip=self.flip),
            fixed if data.validation else None,
            processor,
            metrics=(),
            collate=None,
            loss=DenoisingLoss(self.snr_gamma, str(config.scheduler.get("prediction_type", "epsilon"))),
            example=lambda: {key: value[None] for key, value in fixed[0].items() if key != "weight"},
        )

    def report(self, model: nn.Module, data: TaskData, result: FitResult) -> Report:
        """Loss, cost and settings."""
        name = "loss" if "loss" in result.metrics else "train_loss"
        return Report(
            describe_run(model, data, result), f"{name} {result.metrics[name]:.4f} at step {result.best_step}"
        )

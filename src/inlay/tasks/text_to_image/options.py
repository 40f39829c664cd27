"""The options of a painter's task, and the steps of its recipes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from inlay.errors import BadInput
from inlay.options import option
from inlay.tasks.options import Parts, Report, TaskData, TaskOptions, describe_run

if TYPE_CHECKING:
    from torch import nn

    from inlay.tasks.text_to_image.prior import Prior
    from inlay.tasks.text_to_image.samples import PaintingRun
    from inlay.tasks.text_to_image.view import PromptView
    from inlay.train.config import TrainConfig
    from inlay.train.loop import FitResult


@dataclass
class TextToImageTask(TaskOptions):
    """The painter: its base, the images of the subject, and the prompts that they go with."""

    model: str = option("builtin:paint-tiny", "Embedded base, local folder or Hub id of a diffusers pipeline.")
    dataset: str = option("builtin:dog", "Embedded subject, or folder of images.")
    prompt: str | None = option(None, "Of images without captions, with a rare word: a photo of sks dog.")
    image_size: int | None = option(None, "Pixels a side; default: those that the base was trained on.", least=8)
    augment: Literal["none", "flip"] = option(
        "none", "flip mirrors images at random, where left and right do not matter."
    )
    snr_gamma: float | None = option(
        None, "Count noise levels of a larger signal-to-noise ratio less (min-SNR; 5 in its paper).", above=0
    )
    drop_prompts: float = option(
        0.0, "Share of prompts left out, which keeps what guidance compares with.", least=0, below=1
    )
    class_prompt: str | None = option(
        None, "Prior preservation: the subject's class, such as a photo of a dog, whose images the base paints first."
    )
    prior_images: int = option(24, "With class_prompt: how many it paints.", least=1)
    prior_weight: float = option(
        1.0, "With class_prompt: weight of one in the loss; that of the subject's is 1.", above=0
    )
    validation_prompt: list[str] = option([], "Paint these at each evaluation, into sheet.png in output_dir.")
    validation_images: int = option(4, "With validation_prompt: images of each.", least=1)
    sampling_steps: int | None = option(None, "Steps from noise to image; default: the pipeline's own.", least=1)
    guidance: float | None = option(None, "Scale of classifier-free guidance; default: the pipeline's own.", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group is not None:
            raise BadInput("images of a subject are one group; leave group out.")
        if self.fold is not None:
            raise BadInput("images of a subject are too few for folds; leave fold out.")
        if self.attention is not None:
            raise BadInput("diffusers chooses the attention of a denoiser by itself; leave attention out.")
        for name in ("prompt", "class_prompt"):
            if (value := getattr(self, name)) is not None and not value.strip():
                raise BadInput(f"{name} must say what the images show, got {value!r}.")
        if not all(prompt.strip() for prompt in self.validation_prompt):
            raise BadInput("a validation_prompt must say what to paint, and one is empty.")

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
        if self.snr_gamma is not None and config.predicts_flow:
            raise BadInput(
                f"snr_gamma weights noise levels by their signal-to-noise ratio, and {self.model} is trained by flow "
                "matching, which has none; leave it out."
            )
        data = load_captioned(self.dataset, self.prompt, seed=seed, test=test)
        held = data.validation or data.train
        fixed = PromptView(held, processor, seed=seed, levels=config.train_timesteps)
        return TaskData(
            data,
            PromptView(data.train, processor, flip=self.augment == "flip", drop_prompts=self.drop_prompts),
            fixed if data.validation else None,
            processor,
            metrics=(),
            collate=None,
            loss=DenoisingLoss(self.snr_gamma, str(config.scheduler.get("prediction_type", "epsilon"))),
            example=lambda: {key: value[None] for key, value in fixed[0].items() if key != "weight"},
        )

    def load_parts(self, seed: int = 0) -> Parts:
        """As `TaskOptions.load_parts`; a study trains without what is painted for a run."""
        if self.class_prompt is not None or self.validation_prompt:
            raise BadInput("a study paints nothing on the way; leave class_prompt and validation_prompt out.")
        return super().load_parts(seed)

    def complete_training(self, view: PromptView, train: TrainConfig) -> PromptView:
        """With the images of the prior, which are painted when the run has begun."""
        prior = self._make_prior()
        return view if prior is None else view.with_prior(prior.list_images(Path(train.output_dir)))

    def make_callback(self, model: nn.Module, data: TaskData) -> PaintingRun:
        """Paints the prior and the samples."""
        from inlay.tasks.text_to_image.paint import Sampling
        from inlay.tasks.text_to_image.samples import PaintingRun

        sampling = Sampling(self.sampling_steps, self.guidance, image_size=data.processor.image_size)
        seeds = range(self.validation_images)
        return PaintingRun(model, sampling, self._make_prior(), self.validation_prompt, seeds)

    def _make_prior(self) -> Prior | None:
        from inlay.tasks.text_to_image.prior import Prior

        if self.class_prompt is None:
            return None
        return Prior(self.class_prompt, self.prior_images, self.prior_weight)

    def report(self, model: nn.Module, data: TaskData, result: FitResult) -> Report:
        """Loss, cost and settings."""
        name = "loss" if "loss" in result.metrics else "train_loss"
        return Report(
            describe_run(model, data, result), f"{name} {result.metrics[name]:.4f} at step {result.best_step}"
        )

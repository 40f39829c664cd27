"""The options of a classifier of images, and the steps of its recipes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from inlay.options import option
from inlay.tasks.options import Report, StreamOptions, TaskData, describe_run

if TYPE_CHECKING:
    from torch import nn

    from inlay.tasks.images.data import ImageData
    from inlay.tasks.images.stream import ImageStream
    from inlay.train.loop import FitResult
    from inlay.train.stream import Stream


@dataclass
class ImageTask(StreamOptions):
    """The classifier: its base, its images, and how they are shown in training."""

    model: str = option("builtin:vit-tiny", "Embedded base, local folder or Hub id.")
    dataset: str = option("builtin:digits", "Embedded data, folder of class folders, file, shards or Hub id.")
    augment: Literal["none", "crop", "crop-flip"] = option(
        "crop", "Random crops, and mirror images where left and right do not matter."
    )
    randaugment: int = option(
        0, "Magnitude of RandAugment (Cubuk et al. 2019), two random operations an image; 0: none.", least=0, most=30
    )
    mixup: float = option(0.0, "Alpha of mixup (Zhang et al. 2018), which mixes pairs of images; 0: none.", least=0)
    corrupt: Literal["refuse", "skip"] = option("refuse", "What to do with images that cannot be read.")
    classes: str | None = option(
        None, "File of the class names of streamed data, one a line; default: labels.txt next to the shards."
    )
    label_smoothing: float = option(0.0, "Of the training loss, 0 to 1.", least=0, most=1)

    def load(self, seed: int, *, test: bool = False) -> TaskData:
        """Labelled images of both splits, as `TaskOptions.load` says."""
        from accelerate.utils import set_seed

        from inlay.bases.processors import load_processor
        from inlay.tasks.images.augment import mix_images
        from inlay.tasks.images.data import load_images
        from inlay.tasks.images.loss import SmoothedClasses
        from inlay.tasks.images.stream import PreparedImage, load_image_stream
        from inlay.tasks.images.view import ImageView, NormalisedBatches
        from inlay.tasks.metrics import Accuracy

        set_seed(seed)
        with self.offering_embedded_base():
            processor = load_processor(self.model)
        data: ImageData | ImageStream
        train: ImageView | Stream
        how: Any = {"randaugment": self.randaugment, "mixup": self.mixup}
        if self.is_streamed(test):
            data = load_image_stream(
                self.dataset,
                seed=seed,
                corrupt=self.corrupt,
                group=self.group,
                classes=self.classes,
                buffer=self.shuffle_buffer,
            )
            train = replace(data.train, prepare=PreparedImage(processor, self.augment, **how))
        else:
            data = load_images(self.dataset, seed=seed, corrupt=self.corrupt, test=test, **self.split)
            train = ImageView(data.train, processor, self.augment, **how)
        validation = ImageView(data.validation, processor)
        return TaskData(
            data,
            train,
            validation,
            processor,
            metrics=[Accuracy()],
            collate=mix_images if self.mixup else NormalisedBatches(validation.steps),
            loss=SmoothedClasses(self.label_smoothing) if self.label_smoothing or self.mixup else None,
            example=lambda: {key: value[None] for key, value in validation[0].items() if key != "labels"},
        )

    def base(self, data: TaskData) -> Any:
        """The frozen base with a new head for the labels of the data."""
        from inlay.tasks.base import load_base
        from inlay.tasks.classification import check_one_label_each

        with self.offering_embedded_base():
            base = load_base(
                self.model,
                task="image-classification",
                labels=data.source.labels,
                quantize=self.quantize,
                attention=self.attention,
            )
        check_one_label_each(base, self.dataset)
        return self._announced(base)

    def report(self, model: nn.Module, data: TaskData, result: FitResult) -> Report:
        """Accuracy, cost and settings."""
        summary = f"accuracy {result.metrics['accuracy']:.4f} at step {result.best_step}"
        return Report(describe_run(model, data, result), summary)

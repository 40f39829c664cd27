"""Image classification: one of several labels for each image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from inlay.files.outputs import check_output_file
from inlay.tasks.images.processing import (
    blank_inputs,
    describe_labels,
    describe_pixels,
    image_processor_settings,
    load_image_processor,
    process_golden,
    random_inputs,
)
from inlay.tasks.printing import printable
from inlay.tasks.task import Answer, LabelledBatches, Option, Record, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inlay.tasks.adapter import Adapter
    from inlay.tasks.evaluation import Evaluation, Request, Training
    from inlay.tasks.options import TaskOptions
    from inlay.tasks.serving import Answering
    from inlay.train.losses import Loss


class ImageClassification(Task):
    """Bases are all that AutoModelForImageClassification loads."""

    name = "image-classification"
    auto_class = "AutoModelForImageClassification"
    base_noun = "an image classifier"
    hub_tag = "image-classification"
    base_kinds = ("vision", "conv")
    classifies = True
    function = "predict"
    main_score = "accuracy"
    limits = (
        "It names one of its labels for any image, also for one that shows something else; its probabilities have "
        "not been calibrated."
    )
    usage = (
        'from inlay import load_adapter, predict\n\nadapter = load_adapter("FOLDER")\n'
        'print(predict(adapter, ["image.png"]))'
    )
    inputs = "images or folders of them, to classify"
    own_data: ClassVar[Mapping[str, str]] = {
        f"builtin:{base}-tiny": "builtin:shapes" for base in ("vit", "mobilenet", "shufflenet", "squeezenet")
    }
    options: ClassVar[Mapping[str, Option]] = {
        "top": Option(int, "Classes to name for each image.", 3, least=1),
        "group": Option(str | None, "Choose among the classes of this group of a combination only."),
        "grid": Option(Path | None, "Save a sheet of the images and their labels under this name."),
    }

    def takes_base(self, config: Any) -> bool:
        from transformers import AutoModelForImageClassification

        return type(config) in AutoModelForImageClassification._model_mapping

    def takes_processor(self, processor: Any) -> bool:
        from transformers.image_processing_utils import BaseImageProcessor

        return isinstance(processor, BaseImageProcessor)

    def load_processor(self, base_name: str, settings: Record | None) -> Any:
        return load_image_processor(base_name, settings)

    def processor_settings(self, processor: Any) -> Record:
        return image_processor_settings(processor)

    def labels(self, base: Any, method: Any) -> list[str]:
        return [base.config.id2label[i] for i in sorted(base.config.id2label)]

    def golden_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        return process_golden(processor)

    def golden_values(self, output: Any, count: int) -> Tensor:
        return output.logits.flatten()[:count]

    def random_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        return random_inputs(processor, 8)

    def training_options(self) -> type[TaskOptions]:
        from inlay.tasks.images.options import ImageTask

        return ImageTask

    def load_labelled(
        self,
        adapter: Adapter,
        data: str,
        count: int,
        seed: int,
        training: Training,
        *,
        held_out: bool = False,
    ) -> LabelledBatches:
        """The classes take turns; numbers of labels are those of the adapter."""
        import torch
        from torch.utils.data import default_collate

        from inlay.tasks.classification import number_labels
        from inlay.tasks.images.data import load_images
        from inlay.tasks.images.view import ImageView
        from inlay.tasks.sampling import by_turns
        from inlay.train.losses import ModelLoss

        images = load_images(data, **training.split_options(data))
        numbers = torch.tensor(number_labels(data, images.labels, adapter))
        rows = images.validation if held_out else images.train
        view = ImageView(rows.select(by_turns(rows["label"][:], seed)[:count]), adapter.processor)

        def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
            batch = default_collate(items)
            return {**batch, "labels": numbers[batch["labels"]]}

        return LabelledBatches(view, collate, ModelLoss(), rows=8)

    def classify_batch(self, model: Callable[..., Any], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        from inlay.tasks.classification import classify_batch

        return classify_batch(model, batch)

    def planned_batch(
        self, base: Any, rows: int, length: int, added: int, crop: Sequence[int] | None = None
    ) -> tuple[dict[str, Tensor], Loss | None]:
        import torch

        return {**blank_inputs(base.config, rows), "labels": torch.zeros(rows, dtype=torch.long)}, None

    def prepare(self, inputs: Sequence[str], options: Mapping[str, Any]) -> Callable[[Adapter], Answer]:
        from inlay.tasks.images.predict import draw_sheet, find_pictures, predict

        files = find_pictures(inputs)
        if options["grid"] is not None:
            check_output_file(options["grid"])

        def answer(adapter: Adapter) -> Answer:
            found = predict(adapter, files, group=options["group"], top=options["top"])
            if options["grid"] is not None:
                draw_sheet(found, files, options["grid"])
            lines = []
            for one in found:
                named = (f"{printable(k)} {v:.1%}" for k, v in zip(one.labels, one.probabilities, strict=True))
                lines.append(f"{one.source}: {'  '.join(named)}")
            return Answer(lines, [vars(one) for one in found])

        return answer

    def evaluate(self, adapter: Adapter, data: str, request: Request) -> Evaluation:
        from inlay.tasks.images.evaluate import evaluate

        return evaluate(adapter, data, request)

    def serving(self) -> Answering:
        from inlay.tasks.images.serving import ImageServing

        return ImageServing()

    def describe_inputs(self, record: Record) -> list[str]:
        return ["Labels", *describe_labels(record["labels"]), *describe_pixels(record["preprocessing"])]

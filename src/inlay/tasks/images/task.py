"""Image classification: one of several labels for each image."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from inlay.errors import BadInput
from inlay.tasks.golden import golden_picture
from inlay.tasks.printing import printable
from inlay.tasks.task import Answer, LabelledBatches, Option, Record, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inlay.tasks.adapter import Adapter
    from inlay.tasks.evaluation import Evaluation, Request
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
    limits = (
        "It names one of its labels for any picture, also for one that shows something else; its probabilities have "
        "not been calibrated."
    )
    usage = (
        'from inlay import load_adapter, predict\n\nadapter = load_adapter("FOLDER")\n'
        'print(predict(adapter, ["picture.png"]))'
    )
    inputs = "images or folders of them, to classify"
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
        return {"pixel_values": processor(golden_picture(), return_tensors="pt")["pixel_values"]}  # 1 C H W

    def golden_values(self, output: Any, count: int) -> Tensor:
        return output.logits.flatten()[:count]

    def random_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        return {"pixel_values": random_pixels(processor, 8)}

    def load_labelled(self, adapter: Adapter, data: str, count: int, seed: int) -> LabelledBatches:
        """The classes take turns; numbers of labels are those of the adapter."""
        import torch
        from torch.utils.data import default_collate

        from inlay.tasks.images.data import load_images
        from inlay.tasks.images.view import ImageView
        from inlay.tasks.sampling import by_turns
        from inlay.train.losses import ModelLoss

        images = load_images(data, seed=seed)
        strange = [label for label in images.labels if label not in adapter.labels]
        if strange:
            raise BadInput(
                f"the data {data!r} has labels that the combination does not have ({', '.join(strange[:5])}); it has "
                f"{', '.join(adapter.labels[:10])}."
            )
        places = torch.tensor([adapter.labels.index(label) for label in images.labels])
        chosen = by_turns(images.train["label"][:], seed)[:count]
        view = ImageView(images.train.select(chosen), adapter.processor)

        def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
            batch = default_collate(items)
            return {**batch, "labels": places[batch["labels"]]}

        return LabelledBatches(view, collate, ModelLoss(), rows=8)

    def planned_batch(self, base: Any, rows: int, length: int, added: int) -> tuple[dict[str, Tensor], Loss | None]:
        import torch

        pixels = blank_pixels(base.config, rows)
        return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long)}, None

    def prepare(self, inputs: Sequence[str], options: Mapping[str, Any]) -> Callable[[Adapter], Answer]:
        from inlay.tasks.images.predict import draw_sheet, find_pictures, predict

        files = find_pictures(inputs)

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

    def describe_inputs(self, record: Record) -> list[str]:
        return ["Labels", *describe_labels(record["labels"]), *describe_pixels(record["preprocessing"])]


def load_image_processor(base_name: str, settings: Record | None) -> Any:
    """From its settings, or that of a base."""
    from inlay.bases.processors import load_processor, processor_from

    return processor_from(settings) if settings else load_processor(base_name)


def image_processor_settings(processor: Any) -> Record:
    """As JSON takes them: a processor's `to_dict` holds arrays and enums."""
    return dict(json.loads(processor.to_json_string()))


def random_pixels(processor: Any, rows: int) -> Tensor:
    """Noise (B, C, H, W) of the size that the processor makes; the same at each call."""
    import torch

    shape = processor(golden_picture(), return_tensors="pt")["pixel_values"].shape[1:]  # C H W
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))


def blank_pixels(config: Any, rows: int) -> Tensor:
    """Zeros (B, C, H, W) of the size that a config names, 224 x 224 where it names none."""
    import torch

    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(rows, getattr(config, "num_channels", 3), height, width)


def describe_labels(labels: Sequence[str]) -> list[str]:
    """The first 50 with their numbers."""
    named = ", ".join(f"{i} = {label}" for i, label in enumerate(labels[:50]))
    return [named + (" ..." if len(labels) > 50 else "")]


def describe_pixels(settings: Record) -> list[str]:
    """What an image processor does, in one sentence; nothing for settings that are no image processor's."""
    size, steps = settings.get("size") or {}, []
    if isinstance(size, dict) and size and settings.get("do_resize"):
        steps.append("resized to " + " x ".join(f"{v}" for v in size.values() if isinstance(v, int)) + " pixels")
    if settings.get("do_rescale"):
        steps.append(f"scaled by {settings.get('rescale_factor', 1):.4g}")
    if settings.get("do_normalize"):
        means, spreads = ([round(x, 4) for x in settings.get(key) or []] for key in ("image_mean", "image_std"))
        steps.append(f"normalised by the means {means} and the deviations {spreads}")
    return [f"Pictures are {', '.join(steps)}."] if steps else []

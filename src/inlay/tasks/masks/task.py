"""Mask generation: points and boxes in an image are answered with masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from inlay.errors import BadInput, Unsupported
from inlay.files.outputs import check_output_file
from inlay.tasks.images.processing import blank_inputs, process_golden, random_inputs
from inlay.tasks.masks.processing import load_mask_processor, mask_processor_settings
from inlay.tasks.task import Answer, LabelledBatches, Option, Record, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inlay.tasks.adapter import Adapter
    from inlay.tasks.evaluation import Evaluation, Request, Training
    from inlay.tasks.options import TaskOptions
    from inlay.tasks.serving import Answering
    from inlay.train.losses import Loss


class MaskGeneration(Task):
    """Bases are SAM and its kin: all that AutoModelForMaskGeneration loads. They have no head and no labels."""

    name = "mask-generation"
    auto_class = "AutoModelForMaskGeneration"
    base_noun = "a promptable mask model"
    hub_tag = "mask-generation"
    base_kinds = ("sam",)
    function = "predict_masks"
    main_score = "mean_iou_point"
    limits = "Its masks answer a point or a box; objects unlike those of the training data may be missed."
    usage = (
        'from inlay import load_adapter, predict_masks\n\nadapter = load_adapter("FOLDER")\n'
        'print(predict_masks(adapter, "image.png", points=[(40, 60)]).masks.shape)'
    )
    inputs = "an image, to find masks in"
    graph_module = "vision_encoder"  # it has the most work by far; prompts have many forms
    graph_output = "last_hidden_state"
    own_data: ClassVar[Mapping[str, str]] = {"builtin:sam-tiny": "builtin:scenes"}
    own_examples = 24
    options: ClassVar[Mapping[str, Option]] = {
        "point": Option(list[str] | None, "A pixel of the object. Repeatable.", metavar="X,Y"),
        "negative": Option(list[str] | None, "A pixel outside of it. Repeatable.", metavar="X,Y"),
        "box": Option(list[str] | None, "Corners around an object. Repeatable.", metavar="X0,Y0,X1,Y1"),
        "overlay": Option(Path | None, "Save the image with its masks under this name."),
    }

    def takes_base(self, config: Any) -> bool:
        from transformers import AutoModelForMaskGeneration

        return type(config) in AutoModelForMaskGeneration._model_mapping

    def takes_processor(self, processor: Any) -> bool:
        from transformers.image_processing_utils import BaseImageProcessor

        return isinstance(processor, BaseImageProcessor)

    def load_processor(self, base_name: str, settings: Record | None) -> Any:
        return load_mask_processor(base_name, settings)

    def processor_settings(self, processor: Any) -> Record:
        return mask_processor_settings(processor)

    def golden_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        """The golden image, asked for by a point and a box."""
        import torch

        pixels = process_golden(processor)["pixel_values"]  # 1 C H W
        side = pixels.shape[-1]
        point, box = torch.tensor([0.4, 0.55]) * side, torch.tensor([0.2, 0.3, 0.7, 0.9]) * side  # x y, x0 y0 x1 y1
        return {"pixel_values": pixels, "input_points": point[None, None, None], "input_boxes": box[None, None]}

    def golden_values(self, output: Any, count: int) -> Tensor:
        """Logits of the first mask, evenly spaced."""
        mask = output.pred_masks[0, 0, 0]  # h w
        spread = mask[mask.shape[0] // 16 :: mask.shape[0] // 8, mask.shape[1] // 16 :: mask.shape[1] // 8]
        return spread.flatten()[:count]

    def random_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        import torch

        pixels = random_inputs(processor, 1)["pixel_values"]
        side = pixels.shape[-1]
        return {
            "pixel_values": pixels,
            "input_points": torch.tensor([[[[0.4 * side, 0.55 * side]]]]),  # 1 image, 1 prompt, 1 point
            "input_boxes": torch.tensor([[[0.2 * side, 0.3 * side, 0.7 * side, 0.9 * side]]]),
        }

    def graph_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        """Of the image encoder.

        Raises:
            InlayError: A SAM 2, whose encoder gives three maps.
        """
        if hasattr(model.config.vision_config, "backbone_config"):
            raise Unsupported(
                "the image encoder of SAM 2 gives three maps to its mask decoder, and a graph here has one output; "
                "merge the adapter (`inlay merge`) and run the merged model in torch."
            )
        return random_inputs(processor, 2)

    def training_options(self) -> type[TaskOptions]:
        from inlay.tasks.masks.options import MaskTask

        return MaskTask

    def find_main_score(self, scores: Mapping[str, float]) -> float:
        return scores["mean_iou"]  # held-out images are scored by a point

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
        """Up to 8 objects of an image, asked for by points, boxes or both."""
        import numpy as np

        from inlay.tasks.masks.data import load_masks
        from inlay.tasks.masks.loss import MaskLoss
        from inlay.tasks.masks.view import MaskView, collate_masks

        masks = load_masks(data, **training.split_options(data))
        rows = masks.validation if held_out else masks.train
        order = np.random.default_rng(seed).permutation(len(rows))[:count]
        view = MaskView([rows[i] for i in order.tolist()], adapter.processor, seed=seed)
        return LabelledBatches(view, collate_masks, MaskLoss(), rows=1)

    def score_batches(self, model: Callable[..., Any], batches: Sequence[dict[str, Tensor]], loss: Loss) -> float:
        """The mean IoU of the masks that the model thinks best."""
        from inlay.tasks.masks.scores import compute_mean_iou

        return compute_mean_iou(model, batches, loss)

    def compute_features(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The image embedding, a row for each of its positions."""
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        encoded = inner.vision_encoder(batch["pixel_values"])
        levels = getattr(encoded, "fpn_hidden_states", None)  # SAM 2's, of which the last is the coarsest
        features = encoded.last_hidden_state if levels is None else levels[-1]  # B C h w
        return features.flatten(2).mT.flatten(0, 1)

    def planned_batch(
        self, base: Any, rows: int, length: int, added: int, crop: Sequence[int] | None = None
    ) -> tuple[dict[str, Tensor], Loss | None]:
        """One image a row with as many prompts as MaskView asks for in training."""
        import torch

        from inlay.tasks.masks.loss import MaskLoss
        from inlay.tasks.masks.view import OBJECTS

        vision, prompts = base.config.vision_config, base.config.prompt_encoder_config
        pixels = blank_inputs(getattr(vision, "backbone_config", vision), rows)[
            "pixel_values"
        ]  # SAM 2's names the size
        side = pixels.shape[-1]
        low = 4 * side // prompts.patch_size
        boxes = torch.tensor([0.2, 0.3, 0.7, 0.9]).mul(side).expand(rows, OBJECTS, 4).contiguous()
        labels = torch.zeros(rows, OBJECTS, low, low, dtype=torch.int8)
        return {"pixel_values": pixels, "input_boxes": boxes, "labels": labels}, MaskLoss()

    def prepare(self, inputs: Sequence[str], options: Mapping[str, Any]) -> Callable[[Adapter], Answer]:
        from inlay.tasks.masks.predict import draw_masks, parse_coordinates, predict_masks

        asked: dict[str, Any] = {
            "points": parse_coordinates(options["point"], 2),
            "negatives": parse_coordinates(options["negative"], 2),
            "boxes": parse_coordinates(options["box"], 4),
        }
        if len(inputs) != 1:
            raise BadInput(f"points and boxes belong to one image, got {len(inputs)}; give one at a time.")

        if options["overlay"] is not None:
            check_output_file(options["overlay"])

        def answer(adapter: Adapter) -> Answer:
            found = predict_masks(adapter, inputs[0], **asked)
            if options["overlay"] is not None:
                draw_masks(found, inputs[0], options["overlay"], **asked)
            rows = [
                {"pixels": area, "predicted_iou": round(score, 4)}
                for area, score in zip(found.areas, found.scores, strict=True)
            ]
            lines = [
                f"{found.source}: mask {k} of {row['pixels']:,} pixels, predicted IoU {row['predicted_iou']:.2f}"
                for k, row in enumerate(rows, 1)
            ]
            return Answer(lines, {"source": found.source, "masks": rows})

        return answer

    def evaluate(self, adapter: Adapter, data: str, request: Request) -> Evaluation:
        from inlay.tasks.masks.evaluate import evaluate

        return evaluate(adapter, data, request)

    def serving(self) -> Answering:
        from inlay.tasks.masks.serving import MaskServing

        return MaskServing()

    def describe_inputs(self, record: Record) -> list[str]:
        said = [
            "Prompts",
            "Points `x, y`, inside or outside of what is meant, and boxes `x0, y0, x1, y1`, in pixels of the image.",
        ]
        if record["preprocessing"].get("intensity") == "percentiles":
            said.append("Images of 16 bits are scaled by their 1st and 99th percentile, each by its own.")
        return said

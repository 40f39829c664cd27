"""The options of a promptable segmenter's task, and the steps of its recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from inlay.options import option
from inlay.tasks.options import Report, TaskData, TaskOptions, describe_run

if TYPE_CHECKING:
    from inlay.tasks.masks.view import MaskView, Prompts
    from inlay.train.loop import FitResult


@dataclass
class MaskTask(TaskOptions):
    """The promptable segmenter: its base, and its images with maps of the objects in them."""

    model: str = option("builtin:sam-tiny", "Embedded base, local folder or Hub id.")
    dataset: str = option("builtin:scenes", "Embedded, or folder of images/ and labels/.")
    meaning: Literal["instances", "classes"] = option("instances", "What a number in a map is: one object, or a class.")
    intensity: Literal["percentiles", "range"] = option(
        "percentiles", "Scale images of 16 bits by the 1st and 99th percentile of each, or by all of 0 to 65535."
    )
    crop: int | None = option(None, "Take parts of so many pixels, for small objects in large images.", least=16)

    def load(self, seed: int, *, test: bool = False) -> TaskData:
        """Images with maps of both splits, as `TaskOptions.load` says: points and boxes by turns in training."""
        from accelerate.utils import set_seed

        from inlay.bases.processors import load_processor
        from inlay.tasks.masks.data import load_masks
        from inlay.tasks.masks.loss import MaskLoss
        from inlay.tasks.masks.processing import choose_intensity
        from inlay.tasks.masks.scores import MaskIoU
        from inlay.tasks.masks.view import MaskView, collate_masks

        set_seed(seed)
        with self.offering_embedded_base():
            processor = choose_intensity(load_processor(self.model), self.intensity)
        data = load_masks(self.dataset, seed=seed, meaning=self.meaning, test=test, **self.split)
        box = self._scoring_view(data, processor, "box")
        return TaskData(
            data,
            MaskView(data.train, processor, turn=True, crop=self.crop, meaning=self.meaning),
            self._scoring_view(data, processor, "point"),
            processor,
            metrics=[MaskIoU()],
            collate=collate_masks,
            loss=MaskLoss(),
            example=lambda: {key: value[None] for key, value in box[0].items() if key != "labels"},
        )

    def report(self, model: Any, data: TaskData, result: FitResult) -> Report:
        """Mean IoU for a point, three points and a box, with the adapter and of the base without it; cost, settings."""
        from torch.utils.data import DataLoader

        from inlay.tasks.masks.scores import compute_mean_iou

        kinds: tuple[Prompts, ...] = ("point", "points", "box")
        views = {kind: self._scoring_view(data.source, data.processor, kind) for kind in kinds}
        loaders = {kind: DataLoader(view, batch_size=4) for kind, view in views.items()}
        after = {kind: compute_mean_iou(model, loader, data.loss) for kind, loader in loaders.items()}
        with model.disable_adapter():
            before = {kind: compute_mean_iou(model, loader, data.loss) for kind, loader in loaders.items()}
        metrics = describe_run(model, data, result)
        metrics["validation"] = {
            **result.metrics,
            **{f"mean_iou_{kind}": value for kind, value in after.items()},
            **{f"mean_iou_{kind}_before": value for kind, value in before.items()},
        }
        scores = ", ".join(f"{kind} {before[kind]:.3f} -> {after[kind]:.3f}" for kind in kinds)
        worse = [kind for kind in kinds if after[kind] < before[kind]]
        warning = (
            f"; with the adapter a {' and a '.join(worse)} is answered worse than by the base: use the base there, or "
            "train again with a lower --learning_rate or more images"
        )
        return Report(metrics, f"mean IoU without and with the adapter: {scores}{warning if worse else ''}")

    def _scoring_view(self, data: Any, processor: Any, prompts: Prompts) -> MaskView:
        from inlay.tasks.masks.view import scoring_view

        return scoring_view(data.validation, processor, prompts, crop=self.crop, meaning=self.meaning)

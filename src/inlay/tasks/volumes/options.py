"""The options of a segmenter of scans, and the steps of its recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inlay.errors import BadInput
from inlay.options import option
from inlay.tasks.options import Report, TaskData, TaskOptions, describe_run

if TYPE_CHECKING:
    from torch import nn

    from inlay.train.loop import FitResult

CROP = (32, 40, 40)  # voxels D, H, W that a model sees at a time, where nothing else is said


@dataclass
class VolumeTask(TaskOptions):
    """The segmenter of scans: its base, its scans, and what of them it sees at a time."""

    model: str = option("builtin:sam-tiny", "Embedded base, local folder or Hub id of a SAM.")
    dataset: str = option(
        "builtin:volumes",
        "Embedded data (builtin:volumes, builtin:channels, builtin:atlas), a Decathlon task, images/ and labels/ of "
        "scans, or a folder of .npz.",
    )
    crop: list[int] = option([*CROP], "Voxels D, H, W that the model sees at a time.", least=1)
    crops: int | None = option(None, "Crops of each scan in an epoch; default: 1.", least=1)
    spacing_mm: list[float] | None = option(
        None, "Resample scans to this spacing D, H, W; default: the median of the data.", above=0
    )
    window: list[float] | None = option(
        None, "CT: low and high end of the intensities, in HU; default: what holds the classes of the training scans."
    )
    flip: list[int] = option(
        [], "Axes along which crops are mirrored: 0 D, 1 H, 2 W (left and right); kept for `--flips`.", least=0, most=2
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention is not None:
            raise BadInput("the 3D encoder computes its attention in windows, by code of its own; leave attention out.")
        if self.window is not None and (len(self.window) != 2 or not self.window[0] < self.window[1]):
            raise BadInput(f"window must be two numbers of HU, low and high, got {self.window}.")
        for name, sizes in (("crop", self.crop), ("spacing_mm", self.spacing_mm)):
            if sizes is not None and len(sizes) != 3:
                raise BadInput(f"{name} must be three numbers D, H, W, got {sizes}.")

    def load(self, seed: int, *, test: bool = False) -> TaskData:
        """Scans of both splits, as `TaskOptions.load` says: crops in training, whole scans in evaluation."""
        from accelerate.utils import set_seed

        from inlay.tasks.volumes.data import find_present_classes, load_volumes
        from inlay.tasks.volumes.loss import WholeVolume
        from inlay.tasks.volumes.scan import VolumeProcessor
        from inlay.tasks.volumes.scores import VolumeDice
        from inlay.tasks.volumes.view import VolumeView, collate_volumes

        set_seed(seed)
        data = load_volumes(self.dataset, seed=seed, test=test, **self.split)
        spacing = tuple(self.spacing_mm) if self.spacing_mm else "median"
        processor = VolumeProcessor.fitted(data, tuple(self.crop), spacing, self.flip, self.window)  # type: ignore[arg-type]
        crops = VolumeView(data.validation, processor, training=True, augment=False, flip=())
        return TaskData(
            data,
            VolumeView(
                data.train, processor, training=True, crops=self.crops or 1, present=find_present_classes(data.train)
            ),
            VolumeView(data.validation, processor),
            processor,
            metrics=[VolumeDice(data.labels)],
            collate=collate_volumes,
            loss=WholeVolume(self.crop),
            example=lambda: {"pixel_values": crops[0]["pixel_values"][None]},  # 1 C D H W
        )

    def fit_method(self, config: Any, model: nn.Module, data: TaskData) -> Any:
        """A spatial adapter has a decoder for the classes of the data, and tokens that suit its crops and spacing."""
        from inlay.methods import SpatialAdapterConfig

        if not isinstance(config, SpatialAdapterConfig):
            return config
        return SpatialAdapterConfig.fitted(
            model,
            data.source.labels,
            self.crop,
            data.processor.spacing_mm,
            channels=data.processor.channels,
            width=config.width,
        )

    def report(self, model: nn.Module, data: TaskData, result: FitResult) -> Report:
        """Dice of whole scans without any click, cost and settings."""
        summary = f"Dice {result.metrics['dice']:.4f} at step {result.best_step}"
        return Report(describe_run(model, data, result), summary)

"""Segmentation of volumes: the class of each voxel of a 3D scan."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from inlay.errors import BadInput, Unsupported
from inlay.tasks.golden import golden_scan
from inlay.tasks.printing import printable
from inlay.tasks.task import Answer, LabelledBatches, Option, PlannedData, Record, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inlay.tasks.adapter import Adapter
    from inlay.tasks.evaluation import Evaluation, Request, Training
    from inlay.tasks.options import TaskOptions
    from inlay.tasks.serving import Answering
    from inlay.train.losses import Loss


class VolumeSegmentation(Task):
    """Bases are SAMs, which the 3D spatial adapter turns into segmenters of volumes."""

    name = "volume-segmentation"
    auto_class = "AutoModelForMaskGeneration"
    base_noun = "a SAM for volumes"
    hub_tag = "image-segmentation"
    base_kinds = ("volume",)
    function = "segment"
    main_score = "dice"
    limits = (
        "It is no medical device and has not been validated for clinical use; scanners, protocols and patients unlike "
        "those of the training data can give wrong masks without a sign."
    )
    usage = (
        'from inlay import load_adapter, segment\n\nadapter = load_adapter("FOLDER")\n'
        'print(segment(adapter, "scan.nii.gz").volumes_ml)'
    )
    inputs = "a scan, to segment"
    options: ClassVar[Mapping[str, Option]] = {
        "out": Option(
            Path | None,
            "Save the mask: .nii.gz, .nrrd, .seg.nrrd, .mha, .mgz, .dcm of DICOM.",
            metavar="MASK",
        ),
    }
    score_options: ClassVar[Mapping[str, Option]] = {
        "tolerance_mm": Option(float, "Distance of surfaces that surface Dice takes for none.", 1.0),
        "plot": Option(Path | None, "Draw a box of each class and score, with a point a scan.", metavar="FILE.png"),
        "worst": Option(int | None, "Draw so many scans of the lowest Dice, with both masks.", least=1),
        "worst_folder": Option(Path | None, "Where they go; default: worst.", metavar="FOLDER"),
    }

    def takes_base(self, config: Any) -> bool:
        """A SAM by itself is for masks in images: only its adapter makes it one for volumes."""
        return False

    def could_take_base(self, config: Any) -> bool:
        from transformers import AutoModelForMaskGeneration

        return type(config) in AutoModelForMaskGeneration._model_mapping

    def takes_processor(self, processor: Any) -> bool:
        from inlay.tasks.volumes.scan import VolumeProcessor

        return isinstance(processor, VolumeProcessor)

    def load_processor(self, base_name: str, settings: Record | None) -> Any:
        from inlay.tasks.volumes.scan import VolumeProcessor

        return VolumeProcessor.from_dict(settings or {})

    def labels(self, base: Any, method: Any) -> list[str]:
        """Of the adapter's own decoder, without background."""
        configs = (method, *getattr(method, "parts", []))
        return next((list(config.classes) for config in configs if hasattr(config, "classes")), [])

    def restore_labels(self, method: Any, labels: Sequence[str]) -> None:
        """Earlier files hold `classes` in alphabetical order; the record has that of the outputs."""
        for config in (method, *getattr(method, "parts", [])):
            if sorted(getattr(config, "classes", [])) == sorted(labels):
                config.classes = list(labels)

    def golden_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        import numpy as np
        import torch

        scan = golden_scan()  # of several channels each is moved by some voxels
        channels = [processor.normalise(np.roll(scan, 5 * i, axis=2), i) for i in range(len(processor.channels))]
        return {"pixel_values": torch.from_numpy(np.stack(channels))[None]}  # 1 C D H W

    def golden_values(self, output: Any, count: int) -> Tensor:
        """Logits without a prompt, evenly spaced."""
        return output.logits.flatten()[:: output.logits.numel() // count][:count]

    def check_merges(self, name: str) -> None:
        raise Unsupported(f"adapter {name!r} makes a model for scans of one for images; use it unmerged.")

    def random_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        import torch

        shape = (1, len(processor.channels), *processor.crop)
        return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0))}

    def training_options(self) -> type[TaskOptions]:
        from inlay.tasks.volumes.options import VolumeTask

        return VolumeTask

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
        """A crop of each scan, without prompts."""
        import numpy as np

        from inlay.tasks.volumes.data import load_volumes
        from inlay.tasks.volumes.view import VolumeView, collate_volumes
        from inlay.train.losses import ModelLoss

        volumes = load_volumes(data, **training.split_options(data))
        if list(volumes.labels) != adapter.labels:
            raise BadInput(
                f"the data {data!r} has the classes {', '.join(volumes.labels)}, but the combination has "
                f"{', '.join(adapter.labels)}; fit on data with the same classes."
            )
        split = volumes.validation if held_out else volumes.train
        cases = [split[i] for i in np.random.default_rng(seed).permutation(len(split))[:count].tolist()]
        view = VolumeView(cases, adapter.processor, training=True, augment=False, flip=())
        return LabelledBatches(view, collate_volumes, ModelLoss(), rows=1)

    def compute_features(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        raise Unsupported("the base without its adapter reads no scans, so that there are no features to compare with.")

    def fit_planned(self, config: Any, base: Any, data: PlannedData) -> Any:
        """A decoder for so many classes and channels, and tokens that suit crop and spacing."""
        from inlay.methods import SpatialAdapterConfig
        from inlay.tasks.volumes.options import CROP

        for name in ("labels", "channels"):
            count = getattr(data, name)
            if count is not None and count < 1:
                raise BadInput(f"{name} must be at least 1, not {count}.")
        for name, sizes in (("crop", data.crop), ("spacing_mm", data.spacing_mm)):
            if sizes is not None and (len(sizes) != 3 or not all(0 < size < math.inf for size in sizes)):
                given = " ".join(f"{size:g}" for size in sizes)
                raise BadInput(f"{name} must be three numbers above 0, for D, H and W, not {given}.")
        return SpatialAdapterConfig.fitted(
            base,
            [f"class_{i}" for i in range(data.labels or 1)],
            data.crop or CROP,
            data.spacing_mm,
            channels=[f"channel_{i}" for i in range(data.channels or 1)],
            width=config.width,
        )

    def planned_batch(
        self, base: Any, rows: int, length: int, added: int, crop: Sequence[int] | None = None
    ) -> tuple[dict[str, Tensor], Loss | None]:
        """Crops with labels, of the channels that an adapter in the base takes, on the base's device."""
        import torch

        from inlay.methods.spatial.adapter import SpatialEncoderLayer
        from inlay.tasks.volumes.options import CROP

        encoder = base.vision_encoder
        configs = encoder.options.values() if isinstance(encoder, SpatialEncoderLayer) else ()
        channels = max((config.channel_count for config in configs), default=1)
        pixels = torch.zeros(rows, channels, *(crop or CROP), device=next(base.parameters()).device)
        return {"pixel_values": pixels, "labels": torch.zeros_like(pixels[:, 0], dtype=torch.long)}, None

    def prepare(self, inputs: Sequence[str], options: Mapping[str, Any]) -> Callable[[Adapter], Answer]:
        from inlay.tasks.volumes.segment import MASKS, check_output, segment

        if len(inputs) != 1:
            raise BadInput(f"give one scan at a time, got {len(inputs)}.")
        out = options["out"]
        if out is not None:
            check_output(out, MASKS, inputs[0])

        def answer(adapter: Adapter) -> Answer:
            found = segment(adapter, inputs[0])
            lines = [f"{printable(name)}: {volume:.4g} ml" for name, volume in found.volumes_ml.items()]
            facts: dict[str, Any] = {"source": inputs[0], "volumes_ml": found.volumes_ml}
            if out is not None:
                facts["mask"] = str(found.save(out))
                lines.append(f"mask: {facts['mask']}")
            return Answer(lines, facts)

        return answer

    def evaluate(self, adapter: Adapter, data: str, request: Request) -> Evaluation:
        from inlay.tasks.volumes.evaluate import evaluate

        return evaluate(adapter, data, request)

    def serving(self) -> Answering:
        from inlay.tasks.volumes.serving import VolumeServing

        return VolumeServing()

    def describe_inputs(self, record: Record) -> list[str]:
        settings = record["preprocessing"]
        spacing = settings["spacing_mm"] and " x ".join(f"{s:g}" for s in settings["spacing_mm"])
        crop = " x ".join(map(str, settings["crop"]))
        grid = f"resampled to {spacing} mm (D, H, W)" if spacing else "kept at their own spacing"
        channels = settings.get("channels", [])
        first = f"A scan has the channels {', '.join(channels)}, in that order. " if channels else ""
        said = f"{first}Scans are reoriented to RAS, {grid}, and processed {crop} voxels at a time."
        values = settings.get("values") or range(1, len(record["labels"]) + 1)
        names = {0: "background", **dict(zip(values, record["labels"], strict=False))}
        listed = ", ".join(f"{value} = {label}" for value, label in list(names.items())[:50])
        return ["Labels", listed + (" ..." if len(names) > 50 else ""), said]

"""Turn SAM into a segmenter of 3D scans with the spatial adapter, then measure and save the adapter.

    accelerate launch recipes/spatial_sam.py                                  # embedded SAM and scans, no download
    accelerate launch recipes/spatial_sam.py --model facebook/sam-vit-base --dataset Task04_Hippocampus \\
        --crop 64 64 64 --precision bf16 --gradient_checkpointing --batch_size 2
    inlay segment runs/spatial_sam/adapter SCAN.nii.gz -o mask.nii.gz --html page.html

Training uses crops, with clicks as a user would give them. Whole scans are scored, without clicks.
"""

from dataclasses import dataclass
from pathlib import Path

from inlay import TrainConfig, VolumeTask, option, run_recipe


@dataclass
class Spatial:
    """3DSAM-adapter: Gong et al. 2023, arXiv:2306.13465."""

    width: int | None = option(None, "Bottleneck size; default: a quarter of SAM's width.", least=1)
    token: int = option(
        4, "Width of a token in voxels; its depth is the same, or less where slices are thick.", least=1
    )


def main(method: Spatial, task: VolumeTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import get_peft_model

    from inlay import SpatialAdapterConfig, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the adapter and its decoder are trainable
    config = SpatialAdapterConfig.fitted(
        model,
        data.source.labels,
        task.crop,
        data.processor.spacing_mm,
        method.token,
        data.processor.channels,
        width=method.width,
    )
    model = get_peft_model(model, config)

    # 3. train
    result = task.fit(model, data, train, method)

    # 4. measure
    report = task.report(model, data, result)

    # 5. save
    folder = Path(train.output_dir) / "adapter"
    save_adapter(model, folder, processor=data.processor, metrics=report.metrics, dtype="float16")
    report.announce(folder)
    return folder


if __name__ == "__main__":
    run_recipe(
        main,
        Spatial(),
        VolumeTask(),
        TrainConfig(output_dir="runs/spatial_sam", epochs=16, batch_size=2, embedded_rate=4e-3),
    )

"""Turn SAM into a segmenter of 3D scans with the spatial adapter, then measure and save the adapter.

    accelerate launch recipes/spatial_sam.py                                  # embedded SAM and scans, no download
    accelerate launch recipes/spatial_sam.py --model facebook/sam-vit-base --dataset Task04_Hippocampus \\
        --crop 64 64 64 --precision bf16 --gradient_checkpointing --batch_size 2
    inlay segment runs/spatial_sam/adapter SCAN.nii.gz -o mask.nii.gz --html page.html

Trained is on crops, with clicks as a user would give them; scored are whole scans, without any. 3DSAM-adapter: Gong et
al. 2023, arXiv:2306.13465.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from inlay import TrainConfig, run_recipe


@dataclass
class Recipe:
    """What is adapted, and how."""

    model: str = field(default="builtin:sam-tiny", metadata={"help": "Embedded base, local folder or Hub id of a SAM."})
    dataset: str = field(
        default="builtin:volumes",
        metadata={"help": "Embedded data, a Decathlon task, images/ and labels/ of NIfTI files, or a folder of .npz."},
    )
    width: int | None = field(default=None, metadata={"help": "Bottleneck size; default: a quarter of SAM's width."})
    token: int = field(
        default=4, metadata={"help": "Voxels that a token is wide; as deep, or less where slices are thick."}
    )
    crop: list[int] = field(
        default_factory=lambda: [32, 40, 40], metadata={"help": "Voxels D, H, W that the model sees at a time."}
    )
    spacing_mm: list[float] | None = field(
        default=None, metadata={"help": "Resample scans to this spacing D, H, W; default: the median of the data."}
    )
    flip: list[int] = field(
        default_factory=list, metadata={"help": "Axes along which crops are mirrored: 0 D, 1 H, 2 W (left and right)."}
    )
    quantize: Literal["8bit", "4bit"] | None = field(
        default=None, metadata={"help": "Hold the frozen base in 8 or 4 bits (bitsandbytes)."}
    )


def main(recipe: Recipe, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from accelerate import PartialState
    from accelerate.utils import set_seed
    from peft import get_peft_model

    from inlay import SpatialAdapterConfig, VolumeProcessor, VolumeView, fit, load_base, load_volumes, save_adapter
    from inlay.measure import cost
    from inlay.tasks.volumes.loss import WholeVolume
    from inlay.tasks.volumes.scores import VolumeDice
    from inlay.tasks.volumes.view import collate_volumes

    # 1. data and frozen base
    set_seed(train.seed)
    data = load_volumes(recipe.dataset, seed=train.seed)
    spacing = tuple(recipe.spacing_mm) if recipe.spacing_mm else "median"
    processor = VolumeProcessor.fitted(data, tuple(recipe.crop), spacing)  # type: ignore[arg-type]
    model = load_base(recipe.model, quantize=recipe.quantize)

    # 2. method: the adapter and its decoder are trained, SAM stays
    method = SpatialAdapterConfig.fitted(
        model, data.labels, recipe.crop, processor.spacing_mm, recipe.token, width=recipe.width
    )
    model = get_peft_model(model, method)

    # 3. train
    result = fit(
        model,
        VolumeView(data.train, processor, training=True, flip=recipe.flip),
        VolumeView(data.validation, processor),
        train,
        metrics=[VolumeDice(data.labels)],
        collate=collate_volumes,
        loss=WholeVolume(recipe.crop),
        settings=asdict(recipe),
    )

    # 4. measure
    example = VolumeView(data.validation, processor, training=True, augment=False)[0]["pixel_values"][None]  # 1 1 D H W
    metrics = {
        "validation": result.metrics,
        "dataset": data.name,
        "history": result.history,
        "cost": cost(model, {"pixel_values": example}),
        "training": {
            **asdict(recipe),
            **train.identity(),
            "steps": result.steps,
            "seconds": round(result.seconds, 1),
        },
    }

    # 5. save
    folder = save_adapter(
        model, Path(train.output_dir) / "adapter", processor=processor, metrics=metrics, dtype="float16"
    )
    PartialState().print(f"Dice {result.metrics['dice']:.4f} at step {result.best_step}; saved {folder}")
    return folder


if __name__ == "__main__":
    run_recipe(main, Recipe(), TrainConfig(output_dir="runs/spatial_sam", epochs=16, batch_size=2, learning_rate=4e-3))

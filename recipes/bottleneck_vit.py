"""Fine-tune an image classifier with bottleneck adapters, then measure and save the adapter.

    accelerate launch recipes/bottleneck_vit.py                       # embedded base and data, no download
    accelerate launch recipes/bottleneck_vit.py --placement parallel --sites mlp --scale 0.1    # AdaptFormer
    accelerate launch recipes/bottleneck_vit.py --activation none     # linear: merges into the weights, no latency

Serial after attention and MLP: Houlsby et al. 2019, arXiv:1902.00751; after the MLP alone (`--sites mlp`): Pfeiffer et
al. 2020, arXiv:2005.00052; parallel: He et al. 2021, arXiv:2110.04366; linear: Luo et al. 2023, arXiv:2302.08106.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from inlay import TrainConfig, run_recipe


@dataclass
class Recipe:
    """What is adapted, and how."""

    model: str = field(default="builtin:vit-tiny", metadata={"help": "Embedded base, local folder or Hub id."})
    dataset: str = field(
        default="builtin:digits", metadata={"help": "Embedded data, folder of class folders, file or Hub id."}
    )
    width: int = field(default=8, metadata={"help": "Bottleneck size."})
    sites: list[str] = field(default_factory=lambda: ["attention", "mlp"], metadata={"help": "attention, mlp or both."})
    placement: Literal["serial", "parallel"] = field(
        default="serial", metadata={"help": "On the sublayer's output, or beside it on its input."}
    )
    activation: str = field(default="relu", metadata={"help": "Non-linearity by its name in transformers, or none."})
    scale: float = field(default=1.0, metadata={"help": "Factor of what the adapter adds."})
    augment: Literal["none", "crop", "crop-flip"] = field(
        default="crop",
        metadata={"help": "Random crops, and mirror images where left and right do not matter."},
    )


def main(recipe: Recipe, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from accelerate import PartialState
    from accelerate.utils import set_seed
    from peft import get_peft_model

    from inlay import BottleneckConfig, ImageView, fit, load_base, load_images, load_processor, save_adapter
    from inlay.bases.sites import head_modules
    from inlay.measure import cost
    from inlay.tasks.metrics import Accuracy

    # 1. data and frozen base
    set_seed(train.seed)
    data = load_images(recipe.dataset, seed=train.seed)
    model = load_base(recipe.model, labels=data.labels)
    processor = load_processor(recipe.model)

    # 2. method: only the adapter and the new head are trainable
    method = BottleneckConfig(
        width=recipe.width,
        sites=recipe.sites,
        placement=recipe.placement,
        activation=None if recipe.activation == "none" else recipe.activation,
        scale=recipe.scale,
        modules_to_save=head_modules(model),
    )
    model = get_peft_model(model, method)

    # 3. train
    result = fit(
        model,
        ImageView(data.train, processor, recipe.augment),
        ImageView(data.validation, processor),
        train,
        metrics=[Accuracy()],
        settings=asdict(recipe),
    )

    # 4. measure
    example = ImageView(data.validation, processor)[0]["pixel_values"][None]  # 1 C H W
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
    folder = save_adapter(model, Path(train.output_dir) / "adapter", processor=processor, metrics=metrics)
    PartialState().print(f"accuracy {result.metrics['accuracy']:.4f} at step {result.best_step}; saved {folder}")
    return folder


if __name__ == "__main__":
    run_recipe(main, Recipe(), TrainConfig(output_dir="runs/bottleneck_vit", learning_rate=1e-2))

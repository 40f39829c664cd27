"""Fine-tune an image classifier with a prefix in every attention, then measure and save the adapter.

    accelerate launch recipes/prefix_vit.py                           # embedded base and data, no download
    accelerate launch recipes/prefix_vit.py --length 32 --projection 64
    accelerate launch recipes/prefix_vit.py --model FOLDER --dataset FOLDER --quantize 8bit --optimizer adamw8bit

Learned keys and values in front of those of the image's tokens: Li & Liang 2021, arXiv:2101.00190. With `--projection`
an MLP makes them while training; the file holds keys and values alone.
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
    length: int = field(default=16, metadata={"help": "Prefix length: keys and values in each block."})
    projection: int | None = field(
        default=None, metadata={"help": "Hidden size of an MLP that makes the prefix while training; default: none."}
    )
    quantize: Literal["8bit", "4bit"] | None = field(
        default=None, metadata={"help": "Hold the frozen base in 8 or 4 bits (bitsandbytes)."}
    )
    augment: Literal["none", "crop", "crop-flip"] = field(
        default="crop",
        metadata={"help": "Random crops, and mirror images where left and right do not matter."},
    )


def main(recipe: Recipe, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from accelerate import PartialState
    from accelerate.utils import set_seed
    from peft import get_peft_model

    from inlay import AttentionPrefixConfig, ImageView, fit, load_base, load_images, load_processor, save_adapter
    from inlay.bases.sites import head_modules
    from inlay.measure import cost
    from inlay.tasks.metrics import Accuracy

    # 1. data and frozen base
    set_seed(train.seed)
    data = load_images(recipe.dataset, seed=train.seed)
    model = load_base(recipe.model, labels=data.labels, quantize=recipe.quantize)
    processor = load_processor(recipe.model)

    # 2. method: only the adapter and the new head are trainable
    method = AttentionPrefixConfig(
        length=recipe.length, projection=recipe.projection, modules_to_save=head_modules(model)
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
    run_recipe(main, Recipe(), TrainConfig(output_dir="runs/prefix_vit", learning_rate=5e-2))

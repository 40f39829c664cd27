"""Fine-tune an image classifier with LoRA, then measure and save the adapter.

    accelerate launch recipes/lora_vit.py                             # embedded base and data, no download
    accelerate launch recipes/lora_vit.py --model google/vit-base-patch16-224-in21k --dataset FOLDER --augment crop-flip
    accelerate launch recipes/lora_vit.py --model facebook/dinov2-small --quantize 8bit --optimizer adamw8bit

The base is any image classifier of transformers: ViT, DeiT, DINOv2, Swin and ConvNeXt get LoRA on their linear layers,
MobileNets and ResNets on their point-wise convolutions. LoRA: Hu et al. 2021, arXiv:2106.09685. For another method of
peft change `method`.
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
    rank: int = field(default=8, metadata={"help": "Rank r of the update B·A."})
    alpha: int = field(default=16, metadata={"help": "Scale of the update: alpha / r."})
    sites: Literal["all", "attention"] = field(
        default="all", metadata={"help": "Every linear layer (in a network of convolutions the 1x1 ones), or q and v."}
    )
    quantize: Literal["8bit", "4bit"] | None = field(
        default=None, metadata={"help": "Hold the frozen base in 8 or 4 bits (bitsandbytes)."}
    )
    augment: Literal["none", "crop", "crop-flip"] = field(
        default="crop",
        metadata={"help": "Random crops, and mirror images where left and right do not matter."},
    )
    corrupt: Literal["refuse", "skip"] = field(
        default="refuse", metadata={"help": "What to do with pictures that cannot be read."}
    )


def main(recipe: Recipe, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from accelerate import PartialState
    from accelerate.utils import set_seed
    from peft import LoraConfig, get_peft_model

    from inlay import ImageView, fit, load_base, load_images, load_processor, save_adapter
    from inlay.bases.sites import head_modules, lora_targets
    from inlay.measure import cost
    from inlay.tasks.metrics import Accuracy

    # 1. data and frozen base
    set_seed(train.seed)
    data = load_images(recipe.dataset, seed=train.seed, corrupt=recipe.corrupt)
    model = load_base(recipe.model, labels=data.labels, quantize=recipe.quantize)
    processor = load_processor(recipe.model)

    # 2. method: only the adapter and the new head are trainable
    method = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=lora_targets(model, recipe.sites),
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
    run_recipe(main, Recipe(), TrainConfig(output_dir="runs/lora_vit"))

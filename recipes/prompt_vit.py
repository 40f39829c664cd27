"""Fine-tune an image classifier with visual prompts, then measure and save the adapter.

    accelerate launch recipes/prompt_vit.py                           # embedded base and data, no download
    accelerate launch recipes/prompt_vit.py --depth shallow --length 50
    accelerate launch recipes/prompt_vit.py --model facebook/dinov2-small --dataset FOLDER --length 20

Deep prompts enter every block, shallow ones the first: VPT, Jia et al. 2022, arXiv:2203.12119. The base is a ViT-like
encoder: ViT, DeiT, DINOv2, CLIP.
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
    length: int = field(default=10, metadata={"help": "Prompt length: tokens in each block that has prompts."})
    depth: Literal["deep", "shallow"] = field(
        default="deep", metadata={"help": "Prompts in every block, or in the first alone."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the prompts."})
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

    from inlay import ImageView, VisualPromptConfig, fit, load_base, load_images, load_processor, save_adapter
    from inlay.bases.sites import head_modules
    from inlay.measure import cost
    from inlay.tasks.metrics import Accuracy

    # 1. data and frozen base
    set_seed(train.seed)
    data = load_images(recipe.dataset, seed=train.seed)
    model = load_base(recipe.model, labels=data.labels, quantize=recipe.quantize)
    processor = load_processor(recipe.model)

    # 2. method: only the adapter and the new head are trainable
    method = VisualPromptConfig(
        length=recipe.length,
        deep=recipe.depth == "deep",
        dropout=recipe.dropout,
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
    run_recipe(main, Recipe(), TrainConfig(output_dir="runs/prompt_vit", learning_rate=3e-2))

"""Fine-tune an image classifier with several methods in one adapter, then measure and save it.

    accelerate launch recipes/composite_vit.py                        # mix and match: prefix and parallel bottleneck
    accelerate launch recipes/composite_vit.py --methods lora prompt
    accelerate launch recipes/composite_vit.py --methods lora prefix bottleneck --width 4

They are trained together and saved in one file. Mix and match (MAM): He et al. 2021, arXiv:2110.04366, section 4.6.
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
    methods: list[str] = field(
        default_factory=lambda: ["prefix", "bottleneck"],
        metadata={"help": "Two or more of lora, prefix, bottleneck (beside the MLP), prompt."},
    )
    width: int = field(default=8, metadata={"help": "Rank, bottleneck size, prefix and prompt length."})
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
    from peft import LoraConfig, get_peft_model

    from inlay import (
        AttentionPrefixConfig,
        BottleneckConfig,
        CompositeConfig,
        ImageView,
        InlayError,
        VisualPromptConfig,
        fit,
        load_base,
        load_images,
        load_processor,
        save_adapter,
    )
    from inlay.bases.sites import head_modules, lora_targets
    from inlay.measure import cost
    from inlay.tasks.metrics import Accuracy

    # 1. data and frozen base
    set_seed(train.seed)
    data = load_images(recipe.dataset, seed=train.seed)
    model = load_base(recipe.model, labels=data.labels, quantize=recipe.quantize)
    processor = load_processor(recipe.model)

    # 2. method: only the adapter and the new head are trainable
    width = recipe.width
    parts = {
        "lora": LoraConfig(r=width, lora_alpha=2 * width, target_modules=lora_targets(model)),
        "prefix": AttentionPrefixConfig(length=width),
        "bottleneck": BottleneckConfig(width=width, sites=["mlp"], placement="parallel", scale=4.0),
        "prompt": VisualPromptConfig(length=width),
    }
    if unknown := set(recipe.methods) - set(parts):
        raise InlayError(f"methods must be among {', '.join(parts)}, got {', '.join(sorted(unknown))}.")
    method = CompositeConfig(parts=[parts[name] for name in recipe.methods], modules_to_save=head_modules(model))
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
    run_recipe(main, Recipe(), TrainConfig(output_dir="runs/composite_vit", learning_rate=1e-2))

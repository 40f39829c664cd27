"""Fine-tune the last blocks of an image classifier, or its biases or norms, and save the difference to the base.

    accelerate launch recipes/partial_vit.py                          # the last block of the embedded base
    accelerate launch recipes/partial_vit.py --train_what bias             # BitFit, in every block
    accelerate launch recipes/partial_vit.py --last 2 --augment none --cache_frozen memory

With `--cache_frozen` the frozen blocks run once per picture and their output is kept. BitFit: Ben Zaken et al. 2022,
arXiv:2106.10199. The saved difference is a task vector: Ilharco et al. 2023, arXiv:2212.04089.
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
    last: int | None = field(
        default=None, metadata={"help": "Train the last so many blocks; default: 1, or every block for bias and norm."}
    )
    train_what: Literal["all", "bias", "norm"] = field(
        default="all", metadata={"help": "All weights of the chosen blocks, their biases or their norms."}
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

    from inlay import ImageView, PartialConfig, fit, load_base, load_images, load_processor, save_adapter
    from inlay.bases.sites import head_modules
    from inlay.measure import cost
    from inlay.tasks.metrics import Accuracy

    # 1. data and frozen base
    set_seed(train.seed)
    data = load_images(recipe.dataset, seed=train.seed)
    model = load_base(recipe.model, labels=data.labels)
    processor = load_processor(recipe.model)

    # 2. method: only the adapter and the new head are trainable
    last = 1 if recipe.last is None and recipe.train_what == "all" else recipe.last
    method = PartialConfig(last=last, train=recipe.train_what, modules_to_save=head_modules(model))
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
    run_recipe(main, Recipe(), TrainConfig(output_dir="runs/partial_vit", learning_rate=3e-3))

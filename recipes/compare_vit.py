"""Put the methods of METHODS beside a linear probe and full fine-tuning of the same base: one table, several seeds.

    accelerate launch recipes/compare_vit.py
    accelerate launch recipes/compare_vit.py --methods all --epochs 5
    accelerate launch recipes/compare_vit.py --model FOLDER --dataset FOLDER --epochs 5 --seeds 0 --augment crop-flip

Every method sees the same batches for the same number of epochs, at a learning rate of its own. A run that is
broken off goes on when the command is given again.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from inlay import TrainConfig, run_recipe


@dataclass
class Recipe:
    """What is compared, and on what."""

    model: str = field(default="builtin:vit-tiny", metadata={"help": "Embedded base, local folder or Hub id."})
    dataset: str = field(
        default="builtin:digits", metadata={"help": "Embedded data, folder of class folders, file or Hub id."}
    )
    methods: list[str] = field(
        default_factory=lambda: ["probe", "lora", "full"],
        metadata={"help": "Names in METHODS, or all that suit a vision transformer."},
    )
    learning_rates: list[float] = field(
        default_factory=list, metadata={"help": "One for each method; default: those of METHODS."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run of each method per seed."})
    width: int = field(default=8, metadata={"help": "Rank or other width of the adapters."})
    augment: Literal["none", "crop", "crop-flip"] = field(default="crop", metadata={"help": "As in lora_vit.py."})


def main(recipe: Recipe, train: TrainConfig) -> None:
    """Train all, print the table, write it down."""
    from accelerate import PartialState

    from inlay.files.atomic import write_json
    from inlay.methods import METHODS
    from inlay.study.compare import compare_images, table

    every = [name for name, method in METHODS.items() if "vision" in method.bases and name != "pissa"]

    # 1. to 4.: data, method, training and measurement, for every method and seed
    rows = compare_images(
        recipe.model,
        recipe.dataset,
        train,
        methods=every if recipe.methods == ["all"] else recipe.methods,
        learning_rates=recipe.learning_rates,
        seeds=recipe.seeds,
        width=recipe.width,
        augment=recipe.augment,
    )

    # 5. save
    if PartialState().is_main_process:
        write_json(Path(train.output_dir) / "comparison.json", [asdict(row) for row in rows])
        print(f"\n{recipe.model} on {recipe.dataset}, {train.epochs:g} epochs, seeds {recipe.seeds}\n\n{table(rows)}")


if __name__ == "__main__":
    run_recipe(main, Recipe(), TrainConfig(output_dir="runs/compare_vit"))

"""Compare ways to fine-tune a language model, on the same data and for the same steps, over several seeds.

    accelerate launch recipes/compare_gpt2.py
    accelerate launch recipes/compare_gpt2.py --methods all --epochs 3
    accelerate launch recipes/compare_gpt2.py --model FOLDER --dataset pairs.csv --methods lora full --seeds 0

Every method sees the same batches, at a learning rate of its own, and writes a text for every prompt of the test split.
A run that is broken off goes on when the command is given again.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from inlay import Decoding, TrainConfig, run_recipe


@dataclass
class Recipe:
    """What is compared, and on what."""

    model: str = field(default="builtin:gpt2-tiny", metadata={"help": "Embedded base, local folder or Hub id."})
    dataset: str = field(
        default="builtin:restaurants",
        metadata={"help": "Embedded data, .csv, .jsonl, .parquet or .txt file, folder of them, or Hub id."},
    )
    methods: list[str] = field(
        default_factory=lambda: ["lora", "bottleneck", "attention-prefix", "prompt", "partial", "full"],
        metadata={"help": "Names in METHODS, or all that suit a language model."},
    )
    learning_rates: list[float] = field(
        default_factory=list, metadata={"help": "One for each method; default: those of METHODS."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run of each method per seed."})
    width: int = field(default=16, metadata={"help": "Rank, prompt length or other width of the adapters."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest example in tokens; default: what the base reads."}
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Of the training loss, 0 to 1."})


def main(recipe: Recipe, train: TrainConfig, decoding: Decoding) -> None:
    """Train all, print the table, write it down."""
    from accelerate import PartialState

    from inlay.files.atomic import write_json
    from inlay.methods import METHODS
    from inlay.study.compare import compare_texts, table

    every = [name for name, method in METHODS.items() if "text" in method.bases and name != "pissa"]

    # 1. to 4.: data, method, training, texts and their scores, for every method and seed
    rows = compare_texts(
        recipe.model,
        recipe.dataset,
        train,
        methods=every if recipe.methods == ["all"] else recipe.methods,
        learning_rates=recipe.learning_rates,
        seeds=recipe.seeds,
        width=recipe.width,
        max_length=recipe.max_length,
        label_smoothing=recipe.label_smoothing,
        decoding=decoding,
    )

    # 5. save
    if PartialState().is_main_process:
        write_json(Path(train.output_dir) / "comparison.json", [asdict(row) for row in rows])
        print(f"\n{recipe.model} on {recipe.dataset}, {train.epochs:g} epochs, seeds {recipe.seeds}\n\n{table(rows)}")


if __name__ == "__main__":
    run_recipe(
        main,
        Recipe(),
        TrainConfig(output_dir="runs/compare_gpt2", epochs=1, workers=0),
        Decoding(max_new_tokens=96, decode_batch=64),
    )

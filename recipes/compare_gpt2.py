"""Compare ways to fine-tune a language model, on the same data and for the same steps, over several seeds.

    accelerate launch recipes/compare_gpt2.py
    accelerate launch recipes/compare_gpt2.py --methods all --epochs 3
    accelerate launch recipes/compare_gpt2.py --model FOLDER --dataset pairs.csv --methods lora full --seeds 0

Every method sees the same batches, at a learning rate of its own, and writes a text for every prompt of the test split.
A run that is broken off goes on when the command is given again.
"""

from dataclasses import asdict, dataclass

from inlay import Decoding, TextTask, TrainConfig, option, run_recipe


@dataclass
class Comparison:
    """What is compared: methods, each at its own rate, over several seeds."""

    methods: list[str] = option(
        ["lora", "bottleneck", "attention-prefix", "prompt", "partial", "full"],
        "Names in METHODS, or all that suit a language model.",
    )
    learning_rates: list[float] = option([], "One for each method; default: those of METHODS.", above=0)
    seeds: list[int] = option([0, 1, 2], "One run of each method per seed.", least=0)
    width: int = option(16, "Rank, prompt length or other width of the adapters.", least=1)


def main(comparison: Comparison, task: TextTask, train: TrainConfig, decoding: Decoding) -> None:
    """Train all, print the table, write it down."""
    from inlay import compare_texts, save_comparison

    # 1. to 4.: data, method, training, texts and their scores, for every method and seed
    rows = compare_texts(task, train, **asdict(comparison), decoding=decoding)

    # 5. save
    title = f"{task.model} on {task.dataset}, {train.epochs:g} epochs, seeds {comparison.seeds}"
    save_comparison(rows, train.output_dir, title)


if __name__ == "__main__":
    run_recipe(
        main,
        Comparison(),
        TextTask(),
        TrainConfig(output_dir="runs/compare_gpt2", epochs=1, workers=0),
        Decoding(max_new_tokens=96, decode_batch=64),
    )

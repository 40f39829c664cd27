"""Compare methods of fine-tuning a language model on the same data and steps, over several seeds.

    accelerate launch recipes/compare_gpt2.py
    accelerate launch recipes/compare_gpt2.py --methods all --epochs 3
    accelerate launch recipes/compare_gpt2.py --model FOLDER --dataset pairs.csv --methods lora full --seeds 0

Every method sees the same batches at its own learning rate, and writes a text for every prompt of the test split. After
an interruption, the same command resumes.
"""

from dataclasses import asdict, dataclass

from inlay import Decoding, TextTask, TrainConfig, option, run_recipe


@dataclass
class Comparison:
    """The methods to compare, their learning rates, and the seeds."""

    methods: list[str] = option(
        ["lora", "bottleneck", "attention-prefix", "prompt", "partial", "full"],
        "Names in METHODS; all means every method that suits a language model.",
    )
    learning_rates: list[float] = option([], "One learning rate per method; default: those in METHODS.", above=0)
    seeds: list[int] = option([0, 1, 2], "Every method is trained once per seed.", least=0)
    width: int = option(16, "Rank, prompt length or other width of the adapters.", least=1)


def main(comparison: Comparison, task: TextTask, train: TrainConfig, decoding: Decoding) -> None:
    """Train every method, print the table and save it."""
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

"""Compare the methods in METHODS, a linear probe and full fine-tuning on the same base, over several seeds.

    accelerate launch recipes/compare_vit.py
    accelerate launch recipes/compare_vit.py --methods all --epochs 5
    accelerate launch recipes/compare_vit.py --model FOLDER --dataset FOLDER --epochs 5 --seeds 0 --augment crop-flip
    accelerate launch recipes/compare_vit.py --methods lora bottleneck --quantize 8bit

Every method sees the same batches for the same number of epochs, at its own learning rate. After an interruption, the
same command resumes.
"""

from dataclasses import asdict, dataclass

from inlay import ImageTask, TrainConfig, option, run_recipe


@dataclass
class Comparison:
    """The methods to compare, their learning rates, and the seeds."""

    methods: list[str] = option(
        ["probe", "lora", "full"], "Names in METHODS; all means every method that suits a vision transformer."
    )
    learning_rates: list[float] = option([], "One learning rate per method; default: those in METHODS.", above=0)
    seeds: list[int] = option([0, 1, 2], "Every method is trained once per seed.", least=0)
    width: int = option(8, "Rank or other width of the adapters.", least=1)


def main(comparison: Comparison, task: ImageTask, train: TrainConfig) -> None:
    """Train every method, print the table and save it."""
    from inlay import compare_images, save_comparison

    # 1. to 4.: data, method, training and measurement, for every method and seed
    rows = compare_images(task, train, **asdict(comparison))

    # 5. save
    title = f"{task.model} on {task.dataset}, {train.epochs:g} epochs, seeds {comparison.seeds}"
    save_comparison(rows, train.output_dir, title)


if __name__ == "__main__":
    run_recipe(main, Comparison(), ImageTask(), TrainConfig(output_dir="runs/compare_vit"))

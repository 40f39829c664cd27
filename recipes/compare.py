"""Compare methods on one base and data: each at its best learning rate, scored on data that chose nothing.

    python recipes/compare.py
    python recipes/compare.py --methods all --epochs 5 --jobs 2
    python recipes/compare.py --model builtin:gpt2-tiny --dataset builtin:restaurants --methods lora full --epochs 1
    python recipes/compare.py --model FOLDER --dataset FOLDER --epochs 5 --seeds 0

Every method sees the same batches for the same number of steps. After an interruption, the same command goes on.
`inlay compare` does the same, and takes the options of the task as well.
"""

from dataclasses import dataclass

from inlay import TrainConfig, option, run_recipe


@dataclass
class Methods:
    """The base, the data, the methods to compare on them, and how often each is trained."""

    model: str = option("builtin:vit-tiny", "Embedded base, local folder or Hub id.")
    dataset: str = option("builtin:digits", "As the recipes of the base's task take it.")
    methods: list[str] = option(["probe", "lora", "full"], "Names in METHODS; all means every one that fits the base.")
    width: int = option(8, "Rank or other width of the adapters.", least=1)
    seeds: list[int] = option([], "Default: 0 to 4 where a run takes less than a minute, else 0 to 2.", least=0)
    jobs: int = option(1, "Runs at a time.", least=1)


def main(chosen: Methods, train: TrainConfig) -> None:
    """Train every method, print the table and save it with its plots."""
    from inlay import compare, make_task_options, save_comparison

    # 1. base and data: what the base is for says how the data is read
    task = make_task_options(chosen.model, chosen.dataset)

    # 2. to 4. method, training and measurement, for every method, learning rate and seed
    comparison = compare(
        task,
        train,
        methods="all" if chosen.methods == ["all"] else chosen.methods,
        width=chosen.width,
        seeds=chosen.seeds or None,
        jobs=chosen.jobs,
    )

    # 5. save
    page = save_comparison(comparison, train.output_dir)
    print(f"\n{page.with_suffix('.md').read_text(encoding='utf-8')}\nreport: {page}")


if __name__ == "__main__":
    run_recipe(main, Methods(), TrainConfig(output_dir="runs/compare", workers=0))

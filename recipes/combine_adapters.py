"""Train two adapters, combine them, and compare each task before and after.

    python recipes/combine_adapters.py                                # embedded base and data, no download
    python recipes/combine_adapters.py --rule ties --density 0.3 --width 16
    python recipes/combine_adapters.py --first FOLDER --second FOLDER --model google/vit-base-patch16-224-in21k

Each task has its own LoRA and head. Adding is exact: the result computes the sum of both updates, and has the rows of
both heads. A task loses accuracy because the other adapter changes its images' features too. Adapters on disk are
combined by one command: `inlay combine a=1.0 b=1.0 -o out --report report.png`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from inlay import ImageTask, TrainConfig, option, run_recipe


@dataclass
class Combination:
    """Base, tasks and rule of the combination."""

    model: str = option("builtin:vit-tiny", "Embedded base, local folder or Hub id.")
    first: str = option("builtin:digits", "Data of the first task.")
    second: str = option("builtin:shapes", "Data of the second task.")
    rank: int = option(8, "Rank r of each update B·A.", least=1)
    rule: str = option("add", "A name in inlay.combine.RULES.")
    weight: float = option(0.5, "Weight of each adapter in the combination.")
    width: int | None = option(None, "Largest rank of the result; default: the rank that the rule gives.", least=1)
    density: float = option(0.5, "Share of the entries that ties, dare and magnitude keep.", above=0, most=1)


def main(combination: Combination, train: TrainConfig) -> Path:
    """Train both adapters, combine them, and evaluate before and after."""
    from accelerate import PartialState
    from peft import LoraConfig, get_peft_model

    from inlay import combine, head_modules, load_adapter, lora_targets, overlap, save_adapter, write_report

    out, folders, loaded = Path(train.output_dir), {}, {}
    for name in (combination.first, combination.second):
        # 1. data and frozen base of each task
        task = ImageTask(combination.model, name)
        data = task.load(train.seed)
        model = task.base(data)

        # 2. method, and 3. training: an adapter and head for each task
        rank, targets = combination.rank, lora_targets(model)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=head_modules(model))
        model = get_peft_model(model, config)
        folder = out / name.rpartition(":")[2].rpartition("/")[2]
        result = task.fit(model, data, replace(train, output_dir=f"{folder}_run"), combination)
        report = task.report(model, data, result)
        folders[name] = save_adapter(model, folder, processor=data.processor, metrics=report.metrics)
        loaded[name] = data.source

    # 4. combine, after a report on where the adapters overlap
    if PartialState().is_main_process:
        weights = dict.fromkeys(folders.values(), combination.weight)
        overlaps = overlap(weights)
        write_report(overlaps, out / "report.png")
        width, density = combination.width, combination.density
        made = combine(weights, combination.rule, out=out / "sum", width=width, density=density)
        print(f"{overlaps}\n{made.rule}: {made.heads}, widths {made.widths}, relative error {made.error:.2g}; ", end="")
        print(f"saved {made.folder}\n{'task':<20}{'before':>8}{'combined':>10}{'all labels':>12}")

        # 5. each task before and after: among its own labels, and among those of both
        together = load_adapter(made.folder)
        for name, source in loaded.items():
            own = folders[name].name if folders[name].name in together.groups else None
            before = accuracy(load_adapter(folders[name]), source)
            print(f"{name:<20}{before:>8.4f}{accuracy(together, source, own, own):>10.4f}", end="")
            print(f"{accuracy(together, source, None, own):>12.4f}")
    return out / "sum"


def accuracy(adapter: Any, data: Any, among: str | None = None, own: str | None = None) -> float:
    """Share of images classified correctly, among the labels of one task or of all; `own` is the task of the data."""
    from inlay import predict

    labels, rows = adapter.route(own)
    names = dict(zip(labels, rows if among is None else range(len(rows)), strict=True))
    answers = adapter.route(among)[0]
    wanted = [answers[names[data.labels[label]]] for label in data.validation["label"][:]]
    found = predict(adapter, data.validation["image"][:], group=among, top=1)
    return sum(p.label == label for p, label in zip(found, wanted, strict=True)) / len(wanted)


if __name__ == "__main__":
    run_recipe(main, Combination(), TrainConfig(output_dir="runs/combine_adapters", epochs=5))

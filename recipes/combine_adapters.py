"""Train two adapters, add them up, and see what each task has kept.

    python recipes/combine_adapters.py                                # embedded base and data, no download
    python recipes/combine_adapters.py --rule ties --density 0.3 --width 16
    python recipes/combine_adapters.py --first FOLDER --second FOLDER --model google/vit-base-patch16-224-in21k

Each task has its own LoRA and head. Adding is exact: the result computes what both adapters compute together, with the
rows of both heads. What a task loses is what the other adapter does to its pictures. For adapters on disk it is one
command: `inlay combine a=1.0 b=1.0 -o out --report report.png`.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inlay import TrainConfig, run_recipe


@dataclass
class Recipe:
    """What is adapted, to which two tasks, and how they are combined."""

    model: str = field(default="builtin:vit-tiny", metadata={"help": "Embedded base, local folder or Hub id."})
    first: str = field(default="builtin:digits", metadata={"help": "Data of the first task."})
    second: str = field(default="builtin:shapes", metadata={"help": "Data of the second task."})
    rank: int = field(default=8, metadata={"help": "Rank r of each update B·A."})
    rule: str = field(default="add", metadata={"help": "A name in inlay.combine.RULES."})
    weight: float = field(default=0.5, metadata={"help": "Of both adapters: how much each keeps of itself."})
    width: int | None = field(
        default=None, metadata={"help": "Largest rank of the result; default: as the rule has it."}
    )
    density: float = field(default=0.5, metadata={"help": "Share of the entries that ties, dare and magnitude keep."})


def main(recipe: Recipe, train: TrainConfig) -> Path:
    """Train both, combine, evaluate before and after."""
    from accelerate import PartialState
    from accelerate.utils import set_seed
    from peft import LoraConfig, get_peft_model

    from inlay import ImageView, combine, fit, load_adapter, load_base, load_images, load_processor, save_adapter
    from inlay.bases.sites import head_modules, lora_targets
    from inlay.combine.heatmap import write_report
    from inlay.combine.report import overlap
    from inlay.tasks.metrics import Accuracy

    out = Path(train.output_dir)

    # 1. data of both tasks, and what makes inputs of pictures
    tasks = {name: load_images(name, seed=train.seed) for name in (recipe.first, recipe.second)}
    processor = load_processor(recipe.model)

    # 2. method, 3. train: one adapter and head for each task, on a base of its own
    folders: dict[str, Path] = {}
    for name, data in tasks.items():
        set_seed(train.seed)
        model = load_base(recipe.model, labels=data.labels)
        method = LoraConfig(
            r=recipe.rank,
            lora_alpha=2 * recipe.rank,
            target_modules=lora_targets(model),
            modules_to_save=head_modules(model),
        )
        model = get_peft_model(model, method)
        folder = out / name.rpartition(":")[2].rpartition("/")[2]
        run = TrainConfig(**{**asdict(train), "output_dir": f"{folder}_run"})
        views = ImageView(data.train, processor, "crop"), ImageView(data.validation, processor)
        result = fit(model, *views, run, metrics=[Accuracy()], settings=asdict(recipe))
        metrics = {"validation": result.metrics, "dataset": name, "training": {**asdict(recipe), **run.identity()}}
        folders[name] = save_adapter(model, folder, processor=processor, metrics=metrics)

    # 4. combine, once the report has said how they meet
    if PartialState().is_main_process:
        weights = dict.fromkeys(folders.values(), recipe.weight)
        report = overlap(weights)
        write_report(report, out / "report.png")
        made = combine(weights, recipe.rule, out=out / "sum", width=recipe.width, density=recipe.density)
        print(report)
        print(
            f"{recipe.rule}: {made.heads}, widths {made.widths}, relative error {made.error:.2g}; saved {made.folder}"
        )

        # 5. each task before and after: among its own labels, and among those of both
        print(f"{'task':<20}{'alone':>8}{'combined':>10}{'all labels':>12}")
        together = load_adapter(made.folder)
        for name, data in tasks.items():
            alone = accuracies(load_adapter(folders[name]), data)
            both = accuracies(together, data, folders[name].name)
            print(f"{name:<20}{alone['own']:>8.4f}{both['own']:>10.4f}{both['all']:>12.4f}")
    return out / "sum"


def accuracies(adapter: Any, data: Any, task: str | None = None) -> dict[str, float]:
    """Shares of pictures classified right: among the labels of their task alone, and among all of the adapter's."""
    import torch

    from inlay import ImageView

    view = ImageView(data.validation, adapter.processor)
    labels, rows = adapter.route(task if task in adapter.tasks else None)
    own = torch.tensor([rows[labels.index(label)] for label in data.labels])
    right = {"own": 0, "all": 0}
    for start in range(0, len(view), 64):
        items = [view[i] for i in range(start, min(start + 64, len(view)))]
        pixels = torch.stack([item["pixel_values"] for item in items]).to(adapter.model.device)  # B C H W
        wanted = torch.tensor([item["labels"] for item in items])
        with torch.no_grad():
            logits = adapter.model(pixel_values=pixels).logits.cpu()  # B labels
        right["own"] += int((logits[:, own].argmax(1) == wanted).sum())
        right["all"] += int((logits.argmax(1) == own[wanted]).sum())
    return {name: count / len(view) for name, count in right.items()}


if __name__ == "__main__":
    run_recipe(main, Recipe(), TrainConfig(output_dir="runs/combine_adapters", epochs=5))

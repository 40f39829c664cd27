"""Serve many adapters on one base: each picture of a batch is classified by the adapter that its sender asked for.

    python recipes/serve_many.py                                       # embedded base and data, no download
    python recipes/serve_many.py --methods bottleneck attention-prefix --budget_mb 20
    python recipes/serve_many.py --model google/vit-base-patch16-224-in21k --tasks FOLDER FOLDER

Two small adapters are trained first, one per task; each may be of another method. In a server of your own, step 4 is
all there is: `Bank(base, folder)`, and a name, or None for the plain base, for each row of a batch.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from inlay import TrainConfig, run_recipe


@dataclass
class Recipe:
    """What is trained, and what is served."""

    model: str = field(default="builtin:vit-tiny", metadata={"help": "Embedded base, local folder or Hub id."})
    tasks: list[str] = field(
        default_factory=lambda: ["builtin:digits", "builtin:shapes"], metadata={"help": "Data of each adapter."}
    )
    methods: list[str] = field(
        default_factory=lambda: ["lora", "bottleneck"], metadata={"help": "Names in inlay.METHODS, one per task."}
    )
    width: int = field(default=8, metadata={"help": "Rank, bottleneck size or prompt length."})
    requests: int = field(default=512, metadata={"help": "Pictures to classify, of all tasks by turns."})
    rows: int = field(default=64, metadata={"help": "Pictures in a batch."})
    budget_mb: float | None = field(
        default=None, metadata={"help": "Most memory for adapters: those that were not used for longest give way."}
    )


def main(recipe: Recipe, train: TrainConfig) -> Path:
    """Train an adapter per task, then serve them all at once."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import set_seed

    from inlay import METHODS, Bank, ImageView, InlayError, fit, load_base, load_images, load_processor, save_adapter
    from inlay.tasks.metrics import Accuracy

    # 1. data of all tasks
    if len(recipe.methods) != len(recipe.tasks):
        raise InlayError(f"expected one method per task, got {len(recipe.methods)} for {len(recipe.tasks)}.")
    out, processor = Path(train.output_dir), load_processor(recipe.model)
    data = {name.rpartition(":")[2].rpartition("/")[2]: load_images(name, seed=train.seed) for name in recipe.tasks}

    # 2. method, and training: an adapter and head for each task, on a base of its own
    for (name, task), method in zip(data.items(), recipe.methods, strict=True):
        set_seed(train.seed)
        model = METHODS[method].adapt(load_base(recipe.model, labels=task.labels), recipe.width)
        run = TrainConfig(**{**asdict(train), "output_dir": str(out / "training" / name)})
        views = ImageView(task.train, processor, "crop"), ImageView(task.validation, processor)
        result = fit(model, *views, run, metrics=[Accuracy()], settings=asdict(recipe))

        # 3. save: all adapters in one folder
        metrics = {"validation": result.metrics, "dataset": task.name, "history": result.history}
        save_adapter(model, out / "adapters" / name, processor=processor, metrics=metrics)
    if not PartialState().is_main_process:
        return out / "adapters"

    # 4. serve: one base, and a name for each row
    bank = Bank(recipe.model, out / "adapters", budget_mb=recipe.budget_mb)
    requests = mixed(data, processor, recipe.requests)
    begun, right = time.perf_counter(), dict.fromkeys(data, 0)
    for start in range(0, len(requests), recipe.rows):
        names, pixels, wanted = zip(*requests[start : start + recipe.rows], strict=True)
        logits = bank({"pixel_values": torch.stack(pixels)}, names).logits  # B x the most labels of a row
        for name, row, label in zip(names, logits.argmax(-1).tolist(), wanted, strict=True):
            right[name] += bank.labels(name)[row] == label
    seconds = time.perf_counter() - begun

    # 5. measure
    print(f"{len(requests)} pictures, {len(bank.names)} adapters in every batch of {recipe.rows}: {seconds:.2f} s")
    print(f"in memory: {', '.join(bank.resident)}, {bank.bytes / 1e6:.2f} MB beside the base")
    for (name, count), method in zip(right.items(), recipe.methods, strict=True):
        asked = sum(request[0] == name for request in requests)
        print(f"  {name:<12} {method:<18} accuracy {count / asked:.4f}")
    return out / "adapters"


def mixed(data: dict[str, Any], processor: Any, count: int) -> list[tuple[str, Any, str]]:
    """Requests of all tasks by turns: which adapter, the pixels C H W, and the label that would be right."""
    from inlay import ImageView

    views = {name: ImageView(task.validation, processor) for name, task in data.items()}
    requests = []
    for i in range(count):
        name = list(data)[i % len(data)]
        item = views[name][i // len(data) % len(views[name])]
        requests.append((name, item["pixel_values"], data[name].labels[int(item["labels"])]))
    return requests


if __name__ == "__main__":
    run_recipe(main, Recipe(), TrainConfig(output_dir="runs/serve_many", epochs=3))

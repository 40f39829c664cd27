"""Serve many adapters on one base: each image of a batch is classified by the adapter that its sender asked for.

    python recipes/serve_many.py                                       # embedded base and data, no download
    python recipes/serve_many.py --methods bottleneck attention-prefix --budget_mb 20
    python recipes/serve_many.py --model google/vit-base-patch16-224-in21k --tasks FOLDER FOLDER

Two small adapters are trained first, one per task, each with its own method. Your own server needs step 4 only:
`Bank(base, folder)`, and for each row of a batch the name of an adapter, or None for the plain base.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from inlay import BadInput, ImageTask, TrainConfig, option, run_recipe


@dataclass
class Service:
    """Base, adapters and requests."""

    model: str = option("builtin:vit-tiny", "Embedded base, local folder or Hub id.")
    tasks: list[str] = option(["builtin:digits", "builtin:shapes"], "Data sets, one per adapter.")
    methods: list[str] = option(["lora", "bottleneck"], "Names in inlay.METHODS, one per task.")
    width: int = option(8, "Rank, bottleneck size or prompt length.", least=1)
    requests: int = option(512, "Images to classify, of all tasks in turn.", least=1)
    rows: int = option(64, "Images in a batch.", least=1)
    budget_mb: float | None = option(
        None, "Memory limit for adapters in MB; the least recently used ones are evicted.", above=0
    )

    def __post_init__(self) -> None:
        if len(self.methods) != len(self.tasks):
            raise BadInput(
                f"methods must name one method per task, got {len(self.methods)} for {len(self.tasks)} tasks."
            )


def main(service: Service, train: TrainConfig) -> Path:
    """Train an adapter per task, then serve them all at once."""
    import torch
    from accelerate import PartialState

    from inlay import METHODS, Bank, save_adapter

    if unknown := [name for name in service.methods if name not in METHODS]:
        raise BadInput(f"unknown method {unknown[0]!r}; choose one of {', '.join(METHODS)}.")
    out, views = Path(train.output_dir), {}
    for source, method in zip(service.tasks, service.methods, strict=True):
        # 1. data and frozen base of each task
        task, name = ImageTask(service.model, source), source.rpartition(":")[2].rpartition("/")[2]
        data = task.load(train.seed)

        # 2. method, and 3. training: an adapter and head for each task, all saved in one folder
        model = METHODS[method].adapt(task.base(data), service.width)
        result = task.fit(model, data, replace(train, output_dir=str(out / "training" / name)), service)
        metrics = task.report(model, data, result).metrics
        save_adapter(model, out / "adapters" / name, processor=data.processor, metrics=metrics)
        views[name] = data.validation
    if not PartialState().is_main_process:
        return out / "adapters"

    # 4. serve: one base, and the name of an adapter for each row; the requests are of all tasks in turn
    bank = Bank(service.model, out / "adapters", budget_mb=service.budget_mb)
    names = [list(views)[i % len(views)] for i in range(service.requests)]
    items = [views[name][i // len(views) % len(views[name])] for i, name in enumerate(names)]
    begun, right = time.perf_counter(), dict.fromkeys(views, 0)
    for start in range(0, len(names), service.rows):
        rows = slice(start, start + service.rows)
        pixels = torch.stack([item["pixel_values"] for item in items[rows]])  # B C H W
        answers = bank({"pixel_values": pixels}, names[rows]).logits.argmax(-1)  # B
        for name, item, answer in zip(names[rows], items[rows], answers.tolist(), strict=True):
            right[name] += answer == int(item["labels"])
    seconds = time.perf_counter() - begun

    # 5. measure
    print(f"{len(names)} images, {len(bank.names)} adapters in every batch of {service.rows}: {seconds:.2f} s")
    print(f"in memory: {', '.join(bank.resident)}, {bank.bytes / 1e6:.2f} MB in addition to the base")
    for (name, count), method in zip(right.items(), service.methods, strict=True):
        print(f"  {name:<12} {method:<18} accuracy {count / max(names.count(name), 1):.4f}")
    return out / "adapters"


if __name__ == "__main__":
    run_recipe(main, Service(), TrainConfig(output_dir="runs/serve_many", epochs=3))

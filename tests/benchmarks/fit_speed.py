"""Steps per second of `fit` beside a bare PyTorch loop and transformers.Trainer: the same model, batches and settings.

    python tests/benchmarks/fit_speed.py [--rounds 5] [--steps 60] [--threads 1]

The three take turns in one process, round by round, in a rotating order, so that a machine that slows down slows all of
them; the figure is the ratio within a round. Loading, start-up and saving are outside the timed part for all three.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from inlay import ImageView, TrainConfig, fit, load_base, load_images, load_processor
from inlay.bases.sites import head_modules, lora_targets
from inlay.train.sampler import SeededDataset, SeededSampler

RESULTS = Path(__file__).parent / "results" / "fit_speed.json"
BATCH, RATE, SEED = 32, 2e-3, 0


class Items(Dataset):
    """Decoded once, so that what is timed is the loop and not Pillow."""

    def __init__(self, view: ImageView, count: int) -> None:
        self.items = [view[i] for i in range(count)]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


def new_model(labels: tuple[str, ...]) -> torch.nn.Module:
    set_seed(SEED)
    model = load_base("builtin:vit-tiny", labels=labels)
    return get_peft_model(
        model,
        LoraConfig(r=8, lora_alpha=16, target_modules=lora_targets(model), modules_to_save=head_modules(model)),
    )


def bare(model: torch.nn.Module, items: Items, steps: int) -> tuple[float, float]:
    """The loop that one would write by hand: steps per second and the last loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    scheduler = transformers.get_scheduler("cosine", optimizer, round(0.1 * steps), steps)
    loader = DataLoader(SeededDataset(items, SEED), batch_sampler=SeededSampler(len(items), BATCH, steps, SEED))
    model.train()
    begun = time.perf_counter()
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        last = loss.item()
    return steps / (time.perf_counter() - begun), last


class Clock(TrainerCallback):
    """Time from the first step's begin to the last step's end."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ended = time.perf_counter()


def trainer(model: torch.nn.Module, items: Items, steps: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            weight_decay=0.0,
            lr_scheduler_type="cosine",
            warmup_steps=round(0.1 * steps),
            max_grad_norm=1.0,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            seed=SEED,
        )
        clock = Clock()
        run = Trainer(model=model, args=arguments, train_dataset=items, callbacks=[clock])
        run.pop_callback(transformers.trainer_callback.PrinterCallback)
        run.train()
        return steps / (clock.ended - clock.begun), run.state.log_history[-2]["loss"]


def ours(model: torch.nn.Module, items: Items, steps: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        epochs = steps * BATCH / len(items)
        config = TrainConfig(
            output_dir=folder + "/run", epochs=epochs, batch_size=BATCH, learning_rate=RATE, seed=SEED, workers=0
        )
        result = fit(model, items, None, config)
        log = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
        return result.steps / result.seconds, log[-1]["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = load_images("builtin:digits")
    items = Items(ImageView(data.train, load_processor("builtin:vit-tiny")), 512)
    loops: list[Callable[..., tuple[float, float]]] = [bare, ours, trainer]
    for loop in loops:  # warm-up: imports, thread pools, allocator
        loop(new_model(data.labels), items, 5)
    speeds: dict[str, list[float]] = {loop.__name__: [] for loop in loops}
    losses = {}
    for round_ in range(arguments.rounds):
        for loop in loops[round_ % 3 :] + loops[: round_ % 3]:
            speed, losses[loop.__name__] = loop(new_model(data.labels), items, arguments.steps)
            speeds[loop.__name__].append(speed)
    assert abs(losses["bare"] - losses["ours"]) < 1e-6, f"the loops do not train alike: {losses}"

    def ratio(name: str) -> dict[str, float]:
        values = sorted(a / b for a, b in zip(speeds["ours"], speeds[name], strict=True))
        return {"median": round(statistics.median(values), 4), "min": round(values[0], 4), "max": round(values[-1], 4)}

    result = {
        "steps_per_second": {name: round(statistics.median(values), 2) for name, values in speeds.items()},
        "ours_over_bare": ratio("bare"),
        "ours_over_trainer": ratio("trainer"),
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "batch": BATCH,
        "threads": arguments.threads,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

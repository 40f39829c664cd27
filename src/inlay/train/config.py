"""The settings of a training run; a recipe's command line is made of them."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from inlay.options import check_options, option

# What may differ between a run and its resumption: none of these changes a single weight.
_FREE = {"output_dir", "overwrite", "workers", "tracker", "save_every", "push_to", "private"}


@dataclass
class TrainConfig:
    """How an adapter is trained. `batch_size` is what one optimiser step sees, whatever the number of processes."""

    output_dir: str = option("runs/adapter", "Folder of the run; given again, the run goes on.")
    overwrite: bool = option(False, "Delete a run that is already in output_dir.")
    epochs: float = option(10, "Passes over the training data; fractions are allowed.", above=0)
    batch_size: int = option(32, "Examples per optimiser step, over all processes.", least=1)
    accumulate: int = option(
        1, "Pieces in which a process computes its share of a step; doubled when memory runs out.", least=1
    )
    learning_rate: float = option(3e-3, "Peak learning rate.", above=0)
    weight_decay: float = option(0.0, "AdamW decay of weights with two or more axes.", least=0)
    warmup: float = option(0.1, "Share of the steps in which the rate rises, 0 to 1.", least=0, most=1)
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", "Course of the learning rate after the warm-up."
    )
    clip_norm: float = option(1.0, "Largest L2 norm of the gradient.", above=0)
    optimizer: Literal["adamw", "adamw8bit"] = option("adamw", "adamw8bit keeps its moments in 8 bits (bitsandbytes).")
    precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto", "Mixed precision; auto takes accelerate's own setting, or the base's dtype."
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, a third more time."
    )
    cache_frozen: Literal["no", "memory", "disk"] = option(
        "no",
        "Run frozen first blocks once per example and keep their output; on disk (beside output_dir, in "
        "frozen_states) also for the next run. Not with random augmentation.",
    )
    cache_gb: float = option(4, "Largest size of cache_frozen in GB, in memory of each process.", above=0)
    eval_every: int | None = option(None, "Steps between evaluations; default: one epoch.", least=1)
    save_every: int | None = option(None, "Steps between checkpoints; default: as evaluations.", least=1)
    patience: int | None = option(None, "Stop after so many evaluations without a new best.", least=1)
    seed: int = option(0, "Seed of order, augmentation, dropout and new weights.", least=0, below=2**32)  # numpy's
    workers: int = option(2, "Processes that decode and augment, per training process.", least=0)
    tracker: str | None = option(None, "tensorboard, wandb, mlflow ... (through accelerate).")
    push_to: str | None = option(None, "Send what was saved to the Hub, as user/name; again: inlay push.")
    private: bool = option(False, "With push_to: for your eyes alone.")

    def __post_init__(self) -> None:
        check_options(self)

    def identity(self) -> dict[str, Any]:
        """The fields that decide the weights that come out: a run is resumed only under the same ones."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}

    def steps(self, examples: int) -> int:
        """Optimiser steps of the run over a training set of this size."""
        return max(1, math.ceil(self.epochs * examples / self.batch_size))


assert {f.name for f in fields(TrainConfig)} >= _FREE

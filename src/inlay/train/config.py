"""The settings of a training run; a recipe's command line is made of them."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from inlay.errors import InlayError

# What may differ between a run and its resumption: none of these changes a single weight.
_FREE = {"output_dir", "overwrite", "workers", "tracker", "save_every", "push_to", "private"}


@dataclass
class TrainConfig:
    """How an adapter is trained. `batch_size` is what one optimiser step sees, whatever the number of processes."""

    output_dir: str = field(
        default="runs/adapter", metadata={"help": "Folder of the run; given again, the run goes on."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete a run that is already in output_dir."})
    epochs: float = field(default=10, metadata={"help": "Passes over the training data."})
    batch_size: int = field(default=32, metadata={"help": "Examples per optimiser step, over all processes."})
    accumulate: int = field(
        default=1,
        metadata={"help": "Pieces in which a process computes its share of a step; doubled when memory runs out."},
    )
    learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW decay of weights with two or more axes."})
    warmup: float = field(default=0.1, metadata={"help": "Share of the steps in which the rate rises, 0 to 1."})
    schedule: Literal["cosine", "linear", "constant"] = field(
        default="cosine", metadata={"help": "Course of the learning rate after the warm-up."}
    )
    clip_norm: float = field(default=1.0, metadata={"help": "Largest L2 norm of the gradient."})
    optimizer: Literal["adamw", "adamw8bit"] = field(
        default="adamw", metadata={"help": "adamw8bit keeps its moments in 8 bits (bitsandbytes)."}
    )
    precision: Literal["auto", "no", "bf16", "fp16"] = field(
        default="auto",
        metadata={"help": "Mixed precision; auto takes accelerate's own setting, or the base's dtype."},
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute activations in the backward pass: less memory, a third more time."},
    )
    cache_frozen: Literal["no", "memory", "disk"] = field(
        default="no",
        metadata={
            "help": "Run frozen first blocks once per example and keep their output; on disk (beside output_dir, in "
            "frozen_states) also for the next run. Not with random augmentation."
        },
    )
    cache_gb: float = field(
        default=4, metadata={"help": "Largest size of cache_frozen in GB, in memory of each process."}
    )
    eval_every: int | None = field(default=None, metadata={"help": "Steps between evaluations; default: one epoch."})
    save_every: int | None = field(
        default=None, metadata={"help": "Steps between checkpoints; default: as evaluations."}
    )
    patience: int | None = field(default=None, metadata={"help": "Stop after so many evaluations without a new best."})
    seed: int = field(default=0, metadata={"help": "Seed of order, augmentation, dropout and new weights."})
    workers: int = field(default=2, metadata={"help": "Processes that decode and augment, per training process."})
    tracker: str | None = field(default=None, metadata={"help": "tensorboard, wandb, mlflow ... (through accelerate)."})
    push_to: str | None = field(
        default=None, metadata={"help": "Send what was saved to the Hub, as user/name; again: inlay push."}
    )
    private: bool = field(default=False, metadata={"help": "With push_to: for your eyes alone."})

    def __post_init__(self) -> None:
        at_least = {"batch_size": 1, "accumulate": 1, "workers": 0, "seed": 0}
        at_least |= {name: 1 for name in ("eval_every", "save_every", "patience") if getattr(self, name) is not None}
        for name, least in at_least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InlayError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if self.seed >= 2**32:
            raise InlayError(f"seed must be below 2**32 (numpy takes no more), got {self.seed}.")
        if not 0 <= self.weight_decay < math.inf:
            raise InlayError(f"weight_decay must be a number of at least 0, got {self.weight_decay}.")
        for name in ("epochs", "learning_rate", "clip_norm", "cache_gb"):
            if not 0 < getattr(self, name) < math.inf:
                raise InlayError(f"{name} must be a positive number, got {getattr(self, name)}.")
        if not 0 <= self.warmup <= 1:
            raise InlayError(f"warmup is a share of the steps, from 0 to 1, got {self.warmup}.")
        choices: dict[str, tuple[str, ...]] = {
            "schedule": ("cosine", "linear", "constant"),
            "optimizer": ("adamw", "adamw8bit"),
            "precision": ("auto", "no", "bf16", "fp16"),
            "cache_frozen": ("no", "memory", "disk"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InlayError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")

    def identity(self) -> dict[str, Any]:
        """The fields that decide the weights that come out: a run is resumed only under the same ones."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}

    def steps(self, examples: int) -> int:
        """Optimiser steps of the run over a training set of this size."""
        return max(1, math.ceil(self.epochs * examples / self.batch_size))


assert {f.name for f in fields(TrainConfig)} >= _FREE

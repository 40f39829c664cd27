"""The settings of a training run, which every recipe offers on its command line."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from inlay.errors import BadInput
from inlay.options import check_options, option

# Settings that may differ when a run is resumed: none of them changes a weight. The rate that `fit` makes of
# embedded_rate does, and is compared.
_FREE = {
    "output_dir",
    "overwrite",
    "workers",
    "tracker",
    "save_every",
    "push_to",
    "private",
    "embedded_rate",
    "read_every",
    "prefetch",
}


@dataclass
class TrainConfig:
    """Training settings. `batch_size` counts the examples of one optimiser step, over all processes."""

    output_dir: str = option("runs/adapter", "Folder of the run. A run that is already there is resumed.")
    overwrite: bool = option(False, "Delete a run that is already in output_dir.")
    epochs: float = option(10, "Passes over the training data; fractions are allowed.", above=0)
    steps: int | None = option(None, "Optimiser steps, instead of epochs; streams need them.", least=1)
    batch_size: int = option(32, "Examples per optimiser step, over all processes.", least=1)
    accumulate: int = option(
        1, "Pieces into which a process divides its share of a step; doubled when memory runs out.", least=1
    )
    learning_rate: float | None = option(
        None, "Peak learning rate; default: embedded_rate, less on a base wider than the embedded ones.", above=0
    )
    embedded_rate: float = option(3e-3, "The learning rate that suits the embedded bases.", above=0)
    weight_decay: float = option(0.0, "AdamW decay of weights with two or more axes.", least=0)
    warmup: float = option(0.1, "Share of the steps in which the learning rate rises, 0 to 1.", least=0, most=1)
    schedule: Literal["cosine", "linear", "constant"] = option(
        "cosine", "Shape of the learning rate after the warm-up."
    )
    clip_norm: float = option(1.0, "Largest L2 norm of the gradient.", above=0)
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = option(
        "adamw",
        "adamw8bit stores its moments in 8 bits; paged ones move to main memory when that of a GPU is full "
        "(bitsandbytes).",
    )
    ema: float | None = option(
        None,
        "Decay of a moving average of the trained weights, such as 0.999, which is evaluated and saved in their place.",
        above=0,
        below=1,
    )
    precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto", "Mixed precision; auto uses accelerate's setting, or the dtype of the base."
    )
    tf32: bool = option(True, "Compute float32 matrix products of a CUDA GPU in TF32, with 10 bits of mantissa.")
    compile: bool = option(False, "Compile the blocks of the model (torch.compile), which takes minutes at the start.")
    channels_last: bool = option(False, "Order the weights of 2D convolutions with the channels last.")
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, a third more time."
    )
    cache_frozen: Literal["no", "memory", "disk"] = option(
        "no",
        "Run the frozen first blocks once per example and store their output. On disk (frozen_states, next to "
        "output_dir) it also serves the next run. Not with random augmentation.",
    )
    cache_gb: float = option(4, "Largest size of the cache_frozen store in GB; in memory, of each process.", above=0)
    eval_every: int | None = option(
        None, "Steps between evaluations; default: one epoch, or a tenth of the steps asked for.", least=1
    )
    eval_start: bool = option(
        False, "Evaluate before the first step too: where no later weights score better, those of the start are kept."
    )
    save_every: int | None = option(None, "Steps between checkpoints; default: at every evaluation.", least=1)
    read_every: int = option(
        10,
        "Steps between two reads of loss and gradient norm from a GPU, which wait for it; a CPU is read at each.",
        least=1,
    )
    patience: int | None = option(None, "Stop after this many evaluations without a new best score.", least=1)
    # numpy takes seeds below 2**32
    seed: int = option(0, "Seed of the data order, augmentation, dropout and new weights.", least=0, below=2**32)
    workers: int = option(2, "Processes that decode and augment data, per training process.", least=0)
    prefetch: int = option(2, "Batches that each of the workers prepares ahead.", least=1)
    tracker: str | None = option(None, "tensorboard, wandb, mlflow ... (through accelerate).")
    push_to: str | None = option(None, "Push the saved adapter to the Hub, as user/name. To repeat a push: inlay push.")
    private: bool = option(False, "With push_to: make the repository private.")

    def __post_init__(self) -> None:
        check_options(self)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the trained weights. A run is resumed only with the same ones."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}

    @property
    def rate(self) -> float:
        """The peak learning rate: as it was given, else that of the embedded bases."""
        return self.embedded_rate if self.learning_rate is None else self.learning_rate

    def count_steps(self, examples: int | None) -> int:
        """Optimiser steps of the run on a training set of this many examples; None: a stream.

        Raises:
            InlayError: A stream without `steps`, as it has no epochs.
        """
        if self.steps is not None:
            return self.steps
        if examples is None:
            raise BadInput(
                "streamed data has no length, so epochs cannot be counted; pass the number of steps (--steps)."
            )
        return max(1, math.ceil(self.epochs * examples / self.batch_size))

    def count_steps_to_evaluation(self, steps: int) -> int:
        """Steps between evaluations of a run with this many steps."""
        return self.eval_every or max(1, round(steps / (10 if self.steps else self.epochs)))


assert {f.name for f in fields(TrainConfig)} >= _FREE

"""A small training run as a program of its own, for tests that kill it, launch it or look at how it ends.

python tests/train/train_job.py --out weights.safetensors --output_dir run [any option of TrainConfig]
"""

import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from transformers.modeling_outputs import ImageClassifierOutput

from inlay import Stream, TrainConfig, fit, run_recipe

FEATURES, CLASSES = 6, 3


@dataclass
class Job:
    """What is trained."""

    out: str = field(default="", metadata={"help": "File for the final weights."})
    rows: int = field(default=44, metadata={"help": "Training examples."})
    rows_validation: int = field(default=13, metadata={"help": "Validation examples."})
    dropout: float = field(default=0.3, metadata={"help": "Dropout of the model."})
    noise: bool = field(default=True, metadata={"help": "Augment by all three generators."})
    pause: float = field(default=0.0, metadata={"help": "Seconds that a forward pass sleeps."})
    stream: str = field(default="", metadata={"help": "Folder of .jsonl shards of a column `number`, to train on."})


class Points(Dataset):
    """Three clouds of points, with noise from Python's, numpy's and torch's global generators when asked."""

    def __init__(self, rows: int, seed: int, noise: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(CLASSES, (rows,), generator=generator)
        centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(99))
        self.values = centres[self.labels] + torch.randn(rows, FEATURES, generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        values = self.values[index]
        if self.noise:
            drawn = random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002
            values = values + torch.tensor([*drawn, *drawn])
        return {"pixel_values": values, "labels": int(self.labels[index])}


class Net(nn.Module):
    """A frozen base of many weights and a trainable head with dropout."""

    def __init__(self, dropout: float = 0.0, pause: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.base = nn.Linear(FEATURES, 600).requires_grad_(False)
        self.ballast = nn.Parameter(torch.zeros(300_000), requires_grad=False)
        self.norm = nn.BatchNorm1d(600).requires_grad_(False) if norm else nn.Identity()
        self.hidden = nn.Linear(600, 8)  # more than 4,096 weights: bitsandbytes keeps smaller ones in 32 bits
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(8, CLASSES)
        self.pause = pause

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Logits (B, classes), and the mean cross-entropy."""
        time.sleep(self.pause)
        hidden = self.hidden(self.norm(torch.tanh(self.base(pixel_values))))
        logits = self.head(self.dropout(torch.tanh(hidden)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class Accuracy:
    """As `inlay.tasks.metrics.Accuracy`, without the imports of evaluate, datasets and scikit-learn."""

    score_name = "accuracy"  # chooses the best step

    def __init__(self) -> None:
        self.right: list[bool] = []

    def add_batch(self, *, predictions: torch.Tensor, references: torch.Tensor) -> None:
        """Take rows."""
        self.right += (predictions == references).tolist()

    def compute(self) -> dict[str, float]:
        """Score them, and forget them."""
        right, self.right = self.right, []
        return {"accuracy": sum(right) / len(right), "rows": len(right)}


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that a run changes."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def open_shards(folder: str) -> Any:
    """Rows of .jsonl files."""
    from datasets import load_dataset

    return load_dataset("json", data_files=f"{folder}/*.jsonl", split="train", streaming=True)


def main(job: Job, train: TrainConfig) -> None:
    """Train, and write what came out."""
    torch.set_num_threads(1)
    model = Net(job.dropout, job.pause)
    data, validation = Points(job.rows, 1, job.noise), Points(job.rows_validation, 2)
    if job.stream:
        data = Stream(open_shards(job.stream), prepare=lambda row: Points(100, 1, job.noise)[row["number"]], buffer=9)
    result = fit(model, data, validation, train, metrics=[Accuracy()], settings={"dropout": job.dropout})
    if PartialState().is_main_process:
        save_file(trainable(model), Path(job.out))
    print(f"done: resumed {result.resumed}, step {result.steps}", flush=True)


if __name__ == "__main__":
    run_recipe(main, Job(), TrainConfig())

"""Several methods on one task, over several seeds: quality with its spread, beside what each costs."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate.utils import set_seed

from inlay._peft import PeftModel
from inlay.data.images import load_images
from inlay.data.picture import Augment, ImageView
from inlay.errors import InlayError
from inlay.measure import Accuracy, footprint
from inlay.methods import METHODS
from inlay.models import load_base
from inlay.processors import load_processor
from inlay.store.file import WEIGHTS
from inlay.store.save import save_adapter
from inlay.train.config import TrainConfig
from inlay.train.loop import fit
from inlay.train.run import WEIGHTS as TRAINED


@dataclass(frozen=True)
class Compared:
    """One method on one task.

    Attributes:
        method: Name in METHODS.
        learning_rate: That it was trained with.
        trainable: Parameters, head included.
        accuracies: On the validation data, best evaluation of each run, 0 to 1, one per seed.
        steps_per_second: Median over the seeds.
        file_bytes: What is stored, head included: the adapter's weights, or all that was trained.
    """

    method: str
    learning_rate: float
    trainable: int
    accuracies: list[float]
    steps_per_second: float
    file_bytes: int

    @property
    def accuracy(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float:
        """Sample standard deviation over the seeds; 0 for one seed."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def compare_images(
    model: str,
    dataset: str,
    train: TrainConfig,
    *,
    methods: Sequence[str] = ("probe", "lora", "full"),
    learning_rates: Sequence[float] = (),
    seeds: Sequence[int] = (0, 1, 2),
    width: int = 8,
    augment: Augment = "crop",
) -> list[Compared]:
    """Train every method on the same data in the same order, each from the same new head, at its own learning rate.

    `learning_rates` are given in the order of `methods`; without them METHODS has one for each.

    The folder `train.output_dir` holds one run per method and seed, so a comparison that is broken off goes on where it
    was. Seeds change the split (where the data has none), the order, the augmentation and the new weights.

    Raises:
        InlayError: An unknown method, no seed, or what load_base, load_images and fit raise.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods or not seeds:
        raise InlayError(
            f"expected methods among {', '.join(METHODS)} and one seed or more, got {methods} and {seeds}."
        )
    if learning_rates and len(learning_rates) != len(methods):
        raise InlayError(f"expected one learning rate for each of {len(methods)} methods, got {len(learning_rates)}.")
    rows = []
    for name, rate in zip(methods, learning_rates or [METHODS[name].learning_rate for name in methods], strict=True):
        method, accuracies, rates, trainable, size = METHODS[name], [], [], 0, 0
        for seed in seeds:
            set_seed(seed)
            data = load_images(dataset, seed=seed)
            processor = load_processor(model)
            adapted = method.adapt(load_base(model, labels=data.labels), width)
            folder = Path(train.output_dir) / f"{name}-{seed}"
            result = fit(
                adapted,
                ImageView(data.train, processor, augment),
                ImageView(data.validation, processor),
                replace(train, output_dir=str(folder), seed=seed, learning_rate=rate),
                metrics=[Accuracy()],
                settings={"model": model, "dataset": dataset, "method": name, "width": width, "augment": augment},
            )
            accuracies.append(result.metrics["accuracy"])
            rates.append(result.steps_per_second)
            trainable = footprint(adapted).trainable
            weights = folder / "best" / TRAINED
            if isinstance(adapted, PeftModel):
                weights = save_adapter(adapted, folder / "adapter", processor=processor) / WEIGHTS
            size = weights.stat().st_size
        rows.append(Compared(name, rate, trainable, accuracies, statistics.median(rates), size))
    return rows


def table(rows: Sequence[Compared]) -> str:
    """The comparison as a Markdown table."""
    lines = [
        "| method | trained parameters | learning rate | accuracy | ms per step | file, kB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        accuracy = f"{row.accuracy:.4f} ± {row.spread:.4f}" if len(row.accuracies) > 1 else f"{row.accuracy:.4f}"
        time_ms, size_kb = 1000 / row.steps_per_second, row.file_bytes / 1000
        cells = [
            row.method,
            f"{row.trainable:,}",
            f"{row.learning_rate:g}",
            accuracy,
            f"{time_ms:.0f}",
            f"{size_kb:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

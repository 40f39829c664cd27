"""A trained model without an adapter in it: of a folder, or an adapter folded into its base."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from inlay.adapters.file import CONFIG, expand_path
from inlay.adapters.load import LoadedAdapter, load_adapter
from inlay.bases.device import Device
from inlay.errors import BadInput
from inlay.tasks import task_of_base
from inlay.tasks.base import load_base
from inlay.tasks.evaluation import Evaluation, Request, Split, Training
from inlay.tasks.task import Task

REPORTS = ("pruning.json", "merge.json")  # of folders that inlay wrote, with the preprocessing of the model's task


@dataclass
class TrainedModel:
    """A model and what its task needs of it: what `Task.evaluate` and `Task.load_labelled` take in place of an adapter.

    Attributes:
        model: Of transformers, in eval mode, all its weights frozen.
        task: What it is for, a row of TASKS.
        processor: What makes its inputs.
        labels: Class names in the order of the logits; none for what has no classes.
        name: The folder's, or the embedded base's.
        seed: By which its training held out a part of data without a split; 0 where that is not known.
    """

    model: PreTrainedModel
    task: Task
    processor: Any
    labels: list[str]
    name: str
    seed: int = 0
    origin: dict[str, Any] = field(default_factory=dict)

    def route(self, group: str | None) -> tuple[list[str], list[int]]:
        """All class names, and which logits stand for them; there are no groups."""
        if group is not None:
            raise BadInput(f"{self.name!r} has no groups of labels; leave group out.")
        return self.labels, list(range(len(self.labels)))

    def score(self, data: str, *, limit: int | None = None, split: Split | None = None) -> Evaluation:
        """All scores of the task on the part of labelled data that training does not use.

        Raises:
            InlayError: Data of other labels, or none of this task.
        """
        training = Training(data, {"seed": self.seed})
        request = Request(split=split, limit=limit, compare=False, resamples=200, training=training)
        return self.task.evaluate(self, data, request)

    def with_model(self, model: PreTrainedModel) -> "TrainedModel":
        """Another model with the same task, processor and labels."""
        return TrainedModel(model, self.task, self.processor, self.labels, self.name, self.seed, self.origin)


def load_trained(name: str | Path, *, base: str | Path | None = None, device: Device | None = None) -> TrainedModel:
    """Load a model, or an adapter and fold it into its base.

    Args:
        name: An embedded base, a folder of a model or of an adapter, or the Hub id of a model. Of an adapter on the Hub
            `inlay pull` makes a folder.
        base: Of the adapter, instead of the one that it names.
        device: As in `load_base`.

    Raises:
        InlayError: What `load_base` or `load_adapter` says; a base for a model that is no adapter; an adapter that no
            weight can stand for.
    """
    folder = expand_path(name)
    if (folder / CONFIG).is_file():
        return fold_adapter(load_adapter(folder, base, device=device or "cpu"))
    if base is not None:
        raise BadInput(f"{name} is a model and no adapter, so it has no base; leave base out.")
    model = load_base(name, device=device)
    task = task_of_base(str(name), model.config)
    processor = task.load_processor(str(name), _read_preprocessing(folder))
    labels = task.labels(model, None) if task.classifies else []
    return TrainedModel(model, task, processor, labels, _short_name(name), origin={"model": str(name)})


def fold_adapter(loaded: LoadedAdapter) -> TrainedModel:
    """An adapter folded into its base; `loaded` is merged by it.

    Raises:
        InlayError: One that no weight can stand for.
    """
    loaded.task.check_merges(loaded.name)
    origin = {"model": loaded.file.base_name, "adapter": loaded.name}
    merged = loaded.merge().model.requires_grad_(False).eval()
    seed = Training.from_metrics(loaded.file.metrics).seed
    return TrainedModel(merged, loaded.task, loaded.processor, loaded.labels, loaded.name, seed, origin)


def _read_preprocessing(folder: Path) -> dict[str, Any] | None:
    """What a report of inlay in the folder says of it; a TextProcessor's settings stand in no file of transformers."""
    for name in REPORTS:
        if (folder / name).is_file():
            return json.loads((folder / name).read_text(encoding="utf-8")).get("preprocessing") or None
    return None


def _short_name(name: str | Path) -> str:
    return Path(str(name).removeprefix("builtin:")).name

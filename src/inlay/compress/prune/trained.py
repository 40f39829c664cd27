"""The model that is pruned: of a folder, or an adapter folded into its base."""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from inlay.bases.device import Device, choose_device
from inlay.compress.source import Source, load_source
from inlay.errors import Unsupported
from inlay.tasks.evaluation import Evaluation, Request, Split, Training


@dataclass
class TrainedModel(Source):
    """A model without an adapter in it, all its weights frozen, and what its task needs of it."""

    @property
    def training(self) -> Training:
        """What is known of its training: the seed, and what it held out."""
        return Training.from_metrics(self.metrics)

    @property
    def seed(self) -> int:
        """By which its training held out a part of data without a split; 0 where that is not known."""
        return self.training.seed

    def score(
        self, data: str, *, limit: int | None = None, split: Split | None = None, resamples: int = 100
    ) -> Evaluation:
        """All scores of the task on the part of labelled data that training does not use.

        Args:
            data: As the recipes of its task take it.
            limit: Score so many examples at most.
            split: Another part.
            resamples: Of the examples, for the intervals.

        Raises:
            InlayError: Data of other labels, or none of this task.
        """
        used = self.training.used(data)
        training = replace(self.training if used else Training(settings={"seed": self.seed}), dataset=data)
        request = Request(split=split, limit=limit, compare=False, resamples=resamples, training=training)
        return self.task.evaluate(self, data, request)

    def with_model(self, model: PreTrainedModel) -> "TrainedModel":
        """Another model with the same task, processor and labels."""
        return replace(self, model=model)


def load_trained(name: str | Path, *, base: str | Path | None = None, device: Device | None = None) -> TrainedModel:
    """Load a model, or an adapter and fold it into its base.

    Args:
        name: An embedded base, a folder of a model or of an adapter, or the Hub id of one.
        base: Of the adapter, instead of the one that it names.
        device: As in `load_base`.

    Raises:
        InlayError: What `load_source` says; an adapter that no weight can stand for.
    """
    source = load_source(name, base)
    if not source.origin.get("merged", True):
        raise Unsupported(
            f"adapter {source.name!r} ({source.origin['method']}) computes what no weight of its base can stand for; "
            "prune the base, and train the adapter on that."
        )
    source.model.requires_grad_(False).eval().to(choose_device(device or "cpu"))
    return TrainedModel(**vars(source))

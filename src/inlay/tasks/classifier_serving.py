"""What classifiers of images and of texts share when they answer requests."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from inlay.errors import BadInput
from inlay.tasks.classification import class_probabilities
from inlay.tasks.serving import Reply, Row, ServedAdapter, Serving, TensorSpec

TOP = 5  # classes that are named to people, as `predict` and `classify_texts` name them


@dataclass(frozen=True)
class Choice:
    """Among which classes a request chooses.

    Attributes:
        group: Of labels, of a combination of classifiers; None: all.
        top: How many are named to people.
    """

    group: str | None = None
    top: int = TOP


class ClassifierServing(Serving):
    """A request may choose among a group of labels; a reply has the class, and logits and probabilities of all."""

    action = "classify"
    choices: ClassVar = (
        TensorSpec("group", "BYTES", (), "Choose among the labels of this group only.", optional=True, is_text=True),
        TensorSpec("top", "INT32", (), f"How many classes are named to people; default: {TOP}.", optional=True),
    )
    outputs: ClassVar = (
        TensorSpec("logits", "FP32", (-1,), "One for each class."),
        TensorSpec("probabilities", "FP32", (-1,), "One for each class."),
        TensorSpec("label", "BYTES", (1,), "The most probable class.", is_text=True),
    )

    @override
    def take_rows(self, output: Any, count: int) -> list[dict[str, Tensor]]:
        return [{"logits": logits} for logits in output.logits[:count].float().cpu()]

    @override
    def reply(
        self, found: Mapping[str, Any], row: Row, adapter: ServedAdapter, tensors: Collection[str] | None
    ) -> Reply:
        labels, columns = adapter.route(row.source.group)
        logits = found["logits"][: len(labels)] if row.source.group is None else found["logits"][columns]
        if not logits.isfinite().all():
            raise BadInput("the values of the input are so large that the model's answer is not finite.")
        probabilities = class_probabilities(logits, adapter.config)
        count = min(row.source.top, len(labels)) if tensors is None else 1
        values, places = probabilities.topk(count)
        names = [labels[place] for place in places.tolist()]
        if tensors is None:
            return Reply({"label": names[0], "probabilities": dict(zip(names, values.tolist(), strict=True))})
        made = {"logits": logits.numpy(), "probabilities": probabilities.numpy(), "label": [names[0]]}
        return Reply(tensors={name: made[name] for name in tensors})


def read_choice(values: Mapping[str, Any], adapter: ServedAdapter) -> Choice:
    """Among which classes a request chooses.

    Raises:
        InlayError: The adapter has no such group; top under 1.
    """
    group = values.get("group")
    adapter.route(group)  # which says that there is none
    top = int(values.get("top", TOP))
    if top < 1:
        raise BadInput(f"top must be at least 1, got {top}.")
    return Choice(group, top)

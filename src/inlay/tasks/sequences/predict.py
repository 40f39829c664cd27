"""Labels with probabilities for texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from inlay.bases.device import Device, move_model
from inlay.errors import BadInput
from inlay.methods.prompt import check_prompt
from inlay.tasks.adapter import Adapter, check_task
from inlay.tasks.classification import class_probabilities
from inlay.tasks.progress import show_progress


@dataclass(frozen=True)
class TextLabels:
    """What an adapter says of one text, or pair.

    Attributes:
        text: As it was given, or the first of a pair.
        pair: The second of a pair.
        labels: The most probable class names, best first.
        probabilities: Theirs, 0 to 1.
    """

    text: str
    pair: str | None
    labels: list[str]
    probabilities: list[float]

    @property
    def label(self) -> str:
        """The most probable class name."""
        return self.labels[0]


def classify_texts(
    adapter: Adapter,
    texts: Sequence[str] | Sequence[tuple[str, str]],
    *,
    group: str | None = None,
    top: int = 5,
    batch_size: int = 32,
    device: Device | None = None,
) -> list[TextLabels]:
    """Classify texts, or pairs of them, in their order.

    Args:
        adapter: From `load_adapter`.
        texts: All texts, or all pairs.
        group: Of labels, in a combination of classifiers (`adapter.groups`): choose among its classes only.
        top: How many classes to name, at least 1; all if there are fewer.
        batch_size: Texts in one forward pass.
        device: Move the adapter there first, such as to "cuda:1"; default: where it is.

    Raises:
        InlayError: One text where a list is due, texts mixed with pairs, an adapter of another task, or top or
            batch_size under 1.
    """
    if top < 1 or batch_size < 1:
        raise BadInput(f"top and batch_size must be at least 1, got {top} and {batch_size}.")
    check_task(adapter, "text-classification")
    move_model(adapter.model, device)
    check_prompt(adapter.model)
    paired = {not isinstance(text, str) for text in texts}
    if isinstance(texts, str) or len(paired) > 1:
        raise BadInput("texts must be a list of texts, or one of pairs (text, text), not a mixture of both.")
    rows = [(text, None) if isinstance(text, str) else (text[0], text[1]) for text in texts]
    labels, logits = adapter.route(group)
    top = min(top, len(labels))
    device = next(adapter.model.parameters()).device
    found = []
    begins = range(0, len(rows), batch_size)
    for begin in show_progress(begins, len(begins), "predict", "batch"):
        batch = rows[begin : begin + batch_size]
        seconds = [str(b) for _, b in batch] if True in paired else None
        encoded, _ = adapter.processor.encode([a for a, _ in batch], seconds)
        inputs = {key: value.to(device) for key, value in adapter.processor.pad_rows(encoded).items()}
        with torch.inference_mode():
            output = adapter.model(**inputs).logits  # B K
        values, classes = class_probabilities(output[:, logits].float(), adapter.model.config).topk(top)
        for (text, pair), some, places in zip(batch, values.tolist(), classes.tolist(), strict=True):
            found.append(TextLabels(text, pair, [labels[k] for k in places], some))
    return found

"""Labels with probabilities for images, and a sheet that shows them."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import default_collate

from inlay.bases.device import Device, move_model
from inlay.errors import BadInput
from inlay.tasks.adapter import Adapter, check_task, place_inputs
from inlay.tasks.classification import class_probabilities
from inlay.tasks.image_decoding import SUFFIXES, open_for_processor, open_image
from inlay.tasks.images.pixels import choose_steps
from inlay.tasks.progress import show_progress


@dataclass(frozen=True)
class Prediction:
    """What an adapter says of one image.

    Attributes:
        source: The file's path, or `image 3` for what has none.
        labels: The most probable class names, best first.
        probabilities: Theirs, 0 to 1.
    """

    source: str
    labels: list[str]
    probabilities: list[float]

    @property
    def label(self) -> str:
        """The most probable class name."""
        return self.labels[0]


def predict(
    adapter: Adapter,
    images: Sequence[Any],
    *,
    group: str | None = None,
    top: int = 5,
    batch_size: int = 32,
    device: Device | None = None,
) -> list[Prediction]:
    """Classify images, in their order.

    Args:
        adapter: From `load_adapter`.
        images: Paths, file contents as bytes, or PIL images of any size and mode.
        group: Of labels, in a combination of classifiers (`adapter.groups`): choose among its classes only.
        top: How many classes to name, at least 1; all if there are fewer.
        batch_size: Images in one forward pass.
        device: Move the adapter there first, such as to "cuda:1"; default: where it is.

    Raises:
        InlayError: An image that cannot be read (named), a group that the adapter does not have, or top or batch_size
            under 1.
    """
    if top < 1 or batch_size < 1:
        raise BadInput(f"top and batch_size must be at least 1, got {top} and {batch_size}.")
    check_task(adapter, "image-classification")
    move_model(adapter.model, device)
    labels, rows = adapter.route(group)
    top = min(top, len(labels))
    weight = next(p for p in adapter.model.parameters() if p.is_floating_point())
    predictions: list[Prediction] = []
    batches = _read_ahead(images, adapter.processor, batch_size)
    for batch in show_progress(batches, -(-len(images) // batch_size), "predict", "batch"):
        with torch.inference_mode():
            logits = adapter.model(**place_inputs(batch, weight)).logits  # B K
        probabilities, classes = class_probabilities(logits[:, rows].float(), adapter.model.config).topk(top)
        for values, indices in zip(probabilities.tolist(), classes.tolist(), strict=True):
            image = images[len(predictions)]
            source = str(image) if isinstance(image, str | os.PathLike) else f"image {len(predictions)}"
            predictions.append(Prediction(source, [labels[k] for k in indices], values))
    return predictions


def _read_ahead(images: Sequence[Any], processor: Any, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of what a model takes, in order; while one is computed, threads decode the next.

    Raises:
        InlayError: The first image that cannot be read.
    """
    steps = choose_steps(processor)

    def prepare(source: Any) -> dict[str, Tensor]:
        return steps(open_for_processor(source, processor))

    waiting: deque[list[Future[dict[str, Tensor]]]] = deque()
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        for begin in range(0, len(images), batch_size):
            batch = images[begin : begin + batch_size]
            for source in batch:
                if isinstance(source, Image.Image):  # one object may come twice, and Pillow loads it in one thread only
                    with suppress(Exception):  # which `prepare` raises again
                        source.load()
            waiting.append([pool.submit(prepare, source) for source in batch])
            if len(waiting) > 1:
                yield default_collate([one.result() for one in waiting.popleft()])
        for last in waiting:
            yield default_collate([one.result() for one in last])
    finally:
        pool.shutdown(cancel_futures=True)


def find_pictures(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Files as they are given; the images in a folder and below it, sorted.

    Raises:
        InlayError: A path that does not exist, or a folder without images.
    """
    found: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            inside = sorted(str(p) for p in Path(path).rglob("*") if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise BadInput(f"{path} holds no images ({', '.join(SUFFIXES[:4])} ...).")
            found += inside
        elif Path(path).is_file():
            found.append(os.fspath(path))
        else:
            raise BadInput(f"there is no image or folder at {os.fspath(path)!r}.")
    return found


def draw_sheet(
    predictions: Sequence[Prediction], images: Sequence[Any], path: str | Path, *, columns: int = 4, side: int = 160
) -> Path:
    """Save the images as a grid, each over its label, probability and a bar of that length.

    Args:
        predictions: From `predict`, one for each image.
        images: As given to `predict`.
        path: Of the sheet; its suffix chooses the format.
        columns: Images in a row.
        side: Size of an image in the sheet, in pixels; small ones are enlarged without smoothing.
    """
    columns = min(columns, len(predictions))
    rows, gap, text = -(-len(predictions) // columns), 12, 40
    size = (columns * (side + gap) + gap, rows * (side + text + gap) + gap)
    sheet, font = Image.new("RGB", size, "white"), ImageFont.load_default(15)
    draw = ImageDraw.Draw(sheet)
    for i, (prediction, source) in enumerate(zip(predictions, images, strict=True)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + text + gap)
        image = open_image(source)
        scale = side / max(image.size)
        image = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))),
            Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS,
        )
        sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2))
        probability = prediction.probabilities[0]
        percent = f"{probability:.0%}"
        label, room = prediction.label, side - draw.textlength(percent, font) - 8
        while len(label) > 1 and draw.textlength(label, font) > room:
            label = label.rstrip("…")[:-1] + "…"
        draw.text((x, y + side + 4), label, "black", font)
        draw.text((x + side, y + side + 4), percent, "dimgray", font, anchor="ra")
        draw.rectangle((x, y + side + 26, x + side - 1, y + side + 32), "gainsboro")
        draw.rectangle((x, y + side + 26, x + max(1, round(side * probability)) - 1, y + side + 32), "steelblue")
    sheet.save(path)
    return Path(path)

"""Images of requests: what the model gets of them is bit for bit what `predict` gives it."""

import numpy as np
import pytest
import torch

from inlay import InlayError, load_processor
from inlay.tasks.images.predict import _read_ahead
from inlay.tasks.images.serving import ImageServing
from inlay.tasks.serving import Limits, Row, ServedAdapter
from serve.test_tasks import draw, png

PROCESSOR = load_processor("builtin:vit-tiny")
ADAPTER = ServedAdapter("a", PROCESSOR, ["x", "y"])


def read(limits=Limits(), **values):  # noqa: B008
    return ImageServing().read(values, ADAPTER, limits)


def test_the_model_gets_what_it_gets_in_predict():
    images = [draw(seed, size) for seed, size in enumerate([(40, 59), (301, 243), (8, 8)])]
    (expected,) = _read_ahead(images, PROCESSOR, 3)
    rows = [read(image=png(image)) for image in images] + [read(pixels=np.asarray(image)) for image in images]
    made = [PROCESSOR(image, return_tensors="np")["pixel_values"][0] for image in images]
    rows += [read(pixel_values=values) for values in made]
    batch = ImageServing().collate(rows, torch.zeros(1))
    assert batch.keys() == expected.keys() and len({row.shape for row in rows}) == 1
    assert torch.equal(batch["pixel_values"], expected["pixel_values"].repeat(3, 1, 1, 1))
    halves = ImageServing().collate(rows, torch.zeros(1, dtype=torch.bfloat16))
    assert halves["pixel_values"].dtype == torch.bfloat16


def test_one_label_is_answered_by_a_sigmoid_as_by_its_own_model():
    """Next to adapters of several labels on one base, whose config has more."""
    config = type("Config", (), {"problem_type": None, "num_labels": 1})()
    adapter = ServedAdapter("a", PROCESSOR, ["only"], config=config)
    row = Row({}, None, read(image=png(draw(0))).source)
    found = {"logits": torch.tensor([0.7, -torch.inf, -torch.inf])}  # a bank fills up
    reply = ImageServing().reply(found, row, adapter, ["probabilities"])
    assert reply.tensors["probabilities"] == pytest.approx([1 / (1 + np.exp(-0.7))])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "one of image, pixels and pixel_values, got none"),
        ({"image": b"", "pixels": b""}, "got image, pixels"),
        ({"image": b""}, "an empty file"),
        ({"pixels": np.zeros((0, 4, 3), np.uint8)}, "are no image"),
        ({"pixels": np.zeros((40, 40, 3), np.uint8)}, "40 x 40 pixels; the limit is 1,500"),
        ({"pixel_values": np.zeros((3, 8, 8), np.float32)}, "must be 3 x 32 x 32"),
        ({"image": png(draw(0, (8, 8))), "top": 0}, "top must be at least 1"),
        ({"image": png(draw(0, (8, 8))), "group": "x"}, "no group of labels 'x'"),
    ],
)
def test_what_is_refused(values, words):
    with pytest.raises(InlayError, match=words):
        read(Limits(pixels=1500), **values)

"""RandAugment and mixup: their ranges, their loss, and the same images whatever reads them."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader

from inlay import ImageTask, ImageView, InlayError, load_images, load_processor
from inlay.tasks.images.augment import OPERATIONS, mix_images, rand_augment
from inlay.tasks.images.loss import SmoothedClasses
from inlay.tasks.images.pixels import ProcessorSteps
from inlay.train.evaluation import split_batch
from inlay.train.sampler import SeededDataset, SeededSampler


@pytest.fixture(scope="module")
def rows():
    return load_images("builtin:digits").train.select(range(12))


@pytest.fixture(scope="module")
def processor():
    return load_processor("builtin:vit-tiny")


def noise(mode="RGB", side=32):
    shape = (side, side, 3) if mode == "RGB" else (side, side)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def dot(x, y, side=101):
    image = Image.new("L", (side, side), 0)
    image.putpixel((x, y), 255)
    return image


def find_dot(image):
    return tuple(int(i) for i in np.argwhere(np.asarray(image) == 255)[0][::-1])


# rand_augment


def test_operations_and_ranges_are_those_of_the_paper_at_full_strength():
    """The fourteen of table 1, with the ranges that torchvision gives 30 of its 31 bins."""
    assert len(OPERATIONS) == 14
    image = noise()
    same, contrast, equal, poster, solar, rotate, shear_x, shear_y, move_x, move_y, *enhance = OPERATIONS
    assert same(image, 1, 1).tobytes() == image.tobytes()
    assert contrast(image, 1, 1).tobytes() == ImageOps.autocontrast(image).tobytes()
    assert equal(image, 1, 1).tobytes() == ImageOps.equalize(image).tobytes()
    assert (np.asarray(poster(image, 1, 1)) == np.asarray(image) // 16 * 16).all()
    assert (np.asarray(solar(image, 1, 1)) == 255 - np.asarray(image)).all()
    assert rotate(image, 1, -1).tobytes() == image.rotate(-30, fillcolor=(128, 128, 128)).tobytes()
    assert find_dot(move_x(dot(80, 50), 1, 1)) == (80 - round(101 * 150 / 331), 50)
    assert find_dot(move_y(dot(50, 20), 1, -1)) == (50, 20 + round(101 * 150 / 331))
    assert find_dot(shear_x(dot(80, 50), 1, 1)) == (80 - 15, 50) and find_dot(shear_y(dot(50, 80), 1, 1)) == (50, 65)
    kinds = (ImageEnhance.Color, ImageEnhance.Contrast, ImageEnhance.Brightness, ImageEnhance.Sharpness)
    for kind, operation in zip(kinds, enhance, strict=True):
        for sign, factor in ((-1, 0.1), (1, 1.9)):
            assert operation(image, 1, sign).tobytes() == kind(image).enhance(factor).tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_image_keeps_its_size_and_mode_and_follows_pythons_seed(mode):
    image, seen = noise(mode), set()
    for seed in range(60):
        random.seed(seed)
        made = rand_augment(image, 9)
        random.seed(seed)
        assert rand_augment(image, 9).tobytes() == made.tobytes()
        assert made.size == image.size and made.mode == mode
        seen.add(made.tobytes())
    assert len(seen) > 40


def test_crops_are_the_same_with_and_without_it(rows, processor):
    """It draws after crop and flip, so that a seed shows the same part of an image."""

    class Sizes(ProcessorSteps):
        def __call__(self, image):
            return {"size": image.size}

    seen = []
    for magnitude in (0, 9):
        view = ImageView(rows, processor, "crop-flip", randaugment=magnitude)
        view.steps = Sizes(processor)
        seen.append([SeededDataset(view, 4)[i, i]["size"] for i in range(8)])
    assert seen[0] == seen[1] and len({*seen[0]}) > 4


# mixup


def read(rows, processor, workers=0, done=0):
    view = ImageView(rows, processor, "crop", randaugment=9, mixup=0.4)
    order = SeededSampler(len(rows), 6, 3, seed=1, done=done)
    return list(DataLoader(SeededDataset(view, 1), batch_sampler=order, num_workers=workers, collate_fn=mix_images))


def test_batches_are_equal_in_any_worker_and_after_a_resumption(rows, processor):
    whole = read(rows, processor)
    for batches, expected in ((read(rows, processor, workers=1), whole), (read(rows, processor, done=2), whole[2:])):
        for one, other in zip(batches, expected, strict=True):
            assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_each_image_is_mixed_with_the_one_from_the_other_end():
    items = [
        {"pixel_values": torch.full((3, 2, 2), float(i)), "labels": i, "share": s} for i, s in enumerate((0.25, 1, 0))
    ]
    batch = mix_images(items)
    assert batch["labels"].tolist() == [0, 1, 2] and batch["other_labels"].tolist() == [2, 1, 0]
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1.5, 1, 0] and batch["pixel_values"].shape == (3, 3, 2, 2)
    del items[0]["share"], items[1]["share"], items[2]["share"]
    assert mix_images(items).keys() == {"pixel_values", "labels"}
    with pytest.raises(InlayError, match="mixup mixes pixels only, and this base takes spatial_shapes too"):
        mix_images([{**items[0], "share": 0.5, "spatial_shapes": torch.ones(2)}])


class Classifier(torch.nn.Module):
    """Logits of the mean pixels, as a model of transformers gives them."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 3)

    def forward(self, pixel_values, labels):
        logits = self.head(pixel_values.mean((2, 3)))
        return type("Output", (), {"logits": logits, "loss": cross_entropy(logits, labels)})()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_that_of_mixed_labels(smoothing):
    torch.manual_seed(0)
    model, loss = Classifier(), SmoothedClasses(smoothing)
    items = [{"pixel_values": torch.randn(3, 2, 2), "labels": i % 3, "share": random.random()} for i in range(5)]
    batch = mix_images(items)
    output, share = loss(model, batch), batch["share"][:, None]
    target = share * one_hot(batch["labels"], 3) + (1 - share) * one_hot(batch["other_labels"], 3)
    assert output.loss.item() == pytest.approx(
        cross_entropy(output.logits, target, label_smoothing=smoothing).item(), abs=1e-6
    )
    pieces = [loss(model, piece).loss * loss.weight(piece) for piece in split_batch(batch, 3)]
    assert sum(pieces).item() / 5 == pytest.approx(output.loss.item(), abs=1e-6)
    plain = loss(model.eval(), batch)
    assert plain.loss.item() == pytest.approx(cross_entropy(plain.logits, batch["labels"]).item(), abs=1e-6)


def test_options_reach_the_training_view_only(rows, processor):
    data = ImageTask(randaugment=5, mixup=0.2).load(0)
    assert (data.train.randaugment, data.train.mixup) == (5, 0.2) and data.collate is mix_images
    assert (data.validation.randaugment, data.validation.mixup) == (0, 0) and data.loss.smoothing == 0
    with pytest.raises(InlayError, match="randaugment must be a whole number from 0 to 30, got 31"):
        ImageTask(randaugment=31)
    with pytest.raises(InlayError, match="randaugment must be 0 to 30 and mixup at least 0, got 0 and -1"):
        ImageView(rows, processor, mixup=-1)

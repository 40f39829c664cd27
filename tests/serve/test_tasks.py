"""What every served task passes: the answer is that of the task's own function with the adapter loaded alone."""

import asyncio
import base64
import gzip
import io
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from inlay import (
    InlayError,
    SpatialAdapterConfig,
    VolumeProcessor,
    classify_texts,
    load_adapter,
    load_base,
    load_processor,
    predict,
    predict_masks,
    sam_targets,
    save_adapter,
    segment,
)
from inlay.serve.model_bank import ModelBank
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.service import Service, open_bank
from inlay.tasks import TASKS
from serve.banked import GPT2, SAM, VIT, pair
from serve.test_bank_tasks import classifiers

CROP = (8, 16, 16)
TEXTS = [("cheap food", None), ("a long text, of more words than the first one has by far " * 4, None), ("a", "b")]
POINTS, NEGATIVES, BOXES = [(20, 25), (30, 31)], [(5, 5)], [(4, 6, 20, 22), (20, 20, 38, 30)]


def draw(seed, size=(48, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def scan(seed, shape=(22, 18, 12), slice_mm=2.0):
    """An anisotropic, flipped scan, as a file in memory."""
    voxels = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    image = nibabel.Nifti1Image(voxels, np.diag([-1.0, 1.0, slice_mm, 1.0]))
    image.header.set_xyzt_units("mm")
    return image.to_bytes()


def save_random(model, folder, processor, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return save_adapter(model.eval(), folder, processor=processor)


def save_images(folder):
    return pair(VIT, "lora", folder)


def save_masks(folder):
    for seed, name in enumerate("ab"):
        model = load_base(SAM)
        config = LoraConfig(r=2 + seed, target_modules=sam_targets(model, "linear", "encoder"))
        save_random(get_peft_model(model, config), folder / name, load_processor(SAM), seed)
    return folder


def save_volumes(folder):
    for seed, (name, labels) in enumerate({"a": ["tumour"], "b": ["left", "right"]}.items()):
        model = load_base(SAM)
        processor = VolumeProcessor((2.0, 1.0, 1.0), CROP, values=None if seed else [4], flip=[2] if seed else [])
        config = SpatialAdapterConfig.fitted(model, labels, CROP, processor.spacing_mm, 4, width=4, decoder_width=8)
        save_random(get_peft_model(model, config), folder / name, processor, seed)
    return folder


def save_channels(folder, channels=("flair", "t1"), name="two"):
    """An adapter for scans of several channels."""
    model = load_base(SAM)
    processor = VolumeProcessor((2.0, 1.0, 1.0), CROP, channels=channels)
    config = SpatialAdapterConfig.fitted(
        model, ["tumour"], CROP, processor.spacing_mm, 4, width=4, decoder_width=8, channels=channels
    )
    save_random(get_peft_model(model, config), folder / name, processor, 0)
    return folder


def image_requests():
    made = [draw(seed) for seed in range(3)]
    return [{"image": png(made[0])}, {"pixels": np.asarray(made[1])}, {"image": png(made[2]), "top": 2}]


def check_image(adapter, values, facts, tensors):
    source = values["image"] if "image" in values else Image.fromarray(values["pixels"])
    check_classes(predict(adapter, [source], top=values.get("top", 5))[0], adapter, facts, tensors)


def check_text(adapter, values, facts, tensors):
    text = (values["text"], values["pair"]) if "pair" in values else values["text"]
    check_classes(classify_texts(adapter, [text])[0], adapter, facts, tensors)


def check_classes(expected, adapter, facts, tensors):
    assert list(facts["probabilities"]) == expected.labels and facts["label"] == expected.label
    assert list(facts["probabilities"].values()) == pytest.approx(expected.probabilities, rel=1e-4, abs=1e-6)
    assert tensors["label"] == [expected.label] and len(tensors["logits"]) == len(adapter.labels)
    whole = torch.from_numpy(tensors["logits"]).softmax(-1)
    np.testing.assert_allclose(tensors["probabilities"], whole, rtol=1e-5)


def mask_requests():
    image = png(draw(7))
    points = np.array([*POINTS, *NEGATIVES], np.float32)
    return [
        {"image": image, "points": points, "labels": np.array([1, 1, 0], np.int32)},
        {"pixels": np.asarray(draw(8)), "boxes": np.array(BOXES, np.float32)},
        {"image": image, "points": points[:2], "boxes": np.array(BOXES[:1], np.float32)},
    ]


def check_masks(adapter, values, facts, tensors):
    source = values["image"] if "image" in values else Image.fromarray(values["pixels"])
    asked = {"boxes": values.get("boxes", np.zeros((0, 4))).tolist()}
    if "points" in values:
        asked |= {"points": POINTS, "negatives": NEGATIVES if "labels" in values else []}
    expected = predict_masks(adapter, source, **asked)
    assert tensors["masks"].dtype == np.uint8 and tensors["masks"].shape == expected.masks.shape
    assert (tensors["masks"] != expected.masks).mean() < 1e-3  # logits near 0 may fall to the other side
    np.testing.assert_allclose(tensors["predicted_iou"], expected.scores, rtol=1e-3)
    assert (facts["width"], facts["height"]) == (40, 48) and len(facts["masks"]) == len(expected.masks)
    for told, mask, score in zip(facts["masks"], tensors["masks"], expected.scores, strict=True):
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(told["png"]))))
        assert (drawn == mask).all() and told["pixels"] == mask.sum()
        assert told["predicted_iou"] == pytest.approx(score, rel=1e-3)


def volume_requests():
    return [
        {"scan": scan(0, (18, 16, 9))},
        {"scan": scan(1, (12, 12, 6)), "keep_probabilities": True, "largest": True},
        {
            "scan": scan(2, (16, 16, 9)),
            "points": np.array([[3, 4, 5]], np.float32),
            "point_labels": np.array([0], np.int32),
        },
    ]


def check_volume(adapter, values, facts, tensors):
    options = {name: values[name] for name in ("largest", "keep_probabilities") if name in values}
    points = [(3, 4, 5, 0)] if "points" in values else ()
    expected = segment(adapter, values["scan"], points=points, progress=False, **options)
    np.testing.assert_array_equal(tensors["mask"], expected.class_mask)
    assert tensors["labels"] == adapter.labels
    np.testing.assert_allclose(tensors["volumes_ml"], list(expected.volumes_ml.values()), rtol=1e-6)
    assert facts["volumes_ml"] == pytest.approx(expected.volumes_ml) and facts["shape"] == expected.mask.shape
    for file in (tensors["mask_file"][0], base64.b64decode(facts["mask"])):
        image = nibabel.Nifti1Image.from_bytes(gzip.decompress(file))
        np.testing.assert_array_equal(np.asarray(image.dataobj), expected.mask)
        np.testing.assert_array_equal(image.affine, expected.affine)
    assert ("probabilities" in tensors) == ("keep_probabilities" in values)
    if "probabilities" in tensors:
        np.testing.assert_array_equal(tensors["probabilities"], expected.probabilities.astype(np.float32))


@dataclass
class Row:
    """How one task is tested; without a base it is not served, and `says` why."""

    base: str = ""
    save: Any = None
    requests: Any = None
    check: Any = None
    says: str = ""


ROWS = {
    "image-classification": Row(VIT, save_images, image_requests, check_image),
    "text-classification": Row(
        GPT2,
        lambda folder: classifiers(GPT2, folder),
        lambda: [{"text": text} | ({"pair": more} if more else {}) for text, more in TEXTS],
        check_text,
    ),
    "mask-generation": Row(SAM, save_masks, mask_requests, check_masks),
    "volume-segmentation": Row(SAM, save_volumes, volume_requests, check_volume),
    "text-to-image": Row(says="inlay does not serve text-to-image yet."),
}


def ask_all(service, asked, tensors):
    """The replies to (adapter, values), which wait together."""

    async def ask():
        return await asyncio.gather(*(service.ask(name, values, tensors=tensors) for name, values in asked))

    return asyncio.run(ask())


def test_every_task_has_a_row():
    assert set(ROWS) == set(TASKS) - {"text-generation"}  # which has routes and tests of its own


@pytest.mark.parametrize("name", ROWS)
def test_served_answers_are_those_of_the_adapters_alone(name, tmp_path):
    row = ROWS[name]
    if row.says:
        with pytest.raises(InlayError, match=row.says):
            TASKS[name].serving()
        return
    folder, requests = row.save(tmp_path), row.requests()
    service = Service(open_bank(row.base, folder), ServiceConfig())
    assert isinstance(service.bank, ModelBank) == (name == "volume-segmentation") and service.task.name == name
    service.start()
    try:
        asked = list(zip("aba", requests, strict=True))
        told = ask_all(service, asked, None)
        answered = ask_all(service, asked, [spec.name for spec in service.serving.outputs])
    finally:
        assert service.stop(60)
    alone = {adapter: load_adapter(folder / adapter) for adapter in "ab"}
    for (adapter, values), people, program in zip(asked, told, answered, strict=True):
        assert people.signature == program.signature and people.signature.digest == alone[adapter].file.digest
        assert not people.reply.tensors and not program.reply.facts
        row.check(alone[adapter], values, people.reply.facts, program.reply.tensors)

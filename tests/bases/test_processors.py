"""Image processors: by the name of a base, and rebuilt from what an adapter stores."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig

from inlay.bases.processors import load_processor, processor_from
from inlay.errors import InlayError
from places import SHARED

MOBILENETS = SHARED / "mobilenet_imagenet/hf"


@pytest.fixture
def folder(tmp_path):
    """A model folder without preprocessing settings; a processor needs no weights."""
    ViTConfig(image_size=32).save_pretrained(tmp_path)
    return tmp_path


def random_picture(width=50, height=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_the_processor_of_an_embedded_base():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor = load_processor("builtin:vit-tiny")
        pixels = processor(random_picture(), return_tensors="pt")["pixel_values"]
    assert type(processor).__name__ == "ViTImageProcessorPil" and pixels.shape == (1, 3, 32, 32)


def test_a_folder_with_settings_and_one_without(folder):
    standard = load_processor(folder)
    assert standard.size == {"height": 32, "width": 32} and list(standard.image_mean) == [0.5, 0.5, 0.5]
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 24},
        "image_mean": [0, 0, 0],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    pixels = load_processor(folder)(random_picture(), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 16, 24)


@pytest.mark.parametrize("text", ["{", "[]", '{"image_processor_type": "Nonsense"}'])
def test_settings_that_cannot_be_used_are_not_replaced_by_a_default(text, folder):
    (folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(InlayError, match=r"the preprocessor_config.json of .* cannot be used") as caught:
        load_processor(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(("name", "side"), [("mobilenet_v1_0.25_128", 128), ("mobilenet_v2_1.0_224", 224)])
def test_a_pre_trained_mobilenet_is_sized_by_its_config(name, side):
    if not (MOBILENETS / name).is_dir():
        pytest.skip(f"no pre-trained MobileNet at {MOBILENETS / name}")
    processor = load_processor(MOBILENETS / name)
    assert processor.crop_size == {"height": side, "width": side}
    assert processor.size == {"shortest_edge": round(side * 256 / 224)}
    assert processor(random_picture(), return_tensors="pt")["pixel_values"].shape == (1, 3, side, side)


@pytest.mark.parametrize("suffix", ["", "Fast", "Pil"])
def test_a_processor_comes_back_from_json(suffix, folder):
    processor = load_processor(folder)
    settings = json.loads(processor.to_json_string())
    settings["image_processor_type"] = "ViTImageProcessor" + suffix
    again = processor_from(json.loads(json.dumps(settings)))
    picture = random_picture()
    first, second = (p(picture, return_tensors="pt")["pixel_values"] for p in (processor, again))
    assert torch.equal(first, second) and again.to_dict() == processor.to_dict()


@pytest.mark.parametrize("kind", ["Evil", "os.system", "", "ViTForImageClassification", "PreTrainedModel"])
def test_an_unknown_processor(kind):
    with pytest.raises(InlayError, match=f"unknown image processor '{kind}'; transformers has none of that name"):
        processor_from({"image_processor_type": kind})
    with pytest.raises(InlayError, match="unknown image processor ''"):
        processor_from({})

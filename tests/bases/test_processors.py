"""Image processors: by the name of a base, and rebuilt from what an adapter stores."""

import json
import warnings

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import ViTConfig

from inlay import ImageView, load_base, load_images
from inlay.bases.processors import build_processor, load_processor
from inlay.errors import InlayError
from inlay.tasks import TASKS
from inlay.tasks.images.processing import image_processor_settings
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
    again = build_processor(json.loads(json.dumps(settings)))
    picture = random_picture()
    first, second = (p(picture, return_tensors="pt")["pixel_values"] for p in (processor, again))
    assert torch.equal(first, second) and again.to_dict() == processor.to_dict()


@pytest.mark.parametrize("kind", ["Evil", "os.system", "", "ViTForImageClassification", "PreTrainedModel"])
def test_an_unknown_processor(kind):
    with pytest.raises(InlayError, match=f"unknown image processor '{kind}'; transformers has none of that name"):
        build_processor({"image_processor_type": kind})
    with pytest.raises(InlayError, match="unknown image processor ''"):
        build_processor({})


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}
TEXT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
TALL = {"image_size": [32, 64]}


def small(kind, **settings):
    if kind == "vit":
        return transformers.ViTConfig(**SMALL, **settings)
    if kind == "beit":
        return transformers.BeitConfig(**SMALL, **settings)
    if kind == "swin":
        sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4}
        return transformers.SwinConfig(**sizes, **settings)
    if kind == "convnext":
        return transformers.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, **settings)
    if kind == "mobilenet":
        return transformers.MobileNetV2Config(depth_multiplier=0.1, **settings)
    if kind == "siglip":
        return transformers.SiglipConfig(
            vision_config={**SMALL, **settings}, text_config={**TEXT, "projection_size": 32}
        )
    settings.pop("image_size", None)
    vision = {**SMALL, "num_patches": 16, **settings}
    eos = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.Siglip2Config(vision_config=vision, text_config=TEXT | eos)


@pytest.mark.parametrize("settings", [{"num_channels": 1}, {"num_channels": 4}, TALL], ids=["grey", "RGBA", "tall"])
@pytest.mark.parametrize("kind", ["vit", "beit", "swin", "convnext", "mobilenet", "siglip", "siglip2"])
def test_what_a_base_without_settings_takes_is_what_it_gets(tmp_path, kind, settings):
    if kind == "siglip" and settings is TALL:
        pytest.skip("transformers makes no SigLIP that is not square")
    config = small(kind, **{"image_size": 32, **settings})
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path)
    model, own = load_base(tmp_path, labels=list("0123456789")), load_processor(tmp_path)
    again = build_processor(image_processor_settings(own))
    task = TASKS["image-classification"]
    rows = load_images("builtin:digits").train.select(range(2))
    item = ImageView(rows, own, "crop")[0]
    batches = [
        {key: value[None] for key, value in item.items() if key != "labels"},
        task.golden_inputs(model, again),
        task.random_inputs(model, own),
        {key: value for key, value in task.planned_batch(model, 2, 0, 0)[0].items() if key != "labels"},
    ]
    for batch in batches:
        assert batch["pixel_values"].shape[1:] == batches[0]["pixel_values"].shape[1:] or kind == "convnext"
        with torch.no_grad():
            assert model(**batch).logits.isfinite().all()
    if settings is TALL and kind not in ("convnext", "siglip2"):
        assert item["pixel_values"].shape == (3, 32, 64)
    elif settings is not TALL and kind != "siglip2":
        assert item["pixel_values"].shape[0] == settings["num_channels"]


def test_other_channels_are_refused(tmp_path):
    transformers.ViTForImageClassification(small("vit", num_channels=13, image_size=32)).save_pretrained(tmp_path)
    with pytest.raises(InlayError, match=r"takes images of 13 channels; use a base for grey \(1\), RGB \(3\) or RGBA"):
        load_processor(tmp_path)


def test_grey_bases_whose_settings_have_three_means(tmp_path):
    """As transformers writes them by default; its own processor would fail on them."""
    transformers.ViTForImageClassification(small("vit", num_channels=1, image_size=32)).save_pretrained(tmp_path)
    square = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=square, image_mean=[0.4, 0.5, 0.6], do_convert_rgb=True).save_pretrained(
        tmp_path
    )
    own = load_processor(tmp_path)
    pixels = ImageView(load_images("builtin:digits").train.select([0]), own)[0]["pixel_values"]
    assert pixels.shape == (1, 32, 32) and own.image_mean == [pytest.approx(0.5)]

"""builtin:sam-tiny: that it loads quietly, is as good as its card says, and holds nothing but itself."""

import json
import re
import warnings

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForMaskGeneration, SamModel
from transformers.utils import logging as transformers_logging

from inlay.bases.load import BUILTIN
from inlay.bases.processors import load_processor
from inlay.builtin.scenes import generate_scenes
from inlay.tasks.masks.clicks import score_clicks
from inlay.tasks.masks.prompts import draw_objects

FOLDER = BUILTIN / "sam-tiny"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model():
    return AutoModelForMaskGeneration.from_pretrained(FOLDER, dtype=torch.float32)


def mean_ious(model, kind, count=16):
    """On scenes of a seed that no training used: 1 point, 3 points (two in errors) and a box."""
    torch.manual_seed(0)
    made = generate_scenes(count, seed=4711, kind=kind)
    pixels = load_processor("builtin:sam-tiny")(images=list(made.images), return_tensors="pt")["pixel_values"]
    return [float(found.mean()) for found in score_clicks(model, pixels, draw_objects(made, 8)).values()]


def test_it_loads_without_a_word(caplog):
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(action="error"):
            model = AutoModelForMaskGeneration.from_pretrained(FOLDER, dtype=torch.float32)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert type(model) is SamModel and {p.dtype for p in model.parameters()} == {torch.float32}
    config = model.config
    prompts, vision, decoder = config.prompt_encoder_config, config.vision_config, config.mask_decoder_config
    assert prompts.image_embedding_size == vision.image_size // vision.patch_size == 16
    assert prompts.hidden_size == decoder.hidden_size == vision.output_channels == 2 * vision.num_pos_feats == 64
    assert vision.initializer_range >= 0.02 and vision.use_rel_pos and vision.global_attn_indexes == [2, 5]
    assert model.prompt_encoder.shared_embedding.positional_embedding is (
        model.shared_image_embedding.positional_embedding
    )


def test_the_folder_is_small_whole_and_tells_no_place():
    assert {path.name for path in FOLDER.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118 - no dict
        assert file.metadata() == {"format": "pt"}
    for path in FOLDER.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not {"_name_or_path", "name_or_path"} & set(json.loads(text)) and not re.search(r"/\w+/|[A-Z]:\\", text)


def test_it_answers_prompts_on_scenes_it_never_saw(model):
    torch.manual_seed(0)
    fresh = SamModel(model.config).eval()
    assert max(mean_ious(fresh, "mixed", 4)) < 0.2
    point, points, box = mean_ious(model, "mixed")
    assert point > 0.27 and points > 0.36 and box > 0.42


def test_its_card_names_its_size(model):
    assert f"{model.num_parameters():,}" in CARD and "Apache-2.0" in CARD

"""The embedded image classifiers are what their recipe makes, and name shapes that they were not trained on."""

import runpy

import pytest
import torch

from inlay import load_base
from inlay.bases.load import BUILTIN
from inlay.builtin.shapes import generate_shapes
from places import ROOT

RECIPE = runpy.run_path(str(ROOT / "recipes" / "pretrain" / "images.py"))
# share of the held-out images that the card states
CARDS = {"vit-tiny": 0.686, "squeezenet-tiny": 0.878, "shufflenet-tiny": 0.9}


@pytest.mark.parametrize("name", RECIPE["BASES"])
def test_an_embedded_classifier(name: str):
    model = load_base(f"builtin:{name}")
    images, labels = generate_shapes(512, seed=1)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        said = model(pixel_values=pixels).logits.argmax(-1)
    assert (said == torch.from_numpy(labels)).float().mean() == pytest.approx(CARDS[name], abs=0.05)
    assert f"{CARDS[name]:.1%} of 4,096" in (BUILTIN / name / "README.md").read_text()

    assert (BUILTIN / name / "model.safetensors").stat().st_size < 1e6

    made = RECIPE["BASES"][name][0]()
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in made.state_dict().items()} == shapes
    assert made.config.id2label == model.config.id2label

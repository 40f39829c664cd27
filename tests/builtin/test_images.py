"""The embedded image classifiers are what their recipe makes, and name as many shapes as their cards say."""

import re
import runpy

import pytest
import torch

from inlay import load_base
from inlay.bases.load import BUILTIN, list_builtin_bases
from inlay.builtin.shapes import generate_shapes
from places import ROOT

MAKERS = runpy.run_path(str(ROOT / "recipes" / "pretrain" / "images.py"))["BASES"]


@pytest.mark.parametrize("name", [name for name in MAKERS if f"builtin:{name}" in list_builtin_bases()])
def test_an_embedded_classifier(name: str):
    model = load_base(f"builtin:{name}")
    images, labels = generate_shapes(512, seed=1)  # the first of those that the card was written on
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        right = model(pixel_values=pixels).logits.argmax(-1) == torch.from_numpy(labels)
    claim = re.search(r"names ([\d.]+)% of 4,096", (BUILTIN / name / "README.md").read_text())
    assert claim and right.float().mean() == pytest.approx(float(claim[1]) / 100, abs=0.05)
    assert (BUILTIN / name / "model.safetensors").stat().st_size < 1e6

    made = MAKERS[name][0]()
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in made.state_dict().items()} == shapes
    assert made.config.id2label == model.config.id2label

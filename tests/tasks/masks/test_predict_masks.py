"""Masks of points and boxes in a picture, by Python and from the command line."""

import json
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from inlay import InlayError, load_adapter, load_base, load_processor, predict, predict_masks, save_adapter
from inlay.bases.sites import decoder_targets
from inlay.cli import app as cli
from inlay.tasks.masks.predict import MaskPrediction, draw_masks, parse_coordinates


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An adapter that changes next to nothing."""
    torch.manual_seed(0)
    base = load_base("builtin:sam-tiny")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=decoder_targets(base)))
    where = tmp_path_factory.mktemp("masks") / "adapter"
    return save_adapter(model, where, processor=load_processor("builtin:sam-tiny"))


@pytest.fixture(scope="module")
def adapter(folder):
    return load_adapter(folder)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A bright disc, 200 x 120: centre 60, 70, radius 25."""
    y, x = np.mgrid[:120, :200]
    disc = np.hypot(x - 60, y - 70) < 25
    path = tmp_path_factory.mktemp("picture") / "disc.png"
    Image.fromarray(np.where(disc, 210, 60).astype(np.uint8)).save(path)
    return path, disc


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize(
    "asked",
    [
        {"points": [(62, 72)]},
        {"boxes": [(35, 45, 85, 95)]},
        {"points": [(60, 70), (50, 60)], "negatives": [(130, 60)]},
        {"points": [(60, 70)], "boxes": [(35, 45, 85, 95)]},
    ],
)
def test_a_disc_is_found(adapter, picture, asked):
    found = predict_masks(adapter, picture[0], **asked)
    assert found.masks.shape == (1, 120, 200) and found.masks.dtype == bool and found.source == str(picture[0])
    assert iou(found.masks[0], picture[1]) > 0.6 and found.areas == [found.masks.sum()]
    assert 0.1 < found.scores[0] < 1.3


def test_several_boxes_give_a_mask_each(adapter, picture):
    found = predict_masks(adapter, Image.open(picture[0]), boxes=[(35, 45, 85, 95), (120, 20, 180, 100)])
    assert found.masks.shape == (2, 120, 200) and found.source == "image" and len(found.scores) == 2
    assert iou(found.masks[0], picture[1]) > 0.6 > iou(found.masks[1], picture[1])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "nothing is asked for"),
        ({"negatives": [(1, 1)]}, "nothing is asked for"),
        ({"points": [(200, 5)]}, r"\(200, 5\) is no point x, y within 200 x 120 pixels"),
        ({"points": [(5, 5, 1)]}, "is no point x, y"),
        ({"boxes": [(10, 10, 20)]}, "is no box x0, y0, x1, y1"),
        ({"boxes": [(20, 10, 10, 30)]}, "x0 < x1"),
        ({"points": [(5, 5)], "boxes": [(1, 1, 9, 9), (2, 2, 8, 8)]}, "points belong to one object"),
    ],
)
def test_what_makes_no_question_is_refused(adapter, picture, asked, said):
    with pytest.raises(InlayError, match=said):
        predict_masks(adapter, picture[0], **asked)


def test_kinds_of_adapters_are_told_apart(adapter, picture):
    with pytest.raises(InlayError, match="use predict_masks"):
        predict(adapter, [picture[0]])


def test_typed_places_are_read():
    assert parse_coordinates(["1,2.5", "3,4"], 2) == [(1.0, 2.5), (3.0, 4.0)] and parse_coordinates(None, 4) == []
    for wrong in (["1;2"], ["1,2,3"], ["a,b"]):
        with pytest.raises(InlayError, match="must be 2 numbers with commas"):
            parse_coordinates(wrong, 2)


def test_the_drawing_shows_masks_and_prompts(tmp_path):
    masks = np.zeros((1, 20, 30), bool)
    masks[0, 5:15, 5:20] = True
    grey = Image.fromarray(np.full((20, 30, 3), 100, np.uint8))
    path = draw_masks(MaskPrediction("x", masks, [0.9]), grey, tmp_path / "o.png", points=[(10, 8)], side=300)
    drawn = np.asarray(Image.open(path))
    assert drawn.shape == (200, 300, 3)
    assert (drawn[5, 5] == 100).all()  # outside
    assert drawn[120, 150, 0] > 130  # inside: tinted
    assert tuple(drawn[50, 150]) == (255, 90, 54)  # the outline
    assert (drawn[85, 105] == 255).all()  # the point, at the centre of its pixel


def test_the_command_finds_masks(folder, picture, tmp_path, capsys, monkeypatch):
    arguments = ["predict", folder, picture[0], "--point", "60,70", "--box", "35,45,85,95"]
    monkeypatch.setattr(sys, "argv", ["inlay", *map(str, arguments), "--overlay", str(tmp_path / "o.png"), "--json"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0 and (tmp_path / "o.png").is_file()
    said = json.loads(capsys.readouterr().out)
    assert said["source"] == str(picture[0]) and 1000 < said["masks"][0]["pixels"] < 3000
    monkeypatch.setattr(sys, "argv", ["inlay", *map(str, arguments[:-1]), "1,2,3"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and "must be 4 numbers" in capsys.readouterr().err

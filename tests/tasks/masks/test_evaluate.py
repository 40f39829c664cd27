"""Promptable mask models scored on objects: as recipes score them, by object and kind of prompt, beside the base."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from inlay import (
    InlayError,
    MaskLoss,
    MaskView,
    evaluate,
    load_adapter,
    load_base,
    load_masks,
    load_processor,
    save_adapter,
)
from inlay.bases.sites import decoder_targets
from inlay.builtin.scenes import generate_scenes
from inlay.tasks.masks.data import load_masks_to_score
from inlay.tasks.masks.scores import MaskIoU
from places import SHARED
from tasks.recipe_scores import recipe_scores

BASE = "builtin:sam-tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = load_base(BASE)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=decoder_targets(model))).eval()
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    noted = {"dataset": "builtin:scenes", "training": {"seed": 3, "crop": None, "meaning": "instances"}}
    return save_adapter(model, tmp_path_factory.mktemp("sam") / "cells", processor=load_processor(BASE), metrics=noted)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "cells"
    made = generate_scenes(6, seed=5, kind="cells")
    for part, arrays in (("images", made.images), ("labels", made.instances.astype(np.uint8))):
        (data / part).mkdir(parents=True)
        for i, array in enumerate(arrays):
            Image.fromarray(array).save(data / part / f"scene{i}.png")
    return data


def test_scores_are_those_of_the_recipe_beside_the_base(folder, cells):
    found, loaded = evaluate(folder, cells, split="validation", resamples=20), load_adapter(folder)
    held = load_masks(str(cells), seed=3).validation
    assert found.count == len(held) and "seed 3" in found.notes[0]
    for kind in ("point", "points", "box"):
        view = MaskView(held, loaded.processor, kind, count=16, seed=0)
        for model, scores in ((loaded.model, found.scores), (load_base(BASE), found.base)):
            expected = recipe_scores(model, view, [MaskIoU()], loss=MaskLoss())
            assert scores[f"mean_iou_{kind}"].value == pytest.approx(expected["mean_iou"], abs=1e-5)
    assert found.scores["mean_iou_box"].value != pytest.approx(found.base["mean_iou_box"].value, abs=1e-3)


def test_each_object_has_a_row_for_each_kind_of_prompt(folder, cells):
    found, loaded = evaluate(folder, cells, resamples=50), load_adapter(folder)
    assert found.split == "all" and found.count == 6
    counts = {kind: [r["iou"] for r in found.rows if r["prompt"] == kind] for kind in ("point", "points", "box")}
    assert len({len(values) for values in counts.values()}) == 1
    for kind, values in counts.items():
        assert found.scores[f"mean_iou_{kind}"].value == pytest.approx(np.mean(values), abs=1e-5)
    first = [row for row in found.rows if row["image"] == "scene0" and row["prompt"] == "box"]
    _, rows, _ = load_masks_to_score(str(cells))
    item = MaskView(rows, loaded.processor, "box", count=16, seed=0)[0]
    with torch.no_grad():
        output = loaded.model(pixel_values=item["pixel_values"][None], input_boxes=item["input_boxes"][None])
    best = output.iou_scores[0].argmax(-1)
    for row in first:
        p = row["object"] - 1
        said, true = output.pred_masks[0, p, best[p]] > 0, item["labels"][p] == 1
        assert row["iou"] == pytest.approx(float((said & true).sum() / (said | true).sum()), abs=1e-4)
        assert row["predicted_iou"] == pytest.approx(float(output.iou_scores[0, p].max()), abs=1e-4)
        assert row["pixels"] == int(true.sum())


def test_images_are_what_is_resampled(folder, cells):
    one = evaluate(folder, cells, limit=1, resamples=5)
    assert one.count == 1 and one.scores["mean_iou_box"].low is None and len(one.rows) > 3
    merged = evaluate(load_adapter(folder).merge(), cells, limit=1, resamples=5)
    assert merged.base is None and "base_iou" not in merged.rows[0]
    assert merged.scores["mean_iou_box"].value == pytest.approx(one.scores["mean_iou_box"].value, abs=1e-4)


def test_one_image_is_enough_and_none_is_named(folder, cells, tmp_path):
    for part in ("images", "labels"):
        (tmp_path / "one" / part).mkdir(parents=True)
        (tmp_path / "one" / part / "scene2.png").write_bytes((cells / part / "scene2.png").read_bytes())
        (tmp_path / "none" / part).mkdir(parents=True)
    assert evaluate(folder, tmp_path / "one", resamples=5).count == 1
    with pytest.raises(InlayError, match="there are no files"):
        evaluate(folder, tmp_path / "none")
    with pytest.raises(InlayError, match="none can be held out"):
        evaluate(folder, tmp_path / "one", split="validation")


@pytest.mark.skipif(not (SHARED / "nuclei_dsb2018").is_dir(), reason="data beside the repository")
def test_real_nuclei(folder):
    found = evaluate(folder, SHARED / "nuclei_dsb2018" / "dev", limit=3, resamples=5)
    assert found.count == 3 and found.split == "all" and set(found.base) == set(found.scores)

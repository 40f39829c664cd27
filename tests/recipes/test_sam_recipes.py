"""The recipes for SAM as a user runs them, on a few pictures: every method in encoder and mask decoder."""

import runpy
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file

from inlay import (
    AttentionPrefixConfig,
    BottleneckConfig,
    PartialConfig,
    load_adapter,
    load_base,
    load_processor,
    predict_masks,
    read_adapter,
    sam_targets,
    save_adapter,
)
from inlay.builtin.scenes import generate_scenes
from places import ROOT

CONFIGS = {
    "lora": lambda model, where: LoraConfig(r=4, target_modules=sam_targets(model, "linear", where)),
    "bottleneck": lambda model, where: BottleneckConfig(width=4, target_modules=sam_targets(model, "output", where)),
    "prefix": lambda model, where: AttentionPrefixConfig(
        length=4, target_modules=sam_targets(model, "attention", where)
    ),
    "partial": lambda model, where: PartialConfig(target_modules=sam_targets(model, "block", where)),
}


def run(monkeypatch, method, folder, *arguments):
    recipe = str(ROOT / f"recipes/{method}_sam.py")
    options = ["--dataset", folder, "--workers", 0, "--batch_size", 4, *arguments]
    monkeypatch.setattr(sys, "argv", [recipe, *map(str, options)])
    runpy.run_path(recipe, run_name="__main__")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures to learn from and two that are held out."""
    where = tmp_path_factory.mktemp("cells")
    made = generate_scenes(8, seed=30_000, kind="cells")
    for i, (picture, objects) in enumerate(zip(made.images, made.instances, strict=True)):
        split = where / ("train" if i < 6 else "val")
        for part, array in (("images", picture), ("labels", objects.astype(np.uint16))):
            (split / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(split / part / f"{i}.png")
    return where


@pytest.mark.parametrize("where", ["encoder", "decoder", "both"])
@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix", "partial"])
def test_every_method_goes_where_it_is_asked_to(method, where, tmp_path):
    torch.manual_seed(0)
    base = load_base("builtin:sam-tiny")
    example = {"pixel_values": torch.randn(2, 3, 128, 128), "input_points": torch.rand(2, 3, 2, 2) * 128}
    with torch.no_grad():
        before = base(**example).pred_masks
    model = get_peft_model(base, CONFIGS[method](base, where))
    trained = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "encoder": {"vision_encoder"}, "decoder": {"mask_decoder"}, "both": {"vision_encoder", "mask_decoder"},
    }[where]  # fmt: skip
    with torch.no_grad():
        start = model(**example).pred_masks
    if method != "prefix":  # a prefix begins with keys and values that are not zero
        assert torch.allclose(start, before, atol=1e-4)
    output = model(**example)
    (output.pred_masks.square().mean() + output.iou_scores.mean()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
        changed = model(**example).pred_masks
        assert (changed - start).abs().max() > 1e-3
        with model.disable_adapter():
            assert torch.equal(model(**example).pred_masks, before)
    if where == "both":
        folder = save_adapter(model, tmp_path / "adapter", processor=load_processor("builtin:sam-tiny"))
        assert load_adapter(folder).deviation < 1e-5


def test_it_trains_measures_and_saves(monkeypatch, folder, tmp_path, capsys):
    run(monkeypatch, "lora", folder, "--output_dir", tmp_path / "run", "--epochs", 1)
    file = read_adapter(tmp_path / "run/adapter")
    assert file.record["task"] == "mask-generation" and file.base_name == "builtin:sam-tiny"
    scores = file.metrics["validation"]
    assert {"loss", "mean_iou", "mean_iou_point", "mean_iou_box_before"} <= set(scores)
    assert scores["mean_iou"] == pytest.approx(scores["mean_iou_point"], abs=1e-6)
    assert file.metrics["cost"]["trainable_parameters"] < 150_000 and file.bytes_weights < 600_000
    out = capsys.readouterr().out
    assert out.startswith("memory: base ") and "mean IoU without and with the adapter: point 0." in out
    loaded = load_adapter(file.folder)
    assert loaded.deviation < 1e-4
    found = predict_masks(loaded, folder / "val/images/7.png", boxes=[(10, 10, 60, 60)])
    assert found.masks.shape == (1, 128, 128)


def test_crops_of_classes_by_another_method(monkeypatch, folder, tmp_path):
    more = ["--where", "decoder", "--crop", 64, "--meaning", "classes"]
    run(monkeypatch, "partial", folder, "--output_dir", tmp_path / "run", "--epochs", 0.5, *more)
    assert load_adapter(tmp_path / "run/adapter").deviation < 1e-4


@pytest.mark.parametrize(
    ("method", "arguments", "kind", "trained"),
    [
        ("bottleneck", ["--width", 4, "--where", "encoder"], "INLAY_BOTTLENECK", {"vision_encoder"}),
        ("prefix", ["--length", 4, "--where", "decoder"], "INLAY_ATTENTION_PREFIX", {"mask_decoder"}),
        ("prompt", ["--length", 4], "INLAY_VISUAL_PROMPT", {"vision_encoder"}),
        ("lora", ["--rank", 2, "--quantize", "8bit"], "LORA", {"vision_encoder", "mask_decoder"}),
        ("partial", ["--where", "decoder", "--quantize", "8bit"], "INLAY_PARTIAL", {"mask_decoder"}),
    ],
)
def test_the_other_methods_train_save_and_load(monkeypatch, folder, tmp_path, method, arguments, kind, trained):
    if "--quantize" in arguments:
        pytest.importorskip("bitsandbytes")
    run(monkeypatch, method, folder, "--output_dir", tmp_path / "run", "--epochs", 0.5, *arguments)
    file = read_adapter(tmp_path / "run/adapter")
    assert file.config["peft_type"] == kind
    assert {name.split(".")[2] for name in load_file(file.folder / "adapter_model.safetensors")} == trained
    quantize = "8bit" if "--quantize" in arguments else None
    assert load_adapter(file.folder, quantize=quantize).deviation < 1e-3


def test_a_folder_of_something_else_is_one_sentence(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "lora", tmp_path, "--output_dir", tmp_path / "run")
    assert "pass a folder with images/ and labels/" in capsys.readouterr().err

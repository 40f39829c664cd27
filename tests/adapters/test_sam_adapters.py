"""Adapters of SAM: saved, checked against their base, loaded and used; SAM as a base in 8 and 4 bits."""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import SamImageProcessorPil, SamModel

from inlay import InlayError, load_adapter, load_base, load_processor, read_adapter, save_adapter
from inlay.adapters.sketch import sketch
from inlay.bases.load import resolve_base
from inlay.bases.sites import decoder_targets, lora_targets
from inlay.methods import METHODS
from inlay.tasks.base import load_skeleton

BASE = "builtin:sam-tiny"


def asked(rows=2):
    """Pictures with two prompts each: a point and a box."""
    generator = torch.Generator().manual_seed(7)
    corners = torch.rand(rows, 2, 2, 2, generator=generator).sort(dim=2).values
    return {
        "pixel_values": torch.randn(rows, 3, 128, 128, generator=generator),
        "input_points": torch.rand(rows, 2, 1, 2, generator=generator) * 128,
        "input_boxes": corners.flatten(2) * 127,
    }


def answers(model):
    with torch.no_grad():
        output = model(**asked())
    return torch.cat([output.pred_masks.float().flatten(), output.iou_scores.float().flatten()])


def adapted(base=None, **settings):
    """LoRA on encoder and mask decoder as if trained."""
    torch.manual_seed(0)
    base = load_base(BASE) if base is None else base
    targets = [*lora_targets(base), *decoder_targets(base)]
    model = get_peft_model(base, LoraConfig(**{"r": 4, "target_modules": targets} | settings)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.02)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = adapted()
    metrics = {"validation": {"mean_iou": 0.75}, "dataset": "builtin:scenes"}
    return model, save_adapter(
        model, tmp_path_factory.mktemp("sam") / "masks", processor=load_processor(BASE), metrics=metrics
    )


def test_it_is_loaded_on_a_fresh_base_and_answers_the_same(saved):
    model, folder = saved
    loaded = load_adapter(folder)
    assert loaded.verified and loaded.deviation < 1e-5 and loaded.labels == []
    assert isinstance(loaded.processor, SamImageProcessorPil)
    assert loaded.processor.size.longest_edge == loaded.processor.pad_size.height == 128
    assert torch.allclose(answers(loaded.model), answers(model), atol=1e-5)
    assert (answers(load_base(BASE)) - answers(model)).abs().max() > 0.1


def test_the_record_knows_the_encoder(saved):
    file = read_adapter(saved[1])
    assert file.record["task"] == "mask-generation" and file.labels == [] and file.record["head"] == []
    assert (file.record["base"]["blocks"], file.record["base"]["width"]) == (6, 128)
    assert len(file.record["golden"]) == 64 and len(set(file.record["golden"])) > 50
    assert file.record["preprocessing"]["image_processor_type"].startswith("SamImageProcessor")
    card = (saved[1] / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: mask-generation" in card and "| Mean IoU | 0.7500 |" in card and "predict_masks" in card


def test_the_cards_two_ways_to_load_run(saved, tmp_path, monkeypatch, capsys):
    model, folder = saved
    text = (folder / "README.md").read_text(encoding="utf-8").replace("FOLDER", str(folder))
    ours, plain = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (90, 70), "red").save("image.png")
    exec(ours, {})
    assert capsys.readouterr().out.strip() == "(1, 70, 90)"
    found = {}
    exec(plain, found)
    assert torch.allclose(answers(found["model"]), answers(model), atol=1e-5)


def test_peft_alone_reads_it(saved):
    from peft import PeftModel

    model = PeftModel.from_pretrained(
        SamModel.from_pretrained(resolve_base(BASE), dtype=torch.float32), saved[1]
    ).eval()
    assert torch.allclose(answers(model), answers(saved[0]), atol=1e-5)


@pytest.mark.parametrize("part", ["vision_encoder.layers.3", "mask_decoder.upscale_conv1"])
def test_other_weights_anywhere_are_refused(saved, part):
    base = load_base(BASE)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in base.get_submodule(part).parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    before = answers(base)
    with pytest.raises(InlayError, match="other weights of the same shape"):
        load_adapter(saved[1], base)
    assert torch.equal(answers(base), before)  # left as it was


def test_another_positional_encoding_is_refused(saved):
    base = load_base(BASE)
    with torch.no_grad():
        base.shared_image_embedding.positional_embedding.mul_(-1.5)
    with pytest.raises(InlayError, match=r"1 of .* tensors next to the matrices differ"):
        load_adapter(saved[1], base)


def test_another_base_is_refused(saved, tmp_path):
    with pytest.raises(InlayError, match="model type sam"):
        load_adapter(saved[1], load_base("builtin:vit-tiny"))
    config = SamModel.config_class.from_pretrained(resolve_base(BASE))
    config.vision_config.num_hidden_layers = 4
    SamModel(config).save_pretrained(tmp_path)
    with pytest.raises(InlayError, match=r"blocks 6.*this base has 4"):
        load_adapter(saved[1], tmp_path)


def test_it_has_no_labels():
    with pytest.raises(InlayError, match="a promptable mask model, which has no classes"):
        load_base(BASE, labels=["cell", "wall"])
    assert load_skeleton(BASE, labels=["cell", "wall"]).device.type == "meta"


def test_a_base_with_a_damaged_decoder_is_refused(tmp_path):
    shutil.copytree(resolve_base(BASE), tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config["mask_decoder_config"]["mlp_dim"] = 128
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    with pytest.raises(InlayError, match="do not fit its config"):
        load_base(tmp_path / "base")


@pytest.mark.parametrize(("quantize", "allowed"), [("8bit", 0.3), ("4bit", 0.8)])
def test_a_quantised_base_trains_and_answers(saved, quantize, allowed):
    """bitsandbytes alone fails in eval mode, as SAM's hidden states are B H W C."""
    base = load_base(BASE, quantize=quantize)
    held = [n for n, m in base.named_modules() if type(m).__name__ in ("Linear8bitLt", "Linear4bit")]
    assert len(held) == 24 and all(name.startswith("vision_encoder.layers.") for name in held)
    whole = answers(load_base(BASE))
    assert (answers(base) - whole).abs().max() < 0.5 * whole.abs().max()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=[*lora_targets(base), *decoder_targets(base)])).train()
    model(**asked()).pred_masks.square().mean().backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(gradients) > 40 and all(g is not None and torch.isfinite(g).all() for g in gradients)
    loaded = load_adapter(saved[1], quantize=quantize)
    assert loaded.verified and loaded.deviation < allowed
    assert {type(m).__name__ for m in load_skeleton(BASE, quantize=quantize).modules()} >= {
        "Linear8bitLt" if quantize == "8bit" else "Linear4bit"
    }


def test_the_sketch_counts_every_weight():
    found = sketch(load_base(BASE))
    assert found["weights"] > 80 and found["parameters"] > 1_400_000


def test_the_file_is_the_adapter_alone(saved):
    tensors = load_file(saved[1] / "adapter_model.safetensors")
    assert all("lora_" in key for key in tensors)
    assert (saved[1] / "adapter_model.safetensors").stat().st_size < sum(t.nbytes for t in tensors.values()) + 40_000


def test_a_base_without_preprocessing_gets_sams_at_its_size(tmp_path):
    shutil.copytree(resolve_base(BASE), tmp_path / "base")
    (tmp_path / "base/preprocessor_config.json").unlink()
    processor = load_processor(tmp_path / "base")
    assert processor.size["longest_edge"] == processor.pad_size["width"] == 128
    assert processor.mask_size["longest_edge"] == processor.mask_pad_size["height"] == 64


@pytest.mark.parametrize("method", ["lora", "bottleneck", "partial"])
def test_the_table_of_methods_leaves_the_mask_decoder_alone(method, tmp_path):
    model = METHODS[method].adapt(load_base(BASE), 4)
    save_adapter(model, tmp_path / "a", processor=load_processor(BASE))
    assert load_adapter(tmp_path / "a").deviation < 1e-5
    assert not any("mask_decoder" in key for key in read_adapter(tmp_path / "a").shapes)


def test_a_mask_decoder_that_is_saved_whole_comes_back(tmp_path):
    model = adapted(target_modules=lora_targets(load_base(BASE)), modules_to_save=["mask_decoder"])
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "modules_to_save" in name:
                value.add_(0.02 * torch.randn_like(value))
    expected = answers(model)
    save_adapter(model, tmp_path / "a", processor=load_processor(BASE))
    loaded = load_adapter(tmp_path / "a")
    assert torch.allclose(answers(loaded.model), expected, atol=1e-4)
    assert not torch.allclose(answers(load_base(BASE)), expected, atol=1e-2)

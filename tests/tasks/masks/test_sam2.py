"""SAM 2 as a base of masks: what holds for SAM holds for it, on a tiny one with random weights."""

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Sam2Model, Sam2VideoConfig, Sam2VideoModel

from command import run
from inlay import (
    AttentionPrefixConfig,
    Bank,
    BottleneckConfig,
    InlayError,
    MaskTask,
    PartialConfig,
    SpatialAdapterConfig,
    TrainConfig,
    VisualPromptConfig,
    combine,
    evaluate,
    fit,
    load_adapter,
    load_base,
    load_masks,
    load_processor,
    merge,
    predict_masks,
    sam_targets,
    save_adapter,
)
from inlay.bases.sites import sites
from inlay.methods import METHODS
from inlay.methods.window_attention import attend_with_prefix
from inlay.tasks import TASKS
from inlay.tasks.base import load_skeleton
from inlay.tasks.masks.loss import MaskLoss, mask_losses
from inlay.tasks.masks.scores import MaskIoU, compute_mean_iou
from inlay.tasks.masks.view import MaskView, collate_masks
from methods.volumes import build as build_sam
from methods.volumes import volumes
from sam2_models import SIDE, build_sam2, sam2_config, write_sam2

CONFIGS = {
    "lora": lambda model, where: LoraConfig(r=4, target_modules=sam_targets(model, "linear", where)),
    "bottleneck": lambda model, where: BottleneckConfig(width=4, target_modules=sam_targets(model, "output", where)),
    "prefix": lambda model, where: AttentionPrefixConfig(
        length=4, target_modules=sam_targets(model, "attention", where)
    ),
    "partial": lambda model, where: PartialConfig(target_modules=sam_targets(model, "block", where)),
    "prompt": lambda model, where: VisualPromptConfig(length=3),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(write_sam2(tmp_path_factory.mktemp("sam2") / "base"))


@pytest.fixture(scope="module")
def data(base):
    """Of the recipes' task: the embedded scenes, at the size of this base."""
    return MaskTask(model=base, dataset="builtin:scenes").load(0)


def asked(rows=2):
    generator = torch.Generator().manual_seed(7)
    return {
        "pixel_values": torch.randn(rows, 3, SIDE, SIDE, generator=generator),
        "input_points": torch.rand(rows, 2, 1, 2, generator=generator) * SIDE,
    }


def answers(model):
    with torch.no_grad():
        output = model(**asked())
    return torch.cat([getattr(output, name).flatten() for name in ("pred_masks", "iou_scores", "object_score_logits")])


def adapted(base, method="lora", where="both"):
    """As if trained."""
    torch.manual_seed(0)
    model = load_base(base)
    model = get_peft_model(model, CONFIGS[method](model, where)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="module")
def saved(base, data, tmp_path_factory):
    model = adapted(base)
    folder = tmp_path_factory.mktemp("sam2") / "adapter"
    return model, save_adapter(model, folder, processor=data.processor, metrics={"dataset": "builtin:scenes"})


# ----- the base


def test_its_sites_are_those_of_its_encoder(base):
    found = sites(load_base(base))
    assert found.source == "sam2" and found.fused and found.head == ("mask_decoder",)
    assert found.blocks == tuple(f"vision_encoder.backbone.blocks.{i}" for i in range(5))
    assert found.mlp_out[-1] == "vision_encoder.backbone.blocks.4.mlp.proj_out"


def test_the_hubs_files_which_are_those_of_videos_load_as_the_model_of_images(tmp_path):
    """facebook/sam2.1-hiera-tiny says model_type sam2_video and holds a memory, which images do not need."""
    parts = sam2_config()
    decoder = parts.mask_decoder_config.to_dict() | {"model_type": "sam2_video_mask_decoder"}
    prompts = parts.prompt_encoder_config.to_dict() | {"model_type": "sam2_video_prompt_encoder"}
    memory = {
        "memory_attention_hidden_size": 16, "memory_attention_num_layers": 1, "memory_encoder_hidden_size": 16,
        "memory_attention_feed_forward_hidden_size": 16, "memory_attention_rope_feat_sizes": [4, 4],
        "memory_encoder_output_channels": 8, "mask_downsampler_embed_dim": 16, "memory_fuser_embed_dim": 16,
        "memory_fuser_intermediate_dim": 16,
    }  # fmt: skip
    config = Sam2VideoConfig(
        vision_config=parts.vision_config.to_dict(),
        mask_decoder_config=decoder,
        prompt_encoder_config=prompts,
        image_size=SIDE,
        **memory,
    )
    Sam2VideoModel(config).save_pretrained(tmp_path)
    settings = {"image_processor_type": "Sam2ImageProcessorFast", "size": {"height": SIDE, "width": SIDE}}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(settings | {"mask_size": {"height": 16, "width": 16}})
    )
    model, processor = load_base(tmp_path), load_processor(tmp_path)
    assert type(model) is Sam2Model and sites(model).source == "sam2_video"
    assert (processor.size["height"], processor.mask_size["width"]) == (SIDE, 16)
    folder = save_adapter(METHODS["lora"].adapt(model, 2), tmp_path / "adapter", processor=processor)
    assert load_adapter(folder).deviation < 1e-5


def test_images_are_stretched_normalised_and_their_masks_brought_back_in_one_step(base):
    """As Sam2ImageProcessor does with torchvision, whose resize is torch's antialiased interpolation."""
    processor = load_processor(base)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    made = processor(images=Image.fromarray(pixels), return_tensors="pt")
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    stretched = F.interpolate(image, (SIDE, SIDE), mode="bilinear", antialias=True) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert (made["pixel_values"] - (stretched - mean) / std).abs().max() < 1.1 / 255 / 0.224
    logits = torch.randn(1, 1, 16, 16)
    (found,) = processor.post_process_masks([logits], [(50, 90)])
    assert torch.equal(found, F.interpolate(logits, (50, 90), mode="bilinear", align_corners=False) > 0)


# ----- the methods


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("block", [0, 1])
def test_without_a_prefix_the_attention_is_that_of_transformers(block, attention):
    """Block 1 pools its queries."""
    model = build_sam2()
    model.set_attn_implementation(attention)
    module = model.vision_encoder.backbone.blocks[block].attn
    hidden, nothing = torch.randn(6, 4, 4, module.dim), torch.zeros(1, 0, module.dim_out)
    assert torch.allclose(attend_with_prefix(module, hidden, nothing, nothing, None), module(hidden), atol=1e-6)


def test_a_pooled_query_sees_the_prefix_and_all_tokens():
    """The formula: softmax(pool(q) [P_k; k]^T / sqrt(d)) [P_v; v], head by head."""
    module = build_sam2().vision_encoder.backbone.blocks[1].attn
    hidden, key, value = torch.randn(2, 4, 4, 8), torch.randn(3, 12), torch.randn(3, 12)
    q, k, v = module.qkv(hidden).chunk(3, -1)  # B 4 4 12
    q = q.unflatten(1, (2, 2)).unflatten(3, (2, 2)).amax((2, 4)).flatten(1, 2)  # B 4 12
    k, v = (torch.cat([p.expand(2, -1, -1), x.flatten(1, 2)], 1) for p, x in ((key, k), (value, v)))
    heads = [
        (a @ b.mT / math.sqrt(6)).softmax(-1) @ c
        for a, b, c in zip(q.split(6, -1), k.split(6, -1), v.split(6, -1), strict=True)
    ]
    expected = module.proj(torch.cat(heads, -1)).unflatten(1, (2, 2))
    assert torch.allclose(attend_with_prefix(module, hidden, key[None], value[None], None), expected, atol=1e-6)


@pytest.mark.parametrize("where", ["encoder", "decoder"])
@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix", "partial"])
def test_every_method_goes_where_it_is_asked_to(method, where, base):
    before = answers(load_base(base))
    torch.manual_seed(0)
    model = load_base(base)
    model = get_peft_model(model, CONFIGS[method](model, where)).eval()
    trained = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"vision_encoder" if where == "encoder" else "mask_decoder"}
    if method != "prefix":
        assert torch.allclose(answers(model), before, atol=1e-5)
    output = model(**asked())
    (output.pred_masks.square().mean() + output.iou_scores.mean() + output.object_score_logits.mean()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(answers(model), before)


@pytest.mark.parametrize("method", CONFIGS)
def test_saved_it_answers_the_same_loaded_and_in_a_bank_next_to_the_base(method, base, data, tmp_path):
    model = adapted(base, method)
    with torch.no_grad():
        expected, plain = model(**asked()).pred_masks, load_base(base)(**asked()).pred_masks
    folder = save_adapter(model, tmp_path / "a", processor=data.processor)
    loaded = load_adapter(folder)
    assert loaded.deviation < 1e-4 and loaded.task.name == "mask-generation"
    with torch.no_grad():
        assert torch.allclose(loaded.model(**asked()).pred_masks, expected, atol=1e-4)
    if method == "partial":
        with pytest.raises(InlayError, match="not whole weights"):
            Bank(base, {"a": folder})
        return
    found = Bank(base, {"a": folder})(asked(), ["a", None]).pred_masks
    assert torch.allclose(found, torch.stack([expected[0], plain[1]]), atol=1e-4)


def test_what_does_not_fit_is_refused_in_one_sentence(base, saved, tmp_path):
    model = load_base(base)
    for config, said in (
        (BottleneckConfig(sites=["attention"], placement="parallel"), "first attention in a stage of SAM 2"),
        (SpatialAdapterConfig(classes=["tumour"]), "take a SAM for scans"),
        (VisualPromptConfig(deep=False), "deep=True"),
        (METHODS["convpass"].config(model, 4), "grid of patches"),
    ):
        with pytest.raises(InlayError, match=said):
            get_peft_model(load_base(base), config)
    with pytest.raises(InlayError, match="take a SAM for scans"):
        SpatialAdapterConfig.fitted(model, ["tumour"], (16, 16, 16))
    with pytest.raises(InlayError, match="three maps"):
        TASKS["mask-generation"].graph_inputs(model, load_processor(base))


# ----- the task


def test_the_loss_is_that_of_its_paper(base):
    """The best of three masks, the absolute error of the IoU, and the cross-entropy of there being an object."""
    model = build_sam2()
    labels = (torch.rand(2, 2, 16, 16) > 0.5).to(torch.int8)
    labels[1, 1] = -1
    with torch.no_grad():
        found = MaskLoss()(model, {**asked(), "labels": labels}).loss
        output = model(**asked())
    truth = labels.clamp_min(0).float()
    each = mask_losses(output.pred_masks, output.iou_scores, truth, absolute=True)
    squared = mask_losses(output.pred_masks, output.iou_scores, truth)
    there = F.binary_cross_entropy_with_logits(output.object_score_logits[..., 0], torch.ones(2, 2), reduction="none")
    assert found == pytest.approx(float((each + there).flatten()[:3].mean()), rel=1e-5)
    overlap = (output.pred_masks > 0) & (truth[:, :, None] > 0.5)
    union = (output.pred_masks > 0) | (truth[:, :, None] > 0.5)
    wrong = output.iou_scores - overlap.sum((-2, -1)) / union.sum((-2, -1))
    assert torch.allclose(each - squared, wrong.abs().mean(-1) - wrong.square().mean(-1), atol=1e-4)


def test_training_begins_at_the_bases_score_and_improves_it(base, tmp_path):
    """Objects that fill a good part of their crop: of smaller ones random weights learn nothing in a few steps."""
    rows = load_masks("builtin:scenes", limit=16).train[:8]
    view = MaskView(rows, load_processor(base), "box", count=2, seed=0, crop=24)

    def score(model):
        return compute_mean_iou(model, DataLoader(view, batch_size=8), MaskLoss())

    torch.manual_seed(0)
    model = load_base(base)
    start = score(model)
    config = PartialConfig(target_modules=["vision_encoder", *sam_targets(model, "block", "decoder")])
    model = get_peft_model(model, config)
    settings = {"schedule": "constant", "learning_rate": 2e-2, "workers": 0, "eval_every": 5, "warmup": 0}
    train = TrainConfig(output_dir=str(tmp_path), steps=15, eval_start=True, batch_size=8, **settings)
    result = fit(model, view, view, train, metrics=[MaskIoU()], collate=collate_masks, loss=MaskLoss())
    assert result.history[0]["step"] == 0 and result.history[0]["mean_iou"] == pytest.approx(start, abs=1e-6)
    assert score(model) == pytest.approx(result.metrics["mean_iou"], abs=1e-6)
    assert result.metrics["mean_iou"] > start + 0.03


@pytest.mark.parametrize(("side", "own"), [(64, {"do_normalize": False}), (256, {"resample": 0})])
def test_a_sam_whose_settings_stretch_images_trains_loads_and_answers(side, own, tmp_path):
    """MedSAM scales a stretched image to 0 to 1; SAM-Med2D stretches by nearest pixels and normalises as SAM does."""
    model = build_sam(16, side)  # 256 with patches of 16 is SAM-Med2D's geometry
    model.save_pretrained(tmp_path / "base")
    sizes = {name: {"height": n, "width": n} for name, n in (("size", side), ("mask_size", side // 4))}
    settings = {"image_processor_type": "Sam2ImageProcessor", **sizes, **own}
    (tmp_path / "base/preprocessor_config.json").write_text(json.dumps(settings))
    processor = load_processor(tmp_path / "base")
    pixels = processor(images=Image.new("RGB", (90, 50), (255, 0, 51)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, side, side)
    if own == {"do_normalize": False}:
        assert pixels[0, :, 0, 0].tolist() == pytest.approx([1, 0, 0.2])
    adapted = METHODS["lora"].adapt(load_base(tmp_path / "base"), 2)
    view = MaskView(load_masks("builtin:scenes", limit=8).train[:2], processor, "box", count=2)
    train = TrainConfig(output_dir=str(tmp_path / "run"), steps=1, batch_size=2, workers=0)
    fit(adapted, view, None, train, collate=collate_masks, loss=MaskLoss())
    loaded = load_adapter(save_adapter(adapted, tmp_path / "a", processor=processor))
    assert loaded.deviation < 1e-4
    found = predict_masks(loaded, Image.new("RGB", (90, 50), "red"), boxes=[(2, 2, 30, 40)])
    assert found.masks.shape == (1, 50, 90)
    spatial = SpatialAdapterConfig.fitted(model, ["organ"], (8, 16, 16), width=4, decoder_width=8)
    with torch.no_grad():
        output = get_peft_model(load_base(tmp_path / "base"), spatial).eval()(volumes(1, (8, 16, 16)))
    assert output.logits.shape == (1, 2, 8, 16, 16)


def test_points_and_boxes_are_answered_at_the_images_size(saved):
    loaded, image = load_adapter(saved[1]), Image.new("RGB", (90, 50), (200, 30, 30))
    assert predict_masks(loaded, image, points=[(20, 20)], negatives=[(80, 40)]).masks.shape == (1, 50, 90)
    found = predict_masks(loaded, image, boxes=[(2, 2, 30, 40), (1, 1, 80, 49)])
    assert found.masks.shape == (2, 50, 90) and all(0 < score < 1 for score in found.scores)


def test_it_is_scored_next_to_its_base(saved):
    found = evaluate(saved[1], "builtin:scenes", limit=2, resamples=9)
    assert set(found.scores) == set(found.base) == {"mean_iou_point", "mean_iou_points", "mean_iou_box"}


def test_adapters_add_and_merge(saved, base, tmp_path):
    model, folder = saved
    combine({folder: 0.5, save_adapter(model, tmp_path / "b", processor=load_processor(base)): 0.5}, out=tmp_path / "s")
    assert torch.allclose(answers(load_adapter(tmp_path / "s").model), answers(model), atol=1e-4)
    merged = merge(folder, tmp_path / "merged")
    assert torch.allclose(answers(load_base(merged.folder)), answers(model), atol=1e-4)
    assert load_processor(merged.folder).size["height"] == SIDE


def test_it_is_held_in_8_bits(base, saved):
    pytest.importorskip("bitsandbytes")
    held = load_base(base, quantize="8bit")
    names = [n for n, m in held.named_modules() if type(m).__name__ == "Linear8bitLt"]
    assert len(names) == 5 * 4 + 3 and all(n.startswith("vision_encoder.backbone.blocks.") for n in names)
    assert load_adapter(saved[1], quantize="8bit").deviation < 0.3


def test_it_is_planned_but_not_pruned(base, capsys, monkeypatch):
    batch, _ = TASKS["mask-generation"].planned_batch(load_skeleton(base), 2, 16, 0)
    assert batch["pixel_values"].shape == (2, 3, SIDE, SIDE) and batch["labels"].shape[-1] == 16
    status, out, err = run(capsys, monkeypatch, "plan", base, "--method", "lora")
    assert status == 0 and "GB" in out, err
    status, _, err = run(capsys, monkeypatch, "prune", base, "--data", "builtin:scenes", "-o", base + "-pruned")
    assert status == 2 and "inner widths of Sam2Model (sam2) are not known" in err

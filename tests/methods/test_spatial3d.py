"""The 3D spatial adapter: against the published encoder, as an adapter of peft, with prompts, in any size."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from scipy import ndimage
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import SamConfig, SamModel, SamVisionModel

from inlay import InlayError, SpatialAdapterConfig
from inlay.methods.spatial.attention import cut_windows, resize_table
from inlay.methods.spatial.decoder import Encoded, PromptTensors
from inlay.methods.spatial.prompts import clicks_at_centres, damage_masks, measure_depth, name_components
from inlay.methods.spatial.sam import VolumeSamModel, dice_cross_entropy, draw_mixed_prompts, mask_logits
from inlay.train.launch import enable_checkpointing
from methods.bases import randomise
from methods.volumes import CONFIG, build, published_levels, settings, volumes

PICTURE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))


def adapted(adapter="default", **more):
    """A SamModel with a random adapter, in eval mode."""
    model = get_peft_model(build(), settings(**more), adapter_name=adapter).eval()
    randomise(model, adapter, 5)
    return model


def off(a, b):
    return (a - b).abs().max().item()


def labelled(rows=2, sizes=(21, 35, 30)):
    """A label map with a box of each class, and a border that does not count."""
    labels = torch.zeros(rows, *sizes, dtype=torch.long)
    labels[:, 3:9, 5:20, 4:12] = 1
    labels[:, 10:15, 20:30, 15:25] = 2
    labels[:, -1] = -1
    return labels


@pytest.mark.parametrize("sizes", [(32, 32, 32), (16, 32, 16)])
def test_reference_equals_the_published_encoder_and_its_gradients(sizes):
    config = settings(
        reference=True, init_weights=False, enlarge=4, enlarge_depth=4, patch_depth=8, depth_rows=sizes[0] // 2
    )
    model = get_peft_model(build(image=256), config).double()  # SAM's table is larger than the volume's
    encoder = model.get_base_model().vision_encoder
    parts, volume = encoder.inlay_spatial3d_encoder["default"], volumes(2, sizes).double()
    found = encoder(volume).hidden_states
    expected = published_levels(encoder, parts, config, volume)
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert off(ours, theirs) < 1e-9 * theirs.abs().max()
    trained = [p for p in parts.parameters() if p.requires_grad]
    weights = [torch.randn_like(level) for level in expected]
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(levels, weights, strict=True)), trained)
        for levels in (found, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        assert off(ours, theirs) < 1e-8 * max(1, theirs.abs().max())
    with torch.no_grad():  # the way without gradients is another one
        for ours, theirs in zip(encoder(volume).hidden_states, expected, strict=True):
            assert off(ours, theirs) < 1e-9 * theirs.abs().max()


@pytest.mark.parametrize(("by", "depth"), [(1, 4), (2, 8), (4, 4), (8, 8)])
def test_patches_are_those_of_the_enlarged_volume(by, depth):
    model = get_peft_model(build(), settings(init_weights=False, enlarge=by, enlarge_depth=4, patch_depth=depth))
    encoder = model.get_base_model().vision_encoder
    patches, base = encoder.inlay_spatial3d_encoder["default"].patches, encoder.get_base_layer()
    volume = volumes(1, (16, 24, 8))
    found = patches(volume, base, (4, by))
    big = F.interpolate(volume, scale_factor=(4, by, by), mode="trilinear").movedim(2, 1)[0].repeat(1, 3, 1, 1)
    flat = base.patch_embed.projection(big).movedim(0, 1)[None]
    filters = patches.depth + 1 / depth
    expected = F.conv3d(flat, filters[:, None, :, None, None], patches.bias, stride=(depth, 1, 1), groups=48)
    positions = patches.positions if len(patches.positions) == found.shape[1] else None
    assert found.shape[1:4] == expected.shape[2:]
    if positions is not None:
        expected = expected + positions.T[None, :, :, None, None]
        where = torch.zeros_like(expected[:, :, 0])
        table = base.pos_embed.movedim(-1, 1)
        rows, columns = where.shape[2:]
        if rows <= 8 and columns <= 8:
            expected = expected + F.adaptive_avg_pool2d(table, (rows, columns))[:, :, None]
            assert off(found.movedim(-1, 1), expected) < 1e-4


def test_channels_start_as_their_mean_and_each_feature_weighs_them():
    """Against SAM's patches on each channel of the enlarged volume, filtered and added one by one."""
    names = ["t1", "t2", "flair"]
    start = get_peft_model(build(), settings(channels=names)).get_base_model().vision_encoder
    single = get_peft_model(build(), settings()).get_base_model().vision_encoder
    volume = torch.cat([volumes(1, (16, 24, 8), seed) for seed in range(3)], dim=1)
    patches, one = (encoder.inlay_spatial3d_encoder["default"].patches for encoder in (start, single))
    base = start.get_base_layer()
    assert off(patches(volume, base, (2, 2)), one(volume.mean(1, keepdim=True), base, (2, 2))) < 1e-5
    with torch.no_grad():
        for parameter in patches.parameters():
            parameter.normal_()
    expected = 0
    for j in range(3):
        big = F.interpolate(volume[:, j : j + 1], scale_factor=2, mode="trilinear").movedim(2, 1)[0]
        flat = base.patch_embed.projection(big.repeat(1, 3, 1, 1)).movedim(0, 1)[None]
        filters = (patches.depth + 1 / 8 + patches.channels[j][:, None]) / 3
        expected = expected + F.conv3d(flat, filters[:, None, :, None, None], stride=(8, 1, 1), groups=48)
    sizes = expected.shape[3:]
    expected = expected + F.adaptive_avg_pool2d(base.pos_embed.movedim(-1, 1), sizes)[:, :, None]
    expected = expected.movedim(1, -1) + patches.bias
    found = patches(volume, base, (2, 2)) - resize_table(patches.positions, 4)[:, None, None]
    assert off(found, expected) < 1e-4


def test_several_channels_train_save_and_load_and_others_are_refused(tmp_path):
    model, names = adapted(channels=["t1", "t2"], rounds=1).train(), ["t1", "t2"]
    volume = torch.cat([volumes(2), volumes(2, seed=2)], dim=1)
    model(pixel_values=volume, labels=labelled()).loss.backward()
    assert all(
        p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "patches" in n and p.requires_grad
    )
    with torch.no_grad():
        expected = model.eval()(pixel_values=volume).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build(), tmp_path).eval()
        assert loaded.active_peft_config.channels == names
        assert off(loaded(pixel_values=volume).logits, expected) < 1e-4
        assert off(loaded(pixel_values=volume.flip(1)).logits, expected) > 1e-3  # their order counts
    with pytest.raises(InlayError, match="2 channels, t1, t2"):
        model(pixel_values=volumes())
    for wrong in ("t1", ["t1"], ["t1", "t1"]):
        with pytest.raises(InlayError, match="channels must be a list"):
            settings(channels=wrong)
    adapted().save_pretrained(tmp_path / "one")
    assert "channels" not in json.loads((tmp_path / "one/adapter_config.json").read_text())


def test_windows_that_are_padded_or_shifted_see_only_their_neighbours():
    """A token far away changes nothing: not through the padding, nor around the end of a shifted volume."""
    model = adapted(kernel=1, levels=1, window=4)
    encoder = model.get_base_model().vision_encoder
    parts = encoder.inlay_spatial3d_encoder["default"]
    block, own = encoder.get_base_layer().layers[0], parts.blocks[0]
    x = torch.randn(1, 6, 7, 9, 48)
    y = x.clone()
    y[:, 5, 6, 8] += 1
    with torch.no_grad():
        changed = (own(x, block) - own(y, block)).abs().amax(-1)[0] > 1e-6
    assert own.shifted and changed[5, 6, 8] and not changed[:2].any() and not changed[:, :2].any()
    assert [axis.shift for axis in cut_windows((6, 4, 9), 4, True)] == [2, 0, 2]


def test_a_global_window_needs_no_table_of_that_size():
    model = adapted(window=0)
    assert torch.isfinite(model(pixel_values=volumes()).logits).all()


def test_pictures_pass_as_if_there_were_no_adapter():
    before = build()(PICTURE, input_points=torch.full((1, 1, 1, 2), 20.0))
    after = adapted()(PICTURE, input_points=torch.full((1, 1, 1, 2), 20.0))
    assert torch.equal(after.pred_masks, before.pred_masks)


def test_it_starts_as_sam_and_only_the_adapter_trains():
    base = build()
    names = {id(p) for p in base.parameters()}
    model = get_peft_model(base, settings())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(id(p) in names for p in trained.values())
    assert all("inlay_spatial3d_" in n for n in trained)
    for block in model.get_base_model().vision_encoder.inlay_spatial3d_encoder["default"].blocks:
        assert not block.adapter.up.weight.any() and not block.norms.any() and not block.positions.any()


def test_training_reaches_every_part():
    model = adapted().train()
    for seed in (0, 3):  # a box in one of them
        torch.manual_seed(seed)
        output = model(pixel_values=volumes(), labels=labelled())
        output.loss.backward()
    assert output.logits.shape == (2, 3, 21, 35, 30)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == parameter.requires_grad, name


@pytest.mark.parametrize("seed", [0, 3])  # clicks, and a box
def test_every_part_is_in_the_graph_of_every_step(seed):
    """DistributedDataParallel waits for the gradient of each parameter."""
    model = adapted(rounds=1).train()
    torch.manual_seed(seed)
    model(pixel_values=volumes(), labels=labelled()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_it_learns_a_volume_by_heart():
    torch.manual_seed(0)
    model = get_peft_model(build(), settings(rounds=1)).train()
    labels = labelled(1, (16, 24, 20))
    volume = 0.3 * volumes(1, (16, 24, 20)) + labels[:, None].clamp(min=0).float()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(30):
        loss = model(pixel_values=volume, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]


@pytest.mark.parametrize("seed", [1, 3])  # clicks, and a box
def test_gradient_checkpointing_gives_the_same_gradients(seed):
    found = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            enable_checkpointing(model)
        torch.manual_seed(seed)
        loss = model(pixel_values=volumes(), labels=labelled()).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_saved_loaded_switched_and_deleted(tmp_path):
    model = adapted("first")
    with torch.no_grad():
        first = model(pixel_values=volumes()).logits
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "first" / "adapter_model.safetensors")
        size = sum(value.numel() * value.element_size() for value in weights.values())
        assert (tmp_path / "first" / "adapter_model.safetensors").stat().st_size < size + 200 * len(weights)
        loaded = PeftModel.from_pretrained(build(), tmp_path / "first").eval()
        assert off(loaded(pixel_values=volumes()).logits, first) < 1e-4
        assert loaded.active_peft_config.classes == ["organ", "lesion"]
        model.add_adapter("second", settings(classes=["other"], enlarge=4, patch_depth=4))
        model.set_adapter("second")
        assert model(pixel_values=volumes()).logits.shape[1] == 2
        model.set_adapter("first")
        assert torch.equal(model(pixel_values=volumes()).logits, first)
        model.delete_adapter("second")
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert torch.equal(twin(pixel_values=volumes()).logits, first)
    left = model.unload()
    assert type(left) is SamModel and left.state_dict().keys() == build().state_dict().keys()
    assert torch.equal(left(PICTURE).pred_masks, build()(PICTURE).pred_masks)


def test_without_an_acting_adapter_a_volume_is_refused():
    model = adapted()
    with model.disable_adapter(), pytest.raises(InlayError, match="active 3D spatial adapter"):
        model(pixel_values=volumes())
    with pytest.raises(InlayError, match="does not fold"):
        model.merge_and_unload()
    with pytest.raises(InlayError, match="one channel"):
        model(pixel_values=volumes().expand(-1, 3, -1, -1, -1))
    with pytest.raises(InlayError, match="SamModel or SamVisionModel"):
        get_peft_model(build(), settings(target_modules=["prompt_encoder"]))


def test_compiles_without_a_graph_break():
    model, volume = adapted(), volumes(1, (16, 16, 16))
    with torch.no_grad():
        expected = model(pixel_values=volume).logits
        found = torch.compile(model, backend="eager", fullgraph=True)(pixel_values=volume).logits
    assert off(found, expected) < 1e-4


def test_the_encoder_alone():
    vision = SamVisionModel(build().config.vision_config)
    model = get_peft_model(vision, settings())
    output = model(volumes())
    assert output.last_hidden_state.shape == (2, 32, 6, 9, 8) and len(output.hidden_states) == 4


@pytest.mark.parametrize("sizes", [(1, 40, 33), (5, 4, 3), (40, 64, 20)])
def test_any_size(sizes):
    model = adapted()
    assert type(model.get_base_model()) is VolumeSamModel
    with torch.no_grad():
        output = model(pixel_values=volumes(1, sizes))
    assert output.logits.shape == (1, 3, *sizes) and torch.isfinite(output.logits).all()


def test_a_further_prompt_needs_no_encoder(monkeypatch):
    model = adapted()
    encoder = model.get_base_model().vision_encoder
    with torch.no_grad():
        first = model(pixel_values=volumes())
        monkeypatch.setattr(encoder, "_levels", None)
        again = model(image_embeddings=first.image_embeddings)
        assert isinstance(first.image_embeddings, Encoded) and torch.equal(again.logits, first.logits)
        points, box = torch.tensor([[[5.0, 6, 7]]] * 2), torch.tensor([[[2.0, 3, 4, 12, 20, 18]]] * 2)
        answers = [
            model(image_embeddings=first.image_embeddings, **prompt).logits
            for prompt in (
                {"input_points": points},
                {"input_points": points, "input_labels": torch.tensor([[0]] * 2)},
                {"input_points": points, "input_labels": torch.tensor([[2]] * 2)},
                {"input_points": points + 6},
                {"input_boxes": box},
                {"input_boxes": box, "input_box_labels": torch.tensor([[2]] * 2)},
                {"input_masks": first.logits},
            )
        ]
        assert all(off(a, b) > 1e-4 for i, a in enumerate(answers) for b in [first.logits, *answers[:i]])
        none = {"input_points": points, "input_labels": torch.tensor([[-1]] * 2)}
        assert off(model(image_embeddings=first.image_embeddings, **none).logits, first.logits) < 1e-5


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ({"input_points": torch.zeros(2, 3)}, r"\(B, N, 3\)"),
        ({"input_boxes": torch.zeros(2, 1, 4)}, r"\(B, N, 6\)"),
        ({"input_points": torch.zeros(2, 1, 3), "input_labels": torch.tensor([[3], [1]])}, "0 to 2"),
        ({"input_boxes": torch.zeros(2, 1, 6), "input_box_labels": torch.tensor([[0], [1]])}, "1 to 2"),
    ],
)
def test_prompts_that_make_no_sense(prompts, says):
    with pytest.raises(InlayError, match=says):
        adapted()(pixel_values=volumes(), **prompts)


def test_an_adapter_without_prompts_refuses_them_and_trains():
    model = adapted(prompts=False).train()
    model(pixel_values=volumes(), labels=labelled()).loss.backward()
    with pytest.raises(InlayError, match="takes no points"):
        model(pixel_values=volumes(), input_points=torch.zeros(2, 1, 3))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"classes": []}, "classes"),
        ({"classes": "tumour"}, "classes"),
        ({"rounds": 0}, "prompts=False"),
        ({"kernel": 2}, "odd"),
        ({"patch_depth": 6, "enlarge_depth": 4}, "multiple"),
        ({"enlarge": 0}, "enlarge"),
        ({"position": "beside"}, "position"),
        ({"activation": "none"}, "activation"),
        ({"reduction": 0}, "reduction"),
        ({"simulated": "people"}, "errors or mixed"),
    ],
)
def test_settings_that_make_no_sense(setting, says):
    with pytest.raises(InlayError, match=says):
        SpatialAdapterConfig(**{**CONFIG, **setting})
    with pytest.raises(InlayError, match="divide"):
        get_peft_model(build(), settings(enlarge=3))


@pytest.mark.parametrize(
    ("spacing", "stride"),
    [(None, (4, 4, 4)), ((1.0, 1.0, 1.0), (4, 4, 4)), ((2.5, 1.0, 1.0), (2, 4, 4)), ((5.0, 0.8, 0.8), (1, 4, 4))],
)
def test_tokens_are_about_as_deep_as_wide_in_mm(spacing, stride):
    config = SpatialAdapterConfig.fitted(build(), ["a"], (12, 32, 32), spacing, width=8)
    model = get_peft_model(build(), config)
    assert model.get_base_model().vision_encoder.stride("default") == stride
    assert config.depth_rows == 12 // stride[0] and config.width == 8 and config.window == 4
    assert SpatialAdapterConfig.fitted(build(), ["a"], (64, 64, 64)).window == 8
    with pytest.raises(InlayError, match="divisor"):
        SpatialAdapterConfig.fitted(build(), ["a"], (12, 32, 32), spacing, token=3)


def test_works_on_a_bf16_base():
    model = get_peft_model(build().to(torch.bfloat16), settings()).eval()
    randomise(model, "default", 5)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    expected = adapted()(pixel_values=volumes()).logits
    found = model(pixel_values=volumes().bfloat16()).logits
    assert torch.isfinite(found).all() and off(found.float(), expected) < 0.2 * expected.abs().max()


def test_it_trains_in_bf16_as_in_float32():
    losses = {}
    for bf16 in (False, True):
        model = adapted().train()
        enable_checkpointing(model)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # as accelerate does
            losses[bf16] = model(pixel_values=volumes(), labels=labelled()).loss
        losses[bf16].backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert losses[True].item() == pytest.approx(losses[False].item(), rel=0.02)


def test_places_are_exact_in_bf16():
    """bfloat16 has no odd number over 256, so a click on plane 301 would be drawn around 300 or 302."""
    decoder = adapted().get_base_model().mask_decoder.inlay_spatial3d_decoder["default"]
    prompts = PromptTensors(
        torch.tensor([[[301.0, 1.0, 2.0]]]),
        torch.tensor([[1]]),
        torch.tensor([[[257.0, 0, 0, 259.0, 3, 3]]]),
        torch.tensor([[2]]),
    )
    sizes = (320, 4, 4)
    drawn = {
        kind: decoder._draw_guides(prompts, None, torch.zeros(1, 1, *sizes, dtype=kind), sizes)
        for kind in (torch.float32, torch.bfloat16)
    }
    assert all(guides.pop() is None for guides in drawn.values())  # there is no earlier answer
    for whole, halved in zip(*drawn.values(), strict=True):
        assert halved.dtype == torch.bfloat16 and torch.equal(whole.bfloat16(), halved)
    clicks, boxes = drawn[torch.bfloat16]
    assert clicks[0, 1].amax((1, 2)).argmax() == 301 and boxes[0, 1].amax((1, 2)).nonzero().flatten().tolist() == [
        257,
        258,
        259,
    ]


def test_loss_is_dice_and_cross_entropy_of_what_counts():
    labels = labelled(1)
    sure = 40 * F.one_hot(labels.clamp(min=0), 3).movedim(-1, 1).float()
    assert dice_cross_entropy(sure, labels) < 1e-3
    wild = sure.clone()
    wild[:, 2, -1] = 100  # under -1
    assert torch.equal(dice_cross_entropy(wild, labels), dice_cross_entropy(sure, labels))
    even = dice_cross_entropy(torch.zeros(1, 3, 21, 35, 30), labels)
    counted, sizes = (labels >= 0).sum(), [(labels == k).sum() for k in (1, 2)]
    dice = sum((2 * n / 3 + 1) / (n + counted / 3 + 1) for n in sizes) / 2
    assert even.item() == pytest.approx(((torch.log(torch.tensor(3.0)) + 1 - dice) / 2).item(), abs=1e-5)


def test_loss_keeps_no_probabilities_for_the_backward_pass_and_has_the_gradient_of_the_plain_formula():
    """With 32 classes they would be the largest tensors of a step."""
    labels, logits = labelled().clamp(max=1), torch.randn(2, 33, 21, 35, 30, requires_grad=True)
    labels[0, :4] = 32
    kept = []

    def keep(tensor):
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = dice_cross_entropy(logits, labels)
    assert sum(kept) <= 1.001 * (logits.nbytes + labels.nbytes)  # what came in, and sums
    (found,) = torch.autograd.grad(loss, logits)
    shares, sizes = logits.softmax(1)[:, 1:] * (labels >= 0)[:, None], torch.bincount(labels[labels >= 0])
    wanted = F.one_hot(labels.clamp(min=0), 33).movedim(-1, 1)[:, 1:]
    both, all_ = (shares * wanted).sum((2, 3, 4)), (shares + wanted).sum((2, 3, 4))
    everything = (logits.softmax(1) * (labels >= 0)[:, None]).detach()
    right = (everything * F.one_hot(labels.clamp(min=0), 33).movedim(-1, 1)).sum((0, 2, 3, 4))
    learned = (2 * right + 1) / (everything.sum((0, 2, 3, 4)) + sizes + 1)
    weight = torch.where(sizes > 0, (sizes.sum() / sizes) ** ((1 - learned) / 2), 0)
    entropy = F.cross_entropy(logits, labels, weight, ignore_index=-1)
    plain = (entropy + 1 - ((2 * both + 1) / (all_ + 1)).mean()) / 2
    (expected,) = torch.autograd.grad(plain, logits)
    assert off(loss, plain) < 1e-5 and off(found, expected) < 1e-5


def test_prompts_that_are_not_given_cost_the_decoder_nothing_and_count_as_none():
    """As many as 98 volumes for 32 classes: left out, the scores are those of volumes of zeros."""
    model, volume = adapted(classes=[f"class {i}" for i in range(32)]).eval(), volumes(1, (16, 16, 16))
    absent = {"input_points": torch.ones(1, 2, 3), "input_labels": torch.full((1, 2), -1)}
    absent |= {"input_boxes": torch.ones(1, 1, 6), "input_box_labels": torch.full((1, 1), -1)}
    with torch.no_grad():
        encoded, work = model(pixel_values=volume).image_embeddings, {}
        for name, prompts in {"none": {}, "absent": absent}.items():
            with FlopCounterMode(display=False) as counter:
                logits = model(image_embeddings=encoded, **prompts).logits
            work[name] = counter.get_total_flops(), logits
    assert off(work["none"][1], work["absent"][1]) < 1e-4
    assert work["none"][0] < 0.8 * work["absent"][0]


@pytest.mark.parametrize(
    ("size", "blocks", "expected"), [(768, 12, 15_080_146), (1024, 24, 24_598_482), (1280, 32, 38_720_722)]
)
def test_it_goes_into_the_published_sizes_of_sam(size, blocks, expected):
    """ViT-B, L and H, by their structure alone."""
    vision = {
        "hidden_size": size,
        "num_hidden_layers": blocks,
        "num_attention_heads": size // 64 if size < 1280 else 16,
    }
    vision |= {"mlp_dim": 4 * size, "global_attn_indexes": [blocks // 4 * (i + 1) - 1 for i in range(4)]}
    with torch.device("meta"):
        model = get_peft_model(SamModel(SamConfig(vision_config=vision)), SpatialAdapterConfig(classes=["tumour"]))
    assert model.get_nb_trainable_parameters()[0] == expected
    assert len(model.vision_encoder.inlay_spatial3d_encoder["default"].necks) == 4


def test_components_and_their_depth_are_those_of_scipy():
    generator = torch.Generator().manual_seed(0)
    for share in (0.05, 0.1, 0.5):
        mask = torch.rand(2, 12, 15, 18, generator=generator) < share
        names, depth = name_components(mask), measure_depth(mask)
        for name, one, deep in zip(names, mask, depth, strict=True):
            wanted, count = ndimage.label(one.numpy(), np.ones((3, 3, 3)))
            pairs = set(zip(wanted[one].tolist(), name.view(one.shape)[one].tolist(), strict=True))
            assert len(pairs) == len({b for _, b in pairs}) == count
            distance = ndimage.distance_transform_edt(np.pad(one.numpy(), 1))[1:-1, 1:-1, 1:-1]
            assert np.allclose(deep.sqrt().numpy(), distance, atol=1e-6)
    corridor = torch.zeros(1, 3, 30, 30, dtype=torch.bool)
    corridor[0, 1, ::2] = True
    corridor[0, 1, 1::4, -1] = corridor[0, 1, 3::4, 0] = True
    assert len(name_components(corridor).view(corridor.shape)[corridor].unique()) == 1, "a line of 464 voxels"


def test_clicks_at_centres_take_the_largest_errors_in_turn():
    labels = torch.zeros(2, 12, 14, 16, dtype=torch.long)
    labels[0, 2:9, 3:8, 3:8] = 1  # 175 voxels that are missing; the centre
    labels[0, 10, 12, 2:6] = 2  # 4 more
    labels[1, 0, 0, 0] = -1
    logits = mask_logits(torch.zeros_like(labels), 2)
    logits[1, 2, 4:7, 4:7, 10:13] = 20  # 27 too many
    points, said = clicks_at_centres(logits, labels, 3)
    assert said.tolist() == [[1, 2, -1], [0, -1, -1]]
    assert points[0, 0, 1:].tolist() == [5, 5] and 4 <= points[0, 0, 0] <= 6
    assert points[0, 1, :2].tolist() == [10, 12] and points[1, 0].tolist() == [5, 5, 11]


def test_a_mask_is_mended_as_the_logits_that_are_sure_of_it():
    model, mask = adapted().eval(), labelled().clamp(min=0)
    with torch.no_grad():
        given = model(pixel_values=volumes(), input_masks=mask).logits
        sure = model(pixel_values=volumes(), input_masks=mask_logits(mask, 2)).logits
        none = model(pixel_values=volumes()).logits
    assert torch.equal(given, sure) and off(given, none) > 1e-4
    assert torch.equal(mask_logits(mask, 2).argmax(1), mask) and mask_logits(mask, 2).softmax(1).amax(1).min() > 0.999
    with pytest.raises(InlayError, match="whole numbers"):
        model(pixel_values=volumes(), input_masks=mask.float())
    with pytest.raises(InlayError, match="takes no masks"):
        adapted(prompts=False)(pixel_values=volumes(), input_masks=mask)


def test_damaged_masks_are_wrong_in_places():
    torch.manual_seed(3)
    labels = labelled()
    wrong = [(damage_masks(labels, 2) != labels.clamp(min=0)).float().mean() for _ in range(8)]
    assert 0 < max(wrong) < 0.6 and damage_masks(torch.full((1, 4, 5, 6), -1), 2).eq(0).all()


def test_mixed_prompts_train_and_are_of_every_kind():
    torch.manual_seed(0)
    labels = labelled()
    drawn = [draw_mixed_prompts(PromptTensors(), mask_logits(labels.clamp(min=0), 2), labels, True) for _ in range(40)]
    kinds = {(one.points is None, one.boxes is None, one.previous is None) for one in drawn}
    assert {(True, True, False), (True, False, False), (True, False, True), (False, True, False)} <= kinds
    assert (True, True, True) not in kinds, "no step without any prompt"
    model = adapted(simulated="mixed").train()
    loss = model(pixel_values=volumes(), labels=labels).loss
    loss.backward()
    assert torch.isfinite(loss)

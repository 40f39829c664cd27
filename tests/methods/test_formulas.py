"""Each method against its formula, written out in float64."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from torch.nn import functional as F
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from convolutional_networks import build_network
from inlay import (
    AttentionPrefixConfig,
    BottleneckConfig,
    CompositeConfig,
    ConvAdapterConfig,
    ConvPassConfig,
    InlayError,
    PartialConfig,
    SsfConfig,
    VisualPromptConfig,
)
from inlay.methods import METHODS
from inlay.methods.attention_prefix import AttentionPrefixLayer
from inlay.methods.base import AdapterLayer
from inlay.methods.bottleneck import BottleneckLayer
from inlay.methods.ssf import SsfLayer
from methods.bases import OTHERS, adapted, batch, build, build_other, compute, randomise


def attach(config, base="vit", dtype=torch.float64):
    """A base in `dtype` with a random adapter of the same type."""
    torch.manual_seed(2)
    model = get_peft_model(build(base).to(dtype), config, autocast_adapter_dtype=False).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def layer(model, name):
    return model.get_base_model().get_submodule(name)


def close(a, b):
    assert a.dtype == torch.float64 and (a - b).abs().max() < 1e-7  # an eager attention takes its softmax in float32


def parts(wrapped):
    """W_down (m, d), b_down, W_up (d, m), b_up, as the tensors of a file hold them."""
    (down, up), bias = wrapped.inlay_bottleneck_weight["default"], wrapped.inlay_bottleneck_bias["default"]
    return down, bias[: len(down)], up.T, bias[len(down) :]


def test_serial_bottleneck():
    model = attach(BottleneckConfig(width=5, scale=0.7, activation="gelu"))
    wrapped = layer(model, "vit.layers.1.mlp.fc2")
    x = torch.randn(2, 7, 64, dtype=torch.float64)
    h = F.linear(x, wrapped.base_layer.weight, wrapped.base_layer.bias)
    w_down, b_down, w_up, b_up = parts(wrapped)
    z = h @ w_down.T + b_down
    z = 0.5 * z * (1 + torch.erf(z / 2**0.5))
    close(wrapped(x), h + 0.7 * (z @ w_up.T + b_up))


def test_parallel_bottleneck_with_norm_and_learned_scale():
    settings = {"sites": ["mlp"], "placement": "parallel", "learn_scale": True, "layer_norm": "before"}
    model = attach(BottleneckConfig(width=5, **settings))
    wrapped = layer(model, "vit.layers.0.mlp")
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    w_down, b_down, w_up, b_up = parts(wrapped)
    norm, scale = wrapped.inlay_bottleneck_norm["default"], wrapped.inlay_bottleneck_scale["default"]
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    z = (normed * norm.weight + norm.bias) @ w_down.T + b_down
    close(wrapped(x), wrapped.base_layer(x) + scale * (z.clamp(min=0) @ w_up.T + b_up))


def test_adapter_plus_stands_behind_the_block_and_scales_each_channel():
    model = attach(METHODS["adapter-plus"].config(None, 5))
    wrapped = layer(model, "vit.layers.1")
    assert isinstance(wrapped, BottleneckLayer) and not isinstance(layer(model, "vit.layers.1.mlp"), BottleneckLayer)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    w_down, b_down, w_up, b_up = parts(wrapped)
    scale = wrapped.inlay_bottleneck_scale["default"]
    assert scale.shape == (32,)
    h = wrapped.base_layer(x)
    z = h @ w_down.T + b_down
    z = 0.5 * z * (1 + torch.erf(z / 2**0.5))
    close(wrapped(x), h + scale * (z @ w_up.T + b_up))


def test_adapter_plus_starts_as_houlsby_et_al():
    model = get_peft_model(build("vit"), METHODS["adapter-plus"].config(None, 16))
    layers = [m for m in model.modules() if isinstance(m, BottleneckLayer)]
    weights = torch.cat([m.inlay_bottleneck_weight["default"].flatten() for m in layers])
    assert len(layers) == 3 and weights.abs().max() <= 0.02 and 0.0085 < weights.std() < 0.0091  # 0.88 of 0.01: cut off
    assert all((m.inlay_bottleneck_bias["default"] == 0).all() for m in layers)
    assert all((m.inlay_bottleneck_scale["default"] == 1).all() for m in layers)


def test_hidden_states_are_those_behind_adapter_plus():
    model = adapted("adapter-plus", "vit")
    states = model(**batch("vit"), output_hidden_states=True).hidden_states
    blocks = model.get_base_model().vit.layers
    for i, block in enumerate(blocks[:-1]):
        assert torch.equal(block(states[i]), states[i + 1])


def test_parallel_bottleneck_in_bert_goes_into_the_residual():
    model = attach(BottleneckConfig(width=5, sites=["attention", "mlp"], placement="parallel"), "bert")
    for name, size in (("attention.output", 32), ("output", 64)):
        wrapped = layer(model, f"bert.encoder.layer.1.{name}")
        h, x = torch.randn(2, 7, size, dtype=torch.float64), torch.randn(2, 7, 32, dtype=torch.float64)
        w_down, b_down, w_up, b_up = parts(wrapped)
        added = (x @ w_down.T + b_down).clamp(min=0) @ w_up.T + b_up
        close(wrapped(h, x), wrapped.base_layer.LayerNorm(wrapped.base_layer.dense(h) + x + added))


@pytest.mark.parametrize("placement", ["serial", "parallel"])
def test_dropout_of_a_bottleneck_acts_on_its_units_in_training_alone(placement):
    settings = {"width": 5, "sites": ["mlp"], "placement": placement, "scale": 0.7, "dropout": 0.4}
    model = attach(BottleneckConfig(**settings))
    wrapped = layer(model, "vit.layers.1.mlp.fc2" if placement == "serial" else "vit.layers.1.mlp")
    x = torch.randn(2, 7, 64 if placement == "serial" else 32, dtype=torch.float64)
    out = wrapped.base_layer(x)
    w_down, b_down, w_up, b_up = parts(wrapped)
    z = ((out if placement == "serial" else x) @ w_down.T + b_down).clamp(min=0)
    close(wrapped(x), out + 0.7 * (z @ w_up.T + b_up))
    model.train()
    torch.manual_seed(5)
    found = wrapped(x)
    torch.manual_seed(5)
    kept = F.dropout(torch.ones_like(z), 0.4)
    assert set(kept.unique().tolist()) == {0.0, 1 / 0.6}
    close(found, out + 0.7 * ((kept * z) @ w_up.T + b_up))
    assert not torch.equal(wrapped(x), found), "the next draw is another one"


def test_ssf_scales_and_shifts_what_each_operation_gives():
    model = attach(SsfConfig())
    for name, x in (
        ("vit.layers.1.mlp.fc1", torch.randn(2, 7, 32, dtype=torch.float64)),
        ("vit.layers.1.layernorm_after", torch.randn(2, 7, 32, dtype=torch.float64)),
        ("vit.embeddings.patch_embeddings.projection", torch.randn(2, 3, 16, 16, dtype=torch.float64)),
    ):
        wrapped = layer(model, name)
        gamma, beta = wrapped.inlay_ssf_scale["default"], wrapped.inlay_ssf_shift["default"]
        y = wrapped.base_layer(x)
        if y.ndim == 4:
            gamma, beta = gamma[:, None, None], beta[:, None, None]
        close(wrapped(x), gamma * y + beta)


def test_ssf_stands_where_its_authors_put_it():
    """Their ViT-B/16 has pairs behind the patch embedding, the last norm, and the six operations of each block."""
    with torch.device("meta"):
        model = get_peft_model(ViTModel(ViTConfig(), add_pooling_layer=False), SsfConfig())
    operations = 768 + 3 * 768 + 768 + 768 + 3072 + 768  # norm, qkv, projection, norm, two layers of the MLP
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (12 * operations + 768 + 768)


@pytest.mark.parametrize("base", ["vit", "gpt2", "llama", "bert", "mobilenet"])
def test_ssf_folds_into_weights_and_biases(base):
    if base == "mobilenet":
        torch.manual_seed(2)
        model = get_peft_model(_mobilenet().double(), SsfConfig(), autocast_adapter_dtype=False).double().eval()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) * 0.2 + (1.0 if "scale" in name else 0.0)
    else:
        model = attach(SsfConfig(), base)
    expected = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, SsfLayer):
            old, gamma = module.get_base_layer(), module.inlay_ssf_scale["default"]
            rows = gamma if type(old).__name__ == "Conv1D" else gamma.view(-1, *[1] * (old.weight.ndim - 1))
            expected[f"{name}.weight"] = rows * old.weight
            if getattr(old, "bias", None) is not None:
                expected[f"{name}.bias"] = gamma * old.bias + module.inlay_ssf_shift["default"]
            else:
                assert "default" not in module.inlay_ssf_shift, "nothing in the merged model could hold it"
    merged = model.merge_and_unload()
    values = dict(merged.named_parameters())
    assert len(expected) > 20
    for name, value in expected.items():
        close(values[name], value)


def test_ssf_folds_into_a_norm_that_adds_one_to_its_weight():
    base = nn.ModuleDict({"norm": GemmaRMSNorm(8), "linear": nn.Linear(8, 8, bias=False)})
    base["norm"].weight.data.normal_()
    model = get_peft_model(base, SsfConfig(target_modules=["norm", "linear"], init_weights=False, add_biases=True))
    norm, linear = model.get_base_model()["norm"], model.get_base_model()["linear"]
    x = torch.randn(3, 8)
    wanted = [norm(x), linear(x)]
    moved = norm.inlay_ssf_scale["default"] * (1 + norm.base_layer.weight) - 1
    model.merge_adapter()
    assert torch.allclose(norm.base_layer.weight, moved, atol=1e-6)
    for wrapped, value in zip((norm, linear), wanted, strict=True):
        assert torch.allclose(wrapped.base_layer(x), value, atol=1e-5)
    assert linear.base_layer.bias is not None and "default" not in norm.inlay_ssf_shift
    model.unmerge_adapter()
    assert linear.base_layer.bias is None


@pytest.mark.filterwarnings("ignore:.*reference PyTorch implementation")
def test_ssf_leaves_out_what_the_kernels_of_a_state_space_model_read():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
    mixer = {"mamba_d_ssm": 16, "mamba_n_heads": 4, "mamba_d_head": 4, "mamba_n_groups": 1, "mamba_d_state": 4}
    base = FalconH1ForCausalLM(FalconH1Config(vocab_size=50, num_hidden_layers=1, head_dim=8, **sizes, **mixer))
    model = get_peft_model(base, SsfConfig(init_weights=False))
    model(input_ids=torch.arange(7)[None]).logits.square().sum().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert any("mamba.in_proj" in name for name in trained)
    assert [name for name, grad in trained.items() if grad is None or not grad.any()] == []


@pytest.mark.parametrize("settings", [{}, {"activation": "gelu", "scale": 0.5, "width": 5}])
def test_a_convolutional_bypass(settings):
    """As its authors have it: 1x1, 3x3 and 1x1 convolutions; the class token is an image of its own."""
    model = attach(ConvPassConfig(**settings))
    vit = model.get_base_model().vit
    model(pixel_values=batch("vit")["pixel_values"].double())  # which tells the grid: 4 x 4
    act = {"gelu": F.gelu}.get(settings.get("activation"), lambda z: z * torch.sigmoid(1.702 * z))
    for wrapped in (vit.layers[1].attention, vit.layers[1].mlp):
        x = torch.randn(2, 17, 32, dtype=torch.float64)
        (down, up), kernel = wrapped.inlay_convpass_weight["default"], wrapped.inlay_convpass_kernel["default"]
        width = settings.get("width", 8)
        assert kernel.shape == (width, width, 3, 3)
        b_down, b_kernel, b_up = wrapped.inlay_convpass_bias["default"].split([width, width, 32])
        added = []
        for image in (x[:, :1].mT.unflatten(2, (1, 1)), x[:, 1:].mT.unflatten(2, (4, 4))):  # B d H W
            h = act(F.conv2d(image, down[..., None, None], b_down))
            h = act(F.conv2d(h, kernel, b_kernel, padding=1))
            added.append(F.conv2d(h, up.T[..., None, None], b_up).flatten(2).mT)
        output, plain = wrapped(x), wrapped.base_layer(x)
        output, plain = (value[0] if isinstance(value, tuple) else value for value in (output, plain))
        close(output, plain + settings.get("scale", 1.0) * torch.cat(added, 1))


def test_convolutional_bypasses_have_as_many_parameters_as_published():
    with torch.device("meta"):
        model = get_peft_model(ViTModel(ViTConfig(), add_pooling_layer=False), ConvPassConfig())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 327_552  # their 0.33 M of ViT-B/16


def test_a_bypass_in_sam_sees_the_whole_image_and_not_a_window():
    model = attach(ConvPassConfig(width=3), "sam")
    wrapped = layer(model, "vision_encoder.layers.0.attn")
    model(pixel_values=batch("sam")["pixel_values"].double())
    block = layer(model, "vision_encoder.layers.0")
    images = torch.randn(2, 8, 8, 32, dtype=torch.float64)
    windows, padded = block.window_partition(images, 3)
    (down, up), kernel = wrapped.inlay_convpass_weight["default"], wrapped.inlay_convpass_kernel["default"]
    b_down, b_kernel, b_up = wrapped.inlay_convpass_bias["default"].split([3, 3, 32])
    z = images @ down.T + b_down
    h = F.conv2d((z * torch.sigmoid(1.702 * z)).movedim(-1, 1), kernel, b_kernel, padding=1).movedim(1, -1)
    added = (h * torch.sigmoid(1.702 * h)) @ up + b_up
    found = wrapped(windows)[0] - wrapped.base_layer(windows)[0]
    close(block.window_unpartition(found, 3, padded, (8, 8)), added)


@pytest.mark.parametrize("settings", [{"width": 8}, {"width": 6}, {"width": 8, "groups": 2, "activation": "gelu"}, {}])
def test_conv_adapter_next_to_a_convolution_with_a_stride(settings):
    torch.manual_seed(2)
    base = nn.Sequential(nn.Conv2d(16, 12, (3, 5), stride=2, padding=(1, 2), groups=4)).double()
    config = ConvAdapterConfig(target_modules=["0"], **settings)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).double()
    wrapped = model.get_base_model()[0]
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    width = settings.get("width", 2)  # 16 / 8
    groups = settings.get("groups", {8: 8, 6: 2, 2: 2}[width])  # as published one a channel, where these divide
    kernel, up = wrapped.inlay_conv_adapter_kernel["default"], wrapped.inlay_conv_adapter_up["default"]
    assert kernel.shape == (groups, width // groups, 16 // groups, 3, 5)
    bias, up_bias = wrapped.inlay_conv_adapter_bias["default"].split([width, 12])
    x, alpha = torch.randn(2, 16, 9, 11, dtype=torch.float64), wrapped.inlay_conv_adapter_scale["default"]
    units = []
    for group, own in enumerate(kernel):
        for unit in own:  # sees the channels of its group
            seen = x[:, group * (16 // groups) : (group + 1) * (16 // groups)]
            units.append(F.conv2d(seen, unit[None], stride=2, padding=(1, 2)))
    h = torch.cat(units, 1) + bias[:, None, None]
    h = F.gelu(h) if "activation" in settings else h.clamp(min=0)
    added = torch.einsum("om,bmhw->bohw", up, h) + up_bias[:, None, None]
    close(wrapped(x), wrapped.base_layer(x) + alpha[:, None, None] * added)


@pytest.mark.parametrize("placement", ["conv_sequential", "residual_parallel", "residual_sequential"])
def test_the_other_placements_of_conv_adapter(placement):
    torch.manual_seed(2)
    base = nn.ModuleDict({"block": nn.Sequential(nn.Conv2d(8, 4, 1), nn.Conv2d(4, 6, 5, stride=2, padding=2))}).double()
    target = "block" if placement.startswith("residual") else "block.1"
    config = ConvAdapterConfig(width=4, placement=placement, target_modules=[target])
    model = get_peft_model(base, config, autocast_adapter_dtype=False).double()
    wrapped = model.get_base_model().get_submodule(target)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    kernel, up = wrapped.inlay_conv_adapter_kernel["default"], wrapped.inlay_conv_adapter_up["default"]
    bias, up_bias = wrapped.inlay_conv_adapter_bias["default"].split([4, 6])
    x = torch.randn(2, 4 if target == "block.1" else 8, 10, 7, dtype=torch.float64)
    y = wrapped.base_layer(x)
    read, stride = (x, 2) if placement == "residual_parallel" else (y, 1)
    size = kernel.shape[-1]
    assert size == (5 if placement == "conv_sequential" else 3)
    h = F.conv2d(read, kernel.flatten(0, 1), bias, stride, size // 2, groups=len(kernel)).clamp(min=0)
    scale = wrapped.inlay_conv_adapter_scale["default"][:, None, None]
    close(wrapped(x), y + scale * F.conv2d(h, up[..., None, None], up_bias))


def test_conv_adapter_at_a_block_whose_branches_are_put_together():
    """What a Fire module gives is twice what its last convolution gives; half of a ShuffleNet unit goes around it."""
    model = get_peft_model(build_network("SqueezeNet"), ConvAdapterConfig(width=2, placement="residual_sequential"))
    scales = [p for name, p in model.named_parameters() if "inlay_conv_adapter_scale" in name]
    assert [len(scale) for scale in scales] == [16, 16]
    with pytest.raises(InlayError, match=r"cannot be told what shufflenet\..* takes, a ShuffleUnit"):
        get_peft_model(build_network("ShuffleNetV2"), ConvAdapterConfig(width=2, placement="residual_sequential"))


def test_conv_adapter_next_to_a_block_that_changes_the_size_otherwise_is_refused():
    base = nn.ModuleDict({"block": nn.Sequential(nn.Conv2d(4, 4, 3), nn.AvgPool2d(2))})
    model = get_peft_model(base, ConvAdapterConfig(width=2, placement="residual_parallel", target_modules=["block"]))
    with pytest.raises(InlayError, match='placement="conv_parallel"'):
        model.get_base_model()["block"](torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize("base", ["vit", "sam"])
def test_dropout_of_prompts_acts_on_them_in_training_alone(base):
    model, entered = attach(VisualPromptConfig(length=6, dropout=0.4), base), []
    wrapped = layer(model, "vit.layers.1" if base == "vit" else "vision_encoder.layers.0.attn")
    tokens = wrapped.inlay_visual_prompt_tokens["default"].detach()
    x = torch.randn(2, 7, 32, dtype=torch.float64) if base == "vit" else torch.randn(9, 3, 3, 32, dtype=torch.float64)
    # The prompts are the last tokens of a ViT's block; SAM makes keys and values of them before those of the windows.
    reads = wrapped.base_layer if base == "vit" else wrapped.qkv
    reads.register_forward_pre_hook(lambda _, args: entered.append(args[0].detach()))

    def prompts():
        entered.clear()
        wrapped(x)
        return entered[0][:, 7:] if base == "vit" else entered[0].view(1, 6, 32)

    assert all(torch.equal(row, tokens) for row in prompts())
    model.train()
    first, second = prompts(), prompts()
    for row in first:
        kept = row != 0
        assert 0.4 < kept.double().mean() < 0.8  # 0.6 of 192
        close(row[kept], tokens[kept] / 0.6)
    assert not torch.equal(first, second), "the next draw is another one"
    model.eval()
    assert all(torch.equal(row, tokens) for row in prompts())


@pytest.mark.parametrize("deep", [True, False])
def test_visual_prompts(deep):
    model = attach(VisualPromptConfig(length=3, deep=deep))
    vit = model.get_base_model().vit
    x = vit.embeddings(batch("vit")["pixel_values"].double())
    prompts = None
    for block in vit.layers:
        own = block.inlay_visual_prompt_tokens
        if "default" in own:
            prompts = own["default"].expand(len(x), -1, -1)
        out = block.base_layer(torch.cat([x, prompts], 1))
        x, prompts = out[:, :-3], out[:, -3:]
    expected = model.get_base_model().classifier(vit.layernorm(x)[:, 0])
    close(model(pixel_values=batch("vit")["pixel_values"].double()).logits, expected)


def attention(q, k, v, key, value, seen=None):
    """softmax(q [P_k; k]ᵀ / √d) [P_v; v], per head; `seen` L x S says what each token may see of the others."""
    k, v = (torch.cat([extra.expand(len(q), -1, -1, -1), x], 2) for extra, x in ((key, k), (value, v)))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if seen is not None:
        scores = scores.masked_fill(~F.pad(seen, (key.shape[-2], 0), value=True), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def heads(x, count=4):
    return x.unflatten(-1, (count, -1)).transpose(-3, -2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_prefix_in_a_vision_transformer(implementation):
    model = attach(AttentionPrefixConfig(length=3))
    model.get_base_model().set_attn_implementation(implementation)
    wrapped = layer(model, "vit.layers.1.attention")
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    key, value = (heads(p[None]) for p in wrapped.prefix("default"))
    mixed = attention(heads(wrapped.q_proj(x)), heads(wrapped.k_proj(x)), heads(wrapped.v_proj(x)), key, value)
    output, weights = wrapped(x)
    close(output, wrapped.o_proj(mixed))
    assert weights is None or weights.shape == (2, 4, 7, 7)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_prefix_under_a_causal_mask_and_padding(implementation):
    model = attach(AttentionPrefixConfig(length=3), "gpt2")
    model.get_base_model().set_attn_implementation(implementation)
    inputs, wrapped, kept = batch("gpt2"), layer(model, "transformer.h.0.attn"), {}
    handles = [
        wrapped.register_forward_pre_hook(lambda _, args, kwargs: kept.update(x=args[0]), with_kwargs=True),
        wrapped.register_forward_hook(lambda _, args, output: kept.update(y=output[0])),
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    q, k, v = (heads(part) for part in wrapped.c_attn(kept["x"]).chunk(3, -1))
    key, value = (heads(p[None]) for p in wrapped.prefix("default"))
    mask = inputs["attention_mask"].bool()
    seen = torch.ones(10, 10, dtype=torch.bool).tril() & mask[:, None, None]
    expected = wrapped.c_proj(attention(q, k, v, key, value, seen))
    close(kept["y"][mask], expected[mask])


@pytest.mark.parametrize("config", [AttentionPrefixConfig(length=3), VisualPromptConfig(length=3)])
def test_every_window_of_sam_sees_prefix_and_prompts(config):
    model = attach(config, "sam")
    wrapped = layer(model, "vision_encoder.layers.0.attn")
    nn.init.normal_(wrapped.rel_pos_h), nn.init.normal_(wrapped.rel_pos_w)
    windows = torch.randn(9, 3, 3, 32, dtype=torch.float64)
    windows[-1, 1:] = 0  # padding
    if isinstance(config, AttentionPrefixConfig):
        key, value = wrapped.prefix("default")
    else:
        _, key, value = wrapped.qkv(wrapped.inlay_visual_prompt_tokens["default"]).chunk(3, -1)
    key, value = heads(key), heads(value)
    expected = []
    for window in windows:  # each by itself: no window knows of another
        q, k, v = (heads(part) for part in wrapped.qkv(window.flatten(0, 1)).chunk(3, -1))
        place = wrapped.get_decomposed_rel_pos(q, wrapped.rel_pos_h, wrapped.rel_pos_w, (3, 3), (3, 3)).reshape(4, 9, 9)
        scores = torch.cat([q @ key.mT / 8**0.5, q @ k.mT / 8**0.5 + place], -1)
        mixed = scores.softmax(-1) @ torch.cat([value, v], 1)
        expected.append(wrapped.proj(mixed.transpose(0, 1).flatten(1)).view(3, 3, 32))
    close(wrapped(windows)[0], torch.stack(expected))


def test_a_projection_is_dropped_on_save(tmp_path):
    model = attach(AttentionPrefixConfig(length=3, projection=5), dtype=torch.float32)
    assert any("projection" in name for name, p in model.named_parameters() if p.requires_grad)
    expected = compute(model, "vit")
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(build("vit"), tmp_path, is_trainable=trainable).eval()
        layers = [m for m in loaded.modules() if isinstance(m, AttentionPrefixLayer)]
        assert not any(m.inlay_attention_prefix_projection for m in layers)
        assert (compute(loaded, "vit") - expected).abs().max() < 1e-6


@pytest.mark.parametrize(("base", "site"), [("gpt2", "transformer.h.0.mlp.c_proj"), ("llama", None)])
def test_a_linear_bottleneck_merges_into_a_transposed_weight_and_one_without_bias(base, site):
    model = attach(BottleneckConfig(width=4, activation=None, learn_scale=True), base)
    expected = compute(model, base)
    merged = model.merge_and_unload()
    assert (compute(merged, base) - expected).abs().max() < 1e-10
    assert merged.state_dict().keys() == build(base).state_dict().keys()
    assert site is None or merged.get_submodule(site).weight.shape == (128, 32)


def test_a_file_of_a_base_sized_vit_is_8_kb_larger_than_what_is_trained():
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig())
        model = get_peft_model(model, BottleneckConfig(width=64))
    tensors = get_peft_model_state_dict(model)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == trained == 9_517_056
    header = {
        k: {"dtype": "F32", "shape": list(t.shape), "data_offsets": [trained, trained]} for k, t in tensors.items()
    }
    assert len(json.dumps(header, separators=(",", ":"))) < 8_000  # beside eight bytes and padding


def _mobilenet():
    return MobileNetV2ForImageClassification(MobileNetV2Config(image_size=32, depth_multiplier=0.35))


def test_a_linear_bottleneck_merges_into_a_convolution():
    torch.manual_seed(0)
    base = _mobilenet().double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    config = BottleneckConfig(width=4, activation=None, sites=["mlp"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False).double().eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    expected = model(x).logits
    close(model.merge_and_unload()(x).logits, expected)


def test_two_linear_bottlenecks_merge_to_their_sum():
    model = attach(BottleneckConfig(width=4, activation=None), dtype=torch.float32)
    model.add_adapter("second", BottleneckConfig(width=3, activation=None, init_weights=False, channel_scale=True))
    randomise(model, "second")
    model.base_model.set_adapter(["default", "second"])
    expected = compute(model, "vit")
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    assert (compute(model, "vit") - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    "parts",
    [
        lambda: [LoraConfig(r=2, target_modules=["fc2"]), BottleneckConfig(width=4, activation=None, sites=["mlp"])],
        lambda: [LoraConfig(r=2, target_modules=["fc2"]), PartialConfig(last=2)],
        lambda: [PartialConfig(last=2), BottleneckConfig(width=4, activation=None)],
    ],
)
def test_composites_merge_one_after_the_other(parts):
    """Layers around one another: what the inner one merges later must reach the weight that the outer one keeps."""
    model = get_peft_model(build("vit"), CompositeConfig(parts=parts()), adapter_name="one").eval()
    model.add_adapter("two", CompositeConfig(parts=parts()))
    randomise(model, "one", 3), randomise(model, "two", 7)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.merge_adapter(["one", "two"])
    together = compute(model, "vit")
    model.unmerge_adapter()
    for first, second in (["one", "two"], ["two", "one"]):
        model.set_adapter(first)
        model.merge_adapter([first])
        one = compute(model, "vit")
        model.merge_adapter([second])
        assert (compute(model, "vit") - together).abs().max() < 1e-4
        model.merge_adapter([first])  # is merged: nothing happens
        assert (compute(model, "vit") - together).abs().max() < 1e-4
        model.unmerge_adapter()
        assert (compute(model, "vit") - one).abs().max() < 1e-4 < (one - together).abs().max()
        exact = not any(isinstance(part, LoraConfig) for part in parts())  # peft's merges are subtracted again
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]) if exact else torch.allclose(value, before[key], atol=1e-6)
    with pytest.raises(InlayError, match="list of names"):
        model.merge_adapter("one")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_plus_delta_is_the_trained_weight_bit_for_bit(dtype, tmp_path):
    base = build("vit").to(dtype)
    model = get_peft_model(base, PartialConfig(last=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        model(pixel_values=batch("vit")["pixel_values"].to(dtype)).logits.float().square().sum().backward()
        optimizer.step()
    trained = {n: m.merged_values(["default"]) for n, m in model.named_modules() if isinstance(m, AdapterLayer)}
    assert len(trained) == 2 * 8 + 1  # six linear layers and two norms a block, and the last norm
    model.save_pretrained(tmp_path)
    ways = [{}, {"low_cpu_mem_usage": True}, {"autocast_adapter_dtype": False}, {"is_trainable": True}, None]
    for way in ways:
        if way is None:
            loaded = build("vit").to(dtype)
            loaded.load_adapter(str(tmp_path))
        else:
            loaded = PeftModel.from_pretrained(build("vit").to(dtype), tmp_path, **way).get_base_model()
        deltas = [value for name, value in loaded.named_parameters() if "inlay_partial_delta" in name]
        assert deltas and all(value.dtype == torch.float32 for value in deltas)
        for name, values in trained.items():
            found = loaded.get_submodule(name.removeprefix("base_model.model.")).merged_values(["default"])
            assert all(values[leaf].dtype == dtype and torch.equal(values[leaf], found[leaf]) for leaf in values)
    merged = PeftModel.from_pretrained(build("vit").to(dtype), tmp_path, low_cpu_mem_usage=True).merge_and_unload()
    for name, values in trained.items():
        for leaf, value in values.items():
            stored = merged.get_submodule(name.removeprefix("base_model.model."))._parameters[leaf]
            assert torch.equal(stored, value)


def test_partial_tuning_leaves_the_statistics_of_the_base_alone():
    torch.manual_seed(0)
    base = MobileNetV2ForImageClassification(MobileNetV2Config(image_size=32, depth_multiplier=0.35)).train()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, PartialConfig(train="norm"))
    for _ in range(2):  # in the mode in which it came, then in that of a training loop
        model(pixel_values=torch.randn(4, 3, 32, 32)).logits.sum().backward()
        model.train()
    assert all(torch.equal(value, before[key]) for key, value in model.unload().state_dict().items())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"train": "norm"}, {"layernorm", "layernorm_before", "layernorm_after"}),
        ({"train": "norm", "target_modules": ["layers.1"]}, {"layernorm_before", "layernorm_after"}),
        ({"train": "norm", "target_modules": r".*layers\.1.*"}, {"layernorm_before", "layernorm_after"}),
        ({"last": 1, "train": "bias"}, None),
        ({"target_modules": ["layers.1"]}, None),
        ({"target_modules": r".*layers\.1\.mlp"}, {"fc1", "fc2"}),
        ({"target_modules": ["mlp"], "layers_to_transform": [0, 2]}, {"fc1", "fc2"}),
    ],
)
def test_what_partial_trains(config, expected):
    model = get_peft_model(build("vit"), PartialConfig(**config))
    names = [n for n, m in model.named_modules() if isinstance(m, AdapterLayer)]
    assert expected is None or {n.rpartition(".")[2] for n in names} == expected
    if config.get("train") == "bias":
        assert all(n.endswith("bias") for n, p in model.named_parameters() if p.requires_grad)
    if "layers_to_transform" in config:
        assert not any("layers.1." in n for n in names) and any("layers.2." in n for n in names)
    if "target_modules" in config and "layers_to_transform" not in config:
        assert all("layers.1." in n for n in names)


@pytest.mark.parametrize("settings", [{}, {"last": 1}, {"train": "bias"}, {"train": "norm"}])
@pytest.mark.parametrize("name", OTHERS)
def test_a_gradient_reaches_all_that_partial_trains(name, settings):
    model = get_peft_model(build_other(name), PartialConfig(**settings)).train()
    inputs = batch("gpt2" if name in ("BertModel", "BertForSequenceClassification", "GPT2LMHeadModel") else "vit")
    getattr(model(**inputs), OTHERS[name]).square().sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and [n for n, p in trained.items() if p.grad is None] == []
    if name == "BertForSequenceClassification" and settings == {}:  # its head reads the pooler
        assert any("pooler" in n for n in trained)
    if name == "CLIPVisionModelWithProjection":
        assert settings == {"train": "bias"} or any("post_layernorm" in n for n in trained)


def test_partial_leaves_a_tied_embedding_alone():
    model = get_peft_model(build("gpt2"), PartialConfig())
    assert not any("wte" in n or "lm_head" in n for n, p in model.named_parameters() if p.requires_grad)
    assert any("wpe" in n for n, p in model.named_parameters() if p.requires_grad)


def test_the_order_of_parts_does_not_matter():
    def parts():
        names = ["vit.layers.0.mlp.fc2", "vit.layers.1.mlp.fc2"]
        return [
            LoraConfig(target_modules=names),
            BottleneckConfig(width=4),
            PartialConfig(last=2),
            VisualPromptConfig(),
        ]

    outputs = []
    for order in (parts(), parts()[::-1]):
        model = get_peft_model(build("vit"), CompositeConfig(parts=order)).eval()
        for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            if parameter.requires_grad:
                torch.manual_seed(len(name))
                nn.init.normal_(parameter, std=0.1)
        outputs.append((sorted(n for n, p in model.named_parameters() if p.requires_grad), compute(model, "vit")))
    assert outputs[0][0] == outputs[1][0] and torch.equal(outputs[0][1], outputs[1][1])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: BottleneckConfig(width=0), "width must be"),
        (lambda: BottleneckConfig(sites=["head"]), "sites must be"),
        (lambda: BottleneckConfig(placement="beside"), "placement must be"),
        (lambda: BottleneckConfig(init="lora"), "init must be zero or houlsby"),
        (lambda: BottleneckConfig(learn_scale=True, channel_scale=True), "give one of them"),
        (lambda: get_peft_model(_mobilenet(), BottleneckConfig(placement="post")), "needs blocks of tokens"),
        (lambda: BottleneckConfig(activation="nothing"), "activation must be"),
        (lambda: BottleneckConfig(target_modules="a.*", layers_to_transform=[0]), "regular expression"),
        (lambda: ConvPassConfig(width=0), "width must be"),
        (lambda: ConvPassConfig(sites=["head"]), "sites must be"),
        (lambda: ConvPassConfig(activation=None), "activation must be"),
        (lambda: ConvPassConfig(dropout=1), "dropout must be"),
        (lambda: attach(ConvPassConfig(), "gpt2"), "encoders of images.*needs a grid of patches"),
        (lambda: attach(ConvPassConfig(target_modules=["layernorm"])), "next to attention or an MLP"),
        (lambda: ConvAdapterConfig(width=0), "width must be"),
        (lambda: ConvAdapterConfig(reduction=0), "reduction must be"),
        (lambda: ConvAdapterConfig(width=6, groups=4), "groups must divide"),
        (lambda: ConvAdapterConfig(placement="serial"), "placement must be"),
        (lambda: ConvAdapterConfig(activation="nothing"), "activation must be"),
        (lambda: attach(ConvAdapterConfig()), "ViTForImageClassification has no convolution of more than 1x1"),
        (lambda: attach(ConvAdapterConfig(target_modules=["fc1"])), "adapts convolutions, and .*fc1 is a Linear"),
        (lambda: attach(SsfConfig(target_modules=["mlp"])), "linear layer, a convolution or a norm"),
        (lambda: AttentionPrefixConfig(length=0), "length must be"),
        (lambda: VisualPromptConfig(dropout=1), "dropout must be"),
        (lambda: PartialConfig(train="some"), "train must be"),
        (lambda: PartialConfig(last=2, layers_to_transform=[1]), "not both"),
        (lambda: CompositeConfig(parts=[PartialConfig()]), "two parts or more"),
        (lambda: attach(PartialConfig(last=9)), "last must be"),
        (lambda: attach(PartialConfig(train="bias"), "llama"), "LlamaForCausalLM has no biases to train"),
        (lambda: attach(PartialConfig(train="norm", target_modules=["mlp"])), "no parameter to train"),
        (lambda: attach(BottleneckConfig(layers_to_transform=[7])), "within 0 to 2"),
        (lambda: attach(VisualPromptConfig(), "bert"), "encoders of images"),
        (lambda: attach(VisualPromptConfig(deep=False), "sam"), "deep=True"),
        (lambda: attach(VisualPromptConfig(deep=False, layers_to_transform=[0, 2])), "follow one another"),
        (lambda: attach(VisualPromptConfig(deep=False, target_modules=["layers.0", "layers.2"])), "follow one another"),
        (lambda: attach(AttentionPrefixConfig(target_modules=["mlp"])), "attention function"),
        (lambda: attach(BottleneckConfig(target_modules=["fc1"], placement="parallel")), "32 and 64 in vit.layers.0"),
        (lambda: attach(BottleneckConfig(target_modules=["c_fc"], placement="parallel"), "gpt2"), "32 and 128 in"),
        (lambda: attach(BottleneckConfig(target_modules=["layernorm"])), "linear layer"),
    ],
)
def test_a_wrong_setting_is_one_sentence(make, sentence):
    with pytest.raises(InlayError, match=sentence):
        make()


def test_adapters_of_one_config_on_some_blocks_only():
    model = adapted("bottleneck", "vit")
    assert sum(isinstance(m, AdapterLayer) for m in model.modules()) == 6
    model = get_peft_model(build("vit"), BottleneckConfig(layers_to_transform=[2], sites=["mlp"]))
    assert [n for n, m in model.named_modules() if isinstance(m, AdapterLayer)] == [
        "base_model.model.vit.layers.2.mlp.fc2"
    ]

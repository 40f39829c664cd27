"""The peak of a training step: by hand, and against what the step takes."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from inlay import SpatialAdapterConfig, load_base
from inlay.errors import InlayError
from inlay.measure import footprint
from inlay.measure.memory import MemoryPlan, measure_peak, plan_memory
from inlay.methods import METHODS
from inlay.tasks.text.loss import NextToken

N = 1000
VOCABULARY = 4000


class Chain(nn.Module):
    """exp(exp(... (x * w))): each exp keeps its result for the backward."""

    def __init__(self, links: int) -> None:
        super().__init__()
        self.links, self.w = links, nn.Parameter(torch.zeros(N))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        y = x * self.w
        for _ in range(self.links):
            y = y.exp()
        return SimpleNamespace(loss=y.sum())


class Choosy(nn.Linear):
    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        y = super().forward(x)
        return SimpleNamespace(loss=y.sum() if y.sum() > 0 else -y.sum())


class Embedded(nn.Module):
    """Its dropout draws, its norm counts, and it keeps a tensor in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout())
        self.kept = {"scale": torch.full((8,), 2.0)}
        self.layer[1].eval()

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.layer(x) * self.kept["scale"]).sum())


def gpt2(method="lora", blocks=2, width=32):
    config = GPT2Config(n_embd=width, n_layer=blocks, n_head=2, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
    return METHODS[method].adapt(GPT2LMHeadModel(config).requires_grad_(False), 4)


def text(rows=8, length=32, prompt=0, padding=0):
    tokens = torch.randint(3, VOCABULARY, (rows, length))
    mask, labels = torch.ones_like(tokens), tokens.clone()
    mask[1:, length - padding :], labels[1:, length - padding :], labels[:, :prompt] = 0, -100, -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def on_meta(batch):
    return {name: value.to("meta") for name, value in batch.items()}


@pytest.mark.parametrize("links", [1, 2, 7])
def test_by_hand(links: int):
    plan = plan_memory(Chain(links), {"x": torch.zeros(N)})
    assert (plan.base, plan.adapter, plan.gradients, plan.optimizer) == (12, 4 * N, 4 * N, 8 * N + 4)
    # At the last exp's backward: x, every exp's result, and the gradient of the last. Scalars are the rest.
    alive = 4 * N + links * 4 * N + 4 * N
    assert 0 <= plan.peak - (12 + 4 * N + 8 * N + 4 + alive) < 64
    assert plan.peak == plan.base + plan.adapter + plan.gradients + plan.optimizer + plan.activations


def test_the_update_is_the_peak_where_activations_are_small():
    pytest.importorskip("bitsandbytes")
    model, batch = Chain(0), {"x": torch.zeros(1, N)}
    model.w = nn.Parameter(torch.zeros(8 * N))
    batch["x"] = torch.zeros(1, 8 * N)
    plan = plan_memory(model, batch, optimizer="adamw8bit")
    assert plan.optimizer == 2 * 8 * N + 2 * 4 * -(-8 * N // 256)  # a byte each, a scale for each 256
    assert plan.peak == pytest.approx(measure_peak(model, batch, optimizer="adamw8bit"), rel=0.03)
    assert plan_memory(Chain(0), {"x": torch.zeros(1, N)}, optimizer="adamw8bit").optimizer == 8 * N  # too few: 32 bits


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {}),
        ("lora", {"accumulate": 3}),
        ("lora", {"gradient_checkpointing": True}),
        ("lora", {"precision": "bf16"}),
        ("lora", {"loss": NextToken(0.1)}),
        ("full", {}),
        ("full", {"optimizer": "adamw8bit", "accumulate": 8}),
        ("full", {"ema": True}),
        ("bottleneck", {"loss": NextToken(), "precision": "bf16"}),
        ("prefix", {}),
        ("prompt", {"loss": NextToken()}),
        ("attention-prefix", {"gradient_checkpointing": True, "accumulate": 2}),
        ("partial", {}),
    ],
)
def test_against_the_step_of_gpt2(method: str, settings: dict):
    if "optimizer" in settings:
        pytest.importorskip("bitsandbytes")
    model = gpt2(method)
    batch = text(prompt=8, padding=6)
    assert plan_memory(model, batch, **settings).peak == pytest.approx(measure_peak(model, batch, **settings), rel=0.02)


@pytest.mark.parametrize("padding", [0, 9])
def test_against_the_step_of_llama(padding: int):
    """Its keys are repeated where a mask masks something."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2, vocab_size=50)).requires_grad_(False)
    model, batch = METHODS["lora"].adapt(model, 4), text(padding=padding)
    batch = {name: value.clamp(max=49) for name, value in batch.items()}
    assert plan_memory(model, batch).peak == pytest.approx(measure_peak(model, batch), rel=0.02)


@pytest.mark.parametrize("method", ["lora", "visual-prompt", "full"])
def test_against_the_step_of_the_embedded_vit(method: str):
    model = METHODS[method].adapt(load_base("builtin:vit-tiny", labels=["a", "b"]), 8)
    config = model.config
    batch = {
        "pixel_values": torch.zeros(4, config.num_channels, config.image_size, config.image_size),
        "labels": torch.tensor([0, 1, 0, 1]),
    }
    plan = plan_memory(model, batch)
    assert plan.peak == pytest.approx(measure_peak(model, batch), rel=0.02)
    assert plan.base + plan.adapter == footprint(model).bytes_total


def test_against_the_step_of_a_mobilenet():
    model = MobileNetV2ForImageClassification(MobileNetV2Config(image_size=64, depth_multiplier=0.35, num_labels=3))
    model = METHODS["lora"].adapt(model.requires_grad_(False), 2)
    batch = {"pixel_values": torch.zeros(2, 3, 64, 64), "labels": torch.tensor([0, 2])}
    assert plan_memory(model, batch).peak == pytest.approx(measure_peak(model, batch), rel=0.05)


def test_against_the_step_of_a_volume_whose_clicks_are_drawn_on_the_way():
    """Most of the memory is the decoder's, which works on voxels: that is recomputed too, one convolution at a time."""
    torch.manual_seed(0)
    sam = load_base("builtin:sam-tiny")
    config = SpatialAdapterConfig.fitted(sam, ["a"], (16, 16, 16), token=4, width=8)
    model = get_peft_model(sam, config).train()
    labels = torch.randint(2, (2, 16, 16, 16))
    batch = {"pixel_values": torch.randn(2, 1, 16, 16, 16), "labels": labels}
    planned = {on: plan_memory(model, batch, gradient_checkpointing=on) for on in (False, True)}
    for on, plan in planned.items():
        assert plan.peak == pytest.approx(measure_peak(model, batch, gradient_checkpointing=on), rel=0.05)
    assert planned[True].activations < 0.4 * planned[False].activations


def test_from_the_meta_device():
    real = gpt2()
    with torch.device("meta"):
        skeleton = gpt2()
    batch = text(padding=4)
    expected = plan_memory(real, batch)
    assert plan_memory(skeleton, batch) == expected
    assert plan_memory(skeleton, on_meta(batch)) == expected
    with pytest.raises(InlayError, match="looks at values"):
        plan_memory(skeleton, on_meta(batch), loss=NextToken())


def quantised(bits: int, device: str):
    """A GPT-2 whose projections are of bitsandbytes; on meta they are not quantised yet."""
    with torch.device("meta"):
        config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=500, bos_token_id=1, eos_token_id=2)
        model = GPT2LMHeadModel(config)
        how = BitsAndBytesConfig(
            load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        replace_with_bnb_linear(model, modules_to_not_convert=["lm_head"], quantization_config=how)
    if device != "meta":
        weights = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
        kinds = pytest.importorskip("bitsandbytes").nn
        for name, module in list(model.named_modules()):
            if isinstance(module, (kinds.Linear4bit, kinds.Linear8bitLt)):
                own = {"has_fp16_weights": False} if bits == 8 else {"quant_type": "nf4"}
                kind = kinds.Int8Params if bits == 8 else kinds.Params4bit
                module.weight = kind(weights[f"{name}.weight"], requires_grad=False, **own).to(device)
                module.bias = nn.Parameter(weights[f"{name}.bias"])
            else:
                for key, value in module.named_parameters(recurse=False):
                    setattr(module, key, nn.Parameter(torch.randn(value.shape)))
        model.lm_head.weight = model.transformer.wte.weight
    targets = ["c_attn", "mlp.c_proj"]
    return get_peft_model(model.requires_grad_(False), LoraConfig(r=4, target_modules=targets))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised(bits: int):
    pytest.importorskip("bitsandbytes")
    model, batch = quantised(bits, "cpu"), text(rows=2, length=16)
    batch = {name: value.clamp(max=499) for name, value in batch.items()}
    plan = plan_memory(model, batch)
    assert plan.base == footprint(model).bytes_total - plan.adapter
    assert plan.peak == pytest.approx(measure_peak(model, batch), rel=0.03)
    skeleton = plan_memory(quantised(bits, "meta"), batch)
    assert (skeleton.base, skeleton.peak) == (plan.base, plan.peak)


def test_cheaper_settings_are_cheaper():
    model, batch = gpt2(), text(length=64)
    plain, pieces = plan_memory(model, batch), plan_memory(model, batch, accumulate=4)
    assert pieces.peak < 0.4 * plain.peak
    assert (pieces.batch, plain.batch) == (2, 8)
    assert plan_memory(model, batch, gradient_checkpointing=True).peak < plain.peak
    # Half of the tokens have no label: their logits (B T V) are not computed, and those are most of it.
    whole, half = (plan_memory(model, text(length=64, prompt=n), loss=NextToken()).peak for n in (0, 32))
    assert half < 0.65 * whole


def test_the_model_is_not_touched():
    model = Embedded()
    model.layer[2].train()
    batch = {"x": torch.randn(4, 8)}
    before, draws = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    plan_memory(model, batch, precision="bf16")
    assert torch.equal(torch.get_rng_state(), draws)
    measure_peak(model, batch, precision="bf16")
    assert [module.training for module in model.modules()] == modes
    assert "forward" not in vars(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_checkpointing_is_off_again():
    model, batch = gpt2(), text()
    expected = plan_memory(model, batch)
    measure_peak(model, batch, gradient_checkpointing=True)
    assert plan_memory(model, batch) == expected
    assert not any(module._forward_hooks for module in model.modules())


def test_as_a_line():
    plan = MemoryPlan(
        base=1_800_000, adapter=225_000, gradients=225_000, optimizer=450_000, activations=41_300_000, peak=44_000_000,
        available=23_000_000_000, device="cpu", batch=32,
    )  # fmt: skip
    assert str(plan) == (
        "memory: base 1.8 MB + adapter 225 kB + gradients 225 kB + AdamW 450 kB + activations 41.3 MB (batch 32) "
        "= 44 MB of 23 GB: fits"
    )
    small = MemoryPlan(**{**vars(plan), "available": 1_000_000, "optimizer_name": "adamw8bit"})
    assert not small.fits
    assert str(small).endswith("= 44 MB of 1 MB: does not fit")
    assert "8-bit AdamW 450 kB" in str(small)
    unknown = MemoryPlan(**{**vars(plan), "available": None, "device": "mps"})
    assert unknown.fits is None
    assert str(unknown).endswith("= 44 MB on mps")


def test_errors(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch"), "propagate", True)  # to caplog
    x = {"x": torch.ones(2, N)}
    with pytest.raises(InlayError, match="no parameter requires a gradient"):
        plan_memory(Chain(1).requires_grad_(False), x)
    with pytest.raises(InlayError, match="fp16 training needs a GPU"):
        plan_memory(Chain(1), x, precision="fp16")
    with pytest.raises(InlayError, match="has no gradient checkpointing"):
        plan_memory(Chain(1), x, gradient_checkpointing=True)
    with pytest.raises(InlayError, match=r"Choosy on x \(2, 1000\) .* looks at values"):
        plan_memory(Choosy(N, 1), x)
    with pytest.raises(InlayError, match=r"returns no loss for .*; add labels"):
        plan_memory(gpt2(), {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    with pytest.raises(InlayError, match="Check the shapes"):
        plan_memory(Chain(1), {"x": torch.ones(2, 3)})
    assert not caplog.records, "torch logs a trace of its own"
    if not torch.cuda.is_available():
        with pytest.raises(InlayError, match="this machine has no device"):
            plan_memory(Chain(1), x, device="cuda")

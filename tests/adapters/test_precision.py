"""Answers in bfloat16: the weights that torch's own conversion makes, checked, and put back where they do not fit."""

import copy

import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from inlay import (
    BadInput,
    ComputationFailed,
    evaluate,
    load_adapter,
    load_base,
    load_processor,
    predict_masks,
    set_precision,
)
from inlay.adapters import golden, precision
from inlay.cli import models
from inlay.tasks import TASKS
from inlay.tasks.adapter import TaskModel
from places import ROOT

DIGITS = ROOT / "adapters_hub" / "digits-lora-vit-tiny"
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def adapter():
    return load_adapter(DIGITS, device="cpu")


@pytest.fixture
def pays(monkeypatch):
    monkeypatch.setattr(precision, "choose_dtype", lambda device: ("bfloat16", "this CPU is fast in it"))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())


def test_auto_computes_as_the_model_in_bfloat16_of_torch(adapter, pays):
    expected = copy.deepcopy(adapter.model).to(torch.bfloat16)(pixel_values=PIXELS.bfloat16()).logits
    whole = adapter.model(pixel_values=PIXELS).logits
    found = set_precision(adapter, "auto")
    logits = adapter.model(pixel_values=PIXELS.bfloat16()).logits
    assert str(found) == "computes in bfloat16: this CPU is fast in it"
    assert torch.equal(logits, expected)
    assert (logits.float() - whole).abs().max() < 0.05 * whole.abs().max()


def test_auto_stays_in_float32_where_bfloat16_does_not_pay(adapter, monkeypatch):
    monkeypatch.setattr(precision, "choose_dtype", lambda device: ("float32", "it is slow here"))
    before = state(adapter.model)
    assert set_precision(adapter, "auto").name == "float32" and same(adapter.model, before)


def test_auto_stays_in_float32_where_the_golden_output_differs(adapter, pays, monkeypatch):
    before = state(adapter.model)
    monkeypatch.setitem(golden.TOLERANCE, "bfloat16", 1e-6)
    found = set_precision(adapter, "auto")
    assert found.name == "float32" and "its golden output differs by" in found.why and "in bfloat16" in found.why
    assert same(adapter.model, before)


def test_auto_stays_in_float32_where_an_operation_is_missing(adapter, pays, monkeypatch):
    def fail(*_):
        raise RuntimeError('"some_kernel" not implemented for BFloat16')

    before = state(adapter.model)
    monkeypatch.setattr(golden, "compute_output", fail)
    found = set_precision(adapter, "auto")
    assert found.name == "float32" and "some_kernel" in found.why and same(adapter.model, before)


def test_what_is_asked_for_and_does_not_fit_is_an_error(adapter, monkeypatch):
    before = state(adapter.model)
    monkeypatch.setitem(golden.TOLERANCE, "float16", 1e-9)
    with pytest.raises(ComputationFailed, match=r"'digits-lora-vit-tiny' cannot compute in float16: .* Use float32"):
        set_precision(adapter, "float16")
    assert same(adapter.model, before)


def test_a_base_in_few_bits_stays_as_it_is(adapter, pays, monkeypatch):
    monkeypatch.setattr(precision, "find_precision", lambda model: "int8")
    before = state(adapter.model)
    assert set_precision(adapter, "auto").name == "int8" and same(adapter.model, before)


def test_networks_of_convolutions_are_channels_last(monkeypatch):
    monkeypatch.setattr(precision, "choose_dtype", lambda device: ("float32", "it is slow here"))
    name = "builtin:mobilenet-tiny"
    model, task = load_base(name, device="cpu"), TASKS["image-classification"]
    net = TaskModel(name, model, task, load_processor(name), [])
    expected = model(pixel_values=PIXELS).logits
    kernel = next(p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1)
    set_precision(net, "float32")
    assert kernel.is_contiguous() and torch.equal(model(pixel_values=PIXELS).logits, expected)
    set_precision(net, "auto")
    assert kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
    torch.testing.assert_close(model(pixel_values=PIXELS).logits, expected)


def test_a_classifier_of_convolutions_is_laid_out_channels_last_if_its_golden_output_stays(adapter, monkeypatch):
    name = "builtin:mobilenet-tiny"
    model, task = load_base(name, device="cpu"), TASKS["image-classification"]
    net = TaskModel(name, model, task, load_processor(name), [])
    expected = model(pixel_values=PIXELS).logits
    kernel = next(p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1)
    with monkeypatch.context() as patched:
        patched.setattr(golden, "measure_deviation", lambda expected, found: 1.0)
        precision.lay_out_channels_last(net)
    assert kernel.is_contiguous()
    assert models._set_precision(net, None) is net
    assert kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
    torch.testing.assert_close(model(pixel_values=PIXELS).logits, expected)
    before = state(adapter.model)
    precision.lay_out_channels_last(adapter)  # a ViT has one convolution
    assert same(adapter.model, before)


def test_frequencies_of_rotary_positions_stay_float32():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    before, frequencies = state(model), model.model.rotary_emb.inv_freq.clone()
    undo = precision._convert(model, torch.bfloat16, channels_last=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    undo()
    assert same(model, before)


def test_clicks_stay_float32():
    """bfloat16 has no odd number over 256, and SAM's images have 1024 pixels."""
    model = load_base("builtin:sam-tiny", device="cpu").bfloat16()
    net = TaskModel("sam", model, TASKS["mask-generation"], load_processor("builtin:sam-tiny"), [])
    seen = []
    model.prompt_encoder.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    found = predict_masks(net, Image.new("RGB", (64, 48), "grey"), points=[(33, 21)])
    assert found.masks.shape == (1, 48, 64) and seen[0]["input_points"].dtype == torch.float32


def test_scores_say_in_what_they_were_computed(adapter):
    set_precision(adapter, "bfloat16")
    found = evaluate(adapter, "builtin:digits", limit=8, compare=False, resamples=10)
    assert any(note.startswith("Computed in bfloat16") for note in found.notes)


def test_an_exported_model_computes_as_it_was_exported(monkeypatch):
    monkeypatch.setattr("inlay.compress.exported.is_exported", lambda name: True)
    with pytest.raises(BadInput, match="leave --dtype out"):
        models.load_adapter_or_model("folder", None, None, "auto")

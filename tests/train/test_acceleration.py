"""Compiled blocks, channels last and TF32: in force while a run trains, with the same results, and gone afterwards."""

from types import SimpleNamespace

import pytest
import torch
from points import Interrupted, log_of, same, train
from test_fit import Pictures, lora_vit
from torch import nn
from train_job import CLASSES, Net
from transformers.modeling_outputs import ImageClassifierOutput

from inlay.errors import InlayError
from inlay.train.acceleration import accelerated
from inlay.train.config import TrainConfig
from inlay.train.launch import build_optimizer


@pytest.fixture
def compiled(monkeypatch):
    """The modules that were compiled; a backend that runs the graph as it is needs no C++ compiler and no time."""
    modules = []

    def compile_eagerly(module):
        modules.append(module)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    yield modules
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo reads it
def test_compiled_blocks_train_resume_and_evaluate_as_plain_ones(tmp_path, compiled):
    settings = {"data": Pictures(20, 1), "validation": Pictures(8, 2), "epochs": 2, "save_every": 2}
    plain, first, second = lora_vit(), lora_vit(), lora_vit()
    first.base_model.model.register_forward_hook(_stop_at_call(5))
    expected = train(tmp_path / "plain", plain, **settings)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", first, compile=True, **settings)
    result = train(tmp_path / "run", second, compile=True, **settings)
    assert result.resumed
    blocks = [*first.base_model.model.vit.layers, *second.base_model.model.vit.layers]
    assert compiled == blocks
    assert all(block._compiled_call_impl is None for block in blocks), "the model is left compiled"
    same(plain, second, atol=1e-6)
    assert result.metrics == pytest.approx(expected.metrics, abs=1e-6)
    assert not any("_orig_mod" in name for name in second.state_dict())


def _stop_at_call(count):
    calls = []

    def hook(module, args, output):
        calls.append(1)
        if len(calls) == count:
            raise Interrupted

    return hook


class Convolutions(nn.Module):
    """A small convolutional classifier that notes how its weights and activations are ordered."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, CLASSES)
        self.last = []

    def forward(self, pixel_values, labels=None):
        states = self.second(self.first(pixel_values).relu())
        last = [self.second.weight, states]
        self.last.append([value.is_contiguous(memory_format=torch.channels_last) for value in last])
        logits = self.head(states.mean((2, 3)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


class Overflowing(Pictures):
    """One image whose convolution is Inf."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "pixel_values": item["pixel_values"] * (3e37 if index == 5 else 1)}


def test_a_model_without_known_blocks_is_compiled_whole_and_its_broken_step_is_explained(tmp_path, compiled):
    net, plain, broken = Convolutions(), Convolutions(), Convolutions()
    train(tmp_path / "compiled", net, data=Pictures(20, 1), epochs=1, validation=None, compile=True)
    train(tmp_path / "plain", plain, data=Pictures(20, 1), epochs=1, validation=None)
    assert compiled == [net]
    same(net, plain, atol=1e-6)
    with torch.no_grad():
        broken.first.weight *= 100
    with pytest.raises(InlayError, match=r"broke at step .*output of 'first'"):
        train(tmp_path / "broken", broken, data=Overflowing(20, 1), validation=None, compile=True)


def test_channels_last_orders_weights_and_activations_while_training(tmp_path):
    nets = [Convolutions(), Convolutions()]
    for net, on in zip(nets, (False, True), strict=True):
        train(tmp_path / str(on), net, data=Pictures(20, 1), validation=Pictures(8, 2), channels_last=on)
    assert not any(map(any, nets[0].last)) and all(map(all, nets[1].last))
    same(*nets, atol=1e-6)
    assert all(p.is_contiguous() for p in nets[1].parameters())


def test_tf32_is_on_for_a_gpu_only_and_said(monkeypatch):
    said = []

    def inside(device, **settings):
        accelerator = SimpleNamespace(device=torch.device(device), print=said.append)
        with accelerated(Net(), TrainConfig(**settings), accelerator):
            return torch.get_float32_matmul_precision()

    assert (inside("cpu"), inside("cuda", tf32=False), said) == ("highest", "highest", [])
    assert inside("cuda") == "high" and "TF32" in said[0] and "--tf32 false" in said[0]
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_precision_that_torch_refuses_to_tell_is_left_as_it_is(monkeypatch):
    def refuse():
        raise RuntimeError("set by torch.backends.fp32_precision, as transformers does")

    said, accelerator = [], SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", said.append)
    with accelerated(Net(), TrainConfig(), accelerator):
        pass
    assert said == []


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw8bit"])
def test_paged_optimisers_need_a_gpu(name, monkeypatch):
    weights = [nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(InlayError, match=f"{name} pages the memory of a CUDA GPU"):
        build_optimizer(weights, TrainConfig(optimizer=name))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    optimizer = build_optimizer(weights, TrainConfig(optimizer=name, weight_decay=0.1))
    assert optimizer.is_paged and optimizer.args.optim_bits == (8 if "8bit" in name else 32)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1]


def test_batches_prepared_ahead_change_nothing(tmp_path):
    nets = [Net(0.3), Net(0.3)]
    train(tmp_path / "two", nets[0], epochs=1, workers=1)
    train(tmp_path / "five", nets[1], epochs=1, workers=1, prefetch=5)
    same(*nets)
    assert log_of(tmp_path / "two") == log_of(tmp_path / "five")

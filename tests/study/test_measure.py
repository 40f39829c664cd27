"""What `inlay measure` counts and measures, and how it says it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, MobileNetV2Config, PreTrainedConfig, SamConfig, ViTConfig

from inlay import SqueezeNetConfig, load_base, load_processor, measure_costs, save_adapter
from inlay.cli import app as cli
from inlay.errors import InlayError
from inlay.measure import count_macs_by_module
from inlay.study.measure import Measurement
from places import ROOT


def adds_up(found: Measurement) -> bool:
    cost = found.states["unmerged" if "unmerged" in found.states else "model"]
    parts = found.modules
    return (sum(part.macs or 0 for part in parts), sum(part.parameters for part in parts)) == (
        cost.macs,
        cost.parameters,
    )


@pytest.mark.parametrize(
    ("config", "options", "gmacs"),
    [
        (ViTConfig(num_labels=1000), {}, 17.6),  # Dosovitskiy et al. 2020
        (MobileNetV2Config(num_labels=1001), {}, 0.300),  # Sandler et al. 2018
        (GPT2Config(), {"length": 1024}, 145.8),
        (SqueezeNetConfig.from_version("1.1", num_labels=1000), {}, 0.349),
        (SamConfig(), {"depth": 1}, 486.0),  # of the encoder
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_counts_from_a_config_only(config: PreTrainedConfig, options: dict, gmacs: float, tmp_path: Path):
    config.save_pretrained(tmp_path)
    found = measure_costs(tmp_path, weights=False, **options)
    macs = found.states["model"].macs
    if config.model_type == "sam":
        macs = next(part.macs for part in found.modules if part.name == "vision_encoder")
    assert macs / 1e9 == pytest.approx(gmacs, rel=0.01)
    assert adds_up(found) and found.device == "meta" and found.states["model"].latency_ms is None


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_parts_add_up(depth: int):
    found = measure_costs("builtin:vit-tiny", weights=False, depth=depth)
    assert adds_up(found) and max(part.name.count(".") for part in found.modules) == depth - 1
    assert found.states["model"].flops == 2 * found.states["model"].macs


class Doubling(nn.Module):
    """Calls a module that is held twice, and computes a product of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 3)))
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x)) @ x.T


def test_parts_by_hand():
    inside = {"first": 0, "first.0": 2 * (2 * 3 * 4), "first.1": 0, "first.1.0": 2 * (2 * 4 * 3)}
    assert count_macs_by_module(Doubling(), {"x": torch.empty(2, 3)}) == {"": 2 * 3 * 2, **inside}


def test_a_model():
    found = measure_costs("builtin:squeezenet-tiny", batch_size=2, device="cpu")
    cost = found.states["model"]
    one = measure_costs("builtin:squeezenet-tiny", weights=False)
    assert cost.macs == 2 * one.states["model"].macs and cost.parameters == one.states["model"].parameters == 234_853
    assert cost.latency_ms > 0 and cost.examples_per_s == pytest.approx(2000 / cost.latency_ms)
    assert cost.peak_bytes > cost.weights_bytes > 4 * cost.parameters - 1
    assert found.inputs == {"pixel_values": [2, 3, 32, 32]} and found.energy_source


def test_images_of_another_size():
    small, large = (measure_costs("builtin:squeezenet-tiny", weights=False, size=size) for size in (32, 64))
    assert large.states["model"].macs > 3.9 * small.states["model"].macs
    with pytest.raises(InlayError, match="doesn't match model"):
        measure_costs("builtin:vit-tiny", size=64, device="cpu")
    with pytest.raises(InlayError, match="doesn't match model"):
        measure_costs("builtin:vit-tiny", size=64, weights=False)
    with pytest.raises(InlayError, match="takes no images of a side"):
        measure_costs("builtin:gpt2-tiny", weights=False, size=64)


@pytest.fixture(scope="module")
def lora_on_squeezenet(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    base = load_base("builtin:squeezenet-tiny", labels=["a", "b"])
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["squeeze"], modules_to_save=["classifier"]))
    folder = tmp_path_factory.mktemp("measured") / "adapter"
    save_adapter(model, folder, processor=load_processor("builtin:squeezenet-tiny"))
    return folder


def test_an_adapter_next_to_its_base_and_merged(lora_on_squeezenet: Path):
    found = measure_costs(lora_on_squeezenet, device="cpu")
    base, unmerged, merged = (found.states[state] for state in ("base", "unmerged", "merged"))
    squeezed = [(32, 16, 16), (64, 16, 16), (96, 32, 8), (160, 32, 8), (192, 48, 4), (256, 48, 4)]
    assert unmerged.macs - base.macs == sum(2 * (before + after) * side**2 for before, after, side in squeezed)
    assert merged.macs == base.macs and merged.parameters == base.parameters
    head = 2 * 256 + 2
    assert unmerged.parameters - base.parameters == sum(2 * (a + b) for a, b, _ in squeezed) + head
    assert adds_up(found) and not found.remarks
    assert found.modules[0].name == "squeezenet.stem.convolution"


def test_an_adapter_whose_base_takes_no_volumes():
    volume = measure_costs(ROOT / "adapters_hub" / "lesions-spatial-sam-tiny", device="cpu")
    assert list(volume.states) == ["unmerged"] and adds_up(volume)
    assert volume.remarks[0].startswith("the base cannot compute") and "does not fold" in volume.remarks[1]


def test_the_verb(lora_on_squeezenet: Path, monkeypatch, capsys):
    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["inlay", "measure", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            assert end.code in (0, 2)
        return "".join(capsys.readouterr())

    said = run("builtin:squeezenet-tiny", "--no-weights", "--depth", "2")
    assert "squeezenet.blocks" in said and "234,853" in said and "counted from the config" in said
    told = run(str(lora_on_squeezenet), "--device", "cpu")
    assert all(word in told for word in ("base", "unmerged", "merged", "latency, ms", "peak memory", "energy: "))
    found = json.loads(run("builtin:vit-tiny", "--no-weights", "--json"))
    assert found["states"]["model"]["flops"] == 2 * sum(part["macs"] for part in found["modules"])
    assert "depth must be at least 1" in run("builtin:vit-tiny", "--depth", "0")
    assert "measure its base without" in run(str(lora_on_squeezenet), "--no-weights")
    assert "--base belongs to an adapter" in run("builtin:vit-tiny", "--base", "builtin:vit-tiny")

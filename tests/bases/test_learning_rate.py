"""The learning rate that suits a base falls with its width."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, GPT2Config, GPT2LMHeadModel, ViTConfig

from inlay import METHODS, TrainConfig, fit, load_base
from inlay.bases.learning_rate import measure_width, scale_rate


def build(config):
    with torch.device("meta"):
        return AutoModelForImageClassification.from_config(config)


@pytest.mark.parametrize(
    ("name", "width"),
    [("vit-tiny", 96), ("gpt2-tiny", 128), ("sam-tiny", 128), ("squeezenet-tiny", 48), ("mobilenet-tiny", 48)],
)
def test_the_embedded_bases_take_the_rates_of_methods(name, width):
    model = load_base(f"builtin:{name}")
    assert measure_width(model)[0] == width
    assert scale_rate(3e-3, model) == 3e-3


def test_wider_bases_take_less():
    base = build(ViTConfig())
    assert measure_width(base) == (768, True)
    assert scale_rate(3e-3, base) == pytest.approx(3e-3 * (128 / 768) ** 0.78)  # 7.4e-4
    with torch.device("meta"):
        language_model = GPT2LMHeadModel(GPT2Config())  # q, k and v are one projection
    assert measure_width(language_model) == (768, True)
    # The 53 layers of MobileNetV2 (Sandler et al. 2018, table 2): half of them give 192 channels or more.
    mobilenet = build(AutoConfig.for_model("mobilenet_v2"))
    assert measure_width(mobilenet) == (192, False)
    assert scale_rate(3e-3, mobilenet) == pytest.approx(3e-3 / 4)


@pytest.mark.parametrize("method", ["lora", "conv-adapter", "ssf", "full"])
def test_an_adapter_does_not_change_the_width(method):
    base = build(AutoConfig.for_model("mobilenet_v2"))
    assert measure_width(METHODS[method].adapt(base, 4)) == (192, False)


def test_a_model_without_blocks_takes_the_rate_as_it_is():
    assert scale_rate(0.1, nn.Linear(4, 4)) == 0.1


def test_fit_takes_the_scaled_rate_unless_one_is_given(tmp_path, capsys):
    wide = ViTConfig(
        hidden_size=256, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    items = [{"pixel_values": torch.zeros(3, 8, 8), "labels": 0}] * 4

    def train(rate: float | None) -> float:
        model = METHODS["lora"].adapt(AutoModelForImageClassification.from_config(wide), 2)
        config = TrainConfig(str(tmp_path / str(rate)), epochs=1, batch_size=4, learning_rate=rate, workers=0)
        return fit(model, items, None, config).settings["learning_rate"]

    assert train(None) == float(f"{3e-3 * 0.5**0.78:.3g}")
    assert "learning rate 0.00175 for a base this wide (0.003 suits the embedded ones)" in capsys.readouterr().out
    assert train(2e-3) == 2e-3
    assert "suits the embedded" not in capsys.readouterr().out

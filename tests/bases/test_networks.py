"""Published counts, formulas of the docstrings, and the ways in which a network of inlay is loaded."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from inlay import load_base, load_processor
from inlay.bases.networks.configs import NETWORK_TYPES, ShuffleNetV1Config, ShuffleNetV2Config, SqueezeNetConfig
from inlay.bases.networks.layers import ConvolutionLayer, shuffle_channels
from inlay.bases.networks.shufflenet_v1 import ShuffleUnit
from inlay.bases.networks.shufflenet_v2 import DownsamplingUnit
from inlay.bases.networks.shufflenet_v2 import ShuffleUnit as ShuffleUnitV2
from inlay.bases.networks.squeezenet import Fire, SqueezeNetForImageClassification
from inlay.errors import InlayError
from inlay.measure import count_macs
from inlay.tasks.images.processing import process_golden

TINY = [
    SqueezeNetConfig(
        stem_channels=8,
        squeeze_channels=[4, 3],
        expand1x1_channels=[8, 5],
        expand3x3_channels=[8, 7],
        pool_before=[1],
        image_size=32,
        num_labels=3,
    ),
    ShuffleNetV1Config(
        groups=2, stem_channels=8, stage_channels=[16, 32], depths=[2, 2], bottleneck_channels=[4, 2, 8, 6],
        image_size=32, num_labels=3,
    ),
    ShuffleNetV2Config(
        stem_channels=8, stage_channels=[16, 32], depths=[2, 2], branch_channels=[8, 5, 16, 3], last_channels=24,
        image_size=32, num_labels=3,
    ),
]  # fmt: skip


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForImageClassification.from_config(config)


def make(config: PreTrainedConfig) -> PreTrainedModel:
    """A small network whose norms have statistics of their own."""
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize(
    ("config", "parameters", "macs"),
    [
        # Iandola et al. 2016, table 2 and the authors' repository; parameters as torchvision prints them
        (SqueezeNetConfig.from_version("1.0", num_labels=1000), 1_248_424, 819e6),
        (SqueezeNetConfig.from_version("1.1", num_labels=1000), 1_235_496, 349e6),
        # Zhang et al. 2017, table 1
        (ShuffleNetV1Config.from_groups(1, num_labels=1000), 1.53e6, 143e6),
        (ShuffleNetV1Config.from_groups(2, num_labels=1000), 1.73e6, 140e6),
        (ShuffleNetV1Config.from_groups(3, num_labels=1000), 1.87e6, 137e6),
        (ShuffleNetV1Config.from_groups(4, num_labels=1000), 1.97e6, 133e6),
        (ShuffleNetV1Config.from_groups(8, num_labels=1000), 2.43e6, 137e6),
        # as torchvision gives them for its weights; Ma et al. 2018, table 8, has 41, 146, 299 and 591
        (ShuffleNetV2Config.from_width(0.5, num_labels=1000), 1_366_792, 40.5e6),
        (ShuffleNetV2Config.from_width(1.0, num_labels=1000), 2_278_604, 145e6),
        (ShuffleNetV2Config.from_width(1.5, num_labels=1000), 3_503_624, 296e6),
        (ShuffleNetV2Config.from_width(2.0, num_labels=1000), 7_393_996, 583e6),
    ],
)
def test_published_counts(config: PreTrainedConfig, parameters: float, macs: float):
    model = on_meta(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.005)
    pixels = {"pixel_values": torch.empty(1, 3, 224, 224, device="meta")}
    assert count_macs(model, pixels) == pytest.approx(macs, rel=0.0101)  # 4 groups: 134.34 for 133


def formula(documented: object) -> str:
    """The formula of a docstring, as Python."""
    found = re.search(r"MACs: `(.+?)`", str(documented.__doc__))
    assert found
    return found[1].replace("·", "*").replace("²", "**2")


@pytest.mark.parametrize(
    ("block", "channels", "values", "size"),
    [
        (ConvolutionLayer(6, 10, 3), 6, {"C": 6, "N": 10, "k": 3, "g": 1}, 1),
        (ConvolutionLayer(6, 10, 1, groups=2), 6, {"C": 6, "N": 10, "k": 1, "g": 2}, 1),
        (ConvolutionLayer(6, 6, 3, 2, groups=6), 6, {"C": 6, "N": 6, "k": 3, "g": 6}, 2),
        (Fire(7, 3, 5, 4, pool=False), 7, {"C": 7, "S": 3, "E1": 5, "E3": 4}, 1),
        (Fire(7, 3, 5, 4, pool=True), 7, {"C": 7, "S": 3, "E1": 5, "E3": 4}, 2),
        (ShuffleUnit(12, 12, 6, 3, 3, 1), 12, {"C": 12, "M": 6, "N": 12, "G": 3, "g": 3, "S": 1}, 1),
        (ShuffleUnit(6, 18, 9, 3, 1, 2), 6, {"C": 6, "M": 9, "N": 12, "G": 1, "g": 3, "S": 2}, 2),
        (ShuffleUnitV2(12, 5), 12, {"B": 6, "M": 5}, 1),
        (DownsamplingUnit(8, 12, 5), 8, {"C": 8, "B": 6, "M": 5}, 2),
    ],
)  # fmt: skip
def test_formulas_of_the_docstrings(block: nn.Module, channels: int, values: dict[str, int], size: int):
    pixels, side = torch.empty(1, channels, 8, 8), 8 // size
    expected = eval(formula(type(block)), {"H": side, "W": side, **values})
    assert count_macs(block, {"hidden_states": pixels}) == expected


def test_formula_of_squeezenets_head():
    model = make(TINY[0])
    pixels = {"pixel_values": torch.randn(1, 3, 32, 32)}
    side = model.squeezenet(**pixels).last_hidden_state.shape[-1]
    expected = eval(formula(SqueezeNetForImageClassification.classify), {"C": 12, "N": 3, "H": side, "W": side})
    assert count_macs(model, pixels) - count_macs(model.squeezenet, pixels) == expected


def test_squeezenets_head_without_its_relu():
    model = make(TINY[0])
    pixels = torch.randn(2, 3, 32, 32)
    assert (model(pixels).logits >= 0).all()
    model.config.relu_logits = False
    torch.testing.assert_close(model(pixels).logits, model.classifier(model.squeezenet(pixels).pooler_output))


def test_a_depthwise_separable_convolution_takes_that_share():
    full = count_macs(ConvolutionLayer(10, 20, 3), {"hidden_states": torch.empty(1, 10, 8, 8)})
    parts = nn.Sequential(ConvolutionLayer(10, 10, 3, groups=10), ConvolutionLayer(10, 20, 1))
    count = count_macs(parts, {"input": torch.empty(1, 10, 8, 8)})
    assert count == (3**2 + 20) * 10 * 8 * 8 and count / full == pytest.approx(1 / 20 + 1 / 9)


def test_shuffle():
    channels = torch.arange(6.0).view(1, 6, 1, 1)
    assert shuffle_channels(channels, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]
    assert shuffle_channels(channels, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(shuffle_channels(channels, 3), nn.ChannelShuffle(3)(channels))
    assert torch.equal(shuffle_channels(channels, 1), channels)


@pytest.mark.parametrize("config", TINY, ids=lambda config: config.model_type)
def test_saved_with_a_width_of_each_block_and_loaded_by_transformers(config: PreTrainedConfig, tmp_path: Path):
    model, pixels = make(config), torch.randn(2, 3, 32, 32)
    expected = model(pixels, labels=torch.tensor([0, 2]), output_hidden_states=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(pixels).logits, expected.logits)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(pixels).pooler_output, model.base_model(pixels)[1])
    assert expected.loss == nn.functional.cross_entropy(expected.logits, torch.tensor([0, 2]))
    assert len(expected.hidden_states) == 1 + len(model.base_model.blocks)
    assert again(pixels, return_dict=False)[0].shape == (2, 3)

    base = load_base(tmp_path, labels=["a", "b"])
    assert base.new_head and base(pixels).logits.shape == (2, 2)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    processor = load_processor(tmp_path)
    assert process_golden(processor)["pixel_values"].shape == (1, 3, 32, 32)
    assert list(processor.image_mean) == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    ("config", "changes", "problem"),
    [
        (SqueezeNetConfig, {"squeeze_channels": [16, 16]}, "one number per module"),
        (SqueezeNetConfig, {"pool_before": [8]}, "fire module 8, and there are 8"),
        (ShuffleNetV1Config, {"groups": 7}, "cannot be divided among 7 groups"),
        (ShuffleNetV1Config, {"depths": [4, 8]}, "one number per stage"),
        (ShuffleNetV1Config, {"bottleneck_channels": [30]}, "one number for each of the 16 units"),
        (ShuffleNetV2Config, {"branch_channels": [30]}, "one number for each of the 16 units"),
        (ShuffleNetV2Config, {"stage_channels": [117, 232, 464]}, "117 channels cannot be divided"),
    ],
)
def test_configs_that_describe_no_network(config: type[PreTrainedConfig], changes: dict, problem: str, tmp_path: Path):
    with pytest.raises(StrictDataclassClassValidationError, match=problem):
        config(**changes)
    settings = {**config().to_dict(), **changes}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InlayError, match=problem):
        load_base(tmp_path)


def test_unknown_builds():
    with pytest.raises(InlayError, match=r"unknown version of SqueezeNet '2'; choose one of 1.0, 1.1"):
        SqueezeNetConfig.from_version("2")
    with pytest.raises(InlayError, match=r"unknown number of groups 5"):
        ShuffleNetV1Config.from_groups(5)
    with pytest.raises(InlayError, match=r"unknown width of ShuffleNet v2 3.0"):
        ShuffleNetV2Config.from_width(3.0)


@pytest.mark.parametrize("config", NETWORK_TYPES.values())
def test_every_network_is_registered(config: type[PreTrainedConfig]):
    backbone, classifier = AutoModel._model_mapping[config], AutoModelForImageClassification._model_mapping[config]
    assert backbone.__module__ == classifier.__module__ == f"inlay.bases.networks.{config.model_type}"

"""torchvision's networks compute here what they compute there: their layers and names, written again in plain torch."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from inlay import import_adapter, import_network, load_base, load_processor
from inlay.cli import app as cli
from inlay.errors import InlayError


class Fire(nn.Module):
    def __init__(self, before: int, squeeze: int, left: int, right: int):
        super().__init__()
        self.squeeze = nn.Conv2d(before, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, left, 1)
        self.expand3x3 = nn.Conv2d(squeeze, right, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


def pool() -> nn.Module:
    return nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)


def stack_of_fires(version: str, classes: int) -> nn.Module:
    """torchvision.models.SqueezeNet(version, classes)."""
    fires = [(16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256)]
    pools = {"1_0": (3, 7), "1_1": (2, 4)}[version]  # fires that a pooling comes before, besides the first
    channels, kernel = {"1_0": (96, 7), "1_1": (64, 3)}[version]
    features = [nn.Conv2d(3, channels, kernel, stride=2), nn.ReLU(), pool()]
    for i, (squeeze, expand) in enumerate(fires):
        features += [pool()] if i in pools else []
        features.append(Fire(channels, squeeze, expand, expand))
        channels = 2 * expand
    network = nn.Module()
    network.features = nn.Sequential(*features)
    network.classifier = nn.Sequential(
        nn.Dropout(), nn.Conv2d(channels, classes, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    )
    network.forward = lambda x: network.classifier(network.features(x)).flatten(1)
    return network


class InvertedResidual(nn.Module):
    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        half, self.stride = after // 2, stride

        def depthwise(channels: int) -> nn.Module:
            return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)

        def norm(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels)

        def point(inputs: int) -> nn.Module:
            return nn.Conv2d(inputs, half, 1, bias=False)

        shortcut = [depthwise(before), norm(before), point(before), norm(half), nn.ReLU()] if stride > 1 else []
        self.branch1 = nn.Sequential(*shortcut)
        first = point(before if stride > 1 else half)
        rest = [norm(half), nn.ReLU(), depthwise(half), norm(half), point(half), norm(half), nn.ReLU()]
        self.branch2 = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1) if self.stride == 1 else (self.branch1(x), x)
        out = torch.cat([left, self.branch2(right)], 1)
        batch, channels, height, width = out.shape
        return out.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(out.shape)


def stages_of_units(repeats: list[int], channels: list[int], classes: int) -> nn.Module:
    """torchvision.models.ShuffleNetV2(repeats, channels, classes)."""
    network, before = nn.Module(), channels[0]
    first = nn.Conv2d(3, before, 3, 2, 1, bias=False)
    network.conv1 = nn.Sequential(first, nn.BatchNorm2d(before), nn.ReLU())
    network.maxpool = nn.MaxPool2d(3, 2, 1)
    for stage, count, after in zip(("stage2", "stage3", "stage4"), repeats, channels[1:], strict=False):
        units = [InvertedResidual(before if i == 0 else after, after, 1 if i else 2) for i in range(count)]
        network.add_module(stage, nn.Sequential(*units))
        before = after
    last = nn.Conv2d(before, channels[-1], 1, bias=False)
    network.conv5 = nn.Sequential(last, nn.BatchNorm2d(channels[-1]), nn.ReLU())
    network.fc = nn.Linear(channels[-1], classes)

    def forward(x: Tensor) -> Tensor:
        x = network.maxpool(network.conv1(x))
        x = network.stage4(network.stage3(network.stage2(x)))
        return network.fc(network.conv5(x).mean([2, 3]))

    network.forward = forward
    return network


def draw(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network.eval()


@pytest.fixture(scope="module")
def units() -> nn.Module:
    return draw(stages_of_units([2, 3, 2], [8, 16, 24, 32, 48], 5))


@pytest.mark.parametrize("version", ["1_0", "1_1"])
def test_squeezenet(version: str, tmp_path: Path):
    theirs = draw(stack_of_fires(version, 7))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    made = import_network(tmp_path / "theirs.pth", tmp_path / "ours")
    assert made.network == "SqueezeNetForImageClassification" and made.labels == 7
    assert made.parameters == sum(p.numel() for p in theirs.parameters())
    pixels = torch.randn(2, 3, 64, 64)
    base = load_base(tmp_path / "ours")
    torch.testing.assert_close(base(pixels).logits, theirs.forward(pixels))
    assert base.config.id2label[6] == "LABEL_6" and theirs.forward(pixels).std() > 0.1
    processor = load_processor(tmp_path / "ours")
    assert processor.size["shortest_edge"] == 256 and processor.crop_size["height"] == 224


def test_shufflenet(units: nn.Module, tmp_path: Path):
    save_file(units.state_dict(), tmp_path / "theirs.safetensors")
    made = import_network(tmp_path / "theirs.safetensors", tmp_path / "ours", labels=list("abcde"))
    assert made.network == "ShuffleNetV2ForImageClassification"
    pixels = torch.randn(2, 3, 64, 64)
    ours = AutoModelForImageClassification.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(ours(pixels).logits, units.forward(pixels))
    assert ours.config.id2label == dict(enumerate("abcde")) and ours.config.depths == [2, 3, 2]


def test_shufflenets_of_torchvision_whose_images_are_of_232_pixels(tmp_path: Path):
    torch.save(stages_of_units([4, 8, 4], [24, 176, 352, 704, 1024], 3).state_dict(), tmp_path / "theirs.pth")
    assert import_network(tmp_path / "theirs.pth", tmp_path / "ours").parameters == 3_503_624 - 997 * 1025
    assert load_processor(tmp_path / "ours").size["shortest_edge"] == 232


def test_the_verb(units: nn.Module, tmp_path: Path, monkeypatch, capsys):
    # as torch saved it before it counted batches
    old = {key: value for key, value in units.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save({"state_dict": old}, tmp_path / "theirs.pth")
    (tmp_path / "labels.txt").write_text("un\ndeux\n\ntrois\nquatre\ncinq\n")

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["inlay", "import", str(tmp_path / "theirs.pth"), *arguments])
        try:
            cli.main()
        except SystemExit as end:
            assert end.code in (0, 2)
        return "".join(capsys.readouterr())

    assert "does not apply" in run("-o", str(tmp_path / "new"), "--base", "builtin:vit-tiny")
    said = run("-o", str(tmp_path / "new"), "--labels", str(tmp_path / "labels.txt"))
    assert said.endswith("new: ShuffleNetV2ForImageClassification, 6,929 parameters, 5 labels\n")
    assert load_base(tmp_path / "new").config.id2label[3] == "quatre"
    assert "exists; give a new folder" in run("-o", str(tmp_path / "new"))
    assert "has 5 classes, and 4 labels" in run("-o", str(tmp_path / "b"), "--labels", str(short(tmp_path)))
    assert "one label a line" in run("-o", str(tmp_path / "b"), "--labels", str(tmp_path / "none.txt"))


def short(folder: Path) -> Path:
    (folder / "short.txt").write_text("a\nb\nc\nd\n")
    return folder / "short.txt"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop("stage3.1.branch2.4.running_mean"), r"lacks 1 tensors .*'stage3.1.branch2.4.running_mean'"),
        (lambda t: t.update({"extra.weight": torch.ones(1)}), r"has 1 tensors .*'extra.weight'"),
        (lambda t: t["fc.bias"].fill_(torch.nan), r"'fc.bias' .* holds NaN"),
        (
            lambda t: t.update({"stage2.1.branch2.3.weight": torch.ones(9, 1, 3, 3)}),
            r"branch2.3.weight' of .* is \(9, 1",
        ),
        (lambda t: t.update({"conv1.0.weight": torch.ones(())}), "do not make up a ShuffleNet v2"),
        (lambda t: [t.pop(key) for key in list(t) if key.startswith("stage")], "neither a SqueezeNet nor"),
    ],
)
def test_files_of_something_else(change, problem: str, units: nn.Module, tmp_path: Path):
    tensors = {key: value.clone() for key, value in units.state_dict().items()}
    change(tensors)
    torch.save(tensors, tmp_path / "theirs.pth")
    with pytest.raises(InlayError, match=problem):
        import_network(tmp_path / "theirs.pth", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_no_code_of_a_pickle_runs(tmp_path: Path):
    torch.save(draw(stages_of_units([1, 1, 1], [4, 8, 8, 8, 8], 2)).conv1, tmp_path / "whole.pth")  # a module
    for read in (import_network, import_adapter):
        with pytest.raises(InlayError, match="it holds more than tensors"):
            read(tmp_path / "whole.pth", tmp_path / "ours")

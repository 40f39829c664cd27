"""Configs of the networks, with one width of each block, and their registration with AutoConfig.

transformers reads configs while it is itself being imported, so that nothing here imports its models.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from inlay.errors import BadInput

# 1.1 has a smaller stem and pools earlier: 2.4 times fewer MACs at the same accuracy (the authors' repository).
VERSIONS: dict[str, dict[str, Any]] = {
    "1.0": {"stem_channels": 96, "stem_kernel_size": 7, "pool_before": [0, 3, 7]},
    "1.1": {"stem_channels": 64, "stem_kernel_size": 3, "pool_before": [0, 2, 4]},
}

# Channels of the three stages by the number of groups, for about 140 M MACs each (table 1 of the paper).
STAGE_CHANNELS: dict[int, tuple[int, int, int]] = {
    1: (144, 288, 576),
    2: (200, 400, 800),
    3: (240, 480, 960),
    4: (272, 544, 1088),
    8: (384, 768, 1536),
}

# Channels of the three stages and of the last convolution (table 5 of the paper).
WIDTHS: dict[float, dict[str, Any]] = {
    0.5: {"stage_channels": [48, 96, 192], "last_channels": 1024},
    1.0: {"stage_channels": [116, 232, 464], "last_channels": 1024},
    1.5: {"stage_channels": [176, 352, 704], "last_channels": 1024},
    2.0: {"stage_channels": [244, 488, 976], "last_channels": 2048},
}


def _check_known(what: str, asked: object, known: Mapping[Any, Any]) -> None:
    if asked not in known:
        raise BadInput(f"unknown {what} {asked!r}; choose one of {', '.join(map(str, known))}.")


@strict
class SqueezeNetConfig(PreTrainedConfig):
    """SqueezeNet 1.0 by default. The widths are those of each fire module, so that any of them can be pruned.

    Attributes:
        image_size: Pixels a side that the network was trained on; it takes any.
        stem_channels: Of the first convolution; the next three fields are its form.
        squeeze_channels: Of the 1x1 convolution that each fire module begins with.
        expand1x1_channels: Of its 1x1 convolution over these.
        expand3x3_channels: Of its 3x3 convolution over these; the module's output is both side by side.
        pool_before: Numbers of the fire modules whose input is halved by max pooling.
        dropout: In front of the head.
        relu_logits: Whether the classes of each pixel pass a ReLU before they are averaged, as in the paper. Without it
            the head is linear; one that is trained from nothing then learns much faster, as no class stays at zero.
    """

    model_type = "squeezenet"

    num_channels: int = 3
    image_size: int | list[int] | tuple[int, int] = 224
    stem_channels: int = 96
    stem_kernel_size: int = 7
    stem_stride: int = 2
    stem_padding: int = 0
    squeeze_channels: list[int] | tuple[int, ...] = (16, 16, 32, 32, 48, 48, 64, 64)
    expand1x1_channels: list[int] | tuple[int, ...] = (64, 64, 128, 128, 192, 192, 256, 256)
    expand3x3_channels: list[int] | tuple[int, ...] = (64, 64, 128, 128, 192, 192, 256, 256)
    pool_before: list[int] | tuple[int, ...] = (0, 3, 7)
    dropout: float | int = 0.5
    relu_logits: bool = True
    initializer_range: float = 0.01

    @classmethod
    def from_version(cls, version: str, **changes: Any) -> "SqueezeNetConfig":
        """That of VERSIONS, "1.0" or "1.1", with changes."""
        _check_known("version of SqueezeNet", version, VERSIONS)
        return cls(**{**VERSIONS[version], **changes})

    def validate_architecture(self) -> None:
        """Refuse lists that do not name one width of each module."""
        lengths = {len(self.squeeze_channels), len(self.expand1x1_channels), len(self.expand3x3_channels)}
        if len(lengths) > 1 or lengths == {0}:
            raise ValueError("squeeze_channels, expand1x1_channels and expand3x3_channels need one number per module.")
        if wrong := [i for i in self.pool_before if not 0 <= i < len(self.squeeze_channels)]:
            raise ValueError(f"pool_before names fire module {wrong[0]}, and there are {len(self.squeeze_channels)}.")


@strict
class ShuffleNetV1Config(PreTrainedConfig):
    """ShuffleNet 1x with 3 groups by default.

    Attributes:
        image_size: Pixels a side that the network was trained on; it takes any.
        stem_channels: Of the first convolution, 3x3.
        stem_stride: Of that.
        stem_pool: Whether max pooling follows it.
        groups: Of the 1x1 convolutions; the first of all is not grouped, because it has few inputs.
        stage_channels: Output channels of the units of each stage.
        depths: Units in each stage, of which the first halves height and width.
        bottleneck_channels: Inner width of each unit, so that any of them can be pruned, in steps of `groups`; default:
            a quarter of its output channels.
    """

    model_type = "shufflenet_v1"

    num_channels: int = 3
    image_size: int | list[int] | tuple[int, int] = 224
    stem_channels: int = 24
    stem_stride: int = 2
    stem_pool: bool = True
    groups: int = 3
    stage_channels: list[int] | tuple[int, ...] = (240, 480, 960)
    depths: list[int] | tuple[int, ...] = (4, 8, 4)
    bottleneck_channels: list[int] | tuple[int, ...] | None = None
    initializer_range: float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        if self.bottleneck_channels is None:
            pairs = zip(self.stage_channels, self.depths, strict=False)  # their lengths are validated later
            self.bottleneck_channels = [channels // 4 for channels, depth in pairs for _ in range(depth)]
        super().__post_init__(**kwargs)

    @classmethod
    def from_groups(cls, groups: int, **changes: Any) -> "ShuffleNetV1Config":
        """ShuffleNet 1x with that many groups, one of STAGE_CHANNELS, with changes."""
        _check_known("number of groups", groups, STAGE_CHANNELS)
        return cls(**{"groups": groups, "stage_channels": STAGE_CHANNELS[groups], **changes})

    def validate_architecture(self) -> None:
        """Refuse lists of different lengths, and widths that the groups do not divide."""
        if not self.depths or len(self.stage_channels) != len(self.depths):
            raise ValueError("stage_channels and depths need one number per stage.")
        if self.bottleneck_channels is None or len(self.bottleneck_channels) != sum(self.depths):
            raise ValueError(f"bottleneck_channels needs one number for each of the {sum(self.depths)} units.")
        before = (self.stem_channels, *self.stage_channels)
        added = [after - channels for channels, after in pairwise(before)]
        if wrong := [n for n in (*self.bottleneck_channels, *self.stage_channels, *added) if n < 1 or n % self.groups]:
            raise ValueError(f"{wrong[0]} channels cannot be divided among {self.groups} groups.")


@strict
class ShuffleNetV2Config(PreTrainedConfig):
    """ShuffleNet v2 1x by default.

    Attributes:
        image_size: Pixels a side that the network was trained on; it takes any.
        stem_channels: Of the first convolution, 3x3.
        stem_stride: Of that.
        stem_pool: Whether max pooling follows it.
        stage_channels: Output channels of the units of each stage.
        depths: Units in each stage, of which the first halves height and width.
        branch_channels: Inner width of the branch of each unit, so that any of them can be pruned; default: half its
            output channels.
        last_channels: Of the 1x1 convolution behind the units.
    """

    model_type = "shufflenet_v2"

    num_channels: int = 3
    image_size: int | list[int] | tuple[int, int] = 224
    stem_channels: int = 24
    stem_stride: int = 2
    stem_pool: bool = True
    stage_channels: list[int] | tuple[int, ...] = (116, 232, 464)
    depths: list[int] | tuple[int, ...] = (4, 8, 4)
    branch_channels: list[int] | tuple[int, ...] | None = None
    last_channels: int = 1024
    initializer_range: float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        if self.branch_channels is None:
            pairs = zip(self.stage_channels, self.depths, strict=False)  # their lengths are validated later
            self.branch_channels = [channels // 2 for channels, depth in pairs for _ in range(depth)]
        super().__post_init__(**kwargs)

    @classmethod
    def from_width(cls, width: float, **changes: Any) -> "ShuffleNetV2Config":
        """That of WIDTHS, 0.5, 1.0, 1.5 or 2.0, with changes."""
        _check_known("width of ShuffleNet v2", width, WIDTHS)
        return cls(**{**WIDTHS[width], **changes})

    def validate_architecture(self) -> None:
        """Refuse lists of different lengths, and stages that cannot be halved."""
        if not self.depths or len(self.stage_channels) != len(self.depths):
            raise ValueError("stage_channels and depths need one number per stage.")
        if self.branch_channels is None or len(self.branch_channels) != sum(self.depths):
            raise ValueError(f"branch_channels needs one number for each of the {sum(self.depths)} units.")
        if odd := [n for n in self.stage_channels if n % 2]:
            raise ValueError(f"a stage of {odd[0]} channels cannot be divided into two branches of equal width.")


# The preprocessing of torchvision's weights: the shorter side to 256 pixels, of which the middle 224 x 224 are taken.
IMAGENET_PROCESSOR = {
    "image_processor_type": "MobileNetV1ImageProcessor",
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}

NETWORK_TYPES = {config.model_type: config for config in (SqueezeNetConfig, ShuffleNetV1Config, ShuffleNetV2Config)}
for _model_type, _config in NETWORK_TYPES.items():
    AutoConfig.register(_model_type, _config, exist_ok=True)

"""ShuffleNet v2 at 0.5, 1, 1.5 or 2 times its width: Ma et al. 2018, arXiv:1807.11164."""

import torch
from torch import Tensor, nn

from inlay.bases.networks.configs import ShuffleNetV2Config
from inlay.bases.networks.layers import Backbone, Classifier, ConvolutionLayer, Stem, shuffle_channels


class ShuffleUnit(nn.Module):
    """One half of the channels as it is, the other through 1x1, depth-wise 3x3 and 1x1 convolutions; then a shuffle.

    MACs: `(B·M + 9·M + M·B)·H·W` for branches of B = C/2 channels with M inner ones, at H x W pixels.
    """

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        half = channels // 2
        self.first_1x1 = ConvolutionLayer(half, inner, 1)
        self.conv_3x3 = ConvolutionLayer(inner, inner, 3, groups=inner, activation=False)
        self.last_1x1 = ConvolutionLayer(inner, half, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """B C H W -> B C H W."""
        kept, half = hidden_states.chunk(2, 1)
        return shuffle_channels(torch.cat([kept, self.last_1x1(self.conv_3x3(self.first_1x1(half)))], 1), 2)


class DownsamplingUnit(nn.Module):
    """A unit of stride 2: all channels go through both branches, of which the first has no 1x1 convolution in front.

    MACs: `(9·C + C·B)·H·W + (C·M·4 + 9·M + M·B)·H·W` from C channels to branches of B channels, of which the second has
    M inner ones, at H x W output pixels.
    """

    def __init__(self, in_channels: int, out_channels: int, inner: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.shortcut_3x3 = ConvolutionLayer(in_channels, in_channels, 3, 2, groups=in_channels, activation=False)
        self.shortcut_1x1 = ConvolutionLayer(in_channels, half, 1)
        self.first_1x1 = ConvolutionLayer(in_channels, inner, 1)
        self.conv_3x3 = ConvolutionLayer(inner, inner, 3, 2, groups=inner, activation=False)
        self.last_1x1 = ConvolutionLayer(inner, half, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """B C H W -> B 2·B' H/2 W/2."""
        shortcut = self.shortcut_1x1(self.shortcut_3x3(hidden_states))
        return shuffle_channels(
            torch.cat([shortcut, self.last_1x1(self.conv_3x3(self.first_1x1(hidden_states)))], 1), 2
        )


class ShuffleNetV2Model(Backbone):
    """A ShuffleNet v2 without its head."""

    config: ShuffleNetV2Config
    base_model_prefix = "shufflenet"

    def __init__(self, config: ShuffleNetV2Config) -> None:
        super().__init__(config)
        self.stem = Stem(config.num_channels, config.stem_channels, config.stem_stride, config.stem_pool)
        self.blocks = nn.ModuleList()
        channels, inner = config.stem_channels, iter(config.branch_channels or ())
        for stage, depth in zip(config.stage_channels, config.depths, strict=True):
            for i in range(depth):
                unit = ShuffleUnit(stage, next(inner)) if i else DownsamplingUnit(channels, stage, next(inner))
                self.blocks.append(unit)
            channels = stage
        self.tail = ConvolutionLayer(channels, config.last_channels, 1)
        self.post_init()


class ShuffleNetV2ForImageClassification(Classifier):
    """A ShuffleNet v2 with its head."""

    config: ShuffleNetV2Config
    base_model_prefix = "shufflenet"

    def __init__(self, config: ShuffleNetV2Config) -> None:
        super().__init__(config)
        self.shufflenet = ShuffleNetV2Model(config)
        self.classifier = nn.Linear(config.last_channels, config.num_labels)
        self.post_init()

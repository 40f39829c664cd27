"""ShuffleNet with 1, 2, 3, 4 or 8 groups: Zhang et al. 2017, arXiv:1707.01083."""

import torch
from torch import Tensor, nn

from inlay.bases.networks.configs import ShuffleNetV1Config
from inlay.bases.networks.layers import Backbone, Classifier, ConvolutionLayer, Stem, shuffle_channels


class ShuffleUnit(nn.Module):
    """A bottleneck of grouped 1x1 convolutions around a depth-wise 3x3 one, with a shuffle between the groups.

    Its output is added to the input; with stride 2 it stands behind the average-pooled input instead. The first 1x1
    convolution has `first_groups` (G) groups, the second `groups` (g).

    MACs: `C·M·S·S·H·W/G + 9·M·H·W + M·N·H·W/g` from C channels through M inner ones to N computed ones, at H x W output
    pixels and stride S.
    """

    def __init__(
        self, in_channels: int, out_channels: int, inner: int, groups: int, first_groups: int, stride: int
    ) -> None:
        super().__init__()
        self.groups, self.downsamples = groups, stride > 1
        computed = out_channels - in_channels if self.downsamples else out_channels
        self.shortcut = nn.AvgPool2d(3, stride, padding=1) if self.downsamples else nn.Identity()
        self.reduce_1x1 = ConvolutionLayer(in_channels, inner, 1, groups=first_groups)
        self.conv_3x3 = ConvolutionLayer(inner, inner, 3, stride, groups=inner, activation=False)
        self.expand_1x1 = ConvolutionLayer(inner, computed, 1, groups=groups, activation=False)
        self.activation = nn.ReLU()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """B C H W -> B C H W, or with stride 2 -> B C+N H/2 W/2."""
        inner = shuffle_channels(self.reduce_1x1(hidden_states), self.groups)
        computed, shortcut = self.expand_1x1(self.conv_3x3(inner)), self.shortcut(hidden_states)
        return self.activation(torch.cat([shortcut, computed], 1) if self.downsamples else shortcut + computed)


class ShuffleNetV1Model(Backbone):
    """A ShuffleNet without its head."""

    config: ShuffleNetV1Config
    base_model_prefix = "shufflenet"

    def __init__(self, config: ShuffleNetV1Config) -> None:
        super().__init__(config)
        self.stem = Stem(config.num_channels, config.stem_channels, config.stem_stride, config.stem_pool)
        self.blocks = nn.ModuleList()
        channels, inner = config.stem_channels, iter(config.bottleneck_channels or ())
        for stage, depth in zip(config.stage_channels, config.depths, strict=True):
            for i in range(depth):
                first_groups = config.groups if self.blocks else 1
                self.blocks.append(
                    ShuffleUnit(channels, stage, next(inner), config.groups, first_groups, stride=1 if i else 2)
                )
                channels = stage
        self.tail = nn.Identity()
        self.post_init()


class ShuffleNetV1ForImageClassification(Classifier):
    """A ShuffleNet with its head."""

    config: ShuffleNetV1Config
    base_model_prefix = "shufflenet"

    def __init__(self, config: ShuffleNetV1Config) -> None:
        super().__init__(config)
        self.shufflenet = ShuffleNetV1Model(config)
        self.classifier = nn.Linear(config.stage_channels[-1], config.num_labels)
        self.post_init()

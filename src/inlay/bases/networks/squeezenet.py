"""SqueezeNet 1.0 and 1.1: Iandola et al. 2016, arXiv:1602.07360."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention

from inlay.bases.networks.configs import SqueezeNetConfig
from inlay.bases.networks.layers import Backbone, Classifier


class Fire(nn.Module):
    """A fire module: few channels by 1x1 convolutions, read by 1x1 and 3x3 convolutions side by side.

    MACs: `(C·S + S·E1 + 9·S·E3)·H·W` from C channels to S squeezed and E1 + E3 expanded ones, at H x W pixels. A 3x3
    convolution to as many channels would take 9·C·(E1 + E3)·H·W.
    """

    def __init__(self, in_channels: int, squeeze: int, expand1x1: int, expand3x3: int, pool: bool) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(3, stride=2, ceil_mode=True) if pool else nn.Identity()
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand1x1, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand3x3, 3, padding=1)
        self.activation = nn.ReLU()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """B C H W -> B E1+E3 H W; half the height and width with pooling."""
        squeezed = self.activation(self.squeeze(self.pool(hidden_states)))
        return self.activation(torch.cat([self.expand1x1(squeezed), self.expand3x3(squeezed)], 1))


class SqueezeNetModel(Backbone):
    """A SqueezeNet without its head."""

    config: SqueezeNetConfig
    base_model_prefix = "squeezenet"

    def __init__(self, config: SqueezeNetConfig) -> None:
        super().__init__(config)
        convolution = nn.Conv2d(
            config.num_channels, config.stem_channels, config.stem_kernel_size, config.stem_stride, config.stem_padding
        )
        self.stem = nn.Sequential(OrderedDict(convolution=convolution, activation=nn.ReLU()))
        self.blocks = nn.ModuleList()
        channels = config.stem_channels
        widths = zip(config.squeeze_channels, config.expand1x1_channels, config.expand3x3_channels, strict=True)
        for i, (squeeze, expand1x1, expand3x3) in enumerate(widths):
            self.blocks.append(Fire(channels, squeeze, expand1x1, expand3x3, pool=i in config.pool_before))
            channels = expand1x1 + expand3x3
        self.tail = nn.Identity()
        self.post_init()


class SqueezeNetForImageClassification(Classifier):
    """A SqueezeNet with its head.

    The paper's head is a 1x1 convolution; here it is a linear layer over the channels, which computes the same and can
    be replaced, adapted, combined and served as every other head.
    """

    config: SqueezeNetConfig
    base_model_prefix = "squeezenet"

    def __init__(self, config: SqueezeNetConfig) -> None:
        super().__init__(config)
        self.squeezenet = SqueezeNetModel(config)
        self.dropout = nn.Dropout(config.dropout)
        channels = config.expand1x1_channels[-1] + config.expand3x3_channels[-1]
        self.classifier = nn.Linear(channels, config.num_labels)
        self.post_init()

    def classify(self, outputs: BaseModelOutputWithPoolingAndNoAttention) -> Tensor:
        """Classes of each pixel, through a ReLU, averaged over the pixels; without `relu_logits`, of the mean pixel.

        MACs: `C·N·H·W` from C channels to N classes, at H x W pixels; without `relu_logits` C·N.
        """
        if not self.config.relu_logits:
            return self.classifier(self.dropout(outputs.pooler_output))
        pixels = self.dropout(outputs.last_hidden_state).permute(0, 2, 3, 1)
        return self.classifier(pixels).relu().mean((1, 2))

"""What the networks share: a convolution with its norm, the channel shuffle, the way through backbone and head."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils.generic import can_return_tuple


class ConvolutionLayer(nn.Module):
    """A convolution with `groups` (g) groups, batch normalisation and, where `activation` is set, a ReLU.

    MACs: `k²·C·N·H·W/g` from C to N channels at H x W output pixels. Depth-wise (g = C = N) it is `k²·C·H·W`; with the
    1x1 convolution that follows, a depth-wise separable convolution takes 1/N + 1/k² of a full one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False
        )
        self.normalization = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU() if activation else nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """B C H W -> B N H' W'."""
        return self.activation(self.normalization(self.convolution(hidden_states)))


class Stem(nn.Module):
    """What a ShuffleNet begins with: a 3x3 convolution and, where `pool` is set, max pooling by 2."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, pool: bool) -> None:
        super().__init__()
        self.convolution = ConvolutionLayer(in_channels, out_channels, 3, stride)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if pool else nn.Identity()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """B C H W -> B N H' W'."""
        return self.pool(self.convolution(pixel_values))


def shuffle_channels(hidden_states: Tensor, groups: int) -> Tensor:
    """Let the channels of all groups take turns: channel i of group g goes to place i·groups + g.

    Source: Zhang et al. 2017, arXiv:1707.01083, figure 1.
    """
    batch, channels, height, width = hidden_states.shape
    grouped = hidden_states.view(batch, groups, channels // groups, height, width)
    return grouped.transpose(1, 2).reshape(batch, channels, height, width)


class Backbone(PreTrainedModel):
    """A network up to its head: `stem`, `blocks` one after the other, and what a subclass has behind them (`tail`)."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    stem: nn.Module
    blocks: nn.ModuleList
    tail: nn.Module

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """B C H W -> maps B C' H' W', and their mean over the pixels B C'.

        The hidden states are the maps behind the stem and behind each block.
        """
        hidden_states = self.stem(pixel_values)
        maps = [hidden_states]
        for block in self.blocks:
            hidden_states = block(hidden_states)
            maps.append(hidden_states)
        hidden_states = self.tail(hidden_states)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states.mean((2, 3)),
            hidden_states=tuple(maps) if wanted else None,
        )


class Classifier(Backbone):
    """A backbone under its `base_model_prefix`, and `classifier`, a linear layer on the mean of its maps."""

    classifier: nn.Module

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutputWithNoAttention:
        """B C H W -> logits B N; with labels (B,) also the loss, cross-entropy for two labels or more."""
        outputs = self.base_model(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classify(outputs)
        return ImageClassifierOutputWithNoAttention(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=outputs.hidden_states,
        )

    def classify(self, outputs: BaseModelOutputWithPoolingAndNoAttention) -> Tensor:
        """Logits B N of what the backbone returns."""
        return self.classifier(outputs.pooler_output)

"""Conv-Adapter: a bottleneck of two convolutions next to, or behind, those of a frozen convolutional network.

    conv_parallel           y <- conv(x) + α ⊙ W_up f(K ∗ x + b_K) + α ⊙ b_up           the default, as published
    conv_sequential         y <- conv(x),  y + α ⊙ W_up f(K ∗ y + b_K) + α ⊙ b_up
    residual_parallel       y <- block(x) + the same of x
    residual_sequential     y <- block(x), y + the same of y

K is a depth-wise convolution from C_in channels down to m: it has G groups, and a unit of the bottleneck sees the
C_in / G channels of its group. As published G = m; here it is the greatest common divisor of m and C_in, so that any m
goes with any layer. Next to a convolution K has its size, stride, padding and dilation; next to a block it is 3x3 with
the block's stride. W_up (C_out, m) is point-wise, f a non-linearity, and α (C_out,) a learned scale that starts from
one. W_up and b_up start from zero, so that the adapted model starts as the base.

The convolutions adapted are those of more than 1x1 behind the stem. Their code adds behind the norm and activation that
follow the convolution in ResNet, and in front of the norm in ConvNeXt; here it is in front in all networks.

Chen et al. 2022, arXiv:2208.07463.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import gcd
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from typing_extensions import override

from inlay.bases.sites import Sites
from inlay.errors import BadInput, ComputationFailed, Unsupported
from inlay.methods._peft import PeftType, register_method
from inlay.methods.base import AdapterConfig, AdapterLayer, AdapterTuner, Groups
from inlay.methods.method import Method
from inlay.peft_types import PEFT_TYPES

Placement = Literal["conv_parallel", "conv_sequential", "residual_parallel", "residual_sequential"]
_PLACEMENTS = ("conv_parallel", "conv_sequential", "residual_parallel", "residual_sequential")


@dataclass
class ConvAdapterConfig(AdapterConfig):
    """Settings of Conv-Adapter; the defaults are those of Chen et al. but for W_up, which starts from zero."""

    width: int | None = field(default=None, metadata={"help": "Channels m of the bottleneck; default: C_in / γ."})
    reduction: float = field(default=8.0, metadata={"help": "γ, where width is not given."})
    groups: int | None = field(
        default=None,
        metadata={
            "help": "Groups of K, at most: a layer takes the greatest common divisor with its channels. It divides the "
            "width; default: the width."
        },
    )
    placement: Placement = field(
        default="conv_parallel",
        metadata={"help": "Next to each convolution or behind it; next to each residual block or behind it."},
    )
    activation: str = field(default="relu", metadata={"help": "Non-linearity f, by its name in transformers."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["INLAY_CONV_ADAPTER"]
        if self.width is not None and self.width < 1:
            raise BadInput(f"width must be at least 1, got {self.width}.")
        if not self.reduction > 0:
            raise BadInput(f"reduction must be positive, got {self.reduction}.")
        if self.groups is not None and (self.width is None or self.groups < 1 or self.width % self.groups):
            raise BadInput(f"groups must divide the width, got {self.groups} groups of {self.width} channels.")
        if self.placement not in _PLACEMENTS:
            raise BadInput(f"placement must be one of {', '.join(_PLACEMENTS)}, got {self.placement!r}.")
        if self.activation not in ACT2FN:
            raise BadInput(f"activation must be one of {', '.join(sorted(ACT2FN))}, got {self.activation!r}.")


@dataclass(frozen=True)
class _Convolution:
    """How one adapter convolves at one module.

    Attributes:
        parallel: It reads the input of the module, not the output.
        activation: Name of the non-linearity.
    """

    parallel: bool
    activation: str
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]


class ConvAdapterLayer(AdapterLayer):
    """Adds bottlenecks of convolutions to the output of the wrapped convolution or residual block.

    Attributes:
        inlay_conv_adapter_kernel: By adapter, K of shape (G, m / G, C_in / G, k, k), from which the groups can be told.
        inlay_conv_adapter_up: By adapter, W_up of shape (C_out, m).
        inlay_conv_adapter_bias: By adapter, b_K and b_up, (m + C_out,).
        inlay_conv_adapter_scale: By adapter, α of shape (C_out,).
        inlay_conv_adapter_act: By adapter, the non-linearity.
    """

    nesting = 3
    adapter_layer_names = (
        "inlay_conv_adapter_kernel",
        "inlay_conv_adapter_up",
        "inlay_conv_adapter_bias",
        "inlay_conv_adapter_scale",
        "inlay_conv_adapter_act",
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.inlay_conv_adapter_kernel = nn.ParameterDict()
        self.inlay_conv_adapter_up = nn.ParameterDict()
        self.inlay_conv_adapter_bias = nn.ParameterDict()
        self.inlay_conv_adapter_scale = nn.ParameterDict()
        self.inlay_conv_adapter_act = nn.ModuleDict()

    @override
    def add(self, name: str, config: ConvAdapterConfig, tuner: AdapterTuner, key: str) -> None:
        inputs, outputs, size, self.options[name] = self._find_geometry(config, key)
        width = config.width or max(1, round(inputs / config.reduction))
        groups = gcd(config.groups or width, inputs)
        down = nn.Conv2d(inputs, width, size, groups=groups)
        up = nn.Conv2d(width, outputs, 1)
        if config.init_weights:
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        self.inlay_conv_adapter_kernel[name] = nn.Parameter(down.weight.detach().unflatten(0, (groups, -1)))
        self.inlay_conv_adapter_up[name] = nn.Parameter(up.weight.detach().flatten(1))
        self.inlay_conv_adapter_bias[name] = nn.Parameter(torch.cat([down.bias, up.bias]).detach())
        self.inlay_conv_adapter_scale[name] = nn.Parameter(torch.ones(outputs))
        self.inlay_conv_adapter_act[name] = ACT2FN[config.activation]

    def _find_geometry(self, config: ConvAdapterConfig, key: str) -> tuple[int, int, tuple[int, ...], _Convolution]:
        """C_in, C_out and size of K, and how it convolves."""
        module = self.get_base_layer()
        parallel = config.placement.endswith("_parallel")
        if config.placement.startswith("conv_"):
            if not isinstance(module, nn.Conv2d):
                raise BadInput(
                    f'placement="{config.placement}" adapts convolutions, and {key} is a {type(module).__name__}; give '
                    "other target_modules."
                )
            if parallel:
                how = _Convolution(True, config.activation, module.stride, module.padding, module.dilation)
                return module.in_channels, module.out_channels, module.kernel_size, how
            size = tuple(k + 1 - k % 2 for k in module.kernel_size)  # an even one has no centre
            return module.out_channels, module.out_channels, size, _keep_size(size, config.activation)
        inputs, outputs, stride = _measure_block(module, key)
        if parallel:
            how = _Convolution(True, config.activation, (stride, stride), (1, 1), (1, 1))
            return inputs, outputs, (3, 3), how
        return outputs, outputs, (3, 3), _keep_size((3, 3), config.activation)

    @override
    def forward_adapted(self, groups: Groups, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        output = self.base_layer(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        result = hidden
        for parallel, read in ((True, x), (False, hidden)):
            placed = [([n for n in names if self.options[n].parallel == parallel], rows) for names, rows in groups]
            if any(names for names, _ in placed):
                result = result + self._sum(read, hidden, placed)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    def _sum(self, x: torch.Tensor, hidden: torch.Tensor, groups: Groups) -> torch.Tensor:
        """What all adapters that read x (B, C_in, H, W) add to hidden states (B, C_out, H', W')."""
        if groups[0][1] is None:
            return reduce(torch.add, [self._branch(name, x, hidden) for name in groups[0][0]])
        total = torch.zeros_like(hidden)
        for names, rows in groups:
            for name in names:
                total[rows] += self._branch(name, x[rows], hidden)
        return total

    def _branch(self, name: str, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        here, kernel, up = self.options[name], self.inlay_conv_adapter_kernel[name], self.inlay_conv_adapter_up[name]
        bias, up_bias = self.inlay_conv_adapter_bias[name].split([up.shape[1], len(up)])
        scale = self.inlay_conv_adapter_scale[name]
        x = self._cast_input_dtype(x, kernel.dtype)
        h = F.conv2d(x, kernel.flatten(0, 1), bias, here.stride, here.padding, here.dilation, len(kernel))
        h = self.inlay_conv_adapter_act[name](h)
        h = F.conv2d(h, (scale[:, None] * up)[..., None, None], scale * up_bias)
        check_added_shape(h, hidden, self.get_base_layer())
        return h.to(hidden.dtype)

    @override
    def why_not_merged(self, names: Sequence[str]) -> str | None:
        return (
            f"Conv-Adapter {', '.join(names)} cannot be merged: the activation between its two convolutions is none "
            "that a weight could stand for; keep it as an adapter, or train LoRA where a merged model is needed."
        )


def check_added_shape(added: torch.Tensor, hidden: torch.Tensor, module: nn.Module) -> None:
    """Raise InlayError where an adapter next to a residual block gives a map of another size than the block."""
    if added.shape[1:] != hidden.shape[1:]:
        raise ComputationFailed(
            f"a Conv-Adapter gives {tuple(added.shape[1:])} next to a {type(module).__name__}, which gives "
            f'{tuple(hidden.shape[1:])}; use placement="conv_parallel".'
        )


def _keep_size(kernel: tuple[int, ...], activation: str) -> _Convolution:
    """A convolution that gives a map as large as the one it reads."""
    padding = tuple(k // 2 for k in kernel)
    return _Convolution(False, activation, (1, 1), padding, (1, 1))


@torch.no_grad()
def _measure_block(block: nn.Module, key: str) -> tuple[int, int, int]:
    """Channels that a residual block takes and gives, and its stride, by one small map that goes through it.

    Raises:
        InlayError: It takes no map of as many channels as its first convolution.
    """
    first = next((module for module in block.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise BadInput(f"{key} is no block with a convolution in it; give other target_modules.")
    side = 32
    try:
        output = block(
            torch.zeros(1, first.in_channels, side, side, device=first.weight.device, dtype=first.weight.dtype)
        )
    except Exception as error:  # unknown code may raise anything
        raise Unsupported(
            f'it cannot be told what {key} takes, a {type(block).__name__} ({error}); use placement="conv_parallel".'
        ) from error
    given = output[0] if isinstance(output, tuple) else output
    return first.in_channels, given.shape[1], side // given.shape[-1]


class ConvAdapterModel(AdapterTuner):
    """The tuner of ConvAdapterConfig."""

    prefix = "inlay_conv_adapter_"
    tuner_layer_cls = ConvAdapterLayer

    @override
    def targets(self, config: ConvAdapterConfig, found: Sites) -> Sequence[str]:
        outside = tuple(f"{name}." for name in (*found.head, *found.embeddings))
        convolutions = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Conv2d) and not f"{name}.".startswith(outside)
        }
        if config.placement.startswith("residual_"):
            names = [b for b in found.blocks if any(f"{name}.".startswith(f"{b}.") for name in convolutions)]
        else:
            names = [name for name, module in convolutions.items() if max(module.kernel_size) > 1]
        if not names:
            where = "in its blocks" if config.placement.startswith("residual_") else "of more than 1x1 behind its stem"
            raise Unsupported(
                f"{type(self.model).__name__} has no convolution {where}, so there is no place for a Conv-Adapter; use "
                "ssf or lora."
            )
        return names


register_method("inlay_conv_adapter", ConvAdapterConfig, ConvAdapterModel)

CONV_ADAPTER = Method(
    name="conv-adapter",
    paper=PEFT_TYPES["INLAY_CONV_ADAPTER"].paper,
    attaches="next to convolutions of more than 1x1",
    width="channels of the bottleneck",
    merges=False,
    kind="adapter",
    learning_rate=1e-2,
    config=lambda model, width: ConvAdapterConfig(width=width),
    bases=("conv",),
)
ROWS = (CONV_ADAPTER,)

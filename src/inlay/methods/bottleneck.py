"""Bottleneck adapters: a small two-layer network next to, or behind, the sublayers of a frozen model.

One adapter of width m at a site with the hidden state h of size d adds, in the notation of He et al. 2021 (table 1),

    serial      h <- h + s · W_up · f(W_down · h + b_down) + s · b_up           h: output of the sublayer
    parallel    h <- h + s · W_up · f(W_down · x + b_down) + s · b_up           x: input of the sublayer

before the residual sum, with W_down of shape (m, d), W_up (d, m), a non-linearity f and a scale s. W_up and b_up start
from zero, so that the adapted model starts as the base. `post` is serial behind the residual sum of the MLP: h is the
output of the whole block. With `channel_scale`, s is a vector (d,) and multiplies channel by channel.

    Houlsby et al. 2019, arXiv:1902.00751           sites=["attention", "mlp"], serial: the default
    Pfeiffer et al. 2020, arXiv:2005.00052          sites=["mlp"], serial
    He et al. 2021, arXiv:2110.04366                sites=["mlp"], placement="parallel", scale=4 (scaled parallel)
    Chen et al. 2022 (AdaptFormer), arXiv:2205.13535    the same on ViT, scale=0.1
    Luo et al. 2023 (RepAdapter), arXiv:2302.08106  activation=None: linear, merges into the weight before it
    Steitz & Roth 2024 (Adapter+), arXiv:2406.06820     placement="post", activation="gelu", channel_scale=True,
                                                    init="houlsby"; the stochastic depth of their training is left out
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from inspect import signature
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from inlay.bases.sites import Sites, is_linear, linear_shape, uses_weight_linearly
from inlay.errors import BadInput, Unsupported
from inlay.methods._peft import PeftType, register_method
from inlay.methods.base import AdapterConfig, AdapterLayer, AdapterTuner, Groups
from inlay.methods.hidden_states import replace_recorded_state
from inlay.methods.method import EVERY_BASE, Method
from inlay.peft_types import PEFT_TYPES


@dataclass
class BottleneckConfig(AdapterConfig):
    """Settings of bottleneck adapters; the defaults are those of Houlsby et al."""

    width: int | None = field(default=None, metadata={"help": "Bottleneck size; default: hidden size / reduction."})
    reduction: float = field(
        default=16.0, metadata={"help": "Hidden size / bottleneck size, where width is not given."}
    )
    sites: list[str] = field(
        default_factory=lambda: ["attention", "mlp"], metadata={"help": "After or next to which sublayers."}
    )
    placement: Literal["serial", "parallel", "post"] = field(
        default="serial",
        metadata={
            "help": "On the sublayer's output, next to the sublayer on its input, or (post, whatever the sites) on the "
            "output of the whole block."
        },
    )
    activation: str | None = field(
        default="relu", metadata={"help": "Non-linearity, by its name in transformers; None: a linear adapter."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the bottleneck."})
    scale: float = field(default=1.0, metadata={"help": "Factor s of what the adapter adds."})
    learn_scale: bool = field(default=False, metadata={"help": "Train the scale, one number per site."})
    channel_scale: bool = field(default=False, metadata={"help": "Train the scale, one number per channel and site."})
    init: Literal["zero", "houlsby"] = field(
        default="zero",
        metadata={
            "help": "W_up from zero, so that the model starts as the base; or as Houlsby et al.: both matrices from a "
            "normal distribution of 0.01, truncated at twice that, so that it starts close to the base."
        },
    )
    layer_norm: Literal["before", "after"] | None = field(
        default=None, metadata={"help": "A layer norm of the adapter's own before W_down, or after W_up."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["INLAY_BOTTLENECK"]
        if self.width is not None and self.width < 1:
            raise BadInput(f"width must be at least 1, got {self.width}.")
        if not self.reduction > 0:
            raise BadInput(f"reduction must be positive, got {self.reduction}.")
        if not self.sites or set(self.sites) - {"attention", "mlp"}:
            raise BadInput(f"sites must be attention, mlp or both, got {self.sites}.")
        if self.placement not in ("serial", "parallel", "post"):
            raise BadInput(f"placement must be serial, parallel or post, got {self.placement!r}.")
        if self.learn_scale and self.channel_scale:
            raise BadInput("learn_scale trains one number per site, channel_scale one per channel; give one of them.")
        if self.init not in ("zero", "houlsby"):
            raise BadInput(f"init must be zero or houlsby, got {self.init!r}.")
        if self.activation is not None and self.activation not in ACT2FN:
            raise BadInput(f"activation must be None or one of {', '.join(sorted(ACT2FN))}, got {self.activation!r}.")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout must be within 0 to 1, got {self.dropout}.")
        if self.layer_norm not in (None, "before", "after"):
            raise BadInput(f"layer_norm must be before, after or None, got {self.layer_norm!r}.")


class BottleneckLayer(AdapterLayer):
    """Adds bottlenecks to the output of the wrapped module: a linear layer or convolution, or a whole sublayer.

    Both matrices of an adapter are one tensor, and both biases: a name in a safetensors file takes more room than a
    bias.

    Attributes:
        inlay_bottleneck_weight: By adapter, W_down and the transpose of W_up, (2, m, d).
        inlay_bottleneck_bias: By adapter, b_down and b_up, (m + d,), where it has any.
        inlay_bottleneck_scale: By adapter, s of shape (1,), or (d,) with channel_scale, where it is trained.
        inlay_bottleneck_norm: By adapter, a layer norm, where there is one.
        inlay_bottleneck_act: By adapter, the non-linearity, where there is one.
    """

    nesting = 3
    adapter_layer_names = (
        "inlay_bottleneck_weight",
        "inlay_bottleneck_bias",
        "inlay_bottleneck_scale",
        "inlay_bottleneck_norm",
        "inlay_bottleneck_act",
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.inlay_bottleneck_weight = nn.ParameterDict()
        self.inlay_bottleneck_bias = nn.ParameterDict()
        self.inlay_bottleneck_scale = nn.ParameterDict()
        self.inlay_bottleneck_norm = nn.ModuleDict()
        self.inlay_bottleneck_act = nn.ModuleDict()
        inner = self.get_base_layer()
        self.size = _output_size(inner)
        self.channels_first = isinstance(inner, nn.Conv2d)
        self.adds_residual = (
            "input_tensor" in signature(inner.forward).parameters
        )  # BERT: norm(dense(h) + input_tensor)

    @override
    def add(self, name: str, config: BottleneckConfig, tuner: AdapterTuner, key: str) -> None:
        width = config.width or max(1, round(self.size / config.reduction))
        if config.placement == "parallel":
            self.check_parallel(key)
        if config.placement == "post" and _is_convolutional(self.get_base_layer()):
            raise BadInput(
                f'placement="post" needs blocks of tokens, and {key} is one of a convolutional network; use "serial".'
            )
        linear = config.activation is None and config.placement == "serial"
        biased = not linear or getattr(self.get_base_layer(), "bias", None) is not None  # else it could not merge
        down, up = nn.Linear(self.size, width, bias=biased), nn.Linear(width, self.size, bias=biased)
        if config.init_weights and config.init == "houlsby":
            for layer in (down, up):
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        elif config.init_weights:
            for parameter in up.parameters():
                nn.init.zeros_(parameter)
        self.inlay_bottleneck_weight[name] = nn.Parameter(torch.stack([down.weight, up.weight.T]).detach())
        if biased:
            self.inlay_bottleneck_bias[name] = nn.Parameter(torch.cat([down.bias, up.bias]).detach())
        if config.learn_scale or config.channel_scale:
            count = self.size if config.channel_scale else 1
            self.inlay_bottleneck_scale[name] = nn.Parameter(torch.full((count,), float(config.scale)))
        if config.layer_norm:
            self.inlay_bottleneck_norm[name] = nn.LayerNorm(self.size)
        if config.activation is not None:
            self.inlay_bottleneck_act[name] = ACT2FN[config.activation]
        self.options[name] = config

    def check_parallel(self, key: str) -> None:
        """Raise InlayError where the wrapped module gives other tokens or features than it takes."""
        base = self.get_base_layer()
        if (size := _input_size(base)) not in (None, self.size):
            raise BadInput(
                f"a parallel bottleneck needs a module with as many features in as out, got {size} and {self.size} in "
                f'{key}; name one that holds the whole sublayer, or use placement="serial".'
            )
        if getattr(base, "query_stride", None):
            raise Unsupported(
                f"{key} gives fewer and wider tokens than it takes, as the first attention in a stage of SAM 2 does, "
                'so that no bottleneck fits next to it; use placement="serial", or sites=["mlp"].'
            )

    def projections(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """W_down (m, d), b_down (m,), W_up (d, m) and b_up (d,) of one adapter; None where it has no biases."""
        down, up = self.inlay_bottleneck_weight[name].unbind()
        if name not in self.inlay_bottleneck_bias:
            return down, None, up.T, None
        down_bias, up_bias = self.inlay_bottleneck_bias[name].split([len(down), self.size])
        return down, down_bias, up.T, up_bias

    @override
    def forward_adapted(self, groups: Groups, *args: Any, **kwargs: Any) -> Any:
        serial = [(self._placed(names, "serial", "post"), rows) for names, rows in groups]
        parallel = [(self._placed(names, "parallel"), rows) for names, rows in groups]
        added = None
        if any(names for names, _ in parallel):
            x = args[1] if self.adds_residual else args[0] if args else kwargs["hidden_states"]
            added = self._sum(x, parallel)
            if self.adds_residual:
                args, added = (args[0], x + added, *args[2:]), None
        output = self.base_layer(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        result = hidden if added is None else hidden + added
        if any(names for names, _ in serial):
            result = result + self._sum(hidden, serial)
        if any(self._placed(names, "post") for names, _ in groups):
            replace_recorded_state(result)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    def _placed(self, names: list[str], *placements: str) -> list[str]:
        return [name for name in names if self.options[name].placement in placements]

    def _sum(self, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        """What all adapters add to hidden states of shape (..., d), or (B, d, H, W) behind a convolution."""
        if self.channels_first:
            x = x.movedim(1, -1)
        if groups[0][1] is None:
            total = reduce(torch.add, [self._branch(name, x) for name in groups[0][0]])
        else:
            total = torch.zeros_like(x)
            for names, rows in groups:
                for name in names:
                    total[rows] += self._branch(name, x[rows])
        return total.movedim(-1, 1) if self.channels_first else total

    def _branch(self, name: str, x: torch.Tensor) -> torch.Tensor:
        config = self.options[name]
        down, down_bias, up, up_bias = self.projections(name)
        norm = self.inlay_bottleneck_norm[name] if config.layer_norm else None
        h = self._cast_input_dtype(x, down.dtype)
        h = functional.linear(norm(h) if norm is not None and config.layer_norm == "before" else h, down, down_bias)
        if config.activation is not None:
            h = self.inlay_bottleneck_act[name](h)
        h = functional.dropout(h, config.dropout, self.training) if config.dropout else h
        h = functional.linear(h, up, up_bias)
        if norm is not None and config.layer_norm == "after":
            h = norm(h)
        if config.learn_scale or config.channel_scale:
            h = h * self.inlay_bottleneck_scale[name]
        elif config.scale != 1:
            h = h * config.scale
        return h.to(x.dtype)

    @override
    def why_not_merged(self, names: Sequence[str]) -> str | None:
        for name in names:
            config = self.options[name]
            if config.activation is not None or config.layer_norm or config.placement != "serial":
                what = f"activation {config.activation}" if config.activation else config.layer_norm and "layer norm"
                what = what or f"{config.placement} placement"
                return (
                    f"bottleneck adapter {name!r} does not fold into a weight ({what}); only "
                    'linear serial ones do: BottleneckConfig(activation=None, placement="serial").'
                )
        base = self.get_base_layer()
        if not isinstance(base, nn.Linear | nn.Conv2d | Conv1D) or not base.weight.is_floating_point():
            return f"cannot merge into a {type(base).__name__}; load the base in float32, float16 or bfloat16."
        if getattr(base, "groups", 1) > 1:
            return "a bottleneck mixes the channels that a convolution keeps apart in groups; use it unmerged."
        if not uses_weight_linearly(base):
            return (
                f"a {type(base).__name__} makes another weight of its own, into which nothing merges; use it unmerged."
            )
        return None

    def merged_values(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """W' = W + M W and b' = b + M b + c, where the linear adapters map h to M h + c; in float64."""
        base = self.get_base_layer()
        old = base.weight.data.T if isinstance(base, Conv1D) else base.weight.data.flatten(1)  # d x inputs
        bias = None if base.bias is None else base.bias.data.double()
        weight, moved = old.double(), bias
        for name in names:
            down, down_bias, up, up_bias = (p if p is None else p.double() for p in self.projections(name))
            learned = name in self.inlay_bottleneck_scale
            scale = self.inlay_bottleneck_scale[name].double() if learned else torch.tensor([self.options[name].scale])
            scale = scale.to(old.device, torch.float64)  # (1,) or (d,)
            weight = weight + scale[:, None] * up @ (down @ old.double())
            if bias is not None:
                moved = moved + scale * (up @ (down @ bias + down_bias) + up_bias)
        weight = weight.T if isinstance(base, Conv1D) else weight.view_as(base.weight)
        new = {"weight": weight.to(base.weight.dtype).contiguous()}
        return new if moved is None else {**new, "bias": moved.to(base.bias.dtype)}


def _output_size(module: nn.Module) -> int:
    """Features that the last linear layer or convolution in `module` gives."""
    for inner in reversed(list(module.modules())):
        if isinstance(inner, nn.Linear):
            return inner.out_features
        if isinstance(inner, Conv1D):
            return inner.nf
        if isinstance(inner, nn.Conv2d):
            return inner.out_channels
    raise BadInput(
        f"a bottleneck adapter goes around a linear layer, a convolution or a sublayer that ends in one, got "
        f"{type(module).__name__}; give other target_modules."
    )


def _is_convolutional(block: nn.Module) -> bool:
    """True where a block takes and gives (B, d, H, W), as its first or last layer is a convolution (ConvNeXt, ResNet).

    One in the middle says nothing: it may reduce the keys of an attention (PVT).
    """
    layers = [inner for inner in block.modules() if isinstance(inner, nn.Linear | Conv1D | nn.Conv2d)]
    return bool(layers) and (isinstance(layers[0], nn.Conv2d) or isinstance(layers[-1], nn.Conv2d))


def _input_size(module: nn.Module) -> int | None:
    """Features that a linear layer or convolution takes; None for a sublayer."""
    return linear_shape(module)[0] if is_linear(module) else getattr(module, "in_channels", None)


class BottleneckModel(AdapterTuner):
    """The tuner of BottleneckConfig."""

    prefix = "inlay_bottleneck_"
    tuner_layer_cls = BottleneckLayer

    @override
    def targets(self, config: BottleneckConfig, found: Sites) -> Sequence[str]:
        if config.placement == "post":
            return found.blocks
        where = {
            ("serial", "attention"): found.out,
            ("serial", "mlp"): found.mlp_out,
            ("parallel", "attention"): found.around_attention,
            ("parallel", "mlp"): found.around_mlp,
        }
        return [name for site in config.sites for name in where[config.placement, site]]


register_method("inlay_bottleneck", BottleneckConfig, BottleneckModel)

HOULSBY = Method(
    name="bottleneck",
    paper=PEFT_TYPES["INLAY_BOTTLENECK"].paper,
    attaches="after attention and MLP",
    width="bottleneck size",
    merges=False,
    kind="adapter",
    learning_rate=1e-2,
    config=lambda model, width: BottleneckConfig(width=width),
)
PFEIFFER = Method(
    name="bottleneck-mlp",
    paper="Pfeiffer et al. 2020, arXiv:2005.00052",
    attaches="after the MLP",
    width="bottleneck size",
    merges=False,
    kind="adapter",
    learning_rate=1e-2,
    config=lambda model, width: BottleneckConfig(width=width, sites=["mlp"]),
    bases=EVERY_BASE,
)
SCALED_PARALLEL = Method(
    name="bottleneck-parallel",
    paper="He et al. 2021, arXiv:2110.04366",
    attaches="next to the MLP",
    width="bottleneck size",
    merges=False,
    kind="adapter",
    learning_rate=1e-2,
    config=lambda model, width: BottleneckConfig(width=width, sites=["mlp"], placement="parallel", scale=4.0),
)
REP_ADAPTER = Method(
    name="bottleneck-linear",
    paper="Luo et al. 2023, arXiv:2302.08106",
    attaches="after attention and MLP",
    width="bottleneck size",
    merges=True,
    kind="adapter",
    learning_rate=1e-2,
    config=lambda model, width: BottleneckConfig(width=width, activation=None),
)
ADAPTER_PLUS = Method(
    name="adapter-plus",
    paper=PEFT_TYPES["INLAY_BOTTLENECK"].variants["channel_scale"].paper,
    attaches="after every block",
    width="bottleneck size",
    merges=False,
    kind="adapter",
    learning_rate=1e-2,
    config=lambda model, width: BottleneckConfig(
        width=width, sites=["mlp"], placement="post", activation="gelu", channel_scale=True, init="houlsby"
    ),
)
ROWS = (HOULSBY, PFEIFFER, SCALED_PARALLEL, REP_ADAPTER, ADAPTER_PLUS)

"""SSF: a scale and a shift for every feature that the operations of a frozen model give.

    y <- γ ⊙ y + β          y: what a linear layer, a convolution or a norm gives

γ starts from one and β from zero, so that the adapted model starts as the base; the published code draws both close to
that (`init_weights=False`). As published they stand behind every linear layer, convolution and norm of the backbone,
the patch embedding and the last norm among them; the head has none. Both fold into the operation in front of them:

    W' = γ W,  b' = γ b + β

A module without a bias gets no β, which nothing could hold in the merged model: transformers drops a bias that its
config does not ask for. `add_biases` shifts behind such modules too, and merging in memory then gives them a bias.

Lian et al. 2022, arXiv:2210.08823.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import MultiheadAttention
from typing_extensions import override

from inlay.bases.sites import Sites, is_channels_first, is_linear, is_norm, leaves_read_by_kernels, linear_shape
from inlay.errors import BadInput
from inlay.methods._peft import PeftType, register_method
from inlay.methods.base import AdapterConfig, AdapterLayer, AdapterTuner, Groups
from inlay.methods.method import EVERY_BASE, Method
from inlay.methods.partial import find_shared_parameters, is_unused
from inlay.peft_types import PEFT_TYPES

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class SsfConfig(AdapterConfig):
    """Settings of SSF; without any, it stands behind every linear layer, convolution and norm but those of the head."""

    add_biases: bool = field(
        default=False,
        metadata={
            "help": "Shift also behind modules that have no bias; merged, each gets one, which transformers drops when "
            "it loads such a model."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["INLAY_SSF"]


class SsfLayer(AdapterLayer):
    """Wraps a linear layer, a convolution or a norm.

    Attributes:
        inlay_ssf_scale: By adapter, γ of shape (features,).
        inlay_ssf_shift: By adapter, β of shape (features,), where the module has a bias that can take it up.
    """

    nesting = 2
    adapter_layer_names = ("inlay_ssf_scale", "inlay_ssf_shift")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.inlay_ssf_scale = nn.ParameterDict()
        self.inlay_ssf_shift = nn.ParameterDict()
        self.size = _output_size(self.get_base_layer())
        self.channels_first = is_channels_first(self.get_base_layer())

    @override
    def add(self, name: str, config: SsfConfig, tuner: AdapterTuner, key: str) -> None:
        scale, shift = torch.ones(self.size), torch.zeros(self.size)
        if not config.init_weights:
            scale, shift = scale + 0.02 * torch.randn(self.size), 0.02 * torch.randn(self.size)
        self.inlay_ssf_scale[name] = nn.Parameter(scale)
        parameters = self.get_base_layer()._parameters
        if parameters.get("bias") is not None or (config.add_biases and "bias" in parameters):
            self.inlay_ssf_shift[name] = nn.Parameter(shift)
        self.options[name] = config

    @override
    def forward_adapted(self, groups: Groups, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = self.base_layer(*args, **kwargs)
        if groups[0][1] is None:
            return self._scale_and_shift(output, groups[0][0])
        result = output.clone()
        for names, rows in groups:
            if names:
                result[rows] = self._scale_and_shift(output[rows], names)
        return result

    def _scale_and_shift(self, output: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        scale, shift = self._sum_adapters(names)
        shape = (-1, *[1] * (output.ndim - 2)) if self.channels_first else (-1,)
        result = self._cast_input_dtype(output, scale.dtype) * scale.view(shape)
        return (result if shift is None else result + shift.view(shape)).to(output.dtype)

    def _sum_adapters(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """γ and β of several adapters as one: each adds (γ - 1) y + β."""
        first, *others = names
        scale = self.inlay_ssf_scale[first]
        for name in others:
            scale = scale + (self.inlay_ssf_scale[name] - 1)
        shifts = [self.inlay_ssf_shift[name] for name in names if name in self.inlay_ssf_shift]
        return scale, sum(shifts[1:], shifts[0]) if shifts else None

    @override
    def merged_values(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """W' = γ W and b' = γ b + β; in float64."""
        base = self.get_base_layer()
        scale, shift = (None if p is None else p.detach().double() for p in self._sum_adapters(names))
        assert scale is not None
        weight = base.weight.data
        if type(base).__name__ == "Conv1D":  # (inputs, features)
            new = {"weight": weight * scale}
        elif is_norm(base):
            start = _find_weight_offset(base)
            new = {"weight": (weight + start) * scale - start}
        else:
            new = {"weight": weight * scale.view(-1, *[1] * (weight.ndim - 1))}
        bias = getattr(base, "bias", None)
        if bias is not None or shift is not None:
            moved = 0 if bias is None else bias.data * scale
            new["bias"] = moved + (0 if shift is None else shift)
        return {key: value.to(weight.dtype) for key, value in new.items()}

    @override
    def why_not_merged(self, names: Sequence[str]) -> str | None:
        base = self.get_base_layer()
        if not base.weight.is_floating_point():
            return f"cannot merge into a {type(base).__name__}; load the base in float32, float16 or bfloat16."
        if not self._computes_the_same(names):
            return (
                f"SSF {', '.join(names)} cannot be merged: a {type(base).__name__} does not multiply with its weight "
                "as it stands, so that no weight gives the scaled output; keep SSF as an adapter."
            )
        return None

    @torch.no_grad()
    def _computes_the_same(self, names: Sequence[str]) -> bool:
        """Whether the module with the merged values gives the scaled output of a random input.

        A convolution that standardises its weight, or a norm with an activation in it, does not.
        """
        base, training = self.get_base_layer(), self.get_base_layer().training
        x = _draw_input(base)
        base.eval()  # a BatchNorm is not to see this
        try:
            wanted = self._scale_and_shift(base(x), names)
            found = functional_call(base, self.merged_values(names), x)
        finally:
            base.train(training)
        rounding = 100 * torch.finfo(base.weight.dtype).eps
        return bool((found - wanted).float().norm() <= rounding * (1 + wanted.float().norm()))


def _output_size(module: nn.Module) -> int:
    """Features that a linear layer, a convolution or a norm gives."""
    if is_linear(module):
        return linear_shape(module)[1]
    if isinstance(module, _CONVOLUTIONS):
        return module.out_channels
    if is_norm(module) and getattr(module, "weight", None) is not None and module.weight.ndim == 1:
        return len(module.weight)
    raise BadInput(
        f"SSF goes behind a linear layer, a convolution or a norm with weights, got {type(module).__name__}; give "
        "other target_modules."
    )


def _find_weight_offset(norm: nn.Module) -> int:
    """What a norm adds to its weight before it multiplies: 0, or 1 as in Gemma."""
    zeros = {key: torch.zeros_like(p) for key, p in norm.named_parameters()}
    with torch.no_grad():
        return int(functional_call(norm, zeros, _draw_input(norm)).any())


def _draw_input(module: nn.Module) -> torch.Tensor:
    """A random input of the smallest size that a module takes, the same one each time."""
    if is_linear(module):
        shape: tuple[int, ...] = (2, linear_shape(module)[0])
    elif isinstance(module, _CONVOLUTIONS):
        extent = (d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        shape = (2, module.in_channels, *extent)
    else:
        size = _output_size(module)
        spatial = {nn.BatchNorm1d: (2,), nn.BatchNorm3d: (2, 2, 2)}.get(type(module), (2, 2))
        shape = (2, size, *spatial) if is_channels_first(module) else (2, 2, size)
    weight = module.weight
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return drawn.to(weight.device, weight.dtype)


class SsfModel(AdapterTuner):
    """The tuner of SsfConfig."""

    prefix = "inlay_ssf_"
    tuner_layer_cls = SsfLayer

    @override
    def targets(self, config: SsfConfig, found: Sites) -> Sequence[str]:
        """Every operation that plain fine-tuning would train; one whose weight another module shares stays as it is."""
        shared, unseen = find_shared_parameters(self.model), leaves_read_by_kernels(self.model)
        unseen = unseen | {"conv1d"} if unseen else unseen
        names = []
        for name, module in self.model.named_modules():
            if not name or name.split(".")[0] in found.head or is_unused(name, self.model, found):
                continue
            inside_attention = isinstance(self.model.get_submodule(name.rpartition(".")[0]), MultiheadAttention)
            if inside_attention or name.rpartition(".")[2] in unseen:  # whose weights others read
                continue
            if _is_operation(module) and not any(id(p) in shared for p in module.parameters()):
                names.append(name)
        return names


def _is_operation(module: nn.Module) -> bool:
    """True for a linear layer, a convolution, and a norm with a weight for each feature."""
    if is_norm(module):
        weight = getattr(module, "weight", None)
        return weight is not None and weight.ndim == 1
    return is_linear(module) or isinstance(module, _CONVOLUTIONS)


register_method("inlay_ssf", SsfConfig, SsfModel)

SSF = Method(
    name="ssf",
    paper=PEFT_TYPES["INLAY_SSF"].paper,
    attaches="linear layers, convolutions, norms",
    width="none: a scale and a shift per feature",
    merges=True,
    kind="scale",
    learning_rate=1e-2,
    config=lambda model, width: SsfConfig(),
    bases=EVERY_BASE,
)
ROWS = (SSF,)

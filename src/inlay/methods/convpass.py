"""ConvPass: a convolutional bypass next to the sublayers of a frozen vision transformer.

    h <- h + s · W_up · f(K ∗ f(W_down · x + b_down) + b_K) + s · b_up

x and h are input and output of a sublayer, before the residual sum. W_down (m, d) and W_up (d, m) act on each token; K
is a dense 3x3 convolution of m channels over the grid of the patches. The class token, and any other token that is no
patch, is convolved as an image of 1x1, so that only the centre of K acts on it. K starts as the identity and W_up and
b_up from zero, so that the adapted model starts as the base. Their code drops a tenth of the units in training.

In SAM, whose attention sees windows, K sees the whole image: the windows are put together for the bypass, as its
authors do in Swin. A text has no grid over which to convolve, so that there is no ConvPass of a language model.

Jie & Deng 2022, arXiv:2207.07039.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.sam.modeling_sam import SamVisionAttention
from typing_extensions import override

from inlay.bases.sites import Sites, sites
from inlay.errors import BadInput, ComputationFailed, Unsupported
from inlay.methods._peft import PeftType, register_method
from inlay.methods.base import AdapterConfig, AdapterLayer, AdapterTuner, Groups
from inlay.methods.method import Method
from inlay.methods.patch_grid import PatchGrid, find_patch_grid
from inlay.methods.visual_prompt import ENCODERS
from inlay.methods.window_attention import join_windows, split_into_windows
from inlay.peft_types import PEFT_TYPES


@dataclass
class ConvPassConfig(AdapterConfig):
    """Settings of convolutional bypasses; the defaults are those of Jie & Deng, without their dropout of 0.1."""

    width: int = field(default=8, metadata={"help": "Channels m of the bypass."})
    sites: list[str] = field(default_factory=lambda: ["attention", "mlp"], metadata={"help": "Next to which."})
    activation: str = field(default="quick_gelu", metadata={"help": "Non-linearity f, by its name in transformers."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout in front of W_up."})
    scale: float = field(default=1.0, metadata={"help": "Factor s of what the bypass adds."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["INLAY_CONVPASS"]
        if not isinstance(self.width, int) or self.width < 1:
            raise BadInput(f"width must be a whole number of at least 1, got {self.width!r}.")
        if not self.sites or set(self.sites) - {"attention", "mlp"}:
            raise BadInput(f"sites must be attention, mlp or both, got {self.sites}.")
        if self.activation not in ACT2FN:
            raise BadInput(f"activation must be one of {', '.join(sorted(ACT2FN))}, got {self.activation!r}.")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"dropout must be within 0 to 1, got {self.dropout}.")


class ConvPassLayer(AdapterLayer):
    """Adds bypasses to the output of the wrapped attention or MLP.

    Attributes:
        inlay_convpass_weight: By adapter, W_down and the transpose of W_up, (2, m, d).
        inlay_convpass_kernel: By adapter, K of shape (m, m, 3, 3).
        inlay_convpass_bias: By adapter, b_down, b_K and b_up, (2 m + d,).
        inlay_convpass_act: By adapter, the non-linearity.
        window: Size of the windows that the wrapped module sees; 0 where it sees the whole image.
    """

    nesting = 5
    adapter_layer_names = (
        "inlay_convpass_weight",
        "inlay_convpass_kernel",
        "inlay_convpass_bias",
        "inlay_convpass_act",
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.inlay_convpass_weight = nn.ParameterDict()
        self.inlay_convpass_kernel = nn.ParameterDict()
        self.inlay_convpass_bias = nn.ParameterDict()
        self.inlay_convpass_act = nn.ModuleDict()
        self.window = 0
        self._grid: PatchGrid | None = None

    @override
    def add(self, name: str, config: ConvPassConfig, tuner: AdapterTuner, key: str) -> None:
        block = tuner.model.get_submodule(key.rpartition(".")[0])
        windowed = isinstance(self.get_base_layer(), SamVisionAttention)
        self.read_grid(tuner.patch_grid(), block.window_size if windowed else 0)
        size = _token_size(self.get_base_layer())
        down, up = nn.Linear(size, config.width), nn.Linear(config.width, size)
        kernel = torch.zeros(config.width, config.width, 3, 3)
        kernel[:, :, 1, 1] = torch.eye(config.width)
        bias = torch.zeros(2 * config.width + size)
        nn.init.xavier_uniform_(down.weight)
        if config.init_weights:
            nn.init.zeros_(up.weight)
        self.inlay_convpass_weight[name] = nn.Parameter(torch.stack([down.weight, up.weight.T]).detach())
        self.inlay_convpass_kernel[name] = nn.Parameter(kernel)
        self.inlay_convpass_bias[name] = nn.Parameter(bias)
        self.inlay_convpass_act[name] = ACT2FN[config.activation]
        self.options[name] = config

    def read_grid(self, grid: PatchGrid, window: int) -> None:
        """Say in what grid the patches lie, and in windows of what size the wrapped module sees them; 0: in none."""
        if self._grid is None:
            grid.hold()
            self._grid, self.window = grid, window

    @override
    def undo_changes(self) -> None:
        if self._grid is not None:
            self._grid.release()
            self._grid = None

    @override
    def forward_adapted(self, groups: Groups, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        output = self.base_layer(*args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        result = hidden + self._sum(x, groups)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    def _sum(self, x: torch.Tensor, groups: Groups) -> torch.Tensor:
        """What all adapters add, in the shape of the tokens (B, N, d), map (B, H, W, d) or windows that came."""
        if groups[0][1] is None:
            return reduce(torch.add, [self._branch(name, x) for name in groups[0][0]])
        total = torch.zeros_like(x)
        for names, rows in groups:
            for name in names:
                total[rows] += self._branch(name, x[rows])
        return total

    def _branch(self, name: str, x: torch.Tensor) -> torch.Tensor:
        config, kernel = self.options[name], self.inlay_convpass_kernel[name]
        down, up = self.inlay_convpass_weight[name].unbind()
        down_bias, bias, up_bias = self.inlay_convpass_bias[name].split([len(down), len(down), down.shape[1]])
        act = self.inlay_convpass_act[name]
        h = act(F.linear(self._cast_input_dtype(x, down.dtype), down, down_bias))
        patches, others = self.split_patches(h)
        patches = F.conv2d(patches.movedim(-1, 1), kernel, bias, padding=1).movedim(1, -1)
        others = F.linear(others, kernel[:, :, 1, 1], bias)
        h = act(self.join_patches(patches, others, x))
        h = F.dropout(h, config.dropout, self.training) if config.dropout else h
        h = F.linear(h, up.T, up_bias)
        return (h if config.scale == 1 else h * config.scale).to(x.dtype)

    def split_patches(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The patches as a map (B, H, W, m), and the tokens that are none, (B, n, m): those behind are prompts."""
        grid = self._grid
        assert grid is not None
        if h.ndim == 4:
            whole = join_windows(h, self.window, grid.height, grid.width) if self.window else h
            return whole, h.new_zeros(len(whole), 0, h.shape[-1])
        end = grid.leading + grid.height * grid.width
        if not grid.height or h.shape[1] < end:
            raise ComputationFailed(
                f"a convolutional bypass got {h.shape[1]} tokens for a grid of {grid.height} x {grid.width} patches "
                f"behind {grid.leading} other tokens; call the whole model, with images."
            )
        patches = h[:, grid.leading : end].unflatten(1, (grid.height, grid.width))
        return patches, torch.cat([h[:, : grid.leading], h[:, end:]], dim=1)

    def join_patches(self, patches: torch.Tensor, others: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What `split_patches` took apart, in the shape of x but for the last axis."""
        if x.ndim == 4:
            return split_into_windows(patches, self.window) if self.window else patches
        assert self._grid is not None
        leading = self._grid.leading
        return torch.cat([others[:, :leading], patches.flatten(1, 2), others[:, leading:]], dim=1)

    @override
    def why_not_merged(self, names: Sequence[str]) -> str | None:
        return (
            f"convolutional bypasses {', '.join(names)} cannot be merged: they convolve over the grid of patches, "
            "which no weight of attention or MLP does; keep them as an adapter, or train LoRA where a merged model is "
            "needed."
        )


def _token_size(sublayer: nn.Module) -> int:
    """d: what the first linear layer in a sublayer takes."""
    first = next((module for module in sublayer.modules() if isinstance(module, nn.Linear)), None)
    if first is None:
        raise BadInput(
            f"a convolutional bypass goes next to attention or an MLP, got {type(sublayer).__name__}; give other "
            "target_modules."
        )
    return first.in_features


class ConvPassModel(AdapterTuner):
    """The tuner of ConvPassConfig."""

    prefix = "inlay_convpass_"
    tuner_layer_cls = ConvPassLayer

    @override
    def targets(self, config: ConvPassConfig, found: Sites) -> Sequence[str]:
        kind = getattr(getattr(self.model, "config", None), "model_type", "no model_type")
        if kind not in (*ENCODERS, "sam", "sam_vision_model"):
            raise Unsupported(
                f"convolutional bypasses are for encoders of images ({', '.join(ENCODERS)}, sam), got {kind}: a "
                "convolution needs a grid of patches; use a bottleneck."
            )
        where = {"attention": found.around_attention, "mlp": found.around_mlp}
        return [name for site in config.sites for name in where[site]]

    def patch_grid(self) -> PatchGrid:
        """What notes the grid of the images under way."""
        found = sites(self.model).embeddings
        return find_patch_grid(self.model.get_submodule(found[0]))


register_method("inlay_convpass", ConvPassConfig, ConvPassModel)

CONVPASS = Method(
    name="convpass",
    paper=PEFT_TYPES["INLAY_CONVPASS"].paper,
    attaches="next to attention and MLP",
    width="channels of the bypass",
    merges=False,
    kind="adapter",
    learning_rate=1e-2,
    config=lambda model, width: ConvPassConfig(width=width),
    bases=("vision", "sam"),
)
ROWS = (CONVPASS,)

"""Partial fine-tuning, stored as what was added to the base.

For each chosen weight W of the base, which stays as it is, a delta D is trained and the module computes with

    W + D,  rounded once to the type of W

so the trained weight is exactly the sum of what is in the base and in the file, also in bfloat16 (D is float32), and
merging it changes no output by a single bit. Such a delta is a task vector (Ilharco et al. 2023, arXiv:2212.04089).

    last=2              the last two blocks, and the norm after them
    train="bias"        BitFit: only the biases (Ben Zaken et al. 2022, arXiv:2106.10199)
    train="norm"        only the norms (as in Basu et al. 2024, arXiv:2304.01466, and peft's LNTuningConfig)
    target_modules      these modules, with all that is in them

What plain fine-tuning gives no gradient is left out where target_modules do not name it, as DDP waits for it in vain:
cross-attention, the pooler of a bare backbone, the token of masked patches ... (`is_unused`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import MultiheadAttention
from typing_extensions import override

from inlay.bases.diffusion.config import is_diffusion
from inlay.bases.sites import OTHER_INPUTS, Sites, is_cross, is_norm
from inlay.errors import BadInput, Unsupported
from inlay.methods._peft import PeftType, register_method
from inlay.methods.base import AdapterConfig, AdapterTuner, WeightLayer, name_only
from inlay.methods.method import EVERY_BASE, Method
from inlay.peft_types import PEFT_TYPES


@dataclass
class PartialConfig(AdapterConfig):
    """Settings of partial fine-tuning; without any, all weights but the head's are trained."""

    last: int | None = field(default=None, metadata={"help": "Only the last so many blocks and what follows them."})
    train: Literal["all", "bias", "norm"] = field(
        default="all", metadata={"help": "Which parameters of the chosen modules: all, biases, or those of norms."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["INLAY_PARTIAL"]
        if self.train not in ("all", "bias", "norm"):
            raise BadInput(f"train must be all, bias or norm, got {self.train!r}.")
        if self.last is not None and (not isinstance(self.last, int) or self.last < 1):
            raise BadInput(f"last must be a whole number of at least 1, got {self.last!r}.")
        if self.last is not None and self.layers_to_transform is not None:
            raise BadInput("give last or layers_to_transform, not both.")


class PartialLayer(WeightLayer):
    """Wraps a module that has parameters of its own.

    Attributes:
        inlay_partial_delta: By adapter and parameter, D.
    """

    nesting = 0
    adapter_layer_names = ("inlay_partial_delta",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.inlay_partial_delta = nn.ModuleDict()

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        """No type: peft would round the deltas to that of the base, and the sum would not be exact any more."""
        return super()._get_base_layer_device_and_dtype(base_layer)[0], None

    @override
    def add(self, name: str, config: PartialConfig, tuner: AdapterTuner, key: str) -> None:
        self.inlay_partial_delta[name] = nn.ParameterDict(
            {
                leaf: nn.Parameter(torch.zeros_like(p, dtype=torch.float32) if config.init_weights else _draw_noise(p))
                for leaf, p in parameters_to_train(self.get_base_layer(), config)
            }
        )
        self.options[name] = config

    @override
    def merged_values(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """W + D of each trained parameter, the deltas of several adapters added first."""
        base = self.get_base_layer()
        total: dict[str, torch.Tensor] = {}
        for name in names:
            for leaf, delta in self.inlay_partial_delta[name].items():
                total[leaf] = total[leaf] + delta if leaf in total else delta
        return {
            leaf: (base._parameters[leaf] + delta).to(base._parameters[leaf].dtype) for leaf, delta in total.items()
        }


def _draw_noise(parameter: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(parameter, dtype=torch.float32).normal_(std=0.02)


def parameters_to_train(module: nn.Module, config: PartialConfig) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the module itself, not of its children, that are trained.

    Raises:
        InlayError: One is held in 8 or 4 bits.
    """
    if config.train == "norm" and not is_norm(module):
        return
    for leaf, parameter in module.named_parameters(recurse=False):
        if (config.train == "bias" and leaf != "bias") or leaf == "mask_token":  # that one is for pre-training
            continue
        if not parameter.is_floating_point():
            raise Unsupported(
                f"the {leaf} of a {type(module).__name__} is held in {parameter.dtype} and cannot be trained; use "
                'train="bias" or train="norm", or a base that is not quantised.'
            )
        yield leaf, parameter


class PartialModel(AdapterTuner):
    """The tuner of PartialConfig."""

    prefix = "inlay_partial_"
    tuner_layer_cls = PartialLayer

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """Names of the modules themselves, as the ones that a user gives may hold others."""
        if peft_config.target_modules is None:
            return super()._prepare_adapter_config(peft_config, model_config)
        given = [n for n, _ in self.model.named_modules() if n and self._check_target_module_exists(peft_config, n)]
        inside = tuple(f"{name}." for name in given)
        held = [n for n, _ in self.model.named_modules() if f"{n}.".startswith(inside)]
        names = self._with_parameters(peft_config, held)
        if not names:
            raise BadInput(f"no parameter to train in the modules that target_modules names: {given or 'none'}.")
        peft_config.target_modules = name_only(names, self.model)
        peft_config.layers_to_transform = None  # said by the names from here on
        return peft_config

    @override
    def targets(self, config: PartialConfig, found: Sites) -> Sequence[str]:
        names = [n for n, _ in self.model.named_modules() if n and n.split(".")[0] not in found.head]
        if config.last is not None:
            if config.last > len(found.blocks):
                raise BadInput(
                    f"last must be within 1 to {len(found.blocks)}, the number of blocks; got {config.last}."
                )
            first = names.index(found.blocks[-config.last])
            names = [
                n for n in names[first:] if f"{n}.".startswith(tuple(f"{b}." for b in found.blocks)) or n in found.norms
            ]
        names = self._with_parameters(config, [n for n in names if not is_unused(n, self.model, found)])
        if not names and config.train != "all":
            what = {"bias": "biases", "norm": "norms"}[config.train]
            raise Unsupported(
                f'{type(self.model).__name__} has no {what} to train; use train="all", or another method.'
            )
        return names

    def _with_parameters(self, config: PartialConfig, names: Sequence[str]) -> list[str]:
        """Those that have something to train; a parameter that two modules share stays as it is.

        So does the output projection of torch's MultiheadAttention, which reads its weight and never calls it.
        """
        shared = find_shared_parameters(self.model)
        names = [n for n in names if not isinstance(self.model.get_submodule(n.rpartition(".")[0]), MultiheadAttention)]
        found = []
        for name in names:
            parameters = [p for _, p in parameters_to_train(self.model.get_submodule(name), config)]
            if parameters and not any(id(p) in shared for p in parameters):
                found.append(name)
        return found


def is_unused(name: str, model: nn.Module, found: Sites) -> bool:
    """True for a module that the loss of plain fine-tuning does not depend on.

    That is attention to another model's states; SAM's prompt encoder, of which each kind of prompt uses another part;
    and what makes a pooled output that nothing reads: poolers of a bare backbone (one with a head has a pooler only if
    the head reads it, but for SigLIP's `head`) and CLIP's norm of the class token, unless for a joint space with text.
    """
    parts, children = name.split("."), dict(model.named_children())
    if is_cross(name) or (parts[0] in OTHER_INPUTS and parts[0] != "text_model"):
        return True
    if "text_model" in children or "visual_projection" in children:
        return False
    if "pooler" in parts:
        return not found.head
    clip = model.config.model_type in ("clip", "clip_vision_model") if hasattr(model, "config") else False
    return "head" in parts or (clip and parts[-1] == "post_layernorm")


def find_shared_parameters(model: nn.Module) -> set[int]:
    """Parameters that stand in two places, such as GPT-2's token embedding in its head."""
    seen: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                seen[id(parameter)] = seen.get(id(parameter), 0) + 1
    return {key for key, count in seen.items() if count > 1}


register_method("inlay_partial", PartialConfig, PartialModel)


def _bias_config(model: nn.Module, width: int) -> PartialConfig:
    """The biases of the whole model; of a text-to-image pipeline those of its denoiser."""
    config: Any = getattr(model, "config", None)
    return PartialConfig(train="bias", target_modules=[config.denoiser] if is_diffusion(config) else None)


LAST_BLOCK = Method(
    name="partial",
    paper=PEFT_TYPES["INLAY_PARTIAL"].paper,
    attaches="the last block",
    width="none: every weight",
    merges=True,
    kind="part",
    learning_rate=3e-3,
    config=lambda model, width: PartialConfig(last=1),
    bases=EVERY_BASE,
)
BIT_FIT = Method(
    name="bias",
    paper="Ben Zaken et al. 2022, arXiv:2106.10199",
    attaches="biases",
    width="none",
    merges=True,
    kind="part",
    learning_rate=1e-2,
    config=_bias_config,
    bases=(*EVERY_BASE, "diffusion"),
)
NORM = Method(
    name="norm",
    paper="Basu et al. 2024, arXiv:2304.01466",
    attaches="norms",
    width="none",
    merges=True,
    kind="part",
    learning_rate=1e-2,
    config=lambda model, width: PartialConfig(train="norm"),
    bases=EVERY_BASE,
)
ROWS = (LAST_BLOCK, BIT_FIT, NORM)

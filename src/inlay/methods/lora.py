"""LoRA and its variants, as peft has them: an update B·A of rank r, added to a weight.

Hu et al. 2021, arXiv:2106.09685. Here alpha is twice the rank.
"""

from peft import LoraConfig
from torch import nn

from inlay.bases.sites import is_linear, lora_targets
from inlay.errors import Unsupported
from inlay.methods.method import EVERY_BASE, MakeConfig, Method
from inlay.peft_types import PEFT_TYPES

_PEFT_LORA = PEFT_TYPES["LORA"]


def lora_config(**settings: object) -> MakeConfig:
    """A function that gives the LoraConfig of a model at a rank, with further settings of peft."""
    return lambda model, rank: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=lora_targets(model), **settings)


def _linear_config(init: str | bool) -> MakeConfig:
    """Only of linear layers: peft takes no singular vectors of the 1x1 convolution in SAM's neck."""

    def config(model: nn.Module, rank: int) -> LoraConfig:
        names = [name for name in lora_targets(model) if is_linear(model.get_submodule(name))]
        if not names:
            raise Unsupported(f"PiSSA starts from linear layers, and {type(model).__name__} has none; use lora.")
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, init_lora_weights=init)

    return config


LORA = Method(
    name="lora",
    paper=_PEFT_LORA.paper,
    attaches="linear layers, convolutions",
    width="rank r",
    merges=True,
    kind="update",
    learning_rate=3e-3,
    config=lora_config(),
    bases=(*EVERY_BASE, "diffusion"),
)
RSLORA = Method(
    name="rslora",
    paper=_PEFT_LORA.variants["use_rslora"].paper,
    attaches="linear layers, convolutions",
    width="rank r",
    merges=True,
    kind="update",
    learning_rate=3e-3,
    config=lora_config(use_rslora=True),
    bases=(*EVERY_BASE, "diffusion"),
)
DORA = Method(
    name="dora",
    paper=_PEFT_LORA.variants["use_dora"].paper,
    attaches="linear layers",
    width="rank r",
    merges=True,
    kind="update",
    learning_rate=3e-3,
    config=lora_config(use_dora=True),
    bases=("vision", "sam", "text", "diffusion"),
)
PISSA = Method(
    name="pissa",
    paper="Meng et al. 2024, arXiv:2404.02948",
    attaches="linear layers",
    width="rank r",
    merges=True,
    kind="update",
    learning_rate=3e-3,
    config=_linear_config("pissa"),
    skeleton_config=_linear_config(True),
)
ROWS = (LORA, RSLORA, DORA, PISSA)

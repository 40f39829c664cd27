"""(IA)³, as peft has it: a learned factor for each feature of the keys, the values and the MLP.

Liu et al. 2022, arXiv:2205.05638.
"""

from peft import IA3Config
from torch import nn

from inlay.bases.sites import sites
from inlay.methods.method import Method
from inlay.peft_types import PEFT_TYPES


def _ia3_config(model: nn.Module, width: int) -> IA3Config:
    found = sites(model)
    names = [*dict.fromkeys([*found.k, *found.v, *found.mlp_out])]
    return IA3Config(target_modules=names, feedforward_modules=list(found.mlp_out))


IA3 = Method(
    name="ia3",
    paper=PEFT_TYPES["IA3"].paper,
    attaches="keys, values, MLP",
    width="none: a factor per feature",
    merges=True,
    kind="scale",
    learning_rate=3e-2,
    config=_ia3_config,
)
ROWS = (IA3,)

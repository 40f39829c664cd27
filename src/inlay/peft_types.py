"""PEFT_TYPES: names and papers of the methods, by the peft_type in adapter_config.json.

This file does not import peft or torch, which takes seconds. `inlay info`, the index of a folder and `combine` can
therefore name a method at once. The rows of METHODS take their papers from here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A variant of a method that a setting of its config turns on.

    Attributes:
        name: Name on a card.
        paper: Authors, year and arXiv number.
    """

    name: str
    paper: str


@dataclass(frozen=True)
class PeftTypeFacts:
    """Name and paper of one peft_type.

    Attributes:
        name: Name of the method on a card.
        paper: Authors, year and arXiv number; empty if there is none.
        variants: Its variants, by the setting of the config that turns them on.
    """

    name: str
    paper: str = ""
    variants: Mapping[str, Variant] = field(default_factory=dict)


_PREFIX_PAPER = "Li & Liang 2021, arXiv:2101.00190"  # for both forms: peft's in the cache, inlay's in the attention

PEFT_TYPES = {
    "LORA": PeftTypeFacts(
        "LoRA",
        "Hu et al. 2021, arXiv:2106.09685",
        {
            "use_dora": Variant("DoRA", "Liu et al. 2024, arXiv:2402.09353"),
            "use_rslora": Variant("rsLoRA", "Kalajdzievski 2023, arXiv:2312.03732"),
        },
    ),
    "IA3": PeftTypeFacts("IA3", "Liu et al. 2022, arXiv:2205.05638"),
    "PREFIX_TUNING": PeftTypeFacts("Prefix tuning", _PREFIX_PAPER),
    "PROMPT_TUNING": PeftTypeFacts("Prompt tuning", "Lester et al. 2021, arXiv:2104.08691"),
    "INLAY_BOTTLENECK": PeftTypeFacts(
        "Bottleneck",
        "Houlsby et al. 2019, arXiv:1902.00751",
        {"channel_scale": Variant("Adapter+", "Steitz & Roth 2024, arXiv:2406.06820")},
    ),
    "INLAY_ATTENTION_PREFIX": PeftTypeFacts("Attention prefix", _PREFIX_PAPER),
    "INLAY_VISUAL_PROMPT": PeftTypeFacts("Visual prompt", "Jia et al. 2022, arXiv:2203.12119"),
    "INLAY_CONV_LORA": PeftTypeFacts("Convolutional LoRA", "Yeh et al. 2023, arXiv:2309.14859"),
    "INLAY_PARTIAL": PeftTypeFacts("Partial fine-tuning", "Yosinski et al. 2014, arXiv:1411.1792"),
    "INLAY_SSF": PeftTypeFacts("SSF", "Lian et al. 2022, arXiv:2210.08823"),
    "INLAY_CONVPASS": PeftTypeFacts("ConvPass", "Jie & Deng 2022, arXiv:2207.07039"),
    "INLAY_CONV_ADAPTER": PeftTypeFacts("Conv-Adapter", "Chen et al. 2022, arXiv:2208.07463"),
    "INLAY_SPATIAL3D": PeftTypeFacts("3D spatial", "Gong et al. 2023, arXiv:2306.13465"),
    "INLAY_COMPOSITE": PeftTypeFacts("Composite"),
}


def has_factors(weight: tuple[int, ...], groups: int, rank: int) -> bool:
    """True where LoRA on convolutions has factors in a layer: they hold fewer numbers than its weight.

    Args:
        weight: The shape of the weight, (d_out, d_in / groups, k, k).
        groups: Of the convolution.
        rank: Of the update of each group.
    """
    outputs, inputs = weight[0], math.prod(weight[1:])
    return rank * (groups * inputs + outputs) < outputs * inputs


# Initialisations of LoRA that move a part of the base's weights into the adapter. Such an adapter is wrong on the
# unchanged base. Some names end with a number: `pissa_niter_16`.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def base_changing_init(config: Mapping[str, Any]) -> str | None:
    """The initialisation in a method's config if it changes the base's weights, else None."""
    init = config.get("init_lora_weights")
    return init if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS) else None

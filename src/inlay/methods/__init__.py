"""METHODS: the ways to adapt a model, ours and peft's, in one table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from inlay.bases.sites import is_linear, lora_targets, sites
from inlay.methods._peft import mirror_convolutions
from inlay.methods.attention_prefix import AttentionPrefixConfig
from inlay.methods.bottleneck import BottleneckConfig
from inlay.methods.composite import CompositeConfig
from inlay.methods.partial import PartialConfig
from inlay.methods.spatial.adapter import SpatialAdapterConfig
from inlay.methods.visual_prompt import VisualPromptConfig

__all__ = [
    "METHODS",
    "AttentionPrefixConfig",
    "BottleneckConfig",
    "CompositeConfig",
    "Method",
    "PartialConfig",
    "SpatialAdapterConfig",
    "VisualPromptConfig",
]


mirror_convolutions()


@dataclass(frozen=True)
class Method:
    """One row of METHODS.

    Attributes:
        paper: Where it comes from.
        attaches: To what.
        width: What its width is, in the words of the method.
        merges: True if it folds into the base's weights.
        learning_rate: A rate that suits it on a small task, where a recipe gives none.
        config: Takes a model of transformers and a width; gives peft's config, or None where nothing is added.
        bases: On what it works: vision (token sequences), sam, conv (MobileNets, ResNets ...), text, volume
            (SAM on scans).
    """

    paper: str
    attaches: str
    width: str
    merges: bool
    learning_rate: float
    config: Callable[[nn.Module, int], PeftConfig | None]
    bases: Sequence[str] = ("vision", "sam", "text")

    def adapt(self, model: nn.Module, width: int) -> nn.Module:
        """The frozen `model` with what is to be trained: the adapter, and the head of a classifier."""
        config = self.config(model, width)
        head = [] if _writes_text(model) or hasattr(model, "mask_decoder") else list(sites(model).head)
        if config is None:
            for name in head if self is METHODS["probe"] else [""]:
                model.get_submodule(name).requires_grad_(True)
            return model
        config.modules_to_save = head or None
        return get_peft_model(model, config)


def _writes_text(model: nn.Module) -> bool:
    get = getattr(model, "get_output_embeddings", None)
    return get is not None and get() is not None


def _lora(**settings: object) -> Callable[[nn.Module, int], PeftConfig]:
    return lambda model, width: LoraConfig(
        r=width, lora_alpha=2 * width, target_modules=lora_targets(model), **settings
    )


def _pissa(model: nn.Module, width: int) -> PeftConfig:
    """Peft's takes the singular vectors of linear layers alone, not of the 1x1 convolution in SAM's neck."""
    names = [name for name in lora_targets(model) if is_linear(model.get_submodule(name))]
    return LoraConfig(r=width, lora_alpha=2 * width, target_modules=names, init_lora_weights="pissa")


def _ia3(model: nn.Module, width: int) -> PeftConfig:
    found = sites(model)
    names = [*dict.fromkeys([*found.k, *found.v, *found.mlp_out])]
    return IA3Config(target_modules=names, feedforward_modules=list(found.mlp_out))


def _prompt(model: nn.Module, width: int) -> PeftConfig:
    return PromptTuningConfig(task_type=_task(model), num_virtual_tokens=width)


def _prefix(model: nn.Module, width: int) -> PeftConfig:
    return PrefixTuningConfig(task_type=_task(model), num_virtual_tokens=width)


def _task(model: nn.Module) -> str:
    return "CAUSAL_LM" if _writes_text(model) else "SEQ_CLS"


def _mam(model: nn.Module, width: int) -> PeftConfig:
    parallel = BottleneckConfig(width=width, sites=["mlp"], placement="parallel", scale=4.0)
    return CompositeConfig(parts=[AttentionPrefixConfig(length=width), parallel])


def _lora_prompt(model: nn.Module, width: int) -> PeftConfig:
    return CompositeConfig(parts=[_lora()(model, width), VisualPromptConfig(length=width)])


_ALL = ("vision", "sam", "conv", "text")
METHODS = {
    "probe": Method(
        "Alain & Bengio 2016, arXiv:1610.01644", "nothing: the head is trained", "none", True, 1e-2,
        lambda model, width: None, ("vision", "conv"),
    ),
    "lora": Method(
        "Hu et al. 2021, arXiv:2106.09685", "linear layers, 1x1 convolutions", "rank r", True, 3e-3,
        _lora(), _ALL,
    ),
    "rslora": Method(
        "Kalajdzievski 2023, arXiv:2312.03732", "linear layers, 1x1 convolutions", "rank r", True, 3e-3,
        _lora(use_rslora=True), _ALL,
    ),
    "dora": Method(
        "Liu et al. 2024, arXiv:2402.09353", "linear layers", "rank r", True, 3e-3,
        _lora(use_dora=True),
    ),
    "pissa": Method(
        "Meng et al. 2024, arXiv:2404.02948", "linear layers", "rank r", True, 3e-3,
        _pissa,
    ),
    "ia3": Method(
        "Liu et al. 2022, arXiv:2205.05638", "keys, values, MLP", "none: a factor per feature", True, 3e-2,
        _ia3,
    ),
    "bottleneck": Method(
        "Houlsby et al. 2019, arXiv:1902.00751", "after attention and MLP", "bottleneck size", False, 1e-2,
        lambda model, width: BottleneckConfig(width=width),
    ),
    "bottleneck-mlp": Method(
        "Pfeiffer et al. 2020, arXiv:2005.00052", "after the MLP", "bottleneck size", False, 1e-2,
        lambda model, width: BottleneckConfig(width=width, sites=["mlp"]), _ALL,
    ),
    "bottleneck-parallel": Method(
        "He et al. 2021, arXiv:2110.04366", "beside the MLP", "bottleneck size", False, 1e-2,
        lambda model, width: BottleneckConfig(width=width, sites=["mlp"], placement="parallel", scale=4.0),
    ),
    "bottleneck-linear": Method(
        "Luo et al. 2023, arXiv:2302.08106", "after attention and MLP", "bottleneck size", True, 1e-2,
        lambda model, width: BottleneckConfig(width=width, activation=None),
    ),
    "visual-prompt": Method(
        "Jia et al. 2022, arXiv:2203.12119, deep", "every block", "prompt length", False, 3e-2,
        lambda model, width: VisualPromptConfig(length=width), ("vision", "sam"),
    ),
    "visual-prompt-shallow": Method(
        "Jia et al. 2022, arXiv:2203.12119", "the first block", "prompt length", False, 3e-2,
        lambda model, width: VisualPromptConfig(length=width, deep=False), ("vision",),
    ),
    "attention-prefix": Method(
        "Li & Liang 2021, arXiv:2101.00190", "attention", "prefix length", False, 5e-2,
        lambda model, width: AttentionPrefixConfig(length=width),
    ),
    "prompt": Method(
        "Lester et al. 2021, arXiv:2104.08691", "input embeddings", "prompt length", False, 3e-2,
        _prompt, ("text",),
    ),
    "prefix": Method(
        "Li & Liang 2021, arXiv:2101.00190", "the cache of keys and values", "prefix length", False, 1e-2,
        _prefix, ("text",),
    ),
    "partial": Method(
        "Yosinski et al. 2014, arXiv:1411.1792", "the last block", "none: every weight", True, 3e-3,
        lambda model, width: PartialConfig(last=1), _ALL,
    ),
    "bias": Method(
        "Ben Zaken et al. 2022, arXiv:2106.10199", "biases", "none", True, 1e-2,
        lambda model, width: PartialConfig(train="bias"), _ALL,
    ),
    "norm": Method(
        "Basu et al. 2024, arXiv:2304.01466", "norms", "none", True, 1e-2,
        lambda model, width: PartialConfig(train="norm"), _ALL,
    ),
    "mam": Method(
        "He et al. 2021, arXiv:2110.04366, section 4.6", "attention, and beside the MLP",
        "prefix length, bottleneck size", False, 1e-2, _mam,
    ),
    "lora-prompt": Method(
        "Hu et al. 2021 and Jia et al. 2022", "linear layers and every block", "rank r, prompt length", False, 3e-3,
        _lora_prompt, ("vision", "sam"),
    ),
    "spatial": Method(
        "Gong et al. 2023, arXiv:2306.13465", "SAM's encoder, for volumes", "bottleneck size", False, 1e-3,
        lambda model, width: SpatialAdapterConfig(width=width), ("volume",),
    ),
    "full": Method(
        "full fine-tuning, for comparison", "everything", "none: every weight", True, 1e-3,
        lambda model, width: None, _ALL,
    ),
}  # fmt: skip

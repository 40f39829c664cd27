"""METHODS: the ways to adapt a model, in one table."""

from collections.abc import Callable
from dataclasses import dataclass

from peft import LoraConfig, get_peft_model
from torch import nn

from inlay.arch import head_modules, lora_targets


@dataclass(frozen=True)
class Method:
    """One row of METHODS.

    Attributes:
        paper: Where it comes from.
        width: What its width is, in the words of the method.
        merges: True if it folds into the base's weights without loss.
        learning_rate: A rate that suits it on a small task, where a recipe gives none.
        adapt: Takes a frozen transformers model with a new head and a width; gives the model to train.
    """

    paper: str
    width: str
    merges: bool
    learning_rate: float
    adapt: Callable[[nn.Module, int], nn.Module]


def _lora(model: nn.Module, width: int) -> nn.Module:
    config = LoraConfig(
        r=width, lora_alpha=2 * width, target_modules=lora_targets(model), modules_to_save=head_modules(model)
    )
    return get_peft_model(model, config)


def _probe(model: nn.Module, width: int) -> nn.Module:
    for name in head_modules(model):
        model.get_submodule(name).requires_grad_(True)
    return model


def _full(model: nn.Module, width: int) -> nn.Module:
    return model.requires_grad_(True)


METHODS = {
    "probe": Method("Alain & Bengio 2016, arXiv:1610.01644", "none: the head alone", True, 1e-2, _probe),
    "lora": Method("Hu et al. 2021, arXiv:2106.09685", "rank r", True, 3e-3, _lora),
    "full": Method("full fine-tuning, for comparison", "none: every weight", True, 1e-3, _full),
}

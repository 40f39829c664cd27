"""Method: what a row of METHODS says, and how it adapts a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peft import PeftConfig, get_peft_model
from torch import nn

from inlay.bases.batch_norm import freeze_statistics
from inlay.bases.diffusion.config import is_diffusion
from inlay.bases.load import is_headless
from inlay.bases.sites import sites

MakeConfig = Callable[[nn.Module, int], PeftConfig | None]  # of a model of transformers and a width
EVERY_BASE = ("vision", "sam", "conv", "text")
Kind = Literal["baseline", "update", "scale", "adapter", "prompt", "part", "composite"]


@dataclass(frozen=True)
class Method:
    """One row of METHODS, which stands in the file of its method.

    Attributes:
        name: As a user calls it.
        paper: Where it comes from.
        attaches: To what.
        width: What its width is, in the words of the method.
        merges: True if it folds into the base's weights.
        kind: A baseline adds nothing. Of the others: a low-rank update of weights, a scale of features, an adapter
            module, prompts (tokens, or keys and values), a part of the base's own weights, or several of these.
        learning_rate: A rate that suits it on a small task, where a recipe gives none.
        config: Takes a model of transformers and a width; gives peft's config, or None where nothing is added.
        bases: On what it works: vision (token sequences), sam, conv (MobileNets, ResNets ...), text, volume
            (SAM on scans), diffusion (text-to-image pipelines).
        trains: What is trained: the adapter and the head of a classifier, the head without an adapter, or the whole
            model (of a text-to-image pipeline the denoiser).
        skeleton_config: Of a method that starts from the base's weights, and moves a part of them into the adapter: a
            config of the same shapes for a base that has none (on the meta device). None for all others.
    """

    name: str
    paper: str
    attaches: str
    width: str
    merges: bool
    kind: Kind
    learning_rate: float
    config: MakeConfig
    bases: Sequence[str] = ("vision", "sam", "text")
    trains: Literal["adapter", "head", "model"] = "adapter"
    skeleton_config: MakeConfig | None = None

    @property
    def starts_from_weights(self) -> bool:
        """True where the adapter's first values are taken out of the base's weights."""
        return self.skeleton_config is not None

    def adapt(self, model: nn.Module, width: int) -> nn.Module:
        """The frozen `model` with what is to be trained: the adapter, and the head of a classifier.

        The running statistics of its batch norms stay what they are (`freeze_statistics`), full fine-tuning included.
        """
        return self.attach(model, self.make_config(model, width))

    def make_config(self, model: nn.Module, width: int) -> PeftConfig | None:
        """peft's config of this method for a model, with the head of a classifier; None where nothing is added."""
        bare = next(model.parameters()).is_meta
        config = (self.skeleton_config if bare and self.skeleton_config else self.config)(model, width)
        if config is not None:
            config.modules_to_save = _find_trained_head(model) or None
        return config

    def attach(self, model: nn.Module, config: PeftConfig | None) -> nn.Module:
        """The second half of `adapt`, with a config of `make_config`."""
        freeze_statistics(model)
        if config is not None:
            return get_peft_model(model, config)
        for name in _find_trained_head(model) if self.trains == "head" else [_find_trained_part(model)]:
            model.get_submodule(name).requires_grad_(True)
        return model


def _find_trained_head(model: nn.Module) -> list[str]:
    """Names of the head that belongs to a task, and is trained with every method."""
    headless = writes_text(model) or is_headless(getattr(model, "config", None))
    return [] if headless else list(sites(model).head)


def _find_trained_part(model: nn.Module) -> str:
    """Name of what full fine-tuning trains; empty: the whole model."""
    config: Any = getattr(model, "config", None)
    return str(config.denoiser) if is_diffusion(config) else ""


def writes_text(model: nn.Module) -> bool:
    """True for a language model: its output projection belongs to the base and is no head of a task."""
    get = getattr(model, "get_output_embeddings", None)
    return get is not None and get() is not None

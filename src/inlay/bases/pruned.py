"""Models whose inner widths differ from layer to layer, and the class for a model that was narrowed.

Where a config of transformers can say the widths, such as one `intermediate_size` for all layers, its own classes load
the model. Otherwise the classes here do: each is one of transformers, narrowed to the `widths` of its config when it is
made. This module registers them with the Auto classes; it is imported when one of their configs is made.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    DeiTForImageClassification,
    Dinov2ForImageClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ViTForImageClassification,
)
from transformers.models.mobilenet_v2.modeling_mobilenet_v2 import make_divisible

from inlay.bases.pruned_configs import (
    PrunedBertConfig,
    PrunedDeiTConfig,
    PrunedDinov2Config,
    PrunedGPT2Config,
    PrunedLlamaConfig,
    PrunedMobileNetV2Config,
    PrunedViTConfig,
)
from inlay.bases.widths import Group, find_family, find_groups, narrow
from inlay.errors import Unsupported

Widths = dict[str, list[int]]  # by kind, of each layer in running order


class _Narrowed:
    """Comes before a class of transformers, whose config has `widths`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        set_widths(self, config.widths or {})


class PrunedViTForImageClassification(_Narrowed, ViTForImageClassification):
    """ViTForImageClassification with the widths of its config."""

    config_class = PrunedViTConfig


class PrunedDeiTForImageClassification(_Narrowed, DeiTForImageClassification):
    """DeiTForImageClassification with the widths of its config."""

    config_class = PrunedDeiTConfig


class PrunedDinov2ForImageClassification(_Narrowed, Dinov2ForImageClassification):
    """Dinov2ForImageClassification with the widths of its config."""

    config_class = PrunedDinov2Config


class PrunedMobileNetV2ForImageClassification(_Narrowed, MobileNetV2ForImageClassification):
    """MobileNetV2ForImageClassification with the widths of its config."""

    config_class = PrunedMobileNetV2Config


class PrunedGPT2LMHeadModel(_Narrowed, GPT2LMHeadModel):
    """GPT2LMHeadModel with the widths of its config."""

    config_class = PrunedGPT2Config


class PrunedGPT2ForSequenceClassification(_Narrowed, GPT2ForSequenceClassification):
    """GPT2ForSequenceClassification with the widths of its config."""

    config_class = PrunedGPT2Config


class PrunedLlamaForCausalLM(_Narrowed, LlamaForCausalLM):
    """LlamaForCausalLM with the widths of its config."""

    config_class = PrunedLlamaConfig


class PrunedLlamaForSequenceClassification(_Narrowed, LlamaForSequenceClassification):
    """LlamaForSequenceClassification with the widths of its config."""

    config_class = PrunedLlamaConfig


class PrunedBertForSequenceClassification(_Narrowed, BertForSequenceClassification):
    """BertForSequenceClassification with the widths of its config."""

    config_class = PrunedBertConfig


_CLASSES: dict[type, list[tuple[Any, type]]] = {
    PrunedViTConfig: [(AutoModelForImageClassification, PrunedViTForImageClassification)],
    PrunedDeiTConfig: [(AutoModelForImageClassification, PrunedDeiTForImageClassification)],
    PrunedDinov2Config: [(AutoModelForImageClassification, PrunedDinov2ForImageClassification)],
    PrunedMobileNetV2Config: [(AutoModelForImageClassification, PrunedMobileNetV2ForImageClassification)],
    PrunedGPT2Config: [
        (AutoModelForCausalLM, PrunedGPT2LMHeadModel),
        (AutoModelForSequenceClassification, PrunedGPT2ForSequenceClassification),
    ],
    PrunedLlamaConfig: [
        (AutoModelForCausalLM, PrunedLlamaForCausalLM),
        (AutoModelForSequenceClassification, PrunedLlamaForSequenceClassification),
    ],
    PrunedBertConfig: [(AutoModelForSequenceClassification, PrunedBertForSequenceClassification)],
}
for _config, _models in _CLASSES.items():
    for _auto, _model in _models:
        _auto.register(_config, _model)


def read_widths(model: Any) -> Widths:
    """How many units each layer of a model has, by their kind."""
    widths: Widths = {}
    for group in find_groups(model):
        widths.setdefault(group.kind, []).append(group.units)
    return widths


def set_widths(model: PreTrainedModel, widths: Widths) -> None:
    """Leave out the last units of each layer, in place: the structure of a model that is about to get its weights.

    Raises:
        InlayError: There are widths for more layers than the model has, or for fewer.
    """
    groups = find_groups(model, widths) if widths else []
    counts = {kind: [group for group in groups if group.kind == kind] for kind in widths}
    if any(len(found) != len(widths[kind]) for kind, found in counts.items()):
        raise Unsupported(f"the config's widths {widths} are not those of the {len(groups)} layers of the model.")
    narrow(
        model,
        {
            group.name: torch.arange(width, device="cpu")
            for kind, found in counts.items()
            for group, width in zip(found, widths[kind], strict=True)
        },
    )


def adopt_config(narrowed: PreTrainedModel) -> PreTrainedModel:
    """A narrowed model as one whose class and config have its widths, with the same weights.

    Raises:
        InlayError: Its layers have different widths, and there is no class for such a model with its head.
    """
    model = _with_class_of_widths(narrowed)
    model.load_state_dict(narrowed.state_dict())
    model.to(next(narrowed.parameters()).device)
    model.requires_grad_(False).eval()
    return model


def new_with_widths(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class, config and widths, with new weights from torch's global generator."""
    return _with_class_of_widths(model)


def _with_class_of_widths(model: PreTrainedModel) -> PreTrainedModel:
    kind, stock = find_family(model), _stock_class(model)
    settings = {key: value for key, value in model.config.to_dict().items() if key not in ("widths", "model_type")}
    changes = CONFIGS[kind](model, find_groups(model))
    cls, config_class, more = stock, stock.config_class, changes
    if changes is None:
        config_class, cls = _pruned_class(stock)
        more = {"widths": read_widths(model)}
    made = cls(config_class.from_dict({**settings, **(more or {})}))
    made.config.architectures = [cls.__name__]
    return made


def is_stock(model: PreTrainedModel) -> bool:
    """True where transformers has the class of the model, and loads it without inlay."""
    return type(model).__module__.startswith("transformers.")


def _stock_class(model: PreTrainedModel) -> Any:
    """The class of transformers behind that of a model."""
    cls = type(model)
    return next(base for base in cls.__mro__[1:] if base is not _Narrowed) if issubclass(cls, _Narrowed) else cls


def _pruned_class(stock: Any) -> tuple[Any, Any]:
    """The config and the class here that stand for a class of transformers."""
    for config, models in _CLASSES.items():
        for _, model in models:
            if issubclass(model, stock):
                return config, model
    raise Unsupported(
        f"the layers of this {stock.__name__} would have different widths, which its config cannot say; prune each "
        "layer by the same share (scope='local')."
    )


def even_widths(model: PreTrainedModel, groups: Sequence[Group], share: float) -> dict[str, int]:
    """The width of each group when all keep about the same share, of at least one unit, such as one config can say."""
    if find_family(model) == "mobilenet_v2":
        ratio = model.config.expand_ratio * share
        return {group.name: min(group.units, _expanded(model, group, ratio)) for group in groups}
    return {group.name: max(1, round(group.units * share)) for group in groups}


def _expanded(model: PreTrainedModel, group: Group, ratio: float) -> int:
    """Expansion channels of a block. Source: MobileNetV2InvertedResidual of transformers."""
    inputs = model.get_submodule(group.made[0].module).in_channels
    return make_divisible(round(inputs * ratio), model.config.depth_divisible_by, model.config.min_depth)


# What a config of transformers says of the widths of a model, as changes of its own; None where it cannot.


def _one_value(groups: Sequence[Group], kind: str) -> int | None:
    counts = {group.units for group in groups if group.kind == kind}
    return counts.pop() if len(counts) == 1 else None


def _vit(model: Any, groups: Sequence[Group]) -> dict[str, Any] | None:
    """ViT and DeiT read a `head_dim` where the config has one, so that there may be fewer heads."""
    mlp, heads = _one_value(groups, "mlp"), _one_value(groups, "heads")
    if mlp is None or heads is None:
        return None
    return {"intermediate_size": mlp, **_fewer_heads(model.config, heads)}


def _fewer_heads(config: Any, heads: int) -> dict[str, Any]:
    if heads == config.num_attention_heads:
        return {}
    return {"num_attention_heads": heads, "head_dim": _head_dim(config)}


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _dinov2(model: Any, groups: Sequence[Group]) -> dict[str, Any] | None:
    """The width of its MLP is a whole multiple of the model's; where that is gated, the config does not have it."""
    mlp, heads, config = _one_value(groups, "mlp"), _one_value(groups, "heads"), model.config
    if mlp is None or heads is None or config.use_swiglu_ffn or mlp % config.hidden_size:
        return None
    return {"mlp_ratio": mlp // config.hidden_size, **_fewer_heads(config, heads)}


def _gpt2(model: Any, groups: Sequence[Group]) -> dict[str, Any] | None:
    """The size of its heads is the width divided by their number, so that there cannot be fewer."""
    mlp, heads = _one_value(groups, "mlp"), _one_value(groups, "heads")
    return None if mlp is None or heads != model.config.num_attention_heads else {"n_inner": mlp}


def _bert(model: Any, groups: Sequence[Group]) -> dict[str, Any] | None:
    mlp, heads = _one_value(groups, "mlp"), _one_value(groups, "heads")
    return None if mlp is None or heads != model.config.num_attention_heads else {"intermediate_size": mlp}


def _llama(model: Any, groups: Sequence[Group]) -> dict[str, Any] | None:
    mlp, shared, config = _one_value(groups, "mlp"), _one_value(groups, "heads"), model.config
    if mlp is None or shared is None:
        return None
    heads = shared * config.num_attention_heads // config.num_key_value_heads
    return {
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": _head_dim(config),
    }


def _mobilenet_v2(model: Any, groups: Sequence[Group]) -> dict[str, Any] | None:
    """One `expand_ratio` for all blocks, where one gives these widths: of all that matter the first that does."""
    steps = max(group.units for group in groups)
    largest = max(group.units / model.get_submodule(group.made[0].module).in_channels for group in groups) + 1
    for ratio in [model.config.expand_ratio, *(largest * step / (8 * steps) for step in range(1, 8 * steps))]:
        if all(_expanded(model, group, ratio) == group.units for group in groups):
            return {"expand_ratio": ratio}
    return None


def _squeezenet(model: Any, groups: Sequence[Group]) -> dict[str, Any]:
    """The networks of inlay have a width of each block in their configs."""
    blocks = [model.get_submodule(group.name.rpartition(".")[0]) for group in groups if group.kind == "squeeze"]
    layers = ("squeeze", "expand1x1", "expand3x3")
    return {f"{layer}_channels": [getattr(block, layer).out_channels for block in blocks] for layer in layers}


def _shufflenet_v1(model: Any, groups: Sequence[Group]) -> dict[str, Any]:
    blocks = model.base_model.blocks
    return {"bottleneck_channels": [block.conv_3x3.convolution.out_channels for block in blocks]}


def _shufflenet_v2(model: Any, groups: Sequence[Group]) -> dict[str, Any]:
    return {"branch_channels": [block.conv_3x3.convolution.out_channels for block in model.base_model.blocks]}


CONFIGS: dict[str, Callable[[Any, Sequence[Group]], dict[str, Any] | None]] = {
    "vit": _vit,
    "deit": _vit,
    "dinov2": _dinov2,
    "gpt2": _gpt2,
    "bert": _bert,
    "llama": _llama,
    "mobilenet_v2": _mobilenet_v2,
    "squeezenet": _squeezenet,
    "shufflenet_v1": _shufflenet_v1,
    "shufflenet_v2": _shufflenet_v2,
}

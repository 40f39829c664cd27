"""The inner widths of a model: which units it has between two layers, and how it is made narrower by leaving some out.

A unit is what one layer computes and only the next layer reads: a unit of an MLP, a head of attention, a channel
between the expansion and the reduction of a MobileNetV2. Nothing outside the two layers changes its shape, so no graph
of dependencies is needed.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from inlay.bases.pruned_configs import PRUNED
from inlay.bases.sites import Sites, sites
from inlay.errors import BadInput, Unsupported


@dataclass(frozen=True)
class Part:
    """Where the units of a group stand in one module.

    Attributes:
        module: Its name in the model.
        side: `out`: the units are what it computes; `in`: what it reads.
        places: Of each unit, along that side of the weight; (units, places of a unit). What a grouped convolution reads
            are the places in each group.
    """

    module: str
    side: str
    places: Tensor


@dataclass(frozen=True)
class Group:
    """Units of one layer, each of which can be left out.

    Attributes:
        name: Unique in the model, such as `vit.layers.0.mlp`.
        kind: mlp, heads, expansion, squeeze, expand1x1, expand3x3 or branch.
        made: The modules that compute the units, and what is between them and the readers, such as a BatchNorm.
        read: The modules that read them.
        attention: The module whose count of heads changes with the units; empty where there is none.
    """

    name: str
    kind: str
    made: tuple[Part, ...]
    read: tuple[Part, ...]
    attention: str = ""

    @property
    def units(self) -> int:
        """How many there are."""
        return len(self.made[0].places)


def find_groups(model: nn.Module, kinds: Iterable[str] = ()) -> list[Group]:
    """All groups of a model, or those of some kinds, in running order.

    Args:
        model: A transformers model of one of FAMILIES, without an adapter in it, narrowed or not.
        kinds: Of `Group.kind`; none: all that the model has.

    Raises:
        InlayError: A model of another family, or one without units of these kinds.
    """
    kind = find_family(model)
    found = FAMILIES[kind](model)
    has = list(dict.fromkeys(group.kind for group in found))
    unknown = [each for each in kinds if each not in has]
    if unknown or not found:
        raise BadInput(
            f"{type(model).__name__} ({kind}) has no units of the kind {', '.join(unknown)}; it has {', '.join(has)}."
            if unknown
            else f"{type(model).__name__} ({kind}) has no units that could be left out."
        )
    return [group for group in found if not kinds or group.kind in set(kinds)]


def find_family(model: nn.Module) -> str:
    """The row of FAMILIES that fits a model.

    Raises:
        InlayError: None does.
    """
    kind = str(getattr(getattr(model, "config", None), "model_type", "no model_type"))
    family = kind.removesuffix(PRUNED)
    if family not in FAMILIES:
        raise Unsupported(
            f"the inner widths of {type(model).__name__} ({kind}) are not known here; take one of "
            f"{', '.join(FAMILIES)}."
        )
    return family


def _rows(count: int, each: int = 1, offset: int = 0) -> Tensor:
    """The places of `count` units of `each` neighbours, from `offset` on."""
    return torch.arange(count * each, device="cpu").view(count, each) + offset


def _mlps(model: nn.Module, found: Sites) -> list[Group]:
    groups = []
    gates = len(found.mlp_in) // len(found.blocks)  # a gated MLP has two layers in front
    for i, out in enumerate(found.mlp_out):
        places = _rows(_width(model.get_submodule(out), "in"))
        into = [Part(name, "out", places) for name in found.mlp_in[i * gates : (i + 1) * gates]]
        groups.append(Group(f"{found.blocks[i]}.mlp", "mlp", tuple(into), (Part(out, "in", places),)))
    return groups


def _heads(model: nn.Module, found: Sites) -> list[Group]:
    """Heads of attention; where several heads of queries share keys and values (Llama), these together are a unit."""
    groups = []
    for i, attention in enumerate(found.attention):
        layer = model.get_submodule(attention)
        dim = getattr(layer, "head_dim", None) or layer.attention_head_size
        out = found.out[i]
        wide = _width(model.get_submodule(out), "in")  # heads of queries times their size
        q, k, v = found.q[i], found.k[i], found.v[i]
        if found.fused:
            heads = wide // dim
            fused = torch.cat([_rows(heads, dim, part * wide) for part in range(3)], 1)
            made: tuple[Part, ...] = (Part(q, "out", fused),)
        else:
            heads = _width(model.get_submodule(k), "out") // dim
            made = (
                Part(q, "out", _rows(heads, wide // heads)),
                Part(k, "out", _rows(heads, dim)),
                Part(v, "out", _rows(heads, dim)),
            )
        read = (Part(out, "in", _rows(heads, wide // heads)),)
        groups.append(Group(f"{found.blocks[i]}.heads", "heads", made, read, attention))
    return groups


def _transformer(model: nn.Module) -> list[Group]:
    found = sites(model)
    pairs = zip(_heads(model, found), _mlps(model, found), strict=True)
    return [group for pair in pairs for group in pair]


def _mobilenet_v2(model: nn.Module) -> list[Group]:
    """Expansion channels: 1x1 up, BatchNorm, depth-wise 3x3, BatchNorm, 1x1 down. Those of the stem are left as is."""
    groups = []
    for name, module in model.named_modules():
        if hasattr(module, "reduce_1x1") and hasattr(module, "expand_1x1") and not hasattr(module, "first_conv"):
            layers = [f"{name}.{layer}" for layer in ("expand_1x1", "conv_3x3")]
            places = _rows(_width(model.get_submodule(f"{name}.reduce_1x1.convolution"), "in"))
            made = [Part(f"{layer}.{part}", "out", places) for layer in layers for part in _CONV_LAYER]
            read = Part(f"{name}.reduce_1x1.convolution", "in", places)
            groups.append(Group(f"{name}.expansion", "expansion", tuple(made), (read,)))
    return groups


_CONV_LAYER = ("convolution", "normalization")


def _blocks(model: nn.Module) -> list[str]:
    """Names of the blocks of one of `inlay.bases.networks`."""
    prefix = model.base_model_prefix
    start = f"{prefix}.blocks." if hasattr(model, prefix) else "blocks."
    return [name for name, _ in model.named_modules() if name.startswith(start) and name.count(".") == start.count(".")]


def _squeezenet(model: nn.Module) -> list[Group]:
    """Squeeze channels, and those expanded ones that the next fire module squeezes; the last are the head's input."""
    groups, blocks = [], _blocks(model)
    for i, block in enumerate(blocks):
        squeezed = _rows(_width(model.get_submodule(f"{block}.squeeze"), "out"))
        read = [Part(f"{block}.{expand}", "in", squeezed) for expand in ("expand1x1", "expand3x3")]
        groups.append(Group(f"{block}.squeeze", "squeeze", (Part(f"{block}.squeeze", "out", squeezed),), tuple(read)))
        offset = 0
        for expand in ("expand1x1", "expand3x3") if i + 1 < len(blocks) else ():
            count = _width(model.get_submodule(f"{block}.{expand}"), "out")
            made, into = Part(f"{block}.{expand}", "out", _rows(count)), f"{blocks[i + 1]}.squeeze"
            groups.append(Group(made.module, expand, (made,), (Part(into, "in", _rows(count, 1, offset)),)))
            offset += count
    return groups


def _shufflenet_v1(model: nn.Module) -> list[Group]:
    """Inner channels. The shuffle hands each group of the second 1x1 as many channels of each group of the first.

    To keep that so, a unit is one channel of each such pair: g² for g groups. Blocks whose inner channels of a group
    cannot be divided by g are left whole.
    """
    found = []
    for block in _blocks(model):
        unit, read = model.get_submodule(block), f"{block}.expand_1x1.convolution"
        g, each = unit.groups, _width(model.get_submodule(read), "in")  # channels of a group
        if each % g:
            continue
        units = each // g
        j, a, b = torch.meshgrid(*(torch.arange(n, device="cpu") for n in (units, g, g)), indexing="ij")
        i = b * units + j  # in its group of the first convolution, of which it is the a-th
        before, after = (a * each + i).flatten(1), (i * g + a).flatten(1)  # the shuffle moves it so
        made = [Part(f"{block}.reduce_1x1.{part}", "out", before) for part in _CONV_LAYER]
        made += [Part(f"{block}.conv_3x3.{part}", "out", after) for part in _CONV_LAYER]
        found.append(Group(f"{block}.branch", "branch", tuple(made), (Part(read, "in", _rows(units, g)),)))
    return found


def _shufflenet_v2(model: nn.Module) -> list[Group]:
    """Inner channels of the branch that is computed."""
    found = []
    for block in _blocks(model):
        read = f"{block}.last_1x1.convolution"
        places = _rows(_width(model.get_submodule(read), "in"))
        layers = [f"{block}.{layer}.{part}" for layer in ("first_1x1", "conv_3x3") for part in _CONV_LAYER]
        made = tuple(Part(layer, "out", places) for layer in layers)
        found.append(Group(f"{block}.branch", "branch", made, (Part(read, "in", places),)))
    return found


# By model_type; a model with other widths in each layer has PRUNED behind it.
FAMILIES: dict[str, Callable[[nn.Module], list[Group]]] = {
    "vit": _transformer,
    "deit": _transformer,
    "dinov2": _transformer,
    "gpt2": _transformer,
    "bert": _transformer,
    "llama": _transformer,
    "mobilenet_v2": _mobilenet_v2,
    "squeezenet": _squeezenet,
    "shufflenet_v1": _shufflenet_v1,
    "shufflenet_v2": _shufflenet_v2,
}


def weight_axis(module: nn.Module, side: str) -> int:
    """The axis of a module's weight that holds what it computes (`out`) or reads (`in`)."""
    if type(module).__name__ == "Conv1D":  # of GPT-2, whose weight is (in, out)
        return 1 if side == "out" else 0
    return 0 if side == "out" else 1


def _width(module: nn.Module, side: str) -> int:
    return module.weight.shape[weight_axis(module, side)]


@torch.no_grad()
def narrow(model: nn.Module, keep: Mapping[str, Tensor]) -> None:
    """Leave units out, in place: weights, biases and statistics of what computes them, and columns of what reads them.

    The config is left as it is; `inlay.bases.pruned` makes the one that fits.

    Args:
        model: As `find_groups` takes it.
        keep: Of some groups, by name, the units that stay, in rising order.

    Raises:
        InlayError: A group that the model does not have, or one that would have no unit left.
    """
    groups = {group.name: group for group in find_groups(model)}
    for name, sides in places_that_stay(model, keep).items():
        for side, places in sides.items():
            _keep_places(model.get_submodule(name), side, places)
    for name, kept in keep.items():
        if groups[name].attention:
            _set_heads(model.get_submodule(groups[name].attention), len(kept), groups[name].units)


def places_that_stay(model: nn.Module, keep: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """By module and side of its weight (`out`, `in`) the places that stay, in rising order, where some do not.

    Arguments and errors as in `narrow`, which changes the model.
    """
    groups = {group.name: group for group in find_groups(model)}
    masks: dict[tuple[str, str], Tensor] = {}  # a reader may read several groups
    for name, kept in keep.items():
        if name not in groups or not len(kept):
            reason = "has no units left" if name in groups else "is not in this model"
            raise BadInput(f"group {name!r} {reason}; keep at least one unit of each of {', '.join(groups)}.")
        left_out = torch.ones(groups[name].units, dtype=torch.bool, device="cpu")
        left_out[kept.cpu()] = False
        for part in (*groups[name].made, *groups[name].read):
            size = _width(model.get_submodule(part.module), part.side)
            mask = masks.setdefault((part.module, part.side), torch.ones(size, dtype=torch.bool, device="cpu"))
            mask[part.places[left_out].flatten()] = False
    found: dict[str, dict[str, Tensor]] = {}
    for (name, side), mask in masks.items():
        if not bool(mask.all()):
            found.setdefault(name, {})[side] = mask.nonzero().flatten()
    return found


def narrowed(model: PreTrainedModel, keep: Mapping[str, Tensor]) -> PreTrainedModel:
    """A copy of a model with these units only, as `narrow` takes them."""
    made = copy.deepcopy(model)
    narrow(made, keep)
    return made


def _keep_places(module: nn.Module, side: str, places: Tensor) -> None:
    """Cut the tensors of one module to some places of a side, and the sizes that it holds as numbers."""
    axis, size = weight_axis(module, side), _width(module, side)
    tensors = {**module._parameters, **module._buffers}
    for name, value in tensors.items():
        along = axis if name == "weight" else 0
        if value is None or not value.ndim or (side == "in" and name != "weight"):
            continue  # a bias belongs to what is computed
        assert value.shape[along] == size, name
        cut = value.index_select(along, places.to(value.device)).contiguous()
        if name in module._parameters:
            setattr(module, name, nn.Parameter(cut, requires_grad=value.requires_grad))
        else:
            setattr(module, name, cut)
    depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
    channels = len(places) * (module.groups if side == "in" and isinstance(module, nn.Conv2d) else 1)
    for attribute in _SIZES[side]:
        if hasattr(module, attribute):
            setattr(module, attribute, channels)
    if depthwise:
        module.in_channels = module.groups = len(places)


_SIZES = {"out": ("out_features", "out_channels", "num_features", "nf"), "in": ("in_features", "in_channels", "nx")}


def _set_heads(attention: nn.Module, units: int, before: int) -> None:
    """The numbers that an attention computes its shapes with; their ratios stay."""
    for attribute in ("num_attention_heads", "num_heads", "num_key_value_heads", "all_head_size", "split_size"):
        if hasattr(attention, attribute):
            setattr(attention, attribute, getattr(attention, attribute) * units // before)

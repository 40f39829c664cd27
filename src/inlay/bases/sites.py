"""SITES: where methods attach in a model, per model_type; by structure where a model has no row.

`sites` names every place in a model, `lora_targets` and `head_modules` what LoRA and a new head need. The names in
SITES are those of transformers 5.23 (src/transformers/models/*/modeling_*.py).
"""

import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from inlay.bases.diffusion.config import is_diffusion
from inlay.bases.diffusion.sites import list_denoiser_layers, pipeline_targets
from inlay.bases.pruned_configs import PRUNED
from inlay.errors import BadInput, Unsupported

logger = logging.getLogger("inlay")
_said: set[str] = set()  # model classes of which it has been said what was found by structure

Modules = dict[str, nn.Module]

# Query, key and value projections by leaf name, in the spellings of transformers and timm; a fused one is one name.
_QKV = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("qkv",),
    ("qkv_proj",),
    ("query_key_value",),
    ("c_attn",),
)

# Poolers of a backbone: computed, but not used by a classifier that takes the mean or the first token (SigLIP, BERT).
POOLING = {"head", "pooler"}

# Next to the backbone, but not the head: what embeds another input (SAM's prompts, CLIP's text).
OTHER_INPUTS = {"shared_image_embedding", "prompt_encoder", "text_model"}

# Attention to the states of another model (GPT-2, BERT; BART; T5): a method for self-attention leaves it out.
_CROSS = ("cross", "encoder_attn", "EncDecAttention")

# Norms between MLP and residual, and likewise after attention (Gemma 2, OLMo 2; GLM 4): they would change a branch.
_NORMS_OF_OUTPUT = {"post_feedforward_layernorm", "post_mlp_layernorm"}


# Linear layers of a state-space mixer whose weights its kernels read, so that an adapter around them computes nothing.
# peft refuses out_proj in these models (tuners_utils._check_lora_target_modules_mamba); dt_proj gets no gradient.
_READ_BY_KERNELS = {
    "falcon_h1": {"out_proj"},
    "falcon_mamba": {"out_proj", "dt_proj"},
    "jamba": {"dt_proj"},
    "mamba": {"out_proj", "dt_proj"},
    "mamba2": {"out_proj"},
    "nemotron_h": {"out_proj"},
}


@dataclass(frozen=True)
class Sites:
    """Where methods attach in one model: names of modules relative to it, one per block in running order.

    Adapters that peft has already put in are looked through: the names are those of the model without them.
    """

    source: str  # the model_type whose row of SITES was used, or `structure`
    blocks: tuple[str, ...]  # transformer blocks; of a convolutional network its residual blocks, or modules
    attention: tuple[str, ...]  # the module whose forward computes q, k, v and the softmax
    # Where a branch parallel to attention goes: called with the sublayer's input, and its output goes to the residual.
    # BERT's is called as (hidden_states, input_tensor): the branch takes input_tensor and is added to it.
    around_attention: tuple[str, ...]
    around_mlp: tuple[str, ...]  # the same for the MLP
    q: tuple[str, ...]  # projections; one that is fused (SAM, GPT-2) stands in q, k and v
    k: tuple[str, ...]
    v: tuple[str, ...]
    out: tuple[str, ...]  # output projection of attention
    # Into the inner width of a block; where gated (Llama) both. Of a convolutional block the 1x1 convolutions in front
    # of the k x k one and behind it: they expand and reduce (MobileNetV2), or reduce and expand (ResNet-50).
    mlp_in: tuple[str, ...]
    mlp_out: tuple[str, ...]  # out of it; MobileNetV1: all 1x1 convolutions
    norms: tuple[str, ...]  # every normalisation of the backbone, or between it and the head, except in poolers
    embeddings: tuple[str, ...]  # what turns the input into that of the first block; a stem
    head: tuple[str, ...]  # the task head; () for a bare backbone

    @property
    def fused(self) -> bool:
        """True if q, k and v are one projection."""
        return bool(self.q) and self.q == self.k == self.v


@dataclass(frozen=True)
class Row:
    """Names in one architecture, several between blanks; those that a block lacks are left out there.

    `blocks` (a * for each number) and `embeddings` are relative to the backbone, all others to a block. Convolutions
    other than 1x1 are no sites of their own.
    """

    blocks: str
    embeddings: str
    attention: str = ""
    around_attention: str = ""
    around_mlp: str = ""
    q: str = ""
    k: str = ""
    v: str = ""
    out: str = ""
    mlp_in: str = ""
    mlp_out: str = ""


_VIT = Row(
    blocks="layers.*", embeddings="embeddings",
    attention="attention", around_attention="attention", around_mlp="mlp",
    q="attention.q_proj", k="attention.k_proj", v="attention.v_proj", out="attention.o_proj",
    mlp_in="mlp.fc1", mlp_out="mlp.fc2",
)  # fmt: skip
_DINOV2 = replace(  # the giant one has a gated MLP
    _VIT, blocks="encoder.layer.*", mlp_in="mlp.fc1 mlp.gate_proj mlp.up_proj", mlp_out="mlp.fc2 mlp.down_proj"
)
_CLIP = Row(
    blocks="encoder.layers.*", embeddings="embeddings pre_layrnorm",  # (sic)
    attention="self_attn", around_attention="self_attn", around_mlp="mlp",
    q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", out="self_attn.out_proj",
    mlp_in="mlp.fc1", mlp_out="mlp.fc2",
)  # fmt: skip
_SAM = Row(
    blocks="layers.*", embeddings="patch_embed",
    attention="attn", around_attention="attn", around_mlp="mlp",
    q="attn.qkv", k="attn.qkv", v="attn.qkv", out="attn.proj",
    mlp_in="mlp.lin1", mlp_out="mlp.lin2",
)  # fmt: skip
# Hiera: where its width doubles, a linear layer `proj` in the residual connection is no site of its own.
_SAM2 = replace(
    _SAM, blocks="backbone.blocks.*", embeddings="backbone.patch_embed", mlp_in="mlp.proj_in", mlp_out="mlp.proj_out"
)
_BERT = Row(
    blocks="encoder.layer.*", embeddings="embeddings",
    attention="attention.self", around_attention="attention.output", around_mlp="output",
    q="attention.self.query", k="attention.self.key", v="attention.self.value", out="attention.output.dense",
    mlp_in="intermediate.dense", mlp_out="output.dense",
)  # fmt: skip
# The blocks of a small ResNet are two 3x3 convolutions and have no inner width.
_RESNET = Row(
    blocks="encoder.stages.*.layers.*", embeddings="embedder",
    mlp_in="layer.0.convolution", mlp_out="layer.2.convolution",
)  # fmt: skip
_CONVNEXT = Row(
    blocks="encoder.stages.*.layers.*", embeddings="embeddings", mlp_in="pwconv1", mlp_out="pwconv2"
)  # fmt: skip

SITES = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "swin": replace(_VIT, blocks="encoder.layers.*.blocks.*"),
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "sam": _SAM,
    "sam_vision_model": _SAM,
    "sam2": _SAM2,
    "sam2_video": _SAM2,  # what the Hub's files of SAM 2 call themselves; of the images' part in them only
    "sam2_vision_model": _SAM2,
    "gpt2": Row(
        blocks="h.*", embeddings="wte wpe",
        attention="attn", around_attention="attn", around_mlp="mlp",
        q="attn.c_attn", k="attn.c_attn", v="attn.c_attn", out="attn.c_proj",
        mlp_in="mlp.c_fc", mlp_out="mlp.c_proj",
    ),
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": Row(
        blocks="transformer.layer.*", embeddings="embeddings",
        attention="attention", around_attention="attention", around_mlp="ffn",
        q="attention.q_lin", k="attention.k_lin", v="attention.v_lin", out="attention.out_lin",
        mlp_in="ffn.lin1", mlp_out="ffn.lin2",
    ),
    "llama": Row(
        blocks="layers.*", embeddings="embed_tokens",
        attention="self_attn", around_attention="self_attn", around_mlp="mlp",
        q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", out="self_attn.o_proj",
        mlp_in="mlp.gate_proj mlp.up_proj", mlp_out="mlp.down_proj",
    ),
    # Layers are a depth-wise and a 1x1 convolution by turns.
    "mobilenet_v1": Row(blocks="layer.*", embeddings="conv_stem", mlp_out="convolution"),
    "mobilenet_v2": Row(
        blocks="layer.*", embeddings="conv_stem", mlp_in="expand_1x1.convolution", mlp_out="reduce_1x1.convolution"
    ),
    # Of a MobileViT the transformer blocks inside its layers, in front of and between which are those of a MobileNetV2.
    "mobilevit": replace(
        _BERT, blocks="encoder.layer.*.transformer.layer.*", embeddings="conv_stem",
        attention="attention.attention", around_attention="attention", around_mlp="",
        q="attention.attention.query", k="attention.attention.key", v="attention.attention.value",
    ),
    # Its attention is linear in the tokens and fuses a query of one feature with keys and values: no q, k and v.
    "mobilevitv2": Row(
        blocks="encoder.layer.*.transformer.layer.*", embeddings="conv_stem",
        mlp_in="ffn.conv1.convolution", mlp_out="ffn.conv2.convolution",
    ),
    "efficientnet": Row(
        blocks="encoder.blocks.*", embeddings="embeddings",
        mlp_in="expansion.expand_conv", mlp_out="projection.project_conv",
    ),
    # Attention and MLP are blocks of their own, by turns.
    "levit": Row(
        blocks="encoder.stages.*.layers.*", embeddings="patch_embeddings",
        mlp_in="module.linear_up.linear", mlp_out="module.linear_down.linear",
    ),
    "swiftformer": Row(
        blocks="encoder.network.*.blocks.*", embeddings="patch_embed", mlp_in="linear.fc1", mlp_out="linear.fc2"
    ),
    "poolformer": Row(
        blocks="encoder.block.*.*", embeddings="encoder.patch_embeddings.0",
        mlp_in="output.conv1", mlp_out="output.conv2",
    ),
    "regnet": replace(_RESNET, mlp_out="layer.2.convolution layer.3.convolution"),  # Y has squeeze-and-excitation at 2
    "resnet": _RESNET,
    "bit": replace(_RESNET, mlp_in="conv1", mlp_out="conv3"),
    "convnext": _CONVNEXT,
    "convnextv2": _CONVNEXT,
    "hgnet_v2": Row(
        blocks="encoder.stages.*.blocks.*", embeddings="embedder",
        mlp_in="aggregation.0.convolution", mlp_out="aggregation.1.convolution",
    ),
    "squeezenet": Row(blocks="blocks.*", embeddings="stem", mlp_in="squeeze", mlp_out="expand1x1"),
    "shufflenet_v1": Row(
        blocks="blocks.*", embeddings="stem", mlp_in="reduce_1x1.convolution", mlp_out="expand_1x1.convolution"
    ),
    "shufflenet_v2": Row(
        blocks="blocks.*", embeddings="stem", mlp_in="first_1x1.convolution", mlp_out="last_1x1.convolution"
    ),
}  # fmt: skip

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_linear_in_weight: dict[type[nn.Module], bool] = {}  # by class, of those that have been tried

_PER_BLOCK = [field.name for field in fields(Row) if field.name not in ("blocks", "embeddings")]


def sites(model: nn.Module) -> Sites:
    """Where methods attach in a model: by its row of SITES, else by structure: a warning says once what was found.

    Args:
        model: A transformers model with or without a head, or any module whose blocks hold q, k and v projections of a
            known name, or convolutions; not a PeftModel, but its `get_base_model()`. By structure, a field is () unless
            it is certain.

    Raises:
        InlayError: There is neither a row nor such blocks, or they are those of an encoder and a decoder.
    """
    if is_diffusion(getattr(model, "config", None)):
        raise Unsupported(
            "a text-to-image pipeline has no single stack of equal blocks; use lora, or give target_modules by hand."
        )
    modules = dict(base_modules_of(model))
    text = find_text_part(model)
    backbone = text if text and text in modules else _find_backbone(model)
    prefix = f"{backbone}." if backbone else ""
    inner = {name.removeprefix(prefix): module for name, module in modules.items() if name.startswith(prefix)}
    kind = str(getattr(getattr(model, "config", None), "model_type", "no model_type")).removesuffix(PRUNED)
    label, children = f"{type(model).__name__} ({kind})", dict(model.named_children())
    next_to_it = [name for name in _find_next_to(model, backbone) if name not in OTHER_INPUTS]
    places = listed = _places(SITES[kind], inner) if kind in SITES else None
    if not listed:
        row = _row_by_structure(inner)
        heads = () if backbone else tuple(f"{name}." for name in next_to_it)
        places = _places(row, inner) if row else _convolutional_places(inner, heads)
    if not places:
        raise Unsupported(
            f"{label} has no single stack of equal blocks with query, key and value projections (q_proj, query, qkv "
            f"...), and no list of blocks of convolutions; its children are {', '.join(children) or 'none'}. Give "
            "target_modules by hand."
        )
    full = {field: tuple(prefix + name for name in names) for field, names in places.items()}
    full["norms"] += tuple(find_last_norms(model))
    if not listed:
        first = ", ".join(f"{field} {names[0] if names else 'not found'}" for field, names in full.items())
        if label not in _said:
            _said.add(label)
            logger.warning("%s by structure: %d blocks; the first of each: %s", label, len(full["blocks"]), first)
    head = [name for name in next_to_it if not is_norm(modules[name])]
    head += getattr(model, "new_poolers", []) if head else []
    return Sites(source=kind if listed else "structure", head=tuple(head), **full)


def _find_backbone(model: nn.Module) -> str:
    """The child that is the backbone inside a model with a head; CLIP's and SigLIP's is not its base_model_prefix."""
    children = dict(model.named_children())
    names = (getattr(model, "base_model_prefix", ""), "vision_model", "vision_encoder")
    return next((name for name in names if name in children), "")


def _find_next_to(model: nn.Module, backbone: str) -> list[str]:
    """The parameter-holding children of a model next to its backbone: its head, and a norm in front of that.

    Where the parts of a backbone are children of the model themselves (HGNetV2), the linear layer with as many outputs
    as the model has labels.
    """
    children = {name: child for name, child in model.named_children() if any(True for _ in child.parameters())}
    if backbone:
        return [name for name in children if not f"{backbone}.".startswith(f"{name}.")]
    labels = getattr(getattr(model, "config", None), "num_labels", None)
    last = [_unwrap(child) for child in children.values()][-1:]
    return list(children)[-1:] if last and isinstance(last[0], nn.Linear) and last[0].out_features == labels else []


def find_text_part(model: nn.Module) -> str:
    """Name of the part of a language model that a text reaches: all but the towers of one that sees (Gemma 3).

    Empty for a model that is all of text, or that is asked with something else.
    """
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    if text is config or getattr(model, "main_input_name", "") != "input_ids":
        return ""
    embedding = model.get_input_embeddings()
    name = next((name for name, module in model.named_modules() if module is embedding), "")
    while name:
        name = name.rpartition(".")[0]
        if isinstance(model.get_submodule(name), PreTrainedModel):
            return name
    return ""


def base_modules_of(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """named_modules as they were before peft wrapped any: the base layer under its wrapper's name, no adapter."""
    module = _unwrap(module)
    yield name, module
    for child_name, child in module.named_children():
        yield from base_modules_of(child, f"{name}.{child_name}" if name else child_name)


def _unwrap(module: nn.Module) -> nn.Module:
    for wrapped in ("base_layer", "original_module"):
        while hasattr(module, wrapped):
            module = getattr(module, wrapped)
    return module


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _places(row: Row, modules: Modules) -> dict[str, list[str]] | None:
    """The fields of Sites that a row names, found in a backbone; None if it does not fit there."""
    blocks = [name for name in modules if _pattern(name) == row.blocks]
    places = {"blocks": blocks}
    for field in _PER_BLOCK:
        wanted = getattr(row, field).split()
        found = [f"{block}.{name}" for block in blocks for name in wanted if f"{block}.{name}" in modules]
        if not blocks or (row.attention and wanted and len(found) < len(blocks)):
            return None
        places[field] = [
            each for each in found if not isinstance(modules[each], nn.Conv2d) or modules[each].kernel_size == (1, 1)
        ]
    places["norms"] = _norms(modules)
    places["embeddings"] = [name for name in row.embeddings.split() if name in modules]
    return places


def _norms(modules: Modules) -> list[str]:
    aside = {name for name in modules if is_cross(name) or POOLING.intersection(name.split("."))}
    return [name for name, module in modules.items() if is_norm(module) and name not in aside]


def _convolutional_places(modules: Modules, heads: tuple[str, ...]) -> dict[str, list[str]] | None:
    """The fields of Sites of an unknown convolutional network; None if it has no blocks in a list.

    A block is the innermost element of a list that holds a convolution larger than 1x1 and another layer; the stem is
    what comes before the first. `heads` are the beginnings of the names in the head.
    """
    blocks: list[str] = []
    for name, module in modules.items():
        layers = [inner for inner in module.modules() if is_linear(inner) or isinstance(inner, nn.Conv2d)]
        listed = name.rpartition(".")[2].isdigit() and not isinstance(module, nn.ModuleList)
        wide = any(isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1 for layer in layers)
        if listed and wide and len(layers) > 1 and not name.startswith(heads):
            blocks = [block for block in blocks if not name.startswith(f"{block}.")] + [name]
    if not blocks or {"encoder", "decoder"} <= {part for name in modules for part in name.split(".")}:
        return None
    stem: list[str] = []
    for name, module in modules.items():
        if name == blocks[0]:
            break
        around = not name or blocks[0].startswith(f"{name}.")
        inside = name.startswith(tuple(f"{other}." for other in stem))
        if not around and not inside and any(True for _ in module.parameters()):
            stem.append(name)
    norms = [name for name in _norms(modules) if not name.startswith(heads)]
    return {"blocks": blocks, **{field: [] for field in _PER_BLOCK}, "norms": norms, "embeddings": stem}


def _row_by_structure(modules: Modules) -> Row | None:
    """A row for the most numerous equal blocks with one self-attention each, if they are one stack."""
    groups: dict[str, dict[str, list[str]]] = {}  # pattern: {block: its query, key and value projection}
    for qkv in _attentions(modules):
        block = _block_around(qkv, modules)
        found = groups.setdefault(_pattern(block), {})
        if block and block in found:
            return None  # two self-attentions in a block
        found[block] = qkv
    groups.pop("", None)  # attention outside any block, such as a pooler's
    if not groups or {"encoder", "decoder"} <= {part for name in modules for part in name.split(".")}:
        return None
    pattern, found = max(groups.items(), key=lambda group: len(group[1]))
    blocks = [name for name in modules if _pattern(name) == pattern]
    if len({type(modules[block]) for block in blocks}) > 1:
        return None
    first, qkv = blocks[0], found.get(blocks[0], [])
    inside = {n.removeprefix(f"{first}."): module for n, module in modules.items() if n.startswith(f"{first}.")}
    common = {name: module for name, module in inside.items() if all(f"{block}.{name}" in modules for block in blocks)}
    qkv = [name.removeprefix(f"{first}.") for name in qkv]
    if not qkv or not set(qkv) <= common.keys():
        return None  # other blocks have another attention: Qwen3-Next, Jamba
    return _block_row(common, qkv, pattern, " ".join(_embeddings(modules, tuple(f"{block}." for block in blocks))))


def _attentions(modules: Modules) -> Iterator[list[str]]:
    """The query, key and value projections of each self-attention; one if it is fused."""
    for leaves in _QKV:
        for name in modules:
            attention, _, leaf = name.rpartition(".")
            qkv = [f"{attention}.{each}" for each in leaves]
            if leaf == leaves[0] and not is_cross(name) and all(is_linear(modules.get(each)) for each in qkv):
                yield qkv


def _block_around(qkv: list[str], modules: Modules) -> str:
    """The innermost element of a list around an attention that has linear layers next to it (the MLP); "" for none."""
    attention = qkv[0].rpartition(".")[0]
    block = attention.rpartition(".")[0]
    while block:
        next_to_it = (n for n in modules if n.startswith(f"{block}.") and not n.startswith(f"{attention}."))
        called = block.rpartition(".")[2].isdigit() and not isinstance(modules[block], nn.ModuleList)
        if called and any(is_linear(modules[name]) for name in next_to_it):
            break
        block = block.rpartition(".")[0]
    return block


def _embeddings(modules: Modules, blocks: tuple[str, ...]) -> list[str]:
    """Embeddings by class or by name, outside the blocks, no two inside each other."""
    found: list[str] = []
    for name, module in modules.items():
        named = "embed" in name.rpartition(".")[2] or isinstance(module, nn.Embedding)
        outside = not name.startswith((*blocks, *(f"{other}." for other in found)))
        if named and outside and any(True for _ in module.parameters()):
            found.append(name)
    return found


def _block_row(block: Modules, qkv: list[str], pattern: str, embeddings: str) -> Row:
    """The row of an unknown block: output projection and MLP by shape and order, "" for what is not certain."""
    shapes = {name: linear_shape(module) for name, module in block.items() if is_linear(module) and not is_cross(name)}
    attention = qkv[0].rpartition(".")[0]
    hidden, width = shapes[qkv[0]]
    out, region = "", attention
    for region in (attention, attention.rpartition(".")[0]):  # BERT: attention.self, attention
        inside = [name for name in shapes if name.startswith(f"{region}.") and name not in qkv]
        fits = [n for n in inside if shapes[n] == (width, hidden) or (len(qkv) == 1 and shapes[n][1] == hidden)]
        if fits:
            out = fits[-1]
            break
    rest = {name: shape for name, shape in shapes.items() if not name.startswith((f"{attention}.", f"{region}."))}
    mlp_in, mlp_out = _mlp(rest, hidden)
    q, k, v = qkv if len(qkv) == 3 else qkv * 3
    normed = not _NORMS_OF_OUTPUT.isdisjoint(block)
    return Row(
        pattern, embeddings, attention,
        around_attention="" if normed else _around(block, q, out, hidden),
        around_mlp="" if normed else _around(block, mlp_in.partition(" ")[0], mlp_out, hidden),
        q=q, k=k, v=v, out=out, mlp_in=mlp_in, mlp_out=mlp_out,
    )  # fmt: skip


def _mlp(shapes: dict[str, tuple[int, int]], hidden: int) -> tuple[str, str]:
    """The one layer down to the hidden size, and the one or two (gated) up to its input; in order if all are square."""
    names = list(shapes)
    square = 2 <= len(names) <= 3 and set(shapes.values()) == {(hidden, hidden)}
    down = names[-1:] if square else [n for n, (fan_in, fan_out) in shapes.items() if fan_out == hidden != fan_in]
    if len(down) != 1:
        return "", ""
    inner = shapes[down[0]][0]
    up = [n for n in names if n not in down and shapes[n] in ((hidden, inner), (hidden, 2 * inner))]
    return (" ".join(up), down[0]) if 1 <= len(up) <= 2 else ("", "")


def _around(block: Modules, first: str, last: str, hidden: int) -> str:
    """The module from a sublayer's first linear layer to its last, if no norm comes between the last and the residual.

    As in BERT the last may share a module with such a norm, which then takes the residual as `input_tensor`.
    """
    start, end = first.rpartition(".")[0], last.rpartition(".")[0]
    whole = bool(start) and last.startswith(f"{start}.")
    place = start if whole else end
    inside = [module for name, module in block.items() if place and name.startswith(f"{place}.")]
    normed = any(is_norm(module) and any(p.numel() == hidden for p in module.parameters()) for module in inside)
    if whole:
        return "" if normed else place
    return place if normed and "input_tensor" in inspect.signature(block[place].forward).parameters else ""


def head_modules(model: nn.Module) -> list[str]:
    """Names of the task head: the parameter-holding children of a transformers model next to its backbone.

    A pooler inside the backbone counts with them where the weights had none, so that it was drawn as the head was.

    Raises:
        InlayError: The model has no backbone and head to tell apart.
    """
    heads = _heads(model)
    if not heads:
        children = ", ".join(name for name, _ in model.named_children())
        raise Unsupported(
            f"{type(model).__name__} has no backbone and task head to tell apart; its children are "
            f"{children or 'none'}. Name the head by modules_to_save yourself."
        )
    return heads


def _heads(model: nn.Module) -> list[str]:
    """What stands next to the backbone, but for its last norm; nothing where the model is a backbone itself."""
    heads = [name for name in _find_next_to(model, _find_backbone(model)) if not _is_norm_inside(model, name)]
    return [*heads, *getattr(model, "new_poolers", [])] if heads else []


def find_last_norms(model: nn.Module) -> list[str]:
    """Norms that stand next to the backbone, in front of the head (PoolFormer): pre-trained, and new for no task."""
    return [name for name in _find_next_to(model, _find_backbone(model)) if _is_norm_inside(model, name)]


def _is_norm_inside(model: nn.Module, name: str) -> bool:
    return is_norm(_unwrap(model.get_submodule(name)))


def lora_targets(model: nn.Module, sites: Literal["all", "attention"] = "all") -> list[str]:
    """Names of the modules that LoRA adapts by default.

    Args:
        model: A transformers model; its head, if there is one, is left out. So is what a text does not reach in a
            language model that sees or hears, and what the kernels of a state-space model read as weights.
        sites: `all` takes every linear layer and every 1x1 convolution outside the head, as QLoRA does (Dettmers et al.
            2023, arXiv:2305.14314), and in a network without attention every larger convolution behind the stem too:
            there they hold most of the weights (ResNet, SqueezeNet). `attention` takes the query and value projections
            only (Hu et al. 2021, section 7.1), or all where there is no attention. Convolutions in groups are left out:
            peft's LoRA on them cannot be merged, and is larger than they are where they are depth-wise. `lora-conv` of
            METHODS takes them. So are convolutions that make another weight of theirs first (BiT). Of a text-to-image
            pipeline those of the denoiser's blocks are taken, and of their attention all projections
            (`pipeline_targets`).

    Raises:
        InlayError: Nothing of the kind is there.
    """
    if sites not in ("all", "attention"):
        raise BadInput(f"sites must be all or attention, got {sites!r}.")
    if is_diffusion(getattr(model, "config", None)):
        return pipeline_targets(model, sites)
    text = find_text_part(model)
    unseen = leaves_read_by_kernels(model)
    inner = {
        name: module
        for name, module in _outside(model, _heads(model))
        if name.startswith(f"{text}." if text else "") and name.rpartition(".")[2] not in unseen
    }
    for leaves in _QKV if sites == "attention" else ():
        query_value = (leaves[0], leaves[-1])
        found = [name for name, m in inner.items() if name.rpartition(".")[2] in query_value and is_linear(m)]
        if found:
            return found
    layers = {name: m for name, m in inner.items() if is_linear(m) or (isinstance(m, nn.Conv2d) and m.groups == 1)}
    if any(True for _ in _attentions(inner)):
        layers = {name: m for name, m in layers.items() if is_linear(m) or is_pointwise(m)}
    else:
        stem = _find_stem(model)
        layers = {n: m for n, m in layers.items() if is_linear(m) or is_pointwise(m) or not f"{n}.".startswith(stem)}
    found = [name for name, m in layers.items() if uses_weight_linearly(m)]
    if layers and not found:
        raise Unsupported(
            f"the convolutions of {type(model).__name__} make another weight of theirs before they compute, so that "
            "LoRA next to them is no update of it; use lora-conv, which changes the weight itself."
        )
    if not found:
        raise Unsupported(f"found no linear layer or convolution in {type(model).__name__}; give target_modules.")
    return found


def leaves_read_by_kernels(model: nn.Module) -> set[str]:
    """Last parts of the names of linear layers whose weights the kernels of a state-space model read."""
    return _READ_BY_KERNELS.get(getattr(getattr(model, "config", None), "model_type", ""), set())


def _find_stem(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names in what turns an image into the input of the first block, where the blocks are known."""
    try:
        names = sites(model).embeddings
    except Unsupported:
        return ()
    return tuple(f"{name}." for name in names)


def list_layers(model: nn.Module) -> list[str]:
    """Names of every linear layer and convolution outside the head that is called as such.

    Left out are poolers, and the output projection of torch's MultiheadAttention, which reads its weight; of a
    text-to-image pipeline all but the denoiser's blocks.
    """
    if is_diffusion(getattr(model, "config", None)):
        return [name for name, _ in list_denoiser_layers(model)]
    return [
        name
        for name, module in _outside(model, _heads(model))
        if isinstance(module, _LAYERS)
        and not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
    ]


def decoder_targets(model: nn.Module) -> list[str]:
    """Names of the linear layers of SAM's mask decoder that a method may adapt: its two-way attention and MLPs.

    What makes masks and predicted IoU of the tokens (hypernetworks, head) is left out.

    Raises:
        InlayError: The model has no such decoder.
    """
    found = [name for name, m in model.named_modules() if name.startswith("mask_decoder.transformer.") and is_linear(m)]
    if not found:
        raise Unsupported(f"{type(model).__name__} has no mask decoder with a transformer; adapt the encoder only.")
    return found


def decoder_parts(model: nn.Module) -> list[str]:
    """Names of what in SAM's mask decoder answers with three masks, for partial tuning.

    Left out are its tokens, which SAM reads as tensors and no module computes, and what makes the single mask.
    """
    parts = [name for name, _ in model.mask_decoder.named_children() if not name.endswith(("token", "tokens", "_mlps"))]
    masks = range(1, len(model.mask_decoder.output_hypernetworks_mlps))
    return [f"mask_decoder.{name}" for name in (*parts, *(f"output_hypernetworks_mlps.{i}" for i in masks))]


def _outside(model: nn.Module, heads: list[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[0] not in heads and not POOLING.intersection(parts):
            yield name, module


def is_linear(module: nn.Module | None) -> bool:
    """True for nn.Linear and its quantised subclasses, and for GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_pointwise(module: nn.Module) -> bool:
    """True for a 1x1 convolution that is not grouped: a linear layer on every pixel."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1


def computes_as_torch(layer: nn.Module) -> bool:
    """True for a linear layer or convolution that computes as torch's own, from its weight and its input as they are.

    Not for one with a forward of its own (BiT), a weight that is computed (`parametrize`, weight norm) or a padding
    other than zeros.
    """
    own = next((kind for kind in _LAYERS if isinstance(layer, kind)), None)
    plain = own is not None and type(layer).forward is own.forward and "weight" in layer._parameters
    return plain and getattr(layer, "padding_mode", "zeros") == "zeros"


def uses_weight_linearly(layer: nn.Module) -> bool:
    """True where an update of a layer's weight adds to its output, so that LoRA next to it can be merged into it.

    Not where a linear layer or convolution makes another weight of it first: weight standardisation (BiT), spectral
    norm, torch's parametrizations. A class with a forward of its own is tried once, on random numbers. Not judged are
    other kinds of modules, weights that are held in few bits, and what does not run on its own.
    """
    if not isinstance(layer, _LAYERS) or computes_as_torch(layer):
        return True
    if "weight" not in layer._parameters:
        return False
    if type(layer) not in _linear_in_weight:
        _linear_in_weight[type(layer)] = _is_linear_in_weight(layer)
    return _linear_in_weight[type(layer)]


def _is_linear_in_weight(layer: nn.Module) -> bool:
    """f(W1) + f(W2) = f(W1 + W2), without the bias; True for what cannot be tried."""
    weight, generator = layer._parameters["weight"], torch.Generator().manual_seed(0)
    if weight is None or weight.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return True

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    bias = {"bias": torch.zeros(len(weight))} if layer._parameters.get("bias") is not None else {}
    side = [4 * (k - 1) * d + 2 for k, d in zip(weight.shape[2:], getattr(layer, "dilation", ()), strict=True)]
    x = draw(1, layer.in_channels, *side) if weight.ndim > 2 else draw(1, weight.shape[1])
    first, second = draw(*weight.shape), draw(*weight.shape)
    try:
        with torch.no_grad():
            one, two, both = (
                functional_call(layer, {"weight": w, **bias}, (x,)) for w in (first, second, first + second)
            )
    except Exception:  # a forward of its own may need anything: other arguments, a GPU
        return True
    return torch.allclose(one + two, both, rtol=1e-3, atol=1e-3 * float(both.abs().max()))


def is_norm(module: nn.Module) -> bool:
    """True for LayerNorm, RMSNorm, BatchNorm, GroupNorm and the models' own, which all are called so.

    It may hold an activation (BiT), but nothing else with parameters.
    """
    return "Norm" in type(module).__name__ and not any(True for child in module.children() for _ in child.parameters())


def is_channels_first(module: nn.Module) -> bool:
    """True where the features that a module gives stand second, (B, C, ...): of convolutions, BatchNorm, GroupNorm."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    return isinstance(module, kinds) or getattr(module, "data_format", "") == "channels_first"


def is_cross(name: str) -> bool:
    """True if a module's name says that it belongs to attention to the states of another model."""
    return any(word in name for word in _CROSS)


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """Input and output size; a Conv1D keeps its weight in this order and has no such attributes."""
    return (linear.nx, linear.nf) if type(linear).__name__ == "Conv1D" else (linear.in_features, linear.out_features)

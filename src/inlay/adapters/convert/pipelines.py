"""LoRA files for the pipelines of diffusers, read as factors of layers under their full names (`unet.mid_block...`).

diffusers      `unet.<layer>.lora_A.weight`; before peft `unet.<layer>.processor.to_q_lora.down.weight`, and
               `text_encoder.<layer>.lora_linear_layer.down.weight`. Its settings are in the metadata, or nowhere.
kohya          `lora_unet_<layer with _>.lora_down.weight`, `lora_te_...`, with `.alpha`; SDXL's layers are called as in
               the code of Stability AI.
cloneofsimo    `unet:<number>:down`, numbered as the layers come in the model, whose order has changed since.

What layers of old keys are called now is asked of diffusers.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from inlay.adapters.convert.factors import Factors, Tensors
from inlay.adapters.patterns import check_patterns
from inlay.adapters.weight_file import find_alpha, read_settings
from inlay.adapters.weights import without_adapter_name
from inlay.errors import BadInput, DamagedFile, Unsupported

_KOHYA = re.compile(r"lora_(?:unet|te\d?)_")
_CLONEOFSIMO = re.compile(r"(unet|text_encoder):(\d+):(down|up)")
_PART = re.compile(r"(unet|transformer|text_encoder(?:_2)?)\.(.+)")
# The layers of a UNet, which diffusers wrote without the name of the part at first.
_UNET = re.compile(r"(?:conv_in|conv_out|time_embedding|add_embedding|down_blocks|mid_block|up_blocks)\.")
_CLIP = re.compile(r"(?:text_model\.)?(?:encoder\.layers\.\d+\.(?:self_attn|mlp)\.\w+|text_projection)")
_PROCESSOR = re.compile(r"\.processor\.|_lora\.(?:down|up)\.")
_LEAF = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.weight|\.bias)?")
_LEAVES = {"lora_A": "A", "lora_B": "B", "lora_magnitude_vector": "magnitude"}
_KOHYA_LEAVES = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha", "dora_scale": "magnitude"}
_ATTENTION = ("k_proj", "v_proj", "q_proj", "out_proj")  # in the order of CLIPAttention's layers
# What other adapters of these programs store, by a piece of a key.
_OTHERS = {
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.lora_mid\.": "a LoRA with a core tensor (LyCORIS' Tucker form)",
    r"\.oft_": "OFT",
    r"\.a1\.weight$": "GLoRA",
    r"\.on_input$": "IA3",
    r"\.diff(_b)?$": "differences of whole weights",
}
# UNets whose layers have the same names, but other sizes (unet/config.json of stable-diffusion-v1-5 and
# stable-diffusion-2-1); what is not named is the default of UNet2DConditionModel.
_UNETS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1": {"cross_attention_dim": 768},
    "Stable Diffusion 2": {"cross_attention_dim": 1024, "use_linear_projection": True},
}
# That of stable-diffusion-xl-base-1.0, as far as it decides which layers there are.
_SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_LAYERS_PER_BLOCK = 2  # of all Stable Diffusions
_ONE_LIST = re.compile(r"lora_unet_(?:input_blocks|middle_block|output_blocks)_")  # names in Stability's code
_OLD_ORDER = {"attn1": 0, "ff": 1, "attn2": 2}  # in a transformer block, in the diffusers of early 2023


def holds_pipeline_lora(tensors: Tensors) -> bool:
    """True for keys of a LoRA of a text-to-image pipeline."""
    return any(
        _KOHYA.match(key) or _CLONEOFSIMO.fullmatch(key) or (_UNET.match(key) and "lora" in key) or _is_of_part(key)
        for key in tensors
    )


def _is_of_part(key: str) -> bool:
    """True for a key of diffusers; GPT-2, too, has a `transformer`."""
    found = _PART.match(key)
    return found is not None and (found[1] != "transformer" or "transformer_blocks." in found[2])


def read_pipeline_factors(path: Path, tensors: Tensors, metadata: Mapping[str, str], base: nn.Module | None) -> Factors:
    """The layers of a LoRA of a text-to-image pipeline.

    Args:
        path: The file, for messages.
        tensors: Its content.
        metadata: Its metadata.
        base: The pipeline as a model, its weights do not matter; None where it is not at hand.

    Raises:
        InlayError: Another kind of adapter; layers that cannot be told from their numbers or names.
    """
    for key in tensors:
        if kind := next((kind for piece, kind in _OTHERS.items() if re.search(piece, key)), None):
            raise Unsupported(f"{path} holds {kind} ({key}); inlay imports LoRA and DoRA.")
    try:
        if any(_CLONEOFSIMO.fullmatch(key) for key in tensors):
            found = _read_cloneofsimo(path, tensors, metadata, getattr(base, "unet", None))
        elif any(_KOHYA.match(key) for key in tensors):
            found = _read_kohya(path, tensors, getattr(base, "unet", None))
        else:
            found = _read_diffusers(path, tensors, metadata)
    except ModuleNotFoundError:
        raise Unsupported(
            f"{path} is a LoRA of a text-to-image pipeline, which takes diffusers: pip install 'inlay[diffusion]'."
        ) from None
    modules = None if base is None else {name for name, _ in base.named_modules()}
    with_transformer = any(name.startswith("transformer.") for name in found.layers)
    names = {name: _name_in_model(name, modules, with_transformer) for name in found.layers}
    found.layers = {names[name]: factors for name, factors in found.layers.items()}
    found.alphas = {names[name]: alpha for name, alpha in found.alphas.items() if name in names}
    return found


def _name_in_model(name: str, modules: set[str] | None, with_transformer: bool) -> str:
    """A layer of CLIP with or without `text_model.`, as the base has it.

    Without a base at hand as Stable Diffusion and SDXL have it: CLIPTextModel without, CLIPTextModelWithProjection (the
    second text encoder of SDXL) with it. Next to a transformer the first one may be of either class.
    """
    part, _, layer = name.partition(".")
    if not part.startswith("text_encoder") or not _CLIP.fullmatch(layer) or layer == "text_projection":
        return name
    bare = layer.removeprefix("text_model.")
    without, within = f"{part}.{bare}", f"{part}.text_model.{bare}"
    if modules is not None:
        return next((form for form in (without, within) if form in modules), name)
    if with_transformer:
        return name
    return within if part == "text_encoder_2" else without


def _read_diffusers(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> Factors:
    """Keys of peft, or of diffusers before it; a file may hold both.

    diffusers' training scripts write `convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))`, which renames
    the layers of attention only. Loading such a file, diffusers goes by its first key, and may lose these layers.
    """
    keys: dict[str, dict[str, str]] = {}  # by part: key within it -> key in the file
    left = []
    for key in tensors:
        found = _PART.match(f"unet.{key}" if _UNET.match(key) else key)
        if found is None:
            left.append(key)
        else:
            keys.setdefault(found[1], {})[found[2]] = key
    layers: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, float] = {}
    for part, own in keys.items():
        for key, renamed in _rename_to_peft(path, part, [key for key in own if not key.endswith(".alpha")]).items():
            if match := _LEAF.fullmatch(without_adapter_name(renamed)):
                leaf = "bias" if match[3] == ".bias" else _LEAVES[match[2]]
                layers.setdefault(f"{part}.{match[1]}", {})[leaf] = tensors[own[key]]
            else:
                left.append(own[key])
        for key in own:
            if key.endswith(".alpha") and tensors[own[key]].numel() == 1:
                alphas[f"{part}.{_find_layer_of_alpha(path, part, key)}"] = float(tensors[own[key]])
    ranks = {name: float(len(factors["A"])) for name, factors in layers.items() if "A" in factors}
    alphas = {**_read_alphas(path, read_settings(metadata, path), ranks), **alphas}
    if any(_PROCESSOR.search(key) for key in tensors):  # diffusers' own layers before peft: ΔW = B·A
        alphas = {**ranks, **alphas}
    form = "diffusers"
    if any(_is_mixed(own) for part, own in keys.items() if not part.startswith("text_encoder")):
        form = "diffusers, with keys of two kinds, of which diffusers may lose one"
    return Factors(form, layers, alphas, left_out=_describe_rest(left), pipeline=True)


def _is_mixed(keys: Iterable[str]) -> bool:
    """True where some keys are peft's, and others of diffusers before it."""
    return any(".lora_A." in key for key in keys) and any(re.search(r"[._]lora\.down\.", key) for key in keys)


def _rename_to_peft(path: Path, part: str, keys: Sequence[str]) -> dict[str, str]:
    """Each key within a part as peft names it, by the converters of diffusers."""
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    own = {key: key for key in keys}  # they rename the keys of what they are given
    if part.startswith("text_encoder"):
        old = any("_lora." in key for key in keys)
        found = convert_state_dict_to_peft(own, StateDictType.DIFFUSERS_OLD if old else StateDictType.DIFFUSERS)
    else:
        found = convert_unet_state_dict_to_peft(own)
    if len(found) < len(keys):
        raise DamagedFile(f"{path} holds one tensor of its {part} under two names; download it again.")
    return {key: name for name, key in found.items()}


def _find_layer_of_alpha(path: Path, part: str, key: str) -> str:
    """The layer of a key that ends with `.alpha`: that of A next to it."""
    start = key.removesuffix(".alpha").removesuffix(".lora").removesuffix(".lora_linear_layer")
    if start.endswith("_lora"):
        beside = f"{start}.down.weight"
    else:
        beside = (
            f"{start}.lora_linear_layer.down.weight" if part.startswith("text_encoder") else f"{start}.lora.down.weight"
        )
    return _rename_to_peft(path, part, [beside])[beside].partition(".lora_")[0]


def _read_alphas(path: Path, settings: Mapping[str, Any], ranks: Mapping[str, float]) -> dict[str, float]:
    """alpha of each layer whose part has settings, such that ΔW = alpha / r · B·A, with rsLoRA too."""
    alphas = {}
    for part in dict.fromkeys(name.partition(".")[0] for name in ranks):
        start = f"{part}."
        own = {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)}
        if "lora_alpha" not in own:
            continue
        layers = {name: name.removeprefix(start) for name in ranks if name.startswith(start)}
        patterns = {"alpha_pattern": own.get("alpha_pattern") or {}, "lora_alpha": own["lora_alpha"]}
        if not isinstance(patterns["alpha_pattern"], dict):
            raise DamagedFile(f"alpha_pattern in the metadata of {path} is not a table; download it again.")
        check_patterns(patterns, layers.values(), path.name)
        for name, layer in layers.items():
            try:
                alpha = find_alpha(patterns, layer)
            except re.error as error:
                raise DamagedFile(f"alpha_pattern in the metadata of {path} is no pattern ({error}).") from None
            if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
                raise DamagedFile(f"alpha of {name} in the metadata of {path} is {alpha!r}; download it again.")
            alphas[name] = alpha * (math.sqrt(ranks[name]) if own.get("use_rslora") else 1.0)
    return alphas


def _read_kohya(path: Path, tensors: Tensors, unet: Any) -> Factors:
    """ΔW = alpha / r · up·down; without an alpha, ΔW = up·down (`create_network_from_weights` of sd-scripts)."""
    stored: dict[str, dict[str, torch.Tensor]] = {}
    left = []
    for key, value in tensors.items():
        name, _, leaf = key.partition(".")
        if _KOHYA.match(name) and leaf in _KOHYA_LEAVES:
            stored.setdefault(name, {})[_KOHYA_LEAVES[leaf]] = value
        else:
            left.append(key)
    names = _name_layers_of_kohya(path, stored, unet)
    layers, alphas = {}, {}
    for name, factors in stored.items():
        alpha = factors.pop("alpha", None)
        if "magnitude" in factors:
            factors["magnitude"] = _read_magnitude(path, name, factors["magnitude"])
        layers[names[name]] = factors
        alphas[names[name]] = float(alpha) if alpha is not None else float(len(factors.get("A", ())))
    return Factors("kohya", layers, alphas, left_out=_describe_rest(left), pipeline=True)


def _name_layers_of_kohya(path: Path, names: Iterable[str], unet: Any) -> dict[str, str]:
    """The name in the pipeline of each layer, from the one in which all dots are underscores."""
    from diffusers import StableDiffusionXLPipeline

    names = list(names)
    numbered = {
        f"{name}.{leaf}.weight": torch.tensor(i) for i, name in enumerate(names) for leaf in ("lora_down", "lora_up")
    }
    config = SimpleNamespace(layers_per_block=_LAYERS_PER_BLOCK) if unet is None else unet.config
    try:
        found = StableDiffusionXLPipeline.lora_state_dict(numbered, unet_config=config)[0]
    except Exception as error:  # a name that it does not expect makes it fail in any way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise Unsupported(f"{path} names layers that diffusers does not know ({reason[:200]}).") from error
    layers = {}
    for key, number in found.items():
        part, _, inner = key.partition(".")
        name = _rename_to_peft(path, part, [inner])[inner].partition(".lora_")[0]
        layers[names[int(number)]] = f"{part}.{name}"
    for name in names:
        part, _, layer = layers.get(name, "").partition(".")
        known = _UNET.match(f"{layer}.") if part == "unet" else _CLIP.fullmatch(layer)
        if not known:
            raise Unsupported(
                f"{path} has the layer {name!r}, which neither a UNet nor CLIP's text encoder has; of kohya's LoRAs "
                "inlay imports those of Stable Diffusion 1 and 2 and of SDXL."
            )
    if unet is None and any(_ONE_LIST.match(name) for name in names):
        _check_known_unet(path, {layer.removeprefix("unet.") for layer in layers.values() if layer.startswith("unet.")})
    return layers


def _check_known_unet(path: Path, layers: set[str]) -> None:
    """Raise InlayError for layers that neither Stable Diffusion nor SDXL has.

    In Stability's code all blocks are in one list: how many layers each has is needed to tell them apart.
    """
    from diffusers import UNet2DConditionModel

    unknown: set[str] = set()
    for settings in ({}, _SDXL):
        with torch.device("meta"):
            unet = UNet2DConditionModel(**settings)
        unknown = layers - {name for name, _ in unet.named_modules()}
        if not unknown:
            return
    raise BadInput(
        f"{path} has {len(unknown)} layers that neither Stable Diffusion nor SDXL has ({min(unknown)}); give --base, a "
        "pipeline that is at hand."
    )


def _read_magnitude(path: Path, name: str, value: torch.Tensor) -> torch.Tensor:
    """DoRA's magnitudes, one for each row of the weight as in the paper (Liu et al. 2024, arXiv:2402.09353)."""
    if value.ndim > 1 and value.numel() != len(value):
        raise Unsupported(
            f"{path} has magnitudes for the columns of {name} ({tuple(value.shape)}), and peft's DoRA has them for the "
            "rows; train it with wd_on_output."
        )
    return value.flatten()


def _read_cloneofsimo(path: Path, tensors: Tensors, metadata: Mapping[str, str], unet: Any) -> Factors:
    """ΔW = up·down of the layers in the order of `_find_modules_v2`, in modules of the classes in the metadata."""
    numbered: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    left = []
    for key, value in tensors.items():
        if match := _CLONEOFSIMO.fullmatch(key):
            leaf = "A" if match[3] == "down" else "B"
            numbered.setdefault(match[1], {}).setdefault(int(match[2]), {})[leaf] = value
        else:
            left.append(key)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for part, own in numbered.items():
        if sorted(own) != list(range(len(own))) or any(set(pair) != {"A", "B"} for pair in own.values()):
            raise DamagedFile(f"{path} lacks tensors of the {part} between others; download it again.")
        pairs = [own[i] for i in range(len(own))]
        classes = _read_classes(path, part, metadata)
        if part == "unet":
            names = _name_layers_by_order(path, pairs, classes, unet)
        elif classes == {"CLIPAttention"}:
            names = [f"encoder.layers.{i // 4}.self_attn.{_ATTENTION[i % 4]}" for i in range(len(pairs))]
        else:
            raise Unsupported(
                f"{path} adapts {', '.join(sorted(classes))} of the text encoder; inlay imports CLIPAttention."
            )
        layers |= {f"{part}.{name}": pair for name, pair in zip(names, pairs, strict=True)}
    alphas = {name: float(len(pair["A"])) for name, pair in layers.items()}
    return Factors("cloneofsimo", layers, alphas, left_out=_describe_rest(left), pipeline=True)


def _read_classes(path: Path, part: str, metadata: Mapping[str, str]) -> set[str]:
    """Classes of the modules whose layers are numbered."""
    try:
        found = json.loads(metadata[part])
        if not (isinstance(found, list) and found and all(isinstance(name, str) for name in found)):
            raise ValueError
    except (KeyError, ValueError):
        raise Unsupported(
            f"{path} does not say in its metadata of which modules its {part}'s layers are numbered; inlay imports "
            "files of save_safeloras."
        ) from None
    return set(found)


def _name_layers_by_order(
    path: Path, pairs: Sequence[Mapping[str, torch.Tensor]], classes: set[str], unet: Any
) -> list[str]:
    """Names of the layers of a UNet that come in this order, found by their shapes."""
    from diffusers import UNet2DConditionModel

    unets = {"the base": unet}
    if unet is None:
        with torch.device("meta"):
            unets = {name: UNet2DConditionModel(**settings) for name, settings in _UNETS.items()}
    for model in unets.values():
        for kinds in (nn.Linear, nn.Linear | nn.Conv2d):
            layers = dict(_list_layers(model, classes, kinds))
            for names in (_put_in_old_order(layers), list(layers)):
                if len(names) == len(pairs) and all(map(_fits, map(layers.__getitem__, names), pairs)):
                    return names
    raise BadInput(
        f"{path} numbers {len(pairs)} layers in modules of the classes {', '.join(sorted(classes))}, which do not fit "
        f"{' or '.join(unets)}; give --base, a pipeline that is at hand."
    )


def _list_layers(model: nn.Module, classes: set[str], kinds: Any) -> Iterator[tuple[str, nn.Module]]:
    """Layers in modules of these classes, in the order in which they stand in the model."""
    named = classes | ({"Attention"} if "CrossAttention" in classes else set())  # it was called so
    for outer, module in model.named_modules():
        if type(module).__name__ in named:
            for inner, layer in module.named_modules():
                if isinstance(layer, kinds):
                    yield f"{outer}.{inner}", layer


def _put_in_old_order(names: Iterable[str]) -> list[str]:
    """In each transformer block, the feed-forward layers between the two attentions."""

    def split(name: str) -> tuple[str, str]:
        block, _, inner = name.rpartition(".transformer_blocks.")
        number, _, inner = inner.partition(".")
        return f"{block}.{number}", inner.partition(".")[0]

    found: list[str] = []
    for _, group in groupby(names, key=lambda name: split(name)[0]):
        found += sorted(group, key=lambda name: _OLD_ORDER.get(split(name)[1], 0))
    return found


def _fits(layer: nn.Module, pair: Mapping[str, torch.Tensor]) -> bool:
    weight: Any = layer.weight
    down, up = pair["A"].shape, pair["B"].shape
    return down[1:] == weight.shape[1:] and up[:1] == weight.shape[:1] and down[:1] == up[1:2]


def _describe_rest(keys: Sequence[str]) -> list[str]:
    """What is in the file next to the LoRA, such as the embeddings of new words."""
    return [f"{len(keys)} other tensors ({', '.join(keys[:3])})"] if keys else []

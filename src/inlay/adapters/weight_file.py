"""The file that holds an adapter's tensors: peft's, or the one that the pipelines of diffusers load.

peft        adapter_model.safetensors          `base_model.model.unet.mid_block.attentions.0.proj_in.lora_A.weight`
diffusers   pytorch_lora_weights.safetensors   `unet.mid_block.attentions.0.proj_in.lora_A.weight`

A LoRA of a pipeline is stored in the form of diffusers, so that `pipe.load_lora_weights(folder)` takes it as it is. Its
metadata holds the settings of each part of the pipeline as JSON (`lora_adapter_metadata`: `unet.r`, `unet.lora_alpha`,
`unet.target_modules` ...), as `save_lora_weights` of diffusers 0.42 writes them. Keys are translated where a file is
read or written; everything else sees those of peft.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from inlay.errors import DamagedFile
from inlay.files.bounded_json import parse_json

WEIGHTS = "adapter_model.safetensors"
PIPELINE_WEIGHTS = "pytorch_lora_weights.safetensors"
PREFIX = "base_model.model."  # of the keys in a file of peft
SETTINGS = "lora_adapter_metadata"  # diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY
# The parts that diffusers puts a LoRA into.
_PART = re.compile(r"(unet|transformer|text_encoder(?:_2)?)\.(.+)")
# A layer of CLIP's text encoder: transformers 4 had `text_model.` before it, as files of the community have.
_CLIP_LAYER = re.compile(r"encoder\.layers\.\d+\.(?:self_attn|mlp)\.")
_MAGNITUDE = ".lora_magnitude_vector"  # of DoRA
_FLAGS = ("use_rslora", "use_dora", "lora_bias")


def find_weights(folder: Path) -> Path:
    """The file with the tensors in an adapter's folder: peft's, unless only that of a pipeline is there."""
    peft, pipeline = folder / WEIGHTS, folder / PIPELINE_WEIGHTS
    return pipeline if pipeline.is_file() and not peft.is_file() else peft


def fits_pipeline(config: Mapping[str, Any], keys: Iterable[str]) -> bool:
    """True if diffusers can load these tensors into a pipeline: LoRA of its parts, and nothing else.

    Args:
        config: adapter_config.json.
        keys: Of all tensors, as in a file of peft.
    """
    return config["peft_type"] == "LORA" and all(
        ".lora_" in key and _PART.match(key.removeprefix(PREFIX)) for key in keys
    )


def find_peft_keys(path: Path, header: Mapping[str, Any]) -> dict[str, str]:
    """By the key of each tensor in the file, the key that peft would store it under.

    Args:
        path: The file.
        header: As `read_header` gives it.

    Raises:
        InlayError: Settings of the parts that are no JSON object; two tensors of one name.
    """
    keys = [key for key in header if key != "__metadata__"]
    if path.name != PIPELINE_WEIGHTS:
        return {key: key for key in keys}
    settings = read_settings(header.get("__metadata__", {}), path)
    found = {key: PREFIX + _name_in_model(key, settings) for key in keys}
    if len(set(found.values())) < len(found):
        raise DamagedFile(f"{path} holds one tensor under two names; download it again.")
    return found


def find_stored_key(path: Path, key: str) -> str:
    """The key in the file of a tensor that peft would store under `key`.

    Layers of CLIP's text encoder are named as transformers 4 named them, which all versions of diffusers read, and
    DoRA's magnitudes there get the end without which transformers 5 loses them.
    """
    if path.name != PIPELINE_WEIGHTS:
        return key
    name = key.removeprefix(PREFIX)
    found = _PART.match(name)
    if not found or not found[1].startswith("text_encoder"):
        return name
    start = f"{found[1]}.text_model." if _CLIP_LAYER.match(found[2]) else f"{found[1]}."
    return start + found[2] + (".weight" if name.endswith(_MAGNITUDE) else "")


def _name_in_model(key: str, settings: Mapping[str, Any]) -> str:
    """The name in the model of a tensor of a pipeline's file.

    Where `text_model.` stands before a layer of CLIP, the names in the settings say whether the model has it, too:
    CLIPTextModel of transformers 5 has not, CLIPTextModelWithProjection has.
    """
    found = _PART.match(key)
    if not found or not found[1].startswith("text_encoder"):
        return key
    inner = found[2].removesuffix(".weight") if f"{_MAGNITUDE}.weight" in key else found[2]
    bare = inner.removeprefix("text_model.")
    kept = "text_model" in str(settings.get(f"{found[1]}.target_modules"))
    return f"{found[1]}.{inner if kept or not _CLIP_LAYER.match(bare) else bare}"


def read_settings(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The settings of all parts in the metadata of a pipeline's file, such as `unet.r`; empty where there are none.

    Raises:
        InlayError: They are no JSON object.
    """
    try:
        settings = parse_json(metadata[SETTINGS]) if SETTINGS in metadata else {}
        if not isinstance(settings, dict):
            raise ValueError(f"it is a {type(settings).__name__}")
    except (ValueError, RecursionError) as error:
        raise DamagedFile(
            f"{SETTINGS} in the metadata of {path} cannot be read ({error}); download it again."
        ) from None
    return settings


def describe_parts(path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The metadata by which diffusers knows the settings of each part; empty for a file of peft.

    Only settings that decide what is computed are in it: an older peft refuses names that it does not know.

    Args:
        path: The file.
        config: adapter_config.json, which speaks of the whole model; each layer gets its own rank and alpha.
        shapes: Of all tensors, by the keys of peft.
    """
    if path.name != PIPELINE_WEIGHTS:
        return {}
    ranks: dict[str, dict[str, int]] = {}
    for key, shape in shapes.items():
        name, _, leaf = key.removeprefix(PREFIX).partition(".lora_")
        part, _, layer = name.partition(".")
        if leaf in ("A.weight", "embedding_A"):
            ranks.setdefault(part, {})[layer] = shape[0]
    settings: dict[str, Any] = {}
    for part, own in ranks.items():
        alphas = {layer: find_alpha(config, f"{part}.{layer}") for layer in own}
        rank, alpha = _find_usual(own.values()), _find_usual(alphas.values())
        described = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": list_targets(own),
            "rank_pattern": {_as_pattern(layer, own): n for layer, n in own.items() if n != rank},
            "alpha_pattern": {_as_pattern(layer, own): n for layer, n in alphas.items() if n != alpha},
            **{flag: True for flag in _FLAGS if config.get(flag)},
        }
        settings |= {f"{part}.{key}": value for key, value in described.items()}
    return {SETTINGS: json.dumps(settings, indent=2, sort_keys=True)}


def find_layers(keys: Iterable[str]) -> list[str]:
    """Names in the model of the layers that a LoRA adapts, from the keys of its tensors in peft."""
    return sorted({key.removeprefix(PREFIX).partition(".lora_")[0] for key in keys})


def find_alpha(config: Mapping[str, Any], layer: str) -> float:
    """alpha of one layer under a LoRA's settings: the first pattern that matches counts, as in peft."""
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return config.get("lora_alpha", 8)


def list_targets(layers: Iterable[str]) -> list[str] | str:
    """target_modules for these layers and no others of a part.

    A name in a list stands for all modules that end with it, so a layer without a dot in its name (`proj_out`), or one
    that ends another's, needs a pattern of whole names.
    """
    names = sorted(layers)
    if any("." not in name or _ends_another(name, names) for name in names):
        return "|".join(re.escape(name) for name in names)
    return names


def _as_pattern(layer: str, layers: Iterable[str]) -> str:
    """A layer in rank_pattern, which peft matches with the ends of names, too."""
    return ("^" if _ends_another(layer, layers) else "") + re.escape(layer)


def _ends_another(name: str, names: Iterable[str]) -> bool:
    return any(other.endswith(f".{name}") for other in names)


def _find_usual(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]

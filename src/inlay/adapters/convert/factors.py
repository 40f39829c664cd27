"""LoRA files of other programs, read as what they are: two factors for each layer, and a scale.

peft           `base_model.model.<layer>.lora_A.weight`, without the config that says alpha and the base.
loralib        `<layer>.lora_A`, `<layer>.lora_B` (Hu et al. 2021); alpha and the base are not in the file.
diffusers      `text_encoder.<layer>.lora_A.weight`, or `.lora_linear_layer.down.weight`; the same for `unet`.
kohya          `lora_te_<layer with _>.lora_down.weight`, with `.alpha`; `lora_unet_...`.
cloneofsimo    `text_encoder:<number>:down`, numbered as the layers of CLIP's attention come: k, v, q, out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from inlay.adapters.file import MAX_BYTES, WEIGHTS
from inlay.errors import BadInput, DamagedFile, Unsupported
from inlay.files.tensor_header import read_header

Tensors = Mapping[str, torch.Tensor]
_CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")  # the order of CLIPAttention's layers
# Of a text encoder: number of the block, and the layer in it.
_DIFFUSERS = re.compile(
    r"text_encoder\.(?:text_model\.)?encoder\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)\."
    r"(?:lora_linear_layer\.|lora\.)?(lora_A|lora_B|down|up|alpha)(?:\.weight)?"
)
_KOHYA = re.compile(
    r"lora_te_text_model_encoder_layers_(\d+)_(self_attn|mlp)_(\w+)\.(lora_down|lora_up|alpha)(?:\.weight)?"
)
_PEFT = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_CLONEOFSIMO = re.compile(r"text_encoder:(\d+):(down|up)")
_LEAVES = {"lora_A": "A", "lora_down": "A", "down": "A", "lora_B": "B", "lora_up": "B", "up": "B", "alpha": "alpha"}


@dataclass
class Factors:
    """ΔW = alpha / r · B·A for each layer.

    Attributes:
        form: Which program's file it was.
        layers: By name: A (r, d_in) and B (d_out, r); B (k · d_out / n, r) and A (k · r, d_in) of loralib's fused ones.
        alphas: By name; empty where the file does not say.
        whole: Tensors that were trained whole, such as a head's.
        left_out: What is in the file and belongs to no model of transformers.
        text_encoder: The layers are those of CLIP's text encoder.
    """

    form: str
    layers: dict[str, dict[str, torch.Tensor]]
    alphas: dict[str, float] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    text_encoder: bool = False


def read_factors(path: Path) -> Factors:
    """A file of loralib or of a program around Stable Diffusion.

    Raises:
        InlayError: No such file, no LoRA in it, or one that no model of transformers takes.
    """
    tensors, metadata = read_tensors(path)
    for key, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise DamagedFile(f"the tensor {key!r} of {path} holds NaN or Inf; it cannot be used.")
    if any(_PEFT.fullmatch(key) for key in tensors):
        found = _peft(tensors)
    elif any(key.endswith(".lora_A") for key in tensors):
        found = _loralib(tensors)
    elif any(re.match(r"(lora_)?(unet|te\d?|text_encoder)[_.:]", key) for key in tensors):
        found = _stable_diffusion(path, tensors, metadata)
    else:
        some = ", ".join(list(tensors)[:3])
        raise Unsupported(
            f"{path} has no LoRA that inlay knows (its keys: {some or 'none'}); give one of peft, loralib, diffusers, "
            "kohya or cloneofsimo, or a SqueezeNet or ShuffleNet v2 of torchvision."
        )
    for name, pair in found.layers.items():
        if set(pair) != {"A", "B"} or any(v.ndim != 2 or not v.numel() for v in pair.values()):
            raise Unsupported(f"{path} does not hold two matrices for {name}; inlay imports LoRA of linear layers.")
    return found


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; of one that torch saved, through its reader of tensors only.

    `weights_only=True` calls nothing that a pickle names but what makes tensors and containers, so no code of the file
    runs (torch 2.6 and later, which inlay asks for; before, CVE-2025-32434). It is used only here, on a file that a
    user converts by name; loading an adapter never reads a pickle.
    """
    if not path.is_file():
        raise BadInput(f"no file at {path}; give an adapter folder, or a .safetensors, .bin, .pt or .pth file.")
    if path.stat().st_size > MAX_BYTES[WEIGHTS]:
        raise DamagedFile(f"{path} has {path.stat().st_size:,} bytes, and inlay reads at most {MAX_BYTES[WEIGHTS]:,}.")
    if path.suffix == ".safetensors":
        metadata = read_header(path).get("__metadata__", {})
        return load_file(path), metadata
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickles fail in any way
        reason = "it holds more than tensors" if "weights_only" in str(error).lower() else type(error).__name__
        raise Unsupported(
            f"{path} cannot be read ({reason}); inlay runs no code that a pickle names: ask for safetensors."
        ) from None
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise DamagedFile(f"{path} holds no table of tensors; save a state_dict.")
    return {str(key): value for key, value in content.items()}, {}


def _peft(tensors: Tensors) -> Factors:
    layers: dict[str, dict[str, torch.Tensor]] = {}
    whole = {}
    for key, value in tensors.items():
        if match := _PEFT.fullmatch(key):
            layers.setdefault(match[1], {})[match[2]] = value
        else:
            whole[key.removeprefix("base_model.model.")] = value
    return Factors("peft", layers, whole=whole)


def _loralib(tensors: Tensors) -> Factors:
    layers: dict[str, dict[str, torch.Tensor]] = {}
    whole = {}
    for key, value in tensors.items():
        name, _, leaf = key.rpartition(".")
        if leaf in ("lora_A", "lora_B"):
            layers.setdefault(name, {})[leaf[-1]] = value
        else:
            whole[key] = value
    return Factors("loralib", layers, whole=whole)


def _stable_diffusion(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> Factors:
    """The part of the text encoder, which is a model of transformers."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    alphas, other, form = {}, [], "diffusers"
    for key, value in tensors.items():
        if match := _CLONEOFSIMO.fullmatch(key):
            block, place = divmod(int(match[1]), len(_CLIP))
            name, leaf, form = f"encoder.layers.{block}.self_attn.{_CLIP[place]}", _LEAVES[match[2]], "cloneofsimo"
        elif match := _DIFFUSERS.fullmatch(key) or _KOHYA.fullmatch(key):
            name, leaf = f"encoder.layers.{match[1]}.{match[2]}.{match[3]}", _LEAVES[match[4]]
            form = "kohya" if key.startswith("lora_te") else form
        else:
            other.append(key)
            continue
        if leaf == "alpha" and value.numel() == 1:
            alphas[name] = float(value)
        else:
            layers.setdefault(name, {})[leaf] = value
    unet = sum("unet" in key.split(":")[0].split(".")[0] for key in other)
    if not layers:
        raise Unsupported(
            f"{path} adapts {unet} tensors of a UNet and no text encoder, and transformers has no UNets: load it "
            "with diffusers (pipe.load_lora_weights)."
        )
    if form == "cloneofsimo" and metadata.get("text_encoder") != '["CLIPAttention"]':
        raise Unsupported(f"{path} does not say in its metadata that its text encoder's layers are CLIPAttention's.")
    left = [f"{unet} tensors of the UNet (diffusers: pipe.load_lora_weights)"] if unet else []
    rest = [key for key in other if "unet" not in key.split(":")[0].split(".")[0]]
    left += [f"{len(rest)} other tensors ({', '.join(rest[:3])})"] if rest else []
    for name, pair in layers.items():
        alphas.setdefault(name, float(len(pair["A"])) if "A" in pair else 1.0)  # without one: ΔW = B·A
    return Factors(form, layers, alphas, left_out=left, text_encoder=True)

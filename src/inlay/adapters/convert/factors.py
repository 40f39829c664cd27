"""LoRA files of other programs, read as what they are: two factors for each layer, and a scale.

peft           `base_model.model.<layer>.lora_A.weight`, without the config that says alpha and the base.
loralib        `<layer>.lora_A`, `<layer>.lora_B` (Hu et al. 2021); alpha and the base are not in the file.

Those of text-to-image pipelines are read in `pipelines`.
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
_PEFT = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


@dataclass
class Factors:
    """ΔW = alpha / r · B·A for each layer.

    Attributes:
        form: Which program's file it was.
        layers: By name: A (r, d_in) and B (d_out, r); B (k · d_out / n, r) and A (k · r, d_in) of loralib's fused ones;
            kernels A (r, c_in, h, w) and B (c_out, r, 1, 1) of convolutions. A DoRA has `magnitude` (d_out), and some
            have a `bias` (d_out) of B.
        alphas: By name, of those layers whose alpha the file says.
        whole: Tensors that were trained whole, such as a head's.
        left_out: What else is in the file.
        pipeline: The layers are those of a text-to-image pipeline.
    """

    form: str
    layers: dict[str, dict[str, torch.Tensor]]
    alphas: dict[str, float] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    pipeline: bool = False


def read_factors(path: Path, tensors: Tensors) -> Factors:
    """The layers of a LoRA of peft or loralib.

    Args:
        path: The file, for messages.
        tensors: Its content.

    Raises:
        InlayError: No LoRA in it.
    """
    if any(_PEFT.fullmatch(key) for key in tensors):
        return _peft(tensors)
    if any(key.endswith(".lora_A") for key in tensors):
        return _loralib(tensors)
    some = ", ".join(list(tensors)[:3])
    raise Unsupported(
        f"{path} has no LoRA that inlay knows (its keys: {some or 'none'}); give one of peft, loralib, diffusers, "
        "kohya or cloneofsimo, or a SqueezeNet or ShuffleNet v2 of torchvision."
    )


def check_finite(path: Path, tensors: Tensors) -> None:
    """Raise InlayError for NaN or Inf."""
    for key, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise DamagedFile(f"the tensor {key!r} of {path} holds NaN or Inf; it cannot be used.")


def check_factors(path: Path, found: Factors) -> None:
    """Raise InlayError where there is no layer, or where one lacks a factor, or holds what is none."""
    if not found.layers:
        raise Unsupported(f"{path} holds no LoRA; inlay imports LoRA of linear layers and convolutions.")
    for name, factors in found.layers.items():
        pair = [factors.get("A"), factors.get("B")]
        shapes = [() if factor is None or not factor.numel() else factor.shape for factor in pair]
        if [len(shape) for shape in shapes] not in ([2, 2], [4, 4]):
            raise Unsupported(
                f"{path} does not hold two matrices, or two kernels, for {name}; inlay imports LoRA of linear layers "
                "and convolutions."
            )


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
        is_code = "weights_only" in str(error).lower()
        reason = "it holds more than tensors" if is_code else "it is damaged or of another kind"
        raise Unsupported(
            f"{path} cannot be read as tensors of torch ({reason}), and inlay runs no code that a pickle names; give a "
            "safetensors file."
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

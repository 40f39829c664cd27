"""The tensors of an adapter whose file has been checked."""

import re

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from inlay.adapters.file import AdapterFile
from inlay.adapters.weight_file import find_peft_keys
from inlay.errors import DamagedFile, Unsupported
from inlay.files.tensor_header import read_header

# In a key of a model's own state_dict, which some trainers store in place of peft's.
_NAMED = re.compile(r"\.(?P<leaf>lora_\w+|modules_to_save)\.(?P<adapter>(?!(?:weight|bias)$)[^.]+)|\.default(?=\.|$)")


def read_weights(file: AdapterFile) -> dict[str, torch.Tensor]:
    """The tensors of a checked file, all of them finite, under the keys that peft stores: without an adapter's name.

    Raises:
        InlayError: The file has changed since it was checked; NaN or Inf; several adapters in one file.
    """
    try:
        stored = load_file(file.weights)
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{file.weights} is damaged: {error}; download it again.") from error
    keys = find_peft_keys(file.weights, read_header(file.weights, digest=False))
    weights = {without_adapter_name(keys[key]): value for key, value in stored.items()}
    if len(weights) < len(stored):
        raise Unsupported(
            f"the file of adapter {file.name!r} holds several adapters; save the one that is meant by itself "
            "(save_pretrained(selected_adapters=[...]))."
        )
    real = {key: value for key, value in weights.items() if value.is_floating_point()}
    if real and not torch.stack([v.sum(dtype=torch.float32) for v in real.values()]).isfinite().all():  # cheaper
        for key, value in real.items():
            if not torch.isfinite(value).all():
                raise DamagedFile(f"the tensor {key!r} of adapter {file.name!r} holds NaN or Inf; it cannot be used.")
    return weights


def without_adapter_name(key: str) -> str:
    """`q.lora_A.weight` of `q.lora_A.default.weight`, `head.weight` of `head.modules_to_save.default.weight`."""
    # the magnitude of a DoRA has no leaf in peft's files
    key = re.sub(r"\.lora_magnitude_vector\.[^.]+\.weight$", ".lora_magnitude_vector", key)

    def keep(match: re.Match[str]) -> str:
        leaf = match["leaf"]
        return f".{leaf}" if leaf and leaf != "modules_to_save" else ""

    return _NAMED.sub(keep, key)

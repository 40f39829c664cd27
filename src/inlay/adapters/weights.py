"""The tensors of an adapter whose file has been checked."""

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from inlay.adapters.file import WEIGHTS, AdapterFile
from inlay.errors import DamagedFile


def read_weights(file: AdapterFile) -> dict[str, torch.Tensor]:
    """The tensors of a checked file, all of them finite.

    Raises:
        InlayError: The file has changed since it was checked; NaN or Inf.
    """
    try:
        weights = load_file(file.folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{file.folder / WEIGHTS} is damaged: {error}; download it again.") from error
    real = {key: value for key, value in weights.items() if value.is_floating_point()}
    if real and not torch.stack([v.sum(dtype=torch.float32) for v in real.values()]).isfinite().all():  # cheaper
        for key, value in real.items():
            if not torch.isfinite(value).all():
                raise DamagedFile(f"the tensor {key!r} of adapter {file.name!r} holds NaN or Inf; it cannot be used.")
    return weights

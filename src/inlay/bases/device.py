"""Which device computes: the best that this machine has, or the one that was asked for."""

from typing import TypeAlias

import torch
from torch import nn

from inlay.errors import BadInput, Unsupported

Device: TypeAlias = str | torch.device


def choose_device(device: Device | None = None) -> torch.device:
    """The device that was asked for, checked; None: this machine's accelerator (CUDA, ROCm, XPU, MPS), or its CPU.

    Raises:
        BadInput: torch knows no such device.
        Unsupported: This machine has none.
    """
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return best or torch.device("cpu")
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        raise BadInput(f"unknown device {str(device)!r}; use cpu, cuda, cuda:1, mps or xpu.") from None
    here = ["cpu"] if best is None else ["cpu", *(f"{best.type}:{i}" for i in range(torch.accelerator.device_count()))]
    if asked.type != "cpu" and f"{asked.type}:{asked.index or 0}" not in here:
        raise Unsupported(f"this machine has no device {str(device)!r}; choose one of {', '.join(here)}.")
    return asked


def is_asynchronous(device: torch.device) -> bool:
    """True if the host runs ahead of the device, and waits for it when it reads a number: all but a CPU."""
    return device.type != "cpu"


def move_model(model: nn.Module, device: Device | None) -> None:
    """Move a model, in place, to the device that was asked for; None leaves it where it is."""
    if device is not None:
        model.to(choose_device(device))

"""One known input and output, by which a loaded adapter shows that it computes what it computed when it was saved."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from inlay.bases.eval_mode import eval_mode
from inlay.tasks.adapter import place_inputs
from inlay.tasks.task import Task

OUTPUTS = 64  # logits that are kept

# Largest |difference| relative to the largest |logit|, by the coarser of the two precisions (saved, loaded). Measured
# on three ViTs and a pre-trained MobileNetV2, with and without LoRA: fp32 0, fp16 at most 0.002, bf16 0.10, int8 0.05,
# NF4 0.27. A base changed by 2 % gives 0.02 to 0.9, another one 0.5 and more: this check is sharp in fp32 and fp16; in
# the coarser forms it finds what is grossly wrong, and the sketch tells bases apart.
TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.3, "int8": 0.3, "nf4": 0.8}

# The least that a network of convolutions is allowed: a GPU computes those in TF32 unless it is told not to, and older
# adapters were saved so. Measured with inputs and weights of convolutions rounded to TF32: MobileNets 0.0013 to 0.0087
# (pre-trained, with LoRA), SegFormer 0.001, ResNet 0.0008; ViT, SAM and Swin, which have one to six, 0.0004 at most.
CONVOLUTIONAL_TOLERANCE = 0.02
CONVOLUTIONS = 8  # a network with more is one


def allow_deviation(precisions: Iterable[str], convolutions: int) -> float:
    """The largest deviation that rounding explains.

    Args:
        precisions: In which the base was held when the adapter was saved, and is held now.
        convolutions: In base and adapter.
    """
    limit = max(TOLERANCE[precision] for precision in precisions)
    return max(limit, CONVOLUTIONAL_TOLERANCE) if convolutions > CONVOLUTIONS else limit


@contextmanager
def _full_float32() -> Iterator[None]:
    """Products and convolutions in all bits of float32, whatever the process allows: TF32, or bfloat16 on a CPU."""
    backends = torch.backends
    switches: list[tuple[Any, str, Any]]
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch 2.9
        switches = [
            (backend, "fp32_precision", "ieee")
            for backend in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
        ]
    else:
        switches = [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]
    before = [getattr(backend, name) for backend, name, _ in switches]
    for backend, name, value in switches:
        setattr(backend, name, value)
    try:
        yield
    finally:
        for (backend, name, _), value in zip(switches, before, strict=True):
            setattr(backend, name, value)


@torch.no_grad()
def compute_output(model: torch.nn.Module, processor: Any, task: Task) -> list[float]:
    """What the model, in eval mode, makes of the golden input of its task: at most `OUTPUTS` numbers."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    # accelerate leaves the autocast of mixed precision around a trained model, a loaded one is without
    autocast = vars(model).pop("forward") if "_original_forward" in vars(model) else None
    try:
        with eval_mode(model), _full_float32():
            found = model(**place_inputs(task.golden_inputs(model, processor), weight))
    finally:
        if autocast is not None:
            model.forward = autocast
    return [float(f"{value:.6g}") for value in task.golden_values(found, OUTPUTS).float().tolist()]


def measure_deviation(stored: list[float], found: list[float]) -> float:
    """Largest difference relative to the largest stored logit; infinite for another size or for NaN."""
    a, b = np.asarray(stored), np.asarray(found)
    if a.shape != b.shape or not np.isfinite([a, b]).all():
        return float("inf")
    return float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-6))

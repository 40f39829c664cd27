"""Do two sketches show the same weights? Apart from sketch.py, as the answer needs neither torch nor a model."""

import base64
from typing import Any

import numpy as np

# Largest root-mean-square distance to the stored sketch. Rounding a weight by a relative error e moves its sketch by
# about e. Measured on three ViTs, a pre-trained MobileNetV2 and a 260k Llama: fp16 0.0002, bf16 0.0018, int8 0.008, NF4
# 0.11 at most. Weights changed by 2 % are 0.017 apart at least, also when both are in bf16, other weights 1.2.
TOLERANCE = {"float32": 0.005, "float16": 0.005, "bfloat16": 0.006, "int8": 0.04, "nf4": 0.25}

# What a sketch says of one tensor outside those matrices: a checksum of its name, its place in TOLERANCE, and of its n
# numbers t, with RMS their root mean square, u·t / (√n (RMS + FLOOR)) for several sequences of signs u (uᵀTu for a
# matrix), and log(RMS + FLOOR), all in steps of STEP: 13 bytes for each tensor.
PROJECTIONS, FLOOR, STEP = 3, 1e-3, 5e-4
ENTRY = np.dtype([("name", "<u4"), ("kind", "u1"), ("values", "<i2", PROJECTIONS + 1)])

# Largest difference of any of these numbers, by the coarser of the two forms that the tensor was held in. Measured over
# 480 tensors of a ViT, a GPT-2, two Llamas and two pre-trained MobileNets: nothing in float32, fp16 0.002, bf16 0.006,
# int8 0.015, NF4 0.22 at most. What is not quantised keeps its own, sharper limit in 8 and 4 bits.
TENSOR_TOLERANCE = {"float32": 0.003, "float16": 0.005, "bfloat16": 0.015, "int8": 0.06, "nf4": 0.6}


def explain_difference(stored: dict[str, Any], found: dict[str, Any]) -> str:
    """How the weights of two bases of one structure differ, in words; nothing where rounding explains it.

    Args:
        stored: `precision` and `sketch` of a base.
        found: The same of another.
    """
    off = measure_distance(stored["sketch"], found["sketch"])
    limit = max(TOLERANCE[stored["precision"]], TOLERANCE[found["precision"]])
    if off > limit:
        return f"sketches {off:.3f} apart, {limit} allowed"
    differing, compared = _compare_rest(stored["sketch"].get("rest", ""), found["sketch"].get("rest", ""))
    if differing:
        return f"{differing} of {compared} tensors next to the matrices differ, such as biases, norms and positions"
    return ""


def _compare_rest(stored: str, found: str) -> tuple[int, int]:
    """How many tensors differ, and how many both sketches know; none where one is older than these."""
    a, b = (np.frombuffer(base64.b64decode(rest), dtype=ENTRY) for rest in (stored, found))
    _, at, other = np.intersect1d(a["name"], b["name"], return_indices=True)
    a, b = a[at], b[other]
    limits = np.array(list(TENSOR_TOLERANCE.values()))[np.maximum(a["kind"], b["kind"])]
    off = STEP * np.abs(a["values"].astype(np.int64) - b["values"]).max(1, initial=0)
    return int((off > limits).sum()), len(at)


def measure_distance(stored: dict[str, Any], found: dict[str, Any]) -> float:
    """Root-mean-square distance per weight matrix of two sketches; about 1.4 for unrelated weights of equal size."""
    a, b = (np.frombuffer(base64.b64decode(s["values"]), dtype="<f4").astype(np.float64) for s in (stored, found))
    return float(np.sqrt(2 * np.mean((a - b) ** 2))) if a.shape == b.shape and a.size else float("inf")

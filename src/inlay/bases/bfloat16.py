"""Does a device compute in bfloat16, and faster than in float32? A CPU is asked once by timing it."""

import json
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import torch

from inlay.bases.cpu import list_cpu_flags, name_cpu
from inlay.bases.load import Dtype
from inlay.errors import InlayError
from inlay.files.atomic import replacing
from inlay.files.bounded_json import parse_json

PAYS = 1.5  # times the speed of float32 in products of matrices: a model gains less than its products do
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "svebf16", "bf16")  # of Intel, AMD and Intel, ARM twice
_ROWS, _INPUTS, _OUTPUTS = 256, 768, 3072  # the first layer of a ViT-B's MLP on one image
_TURNS = 5


def choose_dtype(device: torch.device) -> tuple[Dtype, str]:
    """The type of number in which a model answers fastest on a device, and why, as half a sentence.

    bfloat16 where a GPU has it, and on a CPU that multiplies at least `PAYS` times as fast in it; else float32.
    """
    if device.type == "cpu":
        speedup = find_cpu_speedup()
        dtype: Dtype = "bfloat16" if speedup >= PAYS else "float32"
        return dtype, f"this CPU multiplies {speedup:.2g} times as fast in bfloat16"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16", "this GPU has bfloat16"
    return "float32", f"bfloat16 is not known to be faster on {device.type}"


def list_bfloat16_instructions() -> list[str]:
    """Those of this CPU that multiply in bfloat16."""
    return [flag for flag in INSTRUCTIONS if flag in list_cpu_flags()]


def find_cpu_speedup(*, fresh: bool = False) -> float:
    """How many times as fast as in float32 this CPU multiplies matrices in bfloat16.

    It is timed once, in a fifth of a second, and kept in `speedup_file()` for this model of CPU, its instructions and
    this torch. Where no file can be written, it is timed each time.

    Args:
        fresh: Time it anew.
    """
    known = _read_speedup()
    if known is not None and not fresh:
        return known
    speedup = time_bfloat16(torch.device("cpu"))
    text = json.dumps({**_describe_cpu(), "speedup": round(speedup, 3)}, indent=2) + "\n"
    with suppress(OSError, InlayError):
        speedup_file().parent.mkdir(parents=True, exist_ok=True)
        with replacing(speedup_file()) as new:
            new.write_text(text, encoding="utf-8")
    return speedup


def speedup_file() -> Path:
    """Where the measured speed is kept: in the folder of Hugging Face's caches (HF_HOME)."""
    return Path(huggingface_hub.constants.HF_HOME) / "inlay" / "bfloat16.json"


def time_bfloat16(device: torch.device) -> float:
    """Time a product of matrices in float32 and bfloat16 in turns: the ratio of the shortest times.

    On a CPU it is the time that all threads computed, which other load on the machine lengthens little.
    """
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    pairs = [
        [torch.ones(shape, dtype=dtype, device=device) for shape in ((_ROWS, _INPUTS), (_INPUTS, _OUTPUTS))]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    shortest = [math.inf, math.inf]
    for turn in range(_TURNS + 1):
        for i, (a, b) in enumerate(pairs):
            begun = clock()
            (a @ b)[0, 0].item()  # a GPU has computed when the number is here
            if turn:
                shortest[i] = min(shortest[i], clock() - begun)
        if shortest[1] > 4 * shortest[0]:  # it is emulated, and slow
            break
    return shortest[0] / shortest[1]


def _describe_cpu() -> dict[str, Any]:
    """All that the speed depends on; `capability` is what torch makes use of."""
    return {
        "cpu": name_cpu(),
        "instructions": list_bfloat16_instructions(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def _read_speedup() -> float | None:
    """The speed that is kept; None if there is none of this CPU and torch, or the file is damaged."""
    try:
        kept = parse_json(speedup_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(kept, dict) or {**kept, "speedup": None} != {**_describe_cpu(), "speedup": None}:
        return None
    speedup = kept.get("speedup")
    return float(speedup) if isinstance(speedup, int | float) and 0 < speedup < 1000 else None

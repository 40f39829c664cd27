"""What this machine has, and what works on it, tried rather than guessed."""

import importlib.util
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "inlay",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "evaluate",
    "safetensors",
    "bitsandbytes",
    "nibabel",
    "monai",
)
_EXTRAS = {  # what pip installs a package with, and what it is good for
    "bitsandbytes": "'inlay[quantize]' for 8-bit and 4-bit bases",
    "nibabel": "'inlay[volumes]' for scans",
    "monai": "'inlay[volumes]' for scans",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `works` is None where there is nothing to try."""

    what: str
    works: bool | None
    remark: str


def examine() -> list[Finding]:
    """Versions, devices, precisions, quantisation, image libraries, Hub settings."""
    import torch

    from inlay.bases.load import builtin_names

    findings = [Finding("python", None, f"{platform.python_version()} on {platform.platform(terse=True)}")]
    findings += [Finding(name, *_installed(name)) for name in _PACKAGES]
    findings.append(Finding("cpu", None, f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"))
    findings.append(_accelerator())
    findings.append(_tried("bf16", _bf16))
    findings.append(_fp16())
    findings.append(_tried("8-bit base", lambda: _quantised(8)))
    findings.append(_tried("4-bit base", lambda: _quantised(4)))
    findings.append(_torchvision())
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
    findings.append(Finding("Hub", None, "offline by HF_HUB_OFFLINE" if offline else "online (not tried)"))
    findings.append(Finding("embedded bases", None, ", ".join(builtin_names())))
    return findings


def _installed(name: str) -> tuple[bool, str]:
    try:
        return True, version(name)
    except PackageNotFoundError:
        return False, f"not installed; pip install {_EXTRAS.get(name, name)}"


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return Finding("gpu", True, ", ".join(f"{c.name} {c.total_memory / 2**30:.0f} GiB" for c in cards))
    if torch.backends.mps.is_available():
        return Finding("gpu", True, "Apple MPS")
    return Finding("gpu", False, "none: training runs on the CPU")


def _tried(what: str, trial: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, trial())
    except Exception as error:  # whatever a broken driver or library raises is the finding
        return Finding(
            what, False, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        )


def _bf16() -> str:
    """Time a matrix product in both precisions: a CPU without bf16 units emulates it, slowly."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(768, 768, device=device, dtype=dtype)
        a @ a
        begun, runs = time.perf_counter(), 0
        while time.perf_counter() - begun < 0.2:
            (a @ a).sum().item()
            runs += 1
        seconds[dtype] = (time.perf_counter() - begun) / runs
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    return f"{ratio:.2g} times the speed of float32 on {device}" + ("" if ratio > 0.9 else ": use --precision no here")


def _fp16() -> Finding:
    import torch

    gpu = torch.cuda.is_available()
    return Finding("fp16 training", gpu, "with loss scaling" if gpu else "needs a GPU; refused on a CPU")


def _quantised(bits: int) -> str:
    """One forward and backward pass through a quantised linear layer."""
    import torch

    try:
        from bitsandbytes.nn import Linear4bit, Linear8bitLt
    except ImportError:
        raise RuntimeError("bitsandbytes is not installed: pip install 'inlay[quantize]'") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = Linear8bitLt(64, 64, has_fp16_weights=False) if bits == 8 else Linear4bit(64, 64, quant_type="nf4")
    x = torch.randn(4, 64, device=device, requires_grad=True)
    layer.to(device)(x).sum().backward()
    if x.grad is None or not torch.isfinite(x.grad).all():
        raise RuntimeError("the gradient is not finite")
    return f"bitsandbytes on {device}"


def _torchvision() -> Finding:
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", None, "not installed and not needed: Pillow decodes and resizes")
    return _tried("torchvision", lambda: f"{version('torchvision')}, not used{_load('torchvision')}")


def _load(name: str) -> str:
    importlib.import_module(name)
    return ""

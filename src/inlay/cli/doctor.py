"""Report what works on this machine, by trying it."""

import importlib.util
import os
import platform
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
    "onnxruntime",
    "nibabel",
    "monai",
    "diffusers",
)
_EXTRAS = {  # how pip installs a package, and what it is for
    "bitsandbytes": "'inlay[quantize]' for 8-bit and 4-bit bases",
    "onnxruntime": "'inlay[export]' for ONNX graphs and int8",
    "nibabel": "'inlay[volumes]' for scans",
    "monai": "'inlay[volumes]' for scans",
    "diffusers": "'inlay[diffusion]' for text to image",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `works` is None if there is nothing to try."""

    what: str
    works: bool | None
    remark: str


def examine() -> list[Finding]:
    """Try versions, devices, precisions, quantisation, image libraries and Hub settings."""
    import torch

    from inlay.bases.device import choose_device
    from inlay.bases.load import list_builtin_bases

    findings = [Finding("python", None, f"{platform.python_version()} on {platform.platform(terse=True)}")]
    findings += [Finding(name, *_find_version(name)) for name in _PACKAGES]
    findings.append(Finding("cpu", None, f"{os.cpu_count()} cores; threads of torch: {torch.get_num_threads()}"))
    findings.append(_find_gpu())
    findings.append(_try_feature("bf16", _time_bf16))
    findings.append(_find_fp16())
    findings.append(_try_feature("8-bit base", lambda: _try_quantised_layer(8)))
    findings.append(_try_feature("4-bit base", lambda: _try_quantised_layer(4)))
    findings.append(Finding("default device", None, f"{choose_device()}; --device or device= choose another"))
    findings.append(Finding("golden output", None, _describe_tolerance()))
    findings.append(_find_torchvision())
    offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON")
    findings.append(Finding("Hub", None, "offline by HF_HUB_OFFLINE" if offline else "online (not tried)"))
    findings.append(Finding("embedded bases", None, ", ".join(list_builtin_bases())))
    return findings


def _find_version(name: str) -> tuple[bool, str]:
    try:
        return True, version(name)
    except PackageNotFoundError:
        return False, f"not installed; pip install {_EXTRAS.get(name, name)}"


def _find_gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return Finding("gpu", True, ", ".join(f"{c.name} {c.total_memory / 2**30:.0f} GiB" for c in cards))
    if torch.backends.mps.is_available():
        return Finding("gpu", True, "Apple MPS")
    return Finding("gpu", False, "none: training runs on the CPU")


def _try_feature(what: str, trial: Callable[[], str]) -> Finding:
    try:
        return Finding(what, True, trial())
    except Exception as error:  # any error of a broken driver or library is the finding
        first_line = str(error).strip().splitlines()[0] if str(error) else ""
        return Finding(what, False, f"{type(error).__name__}: {first_line}")


def _time_bf16() -> str:
    """Time a matrix product in bf16 and float32: a CPU without bf16 units emulates bf16 slowly.

    The result of a CPU is kept, and is what `--dtype auto` goes by.
    """
    import torch

    from inlay.bases.bfloat16 import choose_dtype, find_cpu_speedup, list_bfloat16_instructions, time_bfloat16

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    ratio = time_bfloat16(device) if gpu else find_cpu_speedup(fresh=True)
    flags = [] if gpu else list_bfloat16_instructions()
    remark = f"{ratio:.2g} times the speed of float32 on {device}" + (f" ({', '.join(flags)})" if flags else "")
    remark += f"; --dtype auto takes {choose_dtype(device)[0]}"
    return remark + ("" if ratio > 0.9 else "; use --precision no here")


def _find_fp16() -> Finding:
    import torch

    gpu = torch.cuda.is_available()
    return Finding("fp16 training", gpu, "with loss scaling" if gpu else "needs a GPU; refused on a CPU")


def _try_quantised_layer(bits: int) -> str:
    """Run one forward and backward pass through a quantised linear layer."""
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


def _describe_tolerance() -> str:
    """How far the output of a loaded adapter may be from the one stored with it, on whatever device."""
    from inlay.adapters.golden import CONVOLUTIONAL_TOLERANCE, TOLERANCE

    limits = ", ".join(f"{limit:g} in {precision}" for precision, limit in TOLERANCE.items())
    return (
        f"computed in full float32 (no TF32), so that GPUs and CPUs agree; allowed relative difference: {limits}, "
        f"{CONVOLUTIONAL_TOLERANCE:g} for networks of convolutions"
    )


def _find_torchvision() -> Finding:
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", None, "not installed and not needed: Pillow decodes and resizes")
    return _try_feature("torchvision", lambda: f"{version('torchvision')}, not used{_import_package('torchvision')}")


def _import_package(name: str) -> str:
    importlib.import_module(name)
    return ""

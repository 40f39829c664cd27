"""Which CPU this machine has, and which instructions, as the system names them."""

import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")  # of Linux


def name_cpu() -> str:
    """The model of the CPU."""
    return _read_field("model name") or platform.processor() or platform.machine()


def list_cpu_flags() -> frozenset[str]:
    """The instructions of the CPU; none where the system does not say."""
    return frozenset((_read_field("flags") or _read_field("Features")).split())  # on x86, on ARM


def _read_field(name: str) -> str:
    """The first value of a field; empty if there is none."""
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for field, _, value in fields if field.strip() == name), "")

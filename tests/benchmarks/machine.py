"""The machine and the versions of a measurement, which each file of results holds as `machine`."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from inlay.bases.bfloat16 import list_bfloat16_instructions
from inlay.bases.cpu import name_cpu

PACKAGES = ("torch", "transformers", "peft")


def describe_machine(*packages: str, device: str = "cpu") -> dict[str, Any]:
    """Date, device, CPU, threads, load and versions; `packages` are those that matter besides PACKAGES."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "cpu": name_cpu(),
        "bfloat16": list_bfloat16_instructions(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[1], 1),
        "python": platform.python_version(),
        "versions": {name: find_version(name) for name in (*PACKAGES, *packages)},
    }
    if torch.device(device).type == "cuda":
        found["device"], found["gpu"] = torch.cuda.get_device_name(), describe_gpu()
    return found


def tell_machine(machine: dict[str, Any]) -> str:
    """The same in a line, for a table."""
    hardware = [machine["device"]] if "gpu" in machine else []
    hardware += [f"{key.replace('_', ' ')} {value}" for key, value in machine.get("gpu", {}).items()]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    hardware += [machine["cpu"], f"{machine['cores']} cores", threads]
    versions = [f"{name} {number}" for name, number in machine["versions"].items()]
    return f"{', '.join(hardware)}; Python {machine['python']}, {', '.join(versions)}; {machine['date']}"


def find_version(package: str) -> str | None:
    """None where the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_gpu() -> dict[str, Any]:
    """Memory, capability, driver and CUDA of the GPU in use."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = None
    return {
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }

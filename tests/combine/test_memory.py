"""What combining takes: no torch, and memory for one module."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

# Peak of the process above what the same work takes on small files, in bytes.
SCRIPT = """
import sys
from inlay.combine import combine
def peak():  # getrusage would give that of the process that started this one
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
small, large, out = sys.argv[1:4]
combine({f"{small}/a": 1.0, f"{small}/b": -0.5}, out=f"{out}/small")
before = peak()
combine({f"{large}/a": 1.0, f"{large}/b": -0.5}, out=f"{out}/large")
after = peak()
print(after - before, "torch" in sys.modules, "peft" in sys.modules)
"""
EDGE = 2048


def lora(folder, size, rank, modules=3):
    """Random factors without a base: names and sizes are all that counts."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(rank)
    tensors = {}
    for i in range(modules):
        for leaf, shape in (("lora_A", (rank, size)), ("lora_B", (size, rank))):
            tensors[f"base_model.model.blocks.{i}.dense.{leaf}.weight"] = rng.standard_normal(shape, np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["dense"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def partial(folder, size, modules=3):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(size)
    tensors = {
        f"base_model.model.blocks.{i}.dense.inlay_partial_delta.weight": rng.standard_normal((size, size), np.float32)
        for i in range(modules)
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "INLAY_PARTIAL", "train": "all", "target_modules": ["dense"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def peak(tmp_path, kind):
    text = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / kind / "small"), str(tmp_path / kind / "large"), str(tmp_path)],
        check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert text[1:] == ["False", "False"], "neither torch nor peft"
    return int(text[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak")
def test_adding_takes_less_than_three_times_the_largest_tensor(tmp_path):
    for name in ("a", "b"):
        partial(tmp_path / "partial/small" / name, 16)
        partial(tmp_path / "partial/large" / name, EDGE)
        lora(tmp_path / "lora/small" / name, 16, 2)
        lora(tmp_path / "lora/large" / name, 8 * EDGE, 256)
    assert peak(tmp_path, "partial") < 3 * 4 * EDGE**2
    assert peak(tmp_path, "lora") < 3 * 4 * 8 * EDGE * 512

"""Adding two adapter files of 10 MB, and compressing the sum of two of rank 64, beside copying and beside peft's SVD.

    python tests/benchmarks/combine_speed.py [--rounds 7] [--threads 2]

Files in the page cache. Copying is cp of both files. `inlay.combine` reads both, checks the digests where they have
some, adds, writes, and reads the result back against the digest of what was in memory; "no digests" are files as plain
peft writes them. peft's `combination_type="svd"` is called on a random ViT-base with the same two adapters; ours reads
them from disk and writes the result.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: small matrices are slower on several threads

import numpy as np

from inlay.adapters.file import WEIGHTS
from inlay.combine import combine
from inlay.combine.parts import Tensors
from inlay.files.tensor_header import sign

RESULTS = Path(__file__).parent / "results" / "combine_speed.json"
SIZE, BLOCKS = 768, 12
MODULES = [f"vit.layers.{i}.attention.{name}" for i in range(BLOCKS) for name in ("q_proj", "v_proj")]


def write(folder: Path, rank: int, seed: int, signed: bool) -> Path:
    """A LoRA of ViT-base on q and v with values of a usual size."""
    from safetensors.numpy import save

    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for module in MODULES:
        tensors[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal((rank, SIZE), np.float32) * 0.03
        tensors[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal((SIZE, rank), np.float32) * 0.01
    data = save(tensors, {"format": "pt"})
    (folder / WEIGHTS).write_bytes(sign(data) if signed else data)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": MODULES}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def best(work: Any, rounds: int) -> tuple[float, float]:
    """Median and shortest time in seconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times)


def adding(folder: Path, rounds: int) -> dict[str, Any]:
    """Rank 68: 10.0 MB a file."""
    rows: dict[str, Any] = {}
    for signed in (True, False):
        kind = folder / ("signed" if signed else "plain")
        a, b = (write(kind / name, 68, seed, signed) for seed, name in enumerate("ab"))

        def copy(a: Path = a, b: Path = b) -> None:
            for path in (a, b):
                shutil.copyfile(path / WEIGHTS, folder / f"copy_{path.name}")

        def add(a: Path = a, b: Path = b) -> None:
            combine({a: 1.0, b: -0.5}, out=folder / "sum")

        add(), copy()
        # by turns, so that a machine that slows down slows both
        pairs = [(best(copy, 1)[0], best(add, 1)[0]) for _ in range(rounds)]
        copied, added = (statistics.median(times) for times in zip(*pairs, strict=True))
        rows["with digests" if signed else "no digests"] = {
            "megabytes": round(2 * (a / WEIGHTS).stat().st_size / 1e6, 2),
            "copy_ms": round(1e3 * copied, 2),
            "add_ms": round(1e3 * added, 2),
            "speed_of_copying": round(statistics.median(c / t for c, t in pairs), 3),
        }
    return rows


def memory(folder: Path) -> dict[str, Any]:
    """Peak of a process that adds those files, above the same process on tiny ones."""
    for name in "ab":
        write(folder / "tiny" / name, 1, 0, True)
    script = (
        "import sys\nfrom inlay.combine import combine\n"
        "def peak(): return next(1024 * int(x.split()[1]) for x in open('/proc/self/status') if 'VmHWM' in x)\n"
        "for kind in ('tiny', 'signed'):\n"
        "    combine({f'{sys.argv[1]}/{kind}/a': 1.0, f'{sys.argv[1]}/{kind}/b': 1.0}, out=f'{sys.argv[1]}/peak')\n"
        "    print(peak())\n"
    )
    found = subprocess.run([sys.executable, "-c", script, str(folder)], check=True, capture_output=True, text=True)
    tiny, large = map(int, found.stdout.split())
    largest = 4 * SIZE * 136
    return {
        "process_mb": round(tiny / 1e6, 1),
        "more_kb": round((large - tiny) / 1e3),
        "largest_tensor_kb": largest // 1000,
    }


def compressing(folder: Path, rounds: int) -> dict[str, Any]:
    """Two of rank 64 to rank 32, ours from disk to disk, peft's in memory, in one run."""
    from peft import PeftModel
    from transformers import ViTConfig, ViTForImageClassification

    a, b = (write(folder / "rank64" / name, 64, seed, False) for seed, name in enumerate("ab", 5))
    ours, _ = best(lambda: combine({a: 1.0, b: 1.0}, width=32, out=folder / "small"), rounds)
    made = combine({a: 1.0, b: 1.0}, width=32, out=folder / "small")
    base = ViTForImageClassification(ViTConfig())
    model = PeftModel.from_pretrained(base, str(a), adapter_name="a")
    model.load_adapter(str(b), adapter_name="b")
    times = []
    for i in range(2):
        start = time.perf_counter()
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], f"svd{i}", combination_type="svd", svd_rank=32)
        times.append(time.perf_counter() - start)
    lost = {"ours": 0.0, "peft": 0.0}
    whole, files = 0.0, [Tensors(path / WEIGHTS) for path in (a, b, folder / "small")]
    layers = dict(model.named_modules())
    for module in MODULES:
        key = f"base_model.model.{module}.lora_"
        pairs = [[f.read(f"{key}{side}.weight").astype(np.float64) for side in "BA"] for f in files]
        dense = 2 * (pairs[0][0] @ pairs[0][1] + pairs[1][0] @ pairs[1][1])
        layer: Any = layers[f"base_model.model.{module}"]
        own = [layer.lora_B["svd0"].weight, layer.lora_A["svd0"].weight]
        up, down = (x.detach().double().numpy() for x in own)
        lost["ours"] += float(((dense - pairs[2][0] @ pairs[2][1]) ** 2).sum())
        lost["peft"] += float(((dense - layer.scaling["svd0"] * up @ down) ** 2).sum())
        whole += float((dense**2).sum())
    return {
        "ours_s": round(ours, 3),
        "peft_s": round(min(times), 2),
        "times_faster": round(min(times) / ours, 1),
        "error_said": made.error,
        **{f"error_{name}": (value / whole) ** 0.5 for name, value in lost.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = {
            "machine": f"{platform.machine()}, {options.threads} threads of torch",
            "add_two_files": adding(folder, options.rounds),
            "memory": memory(folder),
            "compress_64_and_64_to_32": compressing(folder, max(2, options.rounds // 3)),
        }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

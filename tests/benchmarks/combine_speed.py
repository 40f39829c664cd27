"""Adding two adapter files of 10 and of 300 MB, ties, and compressing a sum, next to copying and to peft's SVD.

    python tests/benchmarks/combine_speed.py [--rounds 7] [--threads 1]

Files in the page cache. Copying is shutil.copyfile of both files, over earlier copies; `inlay.combine` reads both,
checks the digests where they have some, adds, writes the sum and its digest, and takes the place of an earlier
result. Neither calls fsync. "no digests" are files as plain peft writes them, "older digests" have SHA-256. By turns
(copy, add, copy, add), medians; speeds are ratios of each pair. CPU time is that of the process, kernel included. ties
and peft's `combination_type="svd"` get two LoRAs of a ViT-base; ours are read from disk and written there.
"""

import argparse
import contextlib
import json
import os
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
from machine import describe_machine, tell_machine

from inlay.adapters.file import WEIGHTS
from inlay.combine import combine
from inlay.combine.parts import Tensors
from inlay.files.tensor_header import PIECE, encode_header, read_header, sign, start_digest

RESULTS = Path(__file__).parent / "results" / "combine_speed"
SIZE, BLOCKS = 768, 12


def list_modules(blocks: int) -> list[str]:
    """q and v of each block."""
    return [f"vit.layers.{i}.attention.{name}" for i in range(blocks) for name in ("q_proj", "v_proj")]


MODULES = list_modules(BLOCKS)


def write(folder: Path, rank: int, seed: int, digest: str, size: int = SIZE, blocks: int = BLOCKS) -> Path:
    """A LoRA on q and v with values of a usual size; of ViT-base, or of as many blocks of another size."""
    from safetensors.numpy import save

    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    modules, tensors = list_modules(blocks), {}
    for module in modules:
        tensors[f"base_model.model.{module}.lora_A.weight"] = rng.standard_normal((rank, size), np.float32) * 0.03
        tensors[f"base_model.model.{module}.lora_B.weight"] = rng.standard_normal((size, rank), np.float32) * 0.01
    data = save(tensors, {"format": "pt"})
    (folder / WEIGHTS).write_bytes(
        {"digests": sign, "older digests": sign_as_before, "no digests": bytes}[digest](data)
    )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def sign_as_before(data: bytes) -> bytes:
    """With SHA-256, as files had it at first."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    seen = start_digest(header, "inlay_sha256")
    seen.update(body)
    header["__metadata__"]["inlay_sha256"] = seen.hexdigest()
    return encode_header(header) + body


def measure(work: Any) -> tuple[float, float]:
    """Wall and CPU time in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def adding(folder: Path, rounds: int, **sizes: int) -> dict[str, Any]:
    """Two files next to copies of them."""
    rows: dict[str, Any] = {}
    for digest in ("digests", "older digests", "no digests"):
        kind = folder / digest.replace(" ", "-")
        a, b = (write(kind / name, seed=seed, digest=digest, **sizes) for seed, name in enumerate("ab"))

        def copy(a: Path = a, b: Path = b) -> None:
            for path in (a, b):
                shutil.copyfile(path / WEIGHTS, folder / f"copy_{path.name}")

        def add(a: Path = a, b: Path = b) -> None:
            combine({a: 1.0, b: -0.5}, out=folder / "sum")

        add(), copy()
        # by turns, so that a machine that slows down slows both
        pairs = [(measure(copy), measure(add)) for _ in range(rounds)]
        row: dict[str, Any] = {"megabytes": round(2 * (a / WEIGHTS).stat().st_size / 1e6, 2)}
        for at, clock in enumerate(("wall", "cpu")):
            copied, added = ([each[at] for each in times] for times in zip(*pairs, strict=True))
            speeds = [c / t for c, t in zip(copied, added, strict=True)]
            row[clock] = {
                "copy_ms": round(1e3 * statistics.median(copied), 2),
                "add_ms": round(1e3 * statistics.median(added), 2),
                "speed_of_copying": round(statistics.median(speeds), 3),
                "from_to": [round(min(speeds), 3), round(max(speeds), 3)],
            }
        rows[digest] = row
        shutil.rmtree(kind)
    return rows


def hashing(rounds: int) -> dict[str, float]:
    """CPU ms for 20 MB in pieces of the size that inlay reads; BLAKE3 where the package blake3 is there."""
    import hashlib

    import xxhash

    kinds: dict[str, Any] = {"xxh3_128": xxhash.xxh3_128, "sha256": hashlib.sha256}
    with contextlib.suppress(ImportError):
        from blake3 import blake3

        kinds["blake3"] = blake3
    data = memoryview(os.urandom(20_000_000))

    def run(new: Any) -> None:
        seen = new()
        for at in range(0, len(data), PIECE):
            seen.update(data[at : at + PIECE])
        seen.digest()

    times = [[measure(lambda new=new: run(new))[1] for new in kinds.values()] for _ in range(rounds)]  # type: ignore[misc]
    return {
        name: round(1e3 * statistics.median(own), 2) for name, own in zip(kinds, zip(*times, strict=True), strict=True)
    }


def ties(folder: Path, rounds: int) -> dict[str, Any]:
    """Two LoRAs of rank 68 by ties, cut to rank 32, and their sum."""
    a, b = (write(folder / "ties" / name, 68, seed, "digests") for seed, name in enumerate("ab"))

    def run(rule: str, width: int | None) -> Any:
        return combine({a: 1.0, b: -0.5}, rule, width=width, out=folder / f"by_{rule}")

    times = [(measure(lambda: run("add", None)), measure(lambda: run("ties", 32))) for _ in range(rounds)]
    cpu = [statistics.median(each[1] for each in own) for own in zip(*times, strict=True)]
    return {"add_cpu_s": round(cpu[0], 3), "ties_cpu_s": round(cpu[1], 3), "error_said": run("ties", 32).error}


def memory(folder: Path) -> dict[str, Any]:
    """Peak of a process that adds those files, above the same process on tiny ones."""
    for name in "ab":
        write(folder / "tiny" / name, 1, 0, "digests")
        write(folder / "signed" / name, 68, 0, "digests")
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

    a, b = (write(folder / "rank64" / name, 64, seed, "no digests") for seed, name in enumerate("ab", 5))
    work = lambda: combine({a: 1.0, b: 1.0}, width=32, out=folder / "small")  # noqa: E731
    ours = statistics.median(measure(work)[0] for _ in range(rounds))
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
    paths = [path / WEIGHTS for path in (a, b, folder / "small")]
    whole, files = 0.0, [Tensors(path, read_header(path)) for path in paths]
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


def write_table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| two files of | | copy, CPU ms | add, CPU ms | speed of copying, CPU | copy, ms | add, ms | speed, wall |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for what in ("add_two_of_10_mb", "add_two_of_300_mb"):
        for digest, row in result[what].items():
            cpu, wall = row["cpu"], row["wall"]
            least, most = cpu["from_to"]
            lines.append(
                f"| {row['megabytes'] / 2:.0f} MB | {digest} | {cpu['copy_ms']:.1f} | {cpu['add_ms']:.1f} | "
                f"**{cpu['speed_of_copying']:.2f}** ({least:.2f} to {most:.2f}) | {wall['copy_ms']:.1f} | "
                f"{wall['add_ms']:.1f} | {wall['speed_of_copying']:.2f} |"
            )
    return "\n".join([*lines, "", tell_machine(result["machine"]) + ". No fsync on either side.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder, few = Path(name), max(2, options.rounds // 3)
        result = {
            "machine": describe_machine("numpy", "xxhash"),
            "fsync": "neither copying nor adding calls it",
            "hashing_20_mb_cpu_ms": hashing(options.rounds),
            "add_two_of_10_mb": adding(folder, options.rounds, rank=68),
            "add_two_of_300_mb": adding(folder, max(5, few), rank=143, size=4096, blocks=32),
            "memory": memory(folder),
            "ties_to_32": ties(folder, few),
            "compress_64_and_64_to_32": compressing(folder, few),
        }
    RESULTS.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text(write_table(result))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

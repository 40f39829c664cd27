"""Requests a second of `inlay serve` for masks and for scans, on tiny adapters of `builtin:sam-tiny`, by `bench-serve`.

    python tests/benchmarks/serve_masks_scans.py

Two adapters of each kind, one thread of torch. Images have 64 pixels a side and one point; scans 32 voxels of 1 mm, of
which a window of the adapters holds 8 x 16 x 16 (at 2 x 1 x 1 mm). Clients wait for their answers.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import describe_machine
from server_process import serve

from inlay.files.atomic import write_json
from inlay.serve.load import run_load
from inlay.serve.load_config import LoadConfig
from serve.banked import SAM
from serve.test_tasks import save_masks, save_volumes

RESULTS = Path(__file__).parent / "results" / "serve_masks_scans.json"
KINDS: dict[str, tuple[Callable[[Path], Any], int]] = {"mask": (save_masks, 200), "scan": (save_volumes, 40)}


def measure(kind: str) -> list[dict[str, Any]]:
    """Loads of one and of eight clients, in both protocols in turn."""
    make, requests = KINDS[kind]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        with serve(SAM, [folder], threads=1) as server:
            for clients in (1, 8):
                for protocol in ("v1", "v2"):
                    config = LoadConfig(
                        requests=requests, warm_up=8, clients=clients, protocol=protocol, side=64, scan_side=32
                    )
                    before = server.cpu_s
                    (load,) = run_load(server.url, config)["loads"]
                    cpu_ms = 1e3 * (server.cpu_s - before) / (requests + config.warm_up)
                    found.append({"protocol": protocol, **load, "server_cpu_ms": round(cpu_ms, 1)})
    return found


def main() -> None:
    found: dict[str, Any] = {kind: measure(kind) for kind in KINDS}
    found["machine"] = describe_machine("fastapi", "uvicorn")
    write_json(RESULTS, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

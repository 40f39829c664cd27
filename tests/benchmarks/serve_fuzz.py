"""1,000 malformed requests each to `inlay serve` for images, language and scans: none may fail it, hang or stay behind.

    python tests/benchmarks/serve_fuzz.py [--cases 1000]

Requests are made by a seed (tests/serve/server/mutated_requests.py): JSON, base64, forms, images, scans, bombs, tensors
of the Open Inference Protocol, completions and chats, files of channels, masks and scribbles, MONAI Label's routes,
loading of adapters, paths, methods, headers and bytes that are no HTTP.
`statuses`: none means that the connection was closed, which is right for what is no HTTP. Memory, files and threads are
those of the server, after a fifth of the requests and after all. Exit status 1 for a status of 500 or more, a request
that is not answered in 30 seconds, or growth.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import describe_machine
from server_process import look_at, serve

from inlay.files.atomic import write_json
from serve.banked import GPT2, SAM, VIT, save
from serve.server.mutated_requests import Kind, make_attempt, send
from serve.test_tasks import save_channels, save_volumes

RESULTS = Path(__file__).parent / "results" / "serve_fuzz.json"
BASES: dict[Kind, str] = {"image": VIT, "prompt": GPT2, "scan": SAM}
MEMORY_MB = 20.0  # that may be more at the end: what the allocator keeps


def attack(kind: Kind, cases: int, folder: Path) -> dict[str, Any]:
    """Send the requests, and say what became of them."""
    names = ["a", "b", "two"] if kind == "scan" else ["version0", "version1"]
    if kind == "scan":
        save_channels(save_volumes(folder))
    else:
        for seed, name in enumerate(names):
            save(BASES[kind], ("lora", 2), folder / name, seed)
    statuses: Counter[str] = Counter()
    wrong, times, states = [], [], {}
    with serve(BASES[kind], [folder], "--allow-loading", str(folder), threads=1) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        for seed in range(cases):
            attempt, begun = make_attempt(seed, names, kind), time.perf_counter()
            try:
                status = send(address, attempt)
            except TimeoutError:
                status = 599
            times.append((time.perf_counter() - begun, attempt.what))
            statuses[str(status).lower()] += 1
            if status is not None and status >= 500:
                wrong.append(f"{status}: {attempt.what}")
            if seed == cases // 5:
                states["after a fifth"] = look_at(server)
        time.sleep(2)  # those that left are forgotten
        states["at the end"] = look_at(server)
    before, after = states.values()
    wrong += [f"{key} grew" for key in ("files", "threads") if after[key] > before[key] + 2]
    if after["memory_mb"] > before["memory_mb"] + MEMORY_MB:
        wrong.append("memory grew")
    seconds, slowest = max(times)
    return {"statuses": statuses, **states, "wrong": wrong, "slowest_s": round(seconds, 2), "slowest": slowest[:100]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--kinds", nargs="+", choices=list(BASES), default=list(BASES))
    arguments = parser.parse_args()
    found: dict[str, Any] = {"cases": arguments.cases}
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as folder:
            found[kind] = attack(kind, arguments.cases, Path(folder))
    found["machine"] = describe_machine("fastapi", "uvicorn")
    if arguments.kinds == list(BASES):
        write_json(RESULTS, found)
    print(json.dumps(found, indent=2))
    sys.exit(any(found[kind]["wrong"] for kind in arguments.kinds))


if __name__ == "__main__":
    main()

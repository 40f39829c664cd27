"""10,000 requests to `inlay serve` while adapters are added, replaced, removed and evicted; every answer is judged.

    python tests/benchmarks/serve_soak.py [--requests 10000] [--clients 16]

Eight adapters of four methods on the embedded ViT, of which the memory holds about five (--budget-mb), and one that
does not fit. Clients ask through /v1/classify, and 5 % leave after some milliseconds; a change through
/v1/load_lora_adapter or /v1/unload_lora_adapter follows every 10 requests. An answer is right if it is what the adapter
says alone of that image (`load_adapter`, `predict`), and if it names the digest of a file that its name had at that
time; 404 is right where the name had none, 409 for the one that does not fit, 429, 503 and 504 are counted. Half of
the requests follow after the server was killed and started anew. Exit status 1 if an answer is wrong, or the server has
more memory, files or threads at the end of a half than in its middle.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from machine import describe_machine
from server_process import ServerProcess, look_at, start_server, wait_until_ready

from inlay import Bank
from inlay.files.atomic import write_json
from inlay.serve.connections import Connections
from serve.banked import GPT2, VIT, save
from serve.server.soak import MISFIT, Change, Soak, Truth, find_truth, make_versions

RESULTS = Path(__file__).parent / "results" / "serve_soak"
ADAPTERS, MEMORY_MB = 8, 5.0  # more at the end, in MB: what the allocator keeps


def load_and_unload(url: str) -> Change:
    """Changes through the server's own routes."""

    async def change(name: str, folder: Path | None) -> None:
        target, given = "/v1/unload_lora_adapter", {"lora_name": name}
        if folder:
            target, given = "/v1/load_lora_adapter", {**given, "lora_path": str(folder), "load_inplace": True}
        connections = Connections(url)
        response = await connections.ask(
            "POST", target, json.dumps(given).encode(), {"content-type": "application/json"}
        )
        connections.close()
        assert response.status == 200, response.body

    return change


async def run_half(
    server: ServerProcess, soak: Soak, arguments: argparse.Namespace, kill: bool
) -> list[dict[str, float]]:
    """Half of the requests, with a look at the server after each tenth; in the last one it may be killed."""
    requests, states = arguments.requests // 20, []
    for _ in range(9 if kill else 10):
        await soak.run(requests, arguments.clients)
        await asyncio.sleep(0.5)  # those that have left are forgotten
        states.append(look_at(server))
    if kill:
        running = asyncio.create_task(soak.run(requests, arguments.clients))
        await asyncio.sleep(0)  # it begins
        while soak.left > requests // 2:
            await asyncio.sleep(0.01)
        server.process.kill()
        await running
    return states


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1, help="Of the server's torch.")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"requests": arguments.requests, "clients": arguments.clients, "halves": []}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as where:
        folders = make_versions(Path(where) / "versions", ADAPTERS)
        misfit = save(GPT2, ("lora", 2), Path(where) / MISFIT)
        truth: Truth = find_truth(folders)
        served = {folder.name: folder for folder in folders}
        size = Bank(VIT, served, check_golden=False).bytes / (ADAPTERS + 1)
        options = ["--budget-mb", f"{5.5 * size / 1e6:.3f}", "--allow-loading", where, "--max-batch", "8"]
        for half in range(2):
            server = start_server(VIT, [*folders, misfit], *options, threads=arguments.threads)
            try:
                wait_until_ready(server)
                begun = time.perf_counter()
                soak = Soak(server.url, truth, served, load_and_unload(server.url), seed=half)
                states = asyncio.run(run_half(server, soak, arguments, kill=half == 0))
                seconds = time.perf_counter() - begun
                metrics = read_counts(server.url) if half else {}
            finally:
                server.process.terminate()
                server.process.wait()
            counts = dict(sorted(soak.counts.items()))
            found["halves"].append({"tenths": states, "seconds": round(seconds), "counts": counts, **metrics})
            wrong += soak.wrong + judge_growth(states)
    found |= {"wrong": wrong[:20], "machine": describe_machine("fastapi", "uvicorn")}
    write_json(RESULTS.with_suffix(".json"), found)
    print(json.dumps(found, indent=2))
    sys.exit(bool(wrong))


def read_counts(url: str) -> dict[str, Any]:
    """What the server counted: adapters that were read, and that gave way."""

    async def ask() -> str:
        connections = Connections(url)
        response = await connections.ask("GET", "/metrics")
        connections.close()
        return response.body.decode()

    lines = [line.split() for line in asyncio.run(ask()).splitlines() if not line.startswith("#")]
    return {"metrics": {name: float(value) for name, value in lines if "adapter_loads" in name or "evict" in name}}


def judge_growth(states: list[dict[str, float]]) -> list[str]:
    """From the middle on, when all that is kept on purpose has been seen."""
    before, after = states[len(states) // 2], states[-1]
    room = {"memory_mb": MEMORY_MB, "files": 2, "threads": 2}
    return [f"{key} grew from {before[key]} to {after[key]}" for key in room if after[key] > before[key] + room[key]]


if __name__ == "__main__":
    main()

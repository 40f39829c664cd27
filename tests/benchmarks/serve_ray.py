"""Two replicas behind Ray Serve on this machine: how often the replica that is asked has the adapter in memory.

    python tests/benchmarks/serve_ray.py [--requests 400] [--rounds 2] [--clients 1 8]

Sixteen adapters of a tiny ViT, and memory for ten in each replica. Each request asks for an adapter drawn from a seed.
In turn, each time with new replicas: `routed`, where the entrance reads the adapter's name and Ray prefers the replica
that has it; `not routed`, the same requests with "model" spelled by an escape of JSON, which the server reads and the
entrance does not, so that Ray chooses by load. The first quarter of the requests, which has to read each adapter at
least once, is counted by itself. The replicas count what they read (/metrics); any status but 200 is an error.
"""

import argparse
import base64
import io
import random
import socket
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ray
from bank import make_adapters, make_base
from machine import describe_machine, tell_machine
from PIL import Image
from ray import serve
from ray.serve.config import HTTPOptions

from inlay import Bank
from inlay.files.atomic import write_json
from inlay.serve.ray import make_application

RESULTS = Path(__file__).parent / "results" / "serve_ray"
ADAPTERS, ROOM, REPLICAS = 16, 10, 2
FIELDS = {"routed": "model", "not routed": "mod\\u0065l"}
LOADS = "inlay_adapter_loads_total"


def draw_bodies(field: str, requests: int) -> list[tuple[str, str]]:
    """Adapter and body of each request, the same each time; `field` is how JSON spells "model"."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    image, draw = base64.b64encode(file.getvalue()).decode(), random.Random(0)
    names = [str(draw.randrange(ADAPTERS)) for _ in range(requests)]
    return [(name, f'{{"{field}": "{name}", "image": "{image}"}}') for name in names]


def count_loads(client: httpx.Client) -> float:
    """Adapters that all replicas have read since they started, each of which is asked sooner or later."""
    found: set[tuple[str, ...]] = set()
    for _ in range(40):
        lines = client.get("/metrics").text.splitlines()
        found.add(tuple(line for line in lines if line.startswith("inlay_adapter_") or "/v1/classify" in line))
        if len(found) == REPLICAS:
            break
    loads = [float(line.split()[1]) for lines in found for line in lines if line.startswith(LOADS)]
    return sum(loads) * REPLICAS / len(found)  # two replicas that have counted the same look like one


def ask(client: httpx.Client, bodies: list[tuple[str, str]], clients: int) -> dict[str, Any]:
    """What came of these requests, of which as many as there are clients are under way at a time."""

    def ask_once(request: tuple[str, str]) -> tuple[bool, float]:
        name, body = request
        begun = time.perf_counter()
        answer = client.post("/v1/classify", content=body)
        right = answer.status_code == 200 and answer.json()["model"] == name
        return right, (time.perf_counter() - begun) * 1e3

    loads, begun = count_loads(client), time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask_once, bodies))
    seconds = time.perf_counter() - begun
    loads = count_loads(client) - loads
    latencies = sorted(latency for _, latency in answers)
    return {
        "requests": len(bodies),
        "errors": sum(not right for right, _ in answers),
        "loads": int(loads),
        "resident": round(1 - loads / len(bodies), 4),
        "per_second": round(len(bodies) / seconds, 1),
        "p50_ms": round(statistics.median(latencies), 1),
        "p99_ms": round(latencies[int(0.99 * len(latencies))], 1),
    }


def measure(way: str, clients: int, requests: int, start: Any, port: int) -> list[dict[str, Any]]:
    """The first quarter of the requests and the rest, asked of new replicas."""
    name, bodies = way.replace(" ", "-"), draw_bodies(FIELDS[way], requests)
    serve.run(start(), name=name, route_prefix="/")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            parts = {"first": bodies[: requests // 4], "rest": bodies[requests // 4 :]}
            return [
                {"way": way, "clients": clients, "part": part, **ask(client, of_part, clients)}
                for part, of_part in parts.items()
            ]
    finally:
        serve.delete(name)


def make_table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The mean over the rounds, the rounds in brackets."""
    lines = [
        "| | clients | adapter in memory, first quarter | adapter in memory, rest | requests a second | p50, p99 ms "
        "| errors |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, clients in dict.fromkeys((row["way"], row["clients"]) for row in rows):
        of_way = [row for row in rows if (row["way"], row["clients"]) == (way, clients)]
        first, rest = ([row for row in of_way if row["part"] == part] for part in ("first", "rest"))
        shares = [
            f"{statistics.mean(row['resident'] for row in part):.3f} "
            f"({', '.join(format(row['resident'], '.3f') for row in part)})"
            for part in (first, rest)
        ]
        speed, p50, p99 = (statistics.mean(row[key] for row in rest) for key in ("per_second", "p50_ms", "p99_ms"))
        errors = sum(row["errors"] for row in of_way)
        lines.append(
            f"| {way} | {clients} | {shares[0]} | **{shares[1]}** | {speed:.0f} | {p50:.0f}, {p99:.0f} | {errors} |"
        )
    return "\n".join([*lines, "", f"{tell_machine(machine)}; load average {machine['load_average']}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rows: list[dict[str, Any]] = []
    ray.init(num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options=HTTPOptions(port=port, num_cpus=0))
        with tempfile.TemporaryDirectory() as where:
            base = make_base(Path(where) / "base", "tiny", 12)
            folder = make_adapters(base, "lora", Path(where) / "adapters", ADAPTERS)
            budget_mb = (ROOM + 1.5) * Bank(base, folder).bytes / (ADAPTERS + 1) / 1e6

            def start() -> serve.Application:
                return make_application(base, str(folder), replicas=REPLICAS, budget_mb=budget_mb)

            for _ in range(given.rounds):
                for clients in given.clients:
                    for way in FIELDS:
                        rows += measure(way, clients, given.requests, start, port)
    finally:
        serve.shutdown()
        ray.shutdown()
    machine = describe_machine("ray")
    settings = {"adapters": ADAPTERS, "room": ROOM, "replicas": REPLICAS}
    write_json(RESULTS.with_suffix(".json"), {"machine": machine, **settings, "rows": rows})
    table = make_table(rows, machine)
    RESULTS.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()

"""Two replicas behind Ray Serve on this machine: how often adapters are read, with and without routing by adapter.

    python tests/benchmarks/serve_ray.py [--requests 400]

Sixteen adapters of a tiny ViT, and memory for about ten in each replica. Requests come one after the other, for an
adapter drawn from a seed. `routed`: the entrance reads the adapter's name, and Ray prefers the replica that has it.
`not routed`: the same requests with "model" spelled by an escape of JSON, which the server reads and the entrance does
not, so that Ray chooses by load. Loads are counted by the replicas themselves (/metrics).
"""

import argparse
import base64
import io
import json
import random
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import ray
from bank import make_adapters, make_base
from machine import describe_machine
from PIL import Image
from ray import serve
from ray.serve.config import HTTPOptions

from inlay import Bank
from inlay.files.atomic import write_json
from inlay.serve.ray import make_application

RESULTS = Path(__file__).parent / "results" / "serve_ray.json"
ADAPTERS, ROOM, REPLICAS = 16, 10, 2
COUNTED = ("inlay_adapter_loads_total", "inlay_adapter_hits_total", "inlay_adapter_evictions_total")


def ask_often(url: str, field: str, requests: int) -> None:
    """The same requests each time; `field` is how JSON spells "model"."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    image, draw = base64.b64encode(file.getvalue()).decode(), random.Random(0)
    with httpx.Client(timeout=120) as client:
        for _ in range(requests):
            name = str(draw.randrange(ADAPTERS))
            answer = client.post(f"{url}/v1/classify", content=f'{{"{field}": "{name}", "image": "{image}"}}')
            assert answer.status_code == 200 and answer.json()["model"] == name, answer.text


def read_counts(url: str) -> dict[str, list[float]]:
    """What the replicas have counted, each of which is asked sooner or later."""
    found = set()
    for _ in range(200):
        lines = [line.split() for line in httpx.get(f"{url}/metrics", timeout=60).text.splitlines()]
        values = {line[0]: float(line[1]) for line in lines if line[0] in COUNTED}
        found.add(tuple(values[name] for name in COUNTED))
        if len(found) == REPLICAS:
            break
    return {name: sorted(counts) for name, counts in zip(COUNTED, zip(*found, strict=True), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=400)
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found: dict[str, Any] = {"requests": arguments.requests, "adapters": ADAPTERS, "room": ROOM, "replicas": REPLICAS}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options=HTTPOptions(port=port, num_cpus=0))
        with tempfile.TemporaryDirectory() as where:
            base = make_base(Path(where) / "base", "tiny", 12)
            folder = make_adapters(base, "lora", Path(where) / "adapters", ADAPTERS)
            budget_mb = (ROOM + 1.5) * Bank(base, folder).bytes / (ADAPTERS + 1) / 1e6
            for way, field in (("routed", "model"), ("not routed", "mod\\u0065l")):
                application = make_application(base, str(folder), replicas=REPLICAS, budget_mb=budget_mb)
                serve.run(application, name=way.replace(" ", "-"), route_prefix="/")
                begun = time.perf_counter()
                ask_often(f"http://127.0.0.1:{port}", field, arguments.requests)
                seconds = time.perf_counter() - begun
                found[way] = {"seconds": round(seconds, 1), **read_counts(f"http://127.0.0.1:{port}")}
                serve.delete(way.replace(" ", "-"))
    finally:
        serve.shutdown()
        ray.shutdown()
    found["machine"] = describe_machine("ray")
    write_json(RESULTS, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

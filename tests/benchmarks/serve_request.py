"""What a request costs besides the model: the CPU time of the server for one image at a time, batch after batch of one.

    python tests/benchmarks/serve_request.py [--requests 30] [--rounds 12]

builtin:vit-tiny with a LoRA adapter, over HTTP on 127.0.0.1 by the Open Inference Protocol. In turn:

    base          the plain base's forward of one image
    bank          Bank of one image under the adapter
    pixels        a request with 32 x 32 pixels as bytes
    png           a request with a PNG of 32 x 32 pixels
    jpeg          a request with a JPEG of 224 x 224 pixels
    json          a request with 32 x 32 pixels in JSON, answered in JSON

CPU time is that of all threads of the server's process but the client's.
"""

import argparse
import http.client
import io
import json
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import uvicorn
from machine import describe_machine, tell_machine
from peft import LoraConfig, get_peft_model
from PIL import Image

from inlay import Bank, load_base, load_processor, save_adapter
from inlay.bases.sites import head_modules, lora_targets
from inlay.serve.server.app import make_app
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.service import Service

RESULTS = Path(__file__).parent / "results" / "serve_request"
BASE, SIDE, PHOTO = "builtin:vit-tiny", 32, 224


def make_adapter(folder: Path) -> Path:
    torch.manual_seed(0)
    model = load_base(BASE)
    config = LoraConfig(r=8, target_modules=lora_targets(model, "attention"), modules_to_save=head_modules(model))
    return save_adapter(get_peft_model(model, config), folder / "a", processor=load_processor(BASE))


@contextmanager
def listen(service: Service) -> Iterator[http.client.HTTPConnection]:
    """A connection to the server of a service."""
    server = uvicorn.Server(uvicorn.Config(make_app(service), port=0, log_level="critical", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield http.client.HTTPConnection(*server.servers[0].sockets[0].getsockname()[:2])
    finally:
        server.should_exit = True
        thread.join()


def encode(image: np.ndarray, kind: str) -> bytes:
    written = io.BytesIO()
    Image.fromarray(image).save(written, kind)
    return struct.pack("<I", written.tell()) + written.getvalue()


def make_body(name: str, datatype: str, shape: list[int], data: bytes) -> tuple[bytes, dict[str, str]]:
    tensor = {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + data, {"Inference-Header-Content-Length": str(len(head))}


def make_ways(bank: Bank, connection: http.client.HTTPConnection) -> dict[str, Callable[[], object]]:
    rng = np.random.default_rng(0)
    small, photo = (rng.integers(0, 256, (side, side, 3), np.uint8) for side in (SIDE, PHOTO))
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, SIDE, SIDE, 3], "data": [small.tolist()]}
    bodies = {
        "pixels": make_body("pixels", "UINT8", [1, SIDE, SIDE, 3], small.tobytes()),
        "png": make_body("image", "BYTES", [1], encode(small, "PNG")),
        "jpeg": make_body("image", "BYTES", [1], encode(photo, "JPEG")),
        "json": (json.dumps({"inputs": [tensor]}).encode(), {}),
    }
    row = {"pixel_values": torch.randn(1, 3, SIDE, SIDE)}
    base = load_base(BASE)

    def ask(body: bytes, headers: dict[str, str]) -> None:
        connection.request("POST", "/v2/models/a/infer", body, headers)
        answer = connection.getresponse()
        said = answer.read()
        assert answer.status == 200, said

    def compute_base() -> None:
        with torch.inference_mode():
            base(**row)

    ways: dict[str, Callable[[], object]] = {"base": compute_base, "bank": lambda: bank(row, ["a"])}
    return ways | {name: lambda body=body: ask(*body) for name, body in bodies.items()}  # type: ignore[misc]


def take_turns(ways: dict[str, Callable[[], object]], rounds: int, count: int) -> dict[str, list[float]]:
    """CPU milliseconds of one call of each way, by round; a request's are those of all threads but this one."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for i in range(rounds + 1):  # the first round warms up
        for name in order[i % len(order) :] + order[: i % len(order)]:
            whole, own = time.process_time(), time.thread_time()
            for _ in range(count):
                ways[name]()
            own = time.thread_time() - own
            spent = own if name in ("base", "bank") else time.process_time() - whole - own
            if i:
                taken[name].append(spent / count * 1e3)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Bank(BASE, [make_adapter(Path(folder))]), ServiceConfig())
        with listen(service) as connection:
            taken = take_turns(make_ways(service.bank, connection), given.rounds, given.requests)
    machine = describe_machine("fastapi", "uvicorn", "pillow")
    RESULTS.with_suffix(".json").write_text(json.dumps({"machine": machine, "cpu_ms": taken}, indent=1) + "\n")
    lines = ["| | CPU ms: median (least to most) | beyond base: median, least |", "|---|---|---|"]
    for name, values in taken.items():
        middle, least = (statistic(values) - statistic(taken["base"]) for statistic in (statistics.median, min))
        spread = f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        lines.append(f"| {name} | {spread} | {'' if name == 'base' else f'{middle:.2f}, {least:.2f}'} |")
    lines += ["", tell_machine(machine)]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

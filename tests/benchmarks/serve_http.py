"""`inlay serve` under load: mixed batches next to one request at a time, and to one process for each adapter.

    python tests/benchmarks/serve_http.py [--size tiny base] [--parts model overhead wait ways spinning]

A ViT with random weights, 12 blocks (tiny: width 96 at 32 px; base: width 768 at 224 px), LoRA r=8 on q and v, images
as JPEG files, 64 clients on this machine, which compete with the server for its cores.

    model       the bare model without a server: 64 images in batches of 1, 8 and 64, by threads and dtype: what batches
                can give here at most
    overhead    CPU time that a server takes for a request beyond the model, at batches of one
    wait        how long a batch waits for more requests: 64 clients, and arrivals below what the server can do
    spinning    threads of OpenMP that sleep while they wait for work, as in `inlay serve` (OMP_WAIT_POLICY=PASSIVE),
                and those that spin as long as they do by default in GNU's OpenMP (GOMP_SPINCOUNT=300000); only where
                it is asked for
    ways        mixed: `inlay serve` as it is, with 1, 16 and 64 adapters
                one by one: the same with --max-batch 1
                processes: `inlay serve` with one adapter in each of --processes processes of one thread, and the load
                spread over them; each takes a whole base in memory

Ways take turns, round by round; figures are the median of the rounds and their range. Loads begin with requests that
are not counted. A part that is measured again replaces what was there of it.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from bank import SIZES, make_adapters, make_base
from machine import describe_machine, tell_machine
from server_process import ServerProcess, serve

from inlay import Bank, load_base
from inlay.files.atomic import write_json
from inlay.serve.connections import Connections, Response
from inlay.serve.load import run_load, send_load
from inlay.serve.load_config import LoadConfig

RESULTS = Path(__file__).parent / "results" / "serve_http"
CLIENTS, ADAPTERS = 64, 64
REQUESTS = {"tiny": 1024, "base": 256}  # of a load
WARM_UP = {"tiny": 64, "base": 16}
ALONE = {"tiny": 200, "base": 30}  # of a single client
RATES = {"tiny": (20, 60), "base": (1, 3)}
WAITS = (0, 1, 5, 20)  # ms
BATCHES = (1, 8, 64)  # of the bare model
TIMES = {"p50 ms": "p50_ms", "p99 ms": "p99_ms"}
# Of the table of each part: the heading of its rows, and its columns by their headings.
COLUMNS: dict[str, tuple[str, dict[str, str]]] = {
    "model": (
        "dtype, threads",
        {
            "one by one, ms an image": "ms_one_by_one",
            "CPU ms": "cpu_ms",
            "batches of 8, gain": "gain_8",
            "in CPU time": "cpu_gain_8",
            "batches of 64, gain": "gain_64",
            "in CPU time ": "cpu_gain_64",
        },
    ),
    "overhead": (
        "CPU ms a request",
        {"server": "server_cpu_ms", "bank": "bank_cpu_ms", "bare model": "model_cpu_ms", "overhead": "overhead_cpu_ms"},
    ),
    "wait": ("load, max wait", {"requests a second": "per_second", **TIMES}),
    "spinning": (
        "load, threads that wait",
        {"requests a second": "per_second", **TIMES, "CPU ms a request": "server_cpu_ms"},
    ),
    "ways": (
        "way, adapters",
        {
            "requests a second": "per_second",
            "over one by one": "over_one_by_one",
            **TIMES,
            "p99 / p50": "p99_over_p50",
            "CPU ms a request": "server_cpu_ms",
        },
    ),
}


def name_adapters(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def load_server(server: ServerProcess, size: str, adapters: int, **settings: Any) -> dict[str, Any]:
    """A closed loop, and what the server itself took."""
    config = {"kind": "image", "side": SIZES[size]["image_size"], "clients": CLIENTS, "requests": REQUESTS[size]}
    config |= {"warm_up": 0, **settings}
    names, warm_up = name_adapters(adapters), {"requests": min(WARM_UP[size], config["requests"]), "seed": 1}
    run_load(server.url, LoadConfig(**{**config, **warm_up}), names)
    before = server.cpu_s
    (found,) = run_load(server.url, LoadConfig(**config), names)["loads"]
    assert found["statuses"] == {"200": config["requests"]}, found["statuses"]
    return {**found, "server_cpu_ms": 1e3 * (server.cpu_s - before) / config["requests"]}


def measure_model(size: str, base: str, rounds: int, threads_each: Sequence[int]) -> dict[str, Any]:
    """Time for an image and what batches gain, by dtype and threads."""
    side, rows = SIZES[size]["image_size"], {}
    for dtype in ("float32", "bfloat16"):
        model = load_base(base, dtype=dtype).eval()
        images = torch.randn(64, 3, side, side, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
        for threads in threads_each:
            torch.set_num_threads(threads)
            compute_in_batches(model, images[:8], 1)  # warm-up
            compute_in_batches(model, images[:8], 8)
            taken: dict[int, list[tuple[float, float]]] = {batch: [] for batch in BATCHES}
            for turn in range(rounds):
                for batch in BATCHES[turn % 3 :] + BATCHES[: turn % 3]:
                    taken[batch].append(compute_in_batches(model, images, batch))
            row = {"ms_one_by_one": tell([wall for wall, _ in taken[1]]), "cpu_ms": tell([cpu for _, cpu in taken[1]])}
            for batch in BATCHES[1:]:
                pairs = list(zip(taken[1], taken[batch], strict=True))
                row[f"gain_{batch}"] = tell([one[0] / other[0] for one, other in pairs])
                row[f"cpu_gain_{batch}"] = tell([one[1] / other[1] for one, other in pairs])
            rows[f"{dtype}, {threads}"] = row
    return {"rows": rows}


@torch.inference_mode()
def compute_in_batches(model: torch.nn.Module, images: torch.Tensor, batch: int) -> tuple[float, float]:
    """Wall and CPU time for an image, in ms."""
    cpu, wall = time.process_time(), time.perf_counter()
    for part in images.split(batch):
        model(pixel_values=part)
    return 1e3 * (time.perf_counter() - wall) / len(images), 1e3 * (time.process_time() - cpu) / len(images)


def tell(values: Sequence[float]) -> list[float]:
    """Median, least and most."""
    return [float(f"{value:.4g}") for value in (statistics.median(values), min(values), max(values))]


def measure_overhead(size: str, base: str, folder: Path, rounds: int) -> dict[str, Any]:
    """CPU time for a request of one client, next to that of the same row in a bank, both by one thread."""
    torch.set_num_threads(1)
    side, count = SIZES[size]["image_size"], ALONE[size]
    bank = Bank(base, folder, check_golden=False)
    row = {"pixel_values": torch.randn(1, 3, side, side)}
    taken: dict[str, list[float]] = {"server": [], "bank": [], "model": []}
    with serve(base, [folder], threads=1) as server:
        for turn in range(-1, rounds):
            found = {"server": load_server(server, size, ADAPTERS, clients=1, requests=count)["server_cpu_ms"]}
            for name, call in {
                "bank": lambda i: bank(row, [str(i % ADAPTERS)]),
                "model": lambda i: bank.model(**row),
            }.items():
                begun = time.process_time()
                with torch.inference_mode():
                    for i in range(count):
                        call(i)
                found[name] = 1e3 * (time.process_time() - begun) / count
            if turn >= 0:
                for name, value in found.items():
                    taken[name].append(value)
    facts = {f"{name}_cpu_ms": tell(values) for name, values in taken.items()}
    pairs = zip(taken["server"], taken["bank"], strict=True)
    return {"rows": {"one client": {**facts, "overhead_cpu_ms": tell([served - bare for served, bare in pairs])}}}


def measure_wait(size: str, base: str, folder: Path, rounds: int, threads: int | None) -> dict[str, Any]:
    """Servers that wait differently, under one load after the other."""
    rows = {}
    with ExitStack() as stack:
        servers = {
            wait: stack.enter_context(serve(base, [folder], "--max-wait-ms", str(wait), threads=threads))
            for wait in WAITS
        }
        loads: dict[str, list[tuple[float, float, float]]] = {}
        for turn in range(rounds):
            for wait, server in list(servers.items())[turn % len(WAITS) :] + list(servers.items())[: turn % len(WAITS)]:
                closed = load_server(server, size, ADAPTERS)
                ways = {f"{CLIENTS} clients": closed}
                config = LoadConfig(kind="image", side=SIZES[size]["image_size"], requests=150, warm_up=8, seed=turn)
                opened = run_load(server.url, config, name_adapters(ADAPTERS), RATES[size])["loads"]
                ways |= {f"{load['rate']:g} a second": load for load in opened}
                for way, load in ways.items():
                    figures = load["per_second"], load["latency_ms"]["p50"], load["latency_ms"]["p99"]
                    loads.setdefault(f"{way}, {wait} ms", []).append(figures)
    for way, figures in loads.items():
        columns = list(zip(*figures, strict=True))
        rows[way] = {"per_second": tell(columns[0]), "p50_ms": tell(columns[1]), "p99_ms": tell(columns[2])}
    return {"rows": rows}


def measure_spinning(size: str, base: str, folder: Path, rounds: int, threads: int | None) -> dict[str, Any]:
    """Servers whose threads sleep or spin while they wait, in turn, under many clients and under one."""
    settings: dict[str, dict[str, str]] = {"sleep": {}, "spin": {"GOMP_SPINCOUNT": "300000"}}
    loads: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(serve(base, [folder], threads=threads, variables=variables))
            for name, variables in settings.items()
        }
        for turn in range(rounds):
            for name in list(servers)[:: 1 - 2 * (turn % 2)]:  # one first, then the other
                for clients, requests in ((CLIENTS, REQUESTS[size]), (1, ALONE[size])):
                    load = load_server(servers[name], size, ADAPTERS, clients=clients, requests=requests)
                    loads.setdefault(f"{clients} client{'s' * (clients > 1)}, {name}", []).append(load)
    rows = {}
    for way, figures in loads.items():
        times = {f"{p}_ms": tell([load["latency_ms"][p] for load in figures]) for p in ("p50", "p99")}
        sums = {key: tell([load[key] for load in figures]) for key in ("per_second", "server_cpu_ms")}
        rows[way] = {**sums, **times}
    return {"rows": rows}


class RoutedConnections(Connections):
    """Connections to one process for each adapter."""

    def __init__(self, servers: dict[str, ServerProcess]) -> None:
        super().__init__(next(iter(servers.values())).url)
        self.routes = {name: Connections(server.url) for name, server in servers.items()}

    async def ask(self, method: str, target: str, body: bytes = b"", headers: Any = None) -> Response:
        return await self.routes[json.loads(body)["model"]].ask(method, target, body, headers)

    def close(self) -> None:
        for connections in self.routes.values():
            connections.close()


def measure_ways(size: str, base: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Each way to serve many adapters, under the same load."""
    options, only, threads = ("--dtype", arguments.dtype), arguments.only, arguments.server_threads
    processes = arguments.processes if not only or "processes" in only else 1  # of which the memory is told
    with ExitStack() as stack:
        mixed = stack.enter_context(serve(base, [folder], *options, threads=threads))
        single = stack.enter_context(serve(base, [folder], *options, "--max-batch", "1", threads=threads))
        many = {
            name: stack.enter_context(serve(base, [folder / name], *options, threads=1))
            for name in name_adapters(processes)
        }
        ways: dict[str, Callable[[], dict[str, Any]]] = {
            **{f"mixed, {n}": lambda n=n: load_server(mixed, size, n) for n in (1, 16, ADAPTERS, processes)},
            f"one by one, {ADAPTERS}": lambda: load_server(single, size, ADAPTERS),
            f"processes, {processes}": lambda: load_processes(many, size),
        }
        chosen = [way for way in ways if not only or way.startswith(("one by one", *only))]
        loads: dict[str, list[dict[str, Any]]] = {way: [] for way in chosen}
        for turn in range(arguments.rounds):
            for way in chosen[turn % len(chosen) :] + chosen[: turn % len(chosen)]:
                loads[way].append(ways[way]())
        each_mb = statistics.mean(each.memory_mb for each in many.values())
        remark = f": the server takes {mixed.memory_mb:,.0f} MB, a process for one adapter {each_mb:,.0f} MB"
    alone = [load["per_second"] for load in loads[f"one by one, {ADAPTERS}"]]
    rows = {}
    for way, figures in loads.items():
        rows[way] = {
            "per_second": tell([load["per_second"] for load in figures]),
            "over_one_by_one": tell([load["per_second"] / one for load, one in zip(figures, alone, strict=True)]),
            "p50_ms": tell([load["latency_ms"]["p50"] for load in figures]),
            "p99_ms": tell([load["latency_ms"]["p99"] for load in figures]),
            "p99_over_p50": tell([load["latency_ms"]["p99"] / load["latency_ms"]["p50"] for load in figures]),
            "server_cpu_ms": tell([load["server_cpu_ms"] for load in figures]),
            "generator_cpu_ms": tell([load["generator_cpu_ms"] for load in figures]),
        }
    return {"rows": rows, "remark": remark}


def load_processes(servers: dict[str, ServerProcess], size: str) -> dict[str, Any]:
    """As `load_server`, of one process for each adapter."""
    requests, side = REQUESTS[size], SIZES[size]["image_size"]
    config = LoadConfig(kind="image", side=side, clients=CLIENTS, requests=requests, warm_up=0)
    warm_up = LoadConfig(kind="image", side=side, clients=CLIENTS, requests=WARM_UP[size], warm_up=0, seed=1)
    asyncio.run(send_load(RoutedConnections(servers), warm_up, list(servers)))
    before = sum(server.cpu_s for server in servers.values())
    (found,) = asyncio.run(send_load(RoutedConnections(servers), config, list(servers)))["loads"]
    assert found["statuses"] == {"200": requests}, found["statuses"]
    taken = sum(server.cpu_s for server in servers.values()) - before
    return {**found, "server_cpu_ms": 1e3 * taken / requests}


def write_tables(result: dict[str, Any]) -> str:
    """A table for each part, and where it was measured."""
    lines = []
    for key, found in result.items():
        part = key.partition(",")[0]
        first, columns = COLUMNS[part]
        heading = "| " + " | ".join([first, *columns]) + " |"
        lines += [f"**{key}**{found.get('remark', '')}", "", heading, "|---|" + "---:|" * len(columns)]
        for way, row in found["rows"].items():
            lines.append(f"| {way} | " + " | ".join(spread(row[column]) for column in columns.values()) + " |")
        lines += ["", tell_machine(found["machine"]) + f"; load average {found['machine']['load_average']}", ""]
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Median (least to most)."""
    median, least, most = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values)
    return f"{median} ({least} to {most})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["tiny", "base"])
    parser.add_argument("--parts", nargs="+", default=["model", "overhead", "wait", "ways"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=4, help="Of the way with one adapter in each.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="Of the bare model.")
    parser.add_argument("--server-threads", type=int, help="Of torch in servers; default: as many as there are cores.")
    parser.add_argument("--requests", type=int, help="Of a load; default: 1024 (tiny) or 256 (base).")
    parser.add_argument("--only", nargs="+", help="Of the ways, by how their names begin; one by one is always there.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="Of the ways.")
    arguments = parser.parse_args()
    if arguments.requests:
        REQUESTS.update(dict.fromkeys(REQUESTS, arguments.requests))
    stored = RESULTS.with_suffix(".json")
    result = json.loads(stored.read_text()) if stored.is_file() else {}
    with tempfile.TemporaryDirectory() as where:
        for size in arguments.size:
            place = Path(where) / size
            base = make_base(place / "base", size, 12)
            folder = make_adapters(base, "lora", place / "adapters", ADAPTERS)
            for part in arguments.parts:
                begun = time.perf_counter()
                if part == "model":
                    found = measure_model(size, base, arguments.rounds, arguments.threads)
                elif part == "overhead":
                    found = measure_overhead(size, base, folder, arguments.rounds)
                elif part == "wait":
                    found = measure_wait(size, base, folder, arguments.rounds, arguments.server_threads)
                elif part == "spinning":
                    found = measure_spinning(size, base, folder, arguments.rounds, arguments.server_threads)
                else:
                    found = measure_ways(size, base, folder, arguments)
                key = f"{part}, {size}" + (", bfloat16" if part == "ways" and arguments.dtype == "bfloat16" else "")
                machine = describe_machine("fastapi", "uvicorn", "h11")
                own = {"model": max(arguments.threads), "overhead": 1}
                machine["threads"] = own.get(part, arguments.server_threads or machine["cores"])
                result[key] = {**found, "rounds": arguments.rounds, "machine": machine}
                print(key, f"{time.perf_counter() - begun:.0f} s", json.dumps(found, indent=1))
                write_json(stored, dict(sorted(result.items())))
                RESULTS.with_suffix(".md").write_text(write_tables(dict(sorted(result.items()))))


if __name__ == "__main__":
    main()

"""The verbs `inlay serve`, many adapters on one base over HTTP, and `inlay bench-serve`, a load on such a server."""

import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Annotated, Any, Literal, get_type_hints

import typer

from inlay.cli.show import DeviceOption, DtypeOption, JsonOption
from inlay.cli.study import read_numbers
from inlay.errors import BadInput, Unsupported
from inlay.serve.load_config import LoadConfig
from inlay.serve.server.config import ServiceConfig

LATE_MS = 5.0  # of the load generator, above which it says so


def serve(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Embedded base, local folder or Hub id.")],
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTER...", help="A folder of adapters, or adapters: folders and Hub ids.")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 is every network of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=0, max=65535)] = 8000,
    budget_mb: Annotated[
        float | None, typer.Option(help="Memory for adapters in MB; the least recently used ones give way.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve adapters as they come to the folder, change there and go.")
    ] = False,
    allow_loading: Annotated[
        list[str] | None,
        typer.Option(metavar="ROOT", help="Let clients load adapters from this folder; may be repeated."),
    ] = None,
    allow_hub: Annotated[bool, typer.Option("--allow-hub", help="Let clients load adapters of the Hub.")] = False,
    drain_s: Annotated[
        float, typer.Option(help="How long accepted requests are answered after SIGTERM, in seconds.", min=0)
    ] = 25.0,
    log_format: Annotated[
        Literal["text", "json"], typer.Option(help="Of the lines on stderr, one for each request.")
    ] = "text",
    **bounds: Any,
) -> None:
    """Serve many adapters of any method on one base, such as `serve builtin:vit-tiny adapters_hub`."""
    # OpenMP reads it when torch is imported. By default threads that wait for the next piece of work keep their cores
    # busy, which the other threads of a server need: on two busy cores a forward took 30 times longer.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from inlay.serve.server.run import run_server
    except ModuleNotFoundError as error:
        raise Unsupported(f"{error.name} is not installed; pip install 'inlay[serve]' installs it.") from error
    from inlay.serve.server.adapters import LoadingRules
    from inlay.serve.server.app import make_app
    from inlay.serve.server.service import Service, open_bank

    config = ServiceConfig(**bounds)
    loading = LoadingRules.from_options(allow_loading or [], allow_hub)
    if watch and len(adapters) > 1:
        raise BadInput("--watch takes one folder that holds a folder for each adapter.")
    given = adapters[0] if len(adapters) == 1 else adapters

    def load() -> Service:
        return Service(open_bank(base, given, budget_mb=budget_mb, device=device, dtype=dtype or "float32"), config)

    run_server(
        load,
        partial(make_app, watched=adapters[0] if watch else None, loading=loading),
        host=host,
        port=port,
        drain_s=drain_s,
        log_format=log_format,
    )


def bench_serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of a server, such as http://127.0.0.1:8000.")],
    adapters: Annotated[
        str | None, typer.Option(help="Names of the adapters to ask for, with commas; default: all of the server.")
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option(
            help="Requests a second that arrive at random, whether or not earlier ones are answered, instead of "
            "--clients that wait for their answers; several with commas give a table."
        ),
    ] = None,
    as_json: JsonOption = False,
    **load: Any,
) -> None:
    """Measure a server under load: requests a second, latency, and errors, such as `bench-serve URL --rate 10,50`."""
    try:
        from inlay.serve.load import run_load
    except ModuleNotFoundError as error:
        raise Unsupported(f"{error.name} is not installed; pip install 'inlay[serve]' installs it.") from error

    names = [name.strip() for name in (adapters or "").split(",") if name.strip()]
    found = run_load(url, LoadConfig(**load), names, read_numbers("--rate", rate, float) or ())
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_loads(found)
    if not any(load["per_second"] for load in found["loads"]):
        sys.exit(1)


def _print_loads(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = {"latency_ms": "latency", "first_token_ms": "first token", "token_ms": "token"}
    shown = {key: title for key, title in columns.items() if any(found_load.get(key) for found_load in found["loads"])}
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("load", "answered", "a second", *(f"{title} p50 / p95 / p99 ms" for title in shown.values())):
        table.add_column(title, justify="right")
    for load in found["loads"]:
        way = f"{load['rate']:g} a second" if "rate" in load else f"{load['clients']} clients"
        answered = f"{load['statuses'].get('200', 0)} of {load['requests']}"
        times = [
            " / ".join(f"{load[key][p]:.1f}" for p in ("p50", "p95", "p99")) if load.get(key) else "" for key in shown
        ]
        table.add_row(way, answered, f"{load['per_second']:.1f}", *times)
    console = Console(highlight=False)
    console.print(
        f"{found['kind']}s to {found['adapters']} adapters of {found['url']}, seed {found['seed']}", markup=False
    )
    console.print(table)
    for load in found["loads"]:
        if errors := {status: count for status, count in load["statuses"].items() if status != "200"}:
            console.print(
                "errors: " + ", ".join(f"{count} x {status}" for status, count in errors.items()), markup=False
            )
        if load["late_ms"]["p99"] > LATE_MS:
            console.print(
                f"the generator itself was late by {load['late_ms']['p99']:.0f} ms (p99): this machine is too busy for "
                "this rate.",
                markup=False,
            )


def _add_options(verb: Callable[..., None], config: type, title: str) -> None:
    """Give a verb the fields of a dataclass as options, whose help is written there."""
    own = inspect.signature(verb).parameters.values()
    parameters = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    hints = get_type_hints(config)
    for each in fields(config):
        panel = typer.Option(help=each.metadata["help"], rich_help_panel=title)
        annotation: Any = Annotated[hints[each.name], panel]
        parameters.append(
            inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=each.default)
        )
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


_add_options(serve, ServiceConfig, "Bounds")
_add_options(bench_serve, LoadConfig, "Load")

VERBS: dict[str, Callable[..., None]] = {"serve": serve, "bench-serve": bench_serve}

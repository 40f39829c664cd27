"""The verb `inlay measure`: what a model or an adapter costs."""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from inlay.cli.show import BaseOption, DeviceOption, JsonOption
from inlay.tasks.printing import printable

if TYPE_CHECKING:
    from inlay.study.measure import Cost, Measurement


def measure(
    name: Annotated[
        str,
        typer.Argument(metavar="MODEL|ADAPTER", help="Embedded base, or a folder or Hub id of a model or an adapter."),
    ],
    base: BaseOption = None,
    batch_size: Annotated[int, typer.Option(help="Examples of a pass.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a text.")] = 128,
    size: Annotated[
        int | None, typer.Option(help="Pixels or voxels a side; default: what the base's config says.")
    ] = None,
    depth: Annotated[int, typer.Option(help="Levels of module names by which parts are told apart.")] = 3,
    no_weights: Annotated[
        bool, typer.Option("--no-weights", help="Read only the config of a model, and count what needs no weights.")
    ] = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a forward pass: parameters and MACs by module, latency, throughput, peak memory and energy.

    An adapter is measured next to its base: in it, and merged into it.
    """
    from inlay.study.measure import measure_costs

    found = measure_costs(
        name,
        base=base,
        batch_size=batch_size,
        length=length,
        size=size,
        depth=depth,
        weights=not no_weights,
        device=device,
    )
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        _print_tables(found)


def _print_tables(found: "Measurement") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    shapes = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in found.inputs.items())
    console.print(printable(f"{found.name}: {found.network} for {found.task}, {shapes}"), markup=False, soft_wrap=True)

    parts = Table(box=None, padding=(0, 2, 0, 0))
    parts.add_column("module", no_wrap=True)
    for heading in ("parameters", "MMACs", "share"):
        parts.add_column(heading, justify="right")
    total = sum(part.macs or 0 for part in found.modules)
    for part in found.modules:
        name = f"{part.name or found.network} (itself)" if part.itself else part.name
        work = ("", "") if part.macs is None else (f"{part.macs / 1e6:,.2f}", f"{part.macs / max(total, 1):.1%}")
        parts.add_row(printable(name), f"{part.parameters:,}", *work)
    console.print(parts)
    console.print()

    facts = Table(box=None, padding=(0, 2, 0, 0))
    facts.add_column("", style="bold", no_wrap=True)
    for state in found.states:
        facts.add_column(state, justify="right")
    rows = [_format_cost(cost) for cost in found.states.values()]
    for what in rows[0]:
        if any(row[what] for row in rows):
            facts.add_row(what, *(row[what] for row in rows))
    console.print(facts)
    if found.device == "meta":
        said = "counted from the config; without --no-weights, time, memory and energy are measured too"
        console.print(said, soft_wrap=True)
    else:
        threads = f", {found.threads} thread{'s' * (found.threads != 1)}" if found.device == "cpu" else ""
        console.print(
            printable(f"on {found.device}{threads}; energy: {found.energy_source}"), markup=False, soft_wrap=True
        )
    for remark in found.remarks:
        console.print(printable(remark), markup=False, soft_wrap=True)


def _format_cost(cost: "Cost") -> dict[str, str]:
    """What is known, in words."""
    from inlay.measure.memory import format_bytes

    spread = f" ± {cost.latency_spread_ms / 2:.2f}" if cost.latency_spread_ms else ""
    return {
        "parameters": f"{cost.parameters:,}",
        "weights": format_bytes(cost.weights_bytes),
        "MMACs": "" if cost.macs is None else f"{cost.macs / 1e6:,.2f}",
        "MFLOPs": "" if cost.flops is None else f"{cost.flops / 1e6:,.2f}",
        "latency, ms": "" if cost.latency_ms is None else f"{cost.latency_ms:.2f}{spread}",
        "examples a second": "" if cost.examples_per_s is None else f"{cost.examples_per_s:,.1f}",
        "peak memory": "" if cost.peak_bytes is None else format_bytes(cost.peak_bytes),
        "energy, J": "" if cost.energy_j is None else f"{cost.energy_j:.4g}",
    }


VERBS: dict[str, Callable[..., None]] = {"measure": measure}

"""README.md of an exported model: what it is, how it is used, and what the probe found."""

from collections.abc import Sequence
from typing import Any

from inlay.adapters.tables import make_table
from inlay.tasks import find_task

PROBE_HEADER = ("mode", "latency, ms", "spread, ms", "CPU, ms", "speed-up", "agreement", "accuracy", "MB", "verdict")


def make_export_card(name: str, record: dict[str, Any], size: int) -> str:
    """Markdown with the Hub's header.

    Args:
        name: Of the folder.
        record: export.json.
        size: Bytes of the files with weights.
    """
    task, source = find_task(record["task"]), record["source"]
    if "adapter" in source:
        how = "merged into" if source["merged"] else "on"
        origin = f"The adapter {source['adapter']} ({source['method']}) {how} {_last(source['base'])}"
    else:
        origin = f"The model {_last(source['model'])}"
    graph = record["runtime"] == "onnxruntime"
    kind = f"an ONNX graph (opset {record['opset']})" if graph else "a model for torch"
    part = f" of its {record['module']}; torch computes the rest" if record["module"] else ""
    heading, *inputs = task.describe_inputs(record) or ["Inputs"]
    versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
    sections = [
        f"# {name}",
        f"{origin}, exported by inlay as {kind}{part}, in {record['mode']}, {size / 1e6:.2f} MB.",
        "## Use",
        f'```python\nfrom inlay import load_exported\n\nmodel = load_exported("{name}")\n```',
        f"`inlay.{task.function}` and `inlay.evaluate` take it as they take an adapter. Loading compares its output on "
        "a golden input with the one that is stored in export.json.",
        f"## {heading}",
        *inputs,
        *(describe_probe(record["probe"]) if "probe" in record else []),
        "## Versions",
        f"{versions}.",
        "## Limits",
        task.limits,
    ]
    header = f"---\nlibrary_name: {'onnx' if graph else 'transformers'}\npipeline_tag: {task.hub_tag}\n---"
    return "\n\n".join([header, *filter(None, sections)]) + "\n"


def describe_probe(probe: dict[str, Any]) -> list[str]:
    """What was measured before the mode was chosen, as a section."""
    return [
        "## Probe",
        describe_conditions(probe),
        make_table(PROBE_HEADER, format_probe(probe["rows"])),
    ]


def describe_conditions(probe: dict[str, Any]) -> str:
    """On what the rows of a probe were measured, and what a mode had to keep."""
    compared = "CPU time" if probe["threads"] == 1 else "latency"
    return (
        f"Measured on {probe['cpu']} with threads: {probe['threads']}, one input at a time, by turns: the median, the "
        f"range of the middle 80 % of {probe['repeats']} runs, and the CPU time. Modes are compared by {compared}. "
        f"Agreement with float32 and accuracy are those of {probe['compared']:,} held-out examples of "
        f"{_last(probe['data'])}; {probe['calibrated']:,} others calibrated. Accuracy may drop by at most "
        f"{probe['max_drop']:g}, and agreement may be no less than {probe['min_agreement']:g}."
    )


def format_probe(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of each mode, under PROBE_HEADER; those of one that failed say why."""
    return [
        (row["mode"], *[""] * (len(PROBE_HEADER) - 2), row["verdict"])
        if row["latency_ms"] is None
        else (
            row["mode"],
            f"{row['latency_ms']:.3f}",
            f"{row['p10_ms']:.3f} to {row['p90_ms']:.3f}",
            f"{row['cpu_ms']:.3f}",
            f"{row['speedup']:.2f}",
            *("" if row[key] is None else f"{row[key]:.4f}" for key in ("agreement", "accuracy")),
            f"{row['bytes'] / 1e6:.2f}",
            row["verdict"],
        )
        for row in rows
    ]


def _last(name: str) -> str:
    """A name as the world may read it: of a path on this machine its last part."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith(("/", "~", ".")) else name

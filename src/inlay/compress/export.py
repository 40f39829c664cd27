"""Write a model, with its adapter merged, as a folder that needs neither its base nor its adapter: `inlay export`."""

import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from inlay.adapters import golden
from inlay.adapters.file import CARD
from inlay.adapters.save import read_versions
from inlay.combine.merge import save_quietly
from inlay.compress.card import make_export_card
from inlay.compress.exported import FORMAT, RECORD, ExportedFile, hash_file
from inlay.compress.graph import GRAPH, export_graph, import_runtime
from inlay.compress.load import REST, open_model, split_rest
from inlay.compress.source import Source, load_source
from inlay.errors import BadInput, ComputationFailed
from inlay.files.atomic import write_json, writing
from inlay.files.outputs import check_replaceable_folder
from inlay.tasks.evaluation import Training

ROWS = 2  # of the example that torch's exporter sees; it takes one row for a size that never changes


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where.
        source: The model or adapter that it is of.
        mode: How it computes: float32, or a mode of `quantize`.
        bytes: Of its files that hold weights.
        opset: Of ONNX; None where torch computes.
    """

    folder: Path
    source: str
    mode: str
    bytes: int
    opset: int | None

    def __str__(self) -> str:
        kind = f"an ONNX graph (opset {self.opset})" if self.opset else "a model for torch"
        return f"{self.folder}: {self.source} as {kind} in {self.mode}, {self.bytes / 1e6:.2f} MB"


def export(
    source: str | Path, output: str | Path, *, base: str | Path | None = None, format: Literal["onnx"] = "onnx"
) -> Exported:
    """Write a model, or an adapter merged into its base, as an ONNX graph in float32 with all that its use needs.

    The folder appears whole or not at all; an earlier export there is replaced. `load_exported` reads it, and any
    runtime for ONNX reads the graph in it. Of SAM the image encoder becomes a graph; torch answers the prompts.

    Args:
        source: An embedded base, the folder of a model or of an adapter, or the Hub id of one.
        output: The folder to write.
        base: Of an adapter; default: the one that it names.
        format: Only ONNX.

    Raises:
        InlayError: What `load_adapter` or `load_base` says; a package is missing; torch cannot export the model, or
            its graph computes something else; a folder that holds something else.
    """
    if format != "onnx":
        raise BadInput(f"unknown format {format!r}; the only one is onnx.")
    folder = check_export_folder(output)
    import_runtime()
    loaded = load_source(source, base)
    with tempfile.TemporaryDirectory() as work:
        export_source(loaded, Path(work))
        return write_export(folder, loaded, "float32", list(Path(work).iterdir()))


def check_export_folder(output: str | Path) -> Path:
    """The folder, if an exported model can be written there.

    Raises:
        InlayError: It holds something else, or cannot be written.
    """
    return check_replaceable_folder(output, RECORD, "an exported model")


def exported_module(source: Source) -> nn.Module:
    """The part of a model that becomes a graph."""
    part = source.task.graph_module
    return source.model.get_submodule(part) if part else source.model


def make_graph_inputs(source: Source) -> dict[str, torch.Tensor]:
    """A few rows without a meaning, as the exporter is shown them."""
    inputs = source.task.graph_inputs(source.model, source.processor)
    return {name: value[:ROWS] for name, value in inputs.items()}


def export_source(source: Source, folder: Path) -> Path:
    """Write the graph of a model in float32 into an empty folder, compared with torch."""
    task, path = source.task, folder / GRAPH
    export_graph(exported_module(source), make_graph_inputs(source), task.graph_output, task.token_inputs, path)
    return path


def write_export(
    folder: Path, source: Source, mode: str, files: list[Path], *, probe: dict[str, Any] | None = None
) -> Exported:
    """Write the folder of an exported model, open it as `load_exported` does, and store its golden output.

    Args:
        folder: To write, whole or not at all.
        source: The model.
        mode: In which `files` compute.
        files: The graph, with its weights where those are apart; none where torch computes.
        probe: What chose the mode.
    """
    task = source.task
    with writing(folder) as new:
        for path in files:
            shutil.copyfile(path, new / path.name)
        _write_weights(new, source, mode, whole=not files)
        source.model.config.to_json_file(new / "config.json")
        task.save_processor(source.processor, new)
        record: dict[str, Any] = {
            "format": FORMAT,
            "task": task.name,
            "source": source.origin,
            "labels": source.labels,
            "groups": source.groups,
            "preprocessing": task.processor_settings(source.processor),
            "mode": mode,
            "runtime": "onnxruntime" if files else "torch",
            "opset": read_opset(new / GRAPH) if files else None,
            "module": task.graph_module,
            "output": task.graph_output,
            "golden": [],
            "files": {path.name: hash_file(path) for path in sorted(new.iterdir()) if _holds_weights(path)},
            "training": Training.select(source.metrics),
            "versions": {**read_versions(), **_read_own_versions(mode)},
        }
        if probe is not None:
            record["probe"] = probe
        file = ExportedFile(new, record, task)
        record["golden"] = golden.compute_output(*open_model(file), task)
        if not np.isfinite(record["golden"]).all():
            raise ComputationFailed("the model's output on the golden input is NaN or Inf; nothing was saved.")
        write_json(new / RECORD, record)
        size = file.bytes
        (new / CARD).write_text(make_export_card(folder.name, record, size), encoding="utf-8")
    return Exported(folder, source.name, mode, size, record["opset"])


def _write_weights(new: Path, source: Source, mode: str, *, whole: bool) -> None:
    """What the graph does not compute; without a graph everything, in bfloat16 where the mode is that."""
    if whole:
        kind = torch.bfloat16 if mode == "bfloat16" else torch.float32
        weights = source.model.state_dict()
        save_quietly(source.model, new, {k: v.to(kind) if v.is_floating_point() else v for k, v in weights.items()})
    elif source.task.graph_module:
        save_file(split_rest(source.model, source.task.graph_module), new / REST, {"format": "pt"})


def _holds_weights(path: Path) -> bool:
    return path.suffix in (".onnx", ".data", ".safetensors")


def read_opset(path: Path) -> int:
    """The version of ONNX's operators that a graph uses."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False)
    return next(int(each.version) for each in graph.opset_import if each.domain in ("", "ai.onnx"))


def _read_own_versions(mode: str) -> dict[str, str]:
    names = ("torchao",) if mode.startswith("torchao") else () if mode == "bfloat16" else ("onnx", "onnxruntime")
    return {name: version(name) for name in names}

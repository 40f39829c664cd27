"""Load an exported model, and check that it computes what it computed when it was exported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from inlay.adapters import golden
from inlay.bases.load import explain_load_error, load_structure, read_config
from inlay.compress.exported import ExportedFile, read_exported
from inlay.compress.graph import GRAPH, Graph, GraphModel, GraphModule
from inlay.compress.torch_modes import load_in_torch
from inlay.errors import ComputationFailed, DamagedFile
from inlay.tasks.adapter import route_group
from inlay.tasks.task import Task

REST = "model.safetensors"  # of what the graph does not compute, or of all where there is no graph


@dataclass
class ExportedModel:
    """An exported model, which `predict`, `evaluate` and their like take in the place of an adapter.

    Attributes:
        model: A module that answers as the model of transformers did which was exported; on the CPU.
        task: What it is for, a row of TASKS.
        processor: What makes its inputs.
        labels: Class names in the order of the logits; none for what has no classes.
        file: What was read from disk.
        deviation: Relative difference to the golden output.
    """

    model: Any
    task: Task
    processor: Any
    labels: list[str]
    file: ExportedFile
    deviation: float

    @property
    def name(self) -> str:
        """The folder's."""
        return self.file.name

    @property
    def mode(self) -> str:
        """How it computes: float32, or what `quantize` chose."""
        return str(self.file.record["mode"])

    @property
    def metrics(self) -> dict[str, Any]:
        """What is known of the training, as in an adapter's metrics.json."""
        return dict(self.file.record["training"])

    def route(self, group: str | None) -> tuple[list[str], list[int]]:
        """Class names of one group of a combination, and which logits stand for them; None: all classes.

        Raises:
            InlayError: There is no such group.
        """
        return route_group(f"the exported model {self.name!r}", self.labels, self.file.groups, group)


def load_exported(folder: str | Path) -> ExportedModel:
    """Load a folder that `export` or `quantize` wrote.

    Args:
        folder: On this machine.

    Raises:
        InlayError: Not such a folder; ONNX Runtime or torchao is missing; damaged files; labels that are not the
            model's; another golden output.
    """
    file = read_exported(folder)
    record = file.record
    model, processor = open_model(file)
    labels = [str(label) for label in record["labels"]]
    if file.task.classifies and len(labels) != model.config.num_labels:
        raise DamagedFile(
            f"{file.folder} names {len(labels)} labels, but its model gives {model.config.num_labels} logits; export "
            "it again."
        )
    found = golden.compute_output(model, processor, file.task)
    deviation = golden.measure_deviation(record["golden"], found)
    # Products of 8 bits are rounded as a CPU has instructions for them, so another machine differs.
    allowed = golden.TOLERANCE["float32" if record["mode"] == "float32" else "int8"]
    if not deviation <= allowed:
        raise ComputationFailed(
            f"{file.folder} does not compute what it computed when it was exported: its golden output differs by "
            f"{deviation:.2g} ({allowed:g} allowed). Export it again on this machine."
        )
    return ExportedModel(model, file.task, processor, labels, file, deviation)


def open_model(file: ExportedFile) -> tuple[Any, Any]:
    """The model of a folder and what makes its inputs, without the check of its golden output."""
    record, where = file.record, str(file.folder)
    processor = file.task.load_processor(where, record["preprocessing"] or None)
    if record["runtime"] == "torch":
        return load_in_torch(where, file.task.name, record["mode"]), processor
    config = read_config(where, where, None)
    graph = Graph(file.folder / GRAPH)
    model = _complete_graph(file, config, graph) if file.task.graph_module else GraphModel(config, graph)
    model.name_or_path = file.name
    return model.requires_grad_(False).eval(), processor


def _complete_graph(file: ExportedFile, config: Any, graph: Graph) -> nn.Module:
    """A model of which the graph computes one module, and torch the rest."""
    model = load_structure(str(file.folder), file.task.auto_class, config)
    model.set_submodule(file.task.graph_module, GraphModule(graph))
    try:
        weights = load_file(file.folder / REST)
        model.load_state_dict(weights, strict=True, assign=True)
    except Exception as error:  # weights are data from anywhere: they fail in any way
        raise explain_load_error(str(file.folder), error) from error
    model.tie_weights()
    return model


def split_rest(model: nn.Module, module: str) -> dict[str, torch.Tensor]:
    """The weights outside of a module."""
    return {k: v.contiguous().clone() for k, v in model.state_dict().items() if not k.startswith(f"{module}.")}

"""A model as an ONNX graph: written by torch's exporter, and run by ONNX Runtime as a module that tasks take as one.

A graph is exported with rows, and tokens of a text, of any number. It computes in float32, or in the 8 bits that
`inlay.compress.quantize` gives it, on the CPU.
"""

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from inlay.errors import ComputationFailed, DamagedFile, Unsupported

GRAPH = "model.onnx"
# Weights go to a file of their own from here on: a protobuf message holds 2 GiB.
LARGE_BYTES = 1_500_000_000
# Largest |difference| to torch, relative to the largest |output|. Measured on ViT, GPT-2, BERT, SAM and MobileNetV2:
# 2e-6 at most.
TOLERANCE = 1e-4


def import_runtime() -> ModuleType:
    """ONNX Runtime, which is an extra.

    Raises:
        InlayError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise Unsupported("ONNX Runtime is not installed; pip install 'inlay[export]'.") from None
    return onnxruntime


def export_graph(
    module: nn.Module, inputs: dict[str, Tensor], output: str, token_inputs: Sequence[str], path: Path
) -> None:
    """Write a module as an ONNX graph, and compare what both compute.

    Args:
        module: Of transformers, in eval mode on the CPU.
        inputs: An example of what it takes, at least two rows of each.
        output: Name of the tensor among its outputs that the graph gives.
        token_inputs: Inputs whose second axis has any length.
        path: Of the graph; the weights of a large one are written next to it.

    Raises:
        InlayError: A package is missing; torch cannot export the module; the graph computes something else.
    """
    import_runtime()
    try:
        import onnxscript  # noqa: F401 - torch's exporter needs it, and says so at length
    except ImportError:
        raise Unsupported("onnxscript is not installed; pip install 'inlay[export]'.") from None
    any_size = torch.export.Dim.DYNAMIC
    axes = tuple({0: any_size, 1: any_size} if name in token_inputs else {0: any_size} for name in inputs)
    large = sum(parameter.nbytes for parameter in module.parameters()) > LARGE_BYTES
    try:
        with _quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                _OneOutput(module, list(inputs), output).eval(),
                args=tuple(inputs.values()),
                dynamo=True,
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes=(axes,),
                external_data=large,
                verbose=False,
            )
            assert program is not None
            _forget_sources(program.model)
            program.save(path, external_data=large)
    except Exception as error:  # of torch.export, of the translation to ONNX, of the model itself
        raise Unsupported(
            f"torch cannot export {type(module).__name__} as an ONNX graph ({_find_reason(error)}); use it as it is."
        ) from error
    graph = Graph(path)
    for batch in (inputs, _make_other_size(inputs, token_inputs)):
        found = measure_error(module, graph, batch, output)
        if not found <= TOLERANCE:
            raise ComputationFailed(
                f"the graph of {type(module).__name__} differs from the model by {found:.1e} of its largest output "
                f"({TOLERANCE:g} allowed); nothing was written."
            )


@torch.no_grad()
def measure_error(module: nn.Module, graph: "Graph", inputs: dict[str, Tensor], output: str) -> float:
    """Largest difference between both outputs, relative to the largest of the module's."""
    wanted = getattr(module(**inputs), output).float()
    return float((graph(inputs) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))


class _OneOutput(nn.Module):
    """A module that takes tensors in a fixed order and gives one."""

    def __init__(self, module: nn.Module, names: list[str], output: str) -> None:
        super().__init__()
        self.module, self.names, self.output = module, names, output
        self.more = {"use_cache": False} if hasattr(getattr(module, "config", None), "use_cache") else {}

    def forward(self, *values: Tensor) -> Tensor:
        return getattr(self.module(**dict(zip(self.names, values, strict=True)), **self.more), self.output)


def _forget_sources(model: Any) -> None:
    """Remove the lines of code, with their paths on this machine, that the exporter notes at each node."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None


def _make_other_size(inputs: dict[str, Tensor], token_inputs: Sequence[str]) -> dict[str, Tensor]:
    """One row, and of texts half of the tokens: a size that the exporter has not seen."""
    return {
        name: value[:1, : max(1, value.shape[1] // 2)] if name in token_inputs else value[:1]
        for name, value in inputs.items()
    }


def _find_reason(error: BaseException) -> str:
    """The first line of what went wrong: torch wraps it in an error of its own, which gives general advice."""
    inner = error.__cause__ or error
    return (str(inner).strip().splitlines() or [type(inner).__name__])[0][:200]


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what the exporter says of torchvision, which is not needed, of its own functions, and of each step."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class Graph:
    """An ONNX graph in a session of ONNX Runtime on the CPU, with as many threads as torch has now.

    Attributes:
        inputs: Names of what it takes.
        output: Name of what it gives.

    Raises:
        InlayError: ONNX Runtime is missing, or cannot read the file.
    """

    def __init__(self, path: Path) -> None:
        runtime = import_runtime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # a graph is data from anywhere, and the runtime's errors have no common class
            raise DamagedFile(f"ONNX Runtime cannot read {path} ({_find_reason(error)}); export it again.") from error
        self.inputs = [each.name for each in self.session.get_inputs()]
        self.output = self.session.get_outputs()[0].name

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """The output for these inputs, as many as the graph takes; others are left aside."""
        taken = {name: inputs[name].detach().cpu().contiguous().numpy() for name in self.inputs}
        return torch.from_numpy(self.session.run([self.output], taken)[0])


class GraphModule(nn.Module):
    """A part of a model, computed by a graph."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, pixel_values: Tensor, **options: Any) -> ModelOutput:
        """What the part gives; its hidden states and attentions stay inside of the graph."""
        output = self.graph({"pixel_values": pixel_values})
        return ModelOutput({self.graph.output: output, "hidden_states": None, "attentions": None})


class GraphModel(PreTrainedModel, GenerationMixin):
    """A whole model, computed by a graph: it answers as a model of transformers does, and has no weights.

    Texts are written without a cache of keys and values: each new token reads all that stand before it.

    Args:
        config: Of the model that was exported.
        graph: Its graph.
    """

    def __init__(self, config: Any, graph: Graph) -> None:
        config = copy.deepcopy(config)
        config._attn_implementation = "eager"  # no attention is computed here, and eager needs no support for it
        super().__init__(config)
        self.graph = graph
        # Tasks place their inputs where the first weight is, in its type.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, **inputs: Any) -> ModelOutput:
        """`logits`, of the tensors that the graph takes; what else transformers' models take has no effect."""
        given = {name: value for name, value in inputs.items() if value is not None}
        return ModelOutput(logits=self.graph(complete_inputs(given, self.graph.inputs)))

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor, **options: Any
    ) -> dict[str, Any]:
        """All tokens so far, their mask, and positions from each text's own first token."""
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}

    def _prepare_cache_for_generation(self, *arguments: Any) -> None:
        """There is none."""


def complete_inputs(given: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The inputs of a graph; those of texts that a caller leaves out are what transformers' models take then."""
    return {name: given[name] if name in given else _FILL[name](given["input_ids"]) for name in names}


def _count_positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1]).expand_as(ids)


_FILL = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like, "position_ids": _count_positions}

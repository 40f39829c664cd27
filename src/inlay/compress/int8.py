"""Graphs in 8 bits, by ONNX Runtime's quantiser: one row of INT8_MODES for each way.

Weights have a scale for each output channel. Dynamic: the products with weights have 8 bits, and the scale of each
input is found while it is computed; convolutions stay in float32, as their dynamic form is slower than that and was
wrong for 9 of 10 images on MobileNetV2. Static: the scales of all activations are fixed by calibration, so that whole
chains of layers stay in 8 bits. Where one extreme value would stretch a scale, a percentile or the entropy of the
distribution cuts it off (Wu et al. 2020, arXiv:2004.09602, section 3.2).
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from inlay.bases.cpu import list_cpu_flags
from inlay.compress.graph import GRAPH, LARGE_BYTES

_AT_ONCE = 8  # examples whose activations are held while their histograms are made


@dataclass(frozen=True)
class Int8Mode:
    """A way to quantise a graph.

    Attributes:
        name: As the command line takes it.
        static: Scales of activations are calibrated; dynamic otherwise.
        method: Of calibration, as ONNX Runtime's CalibrationMethod names it.
        operators: That are quantised; none: all that can be.
        options: For the quantiser.
    """

    name: str
    static: bool
    method: str = "MinMax"
    operators: Sequence[str] = ()
    options: dict[str, Any] = field(default_factory=dict)


# Products with weights, and what bounds their range; products of attention and norms stay in float32.
_WEIGHTED = ("Conv", "Gemm", "MatMul", "Clip", "Relu")
INT8_MODES: dict[str, Int8Mode] = {
    mode.name: mode
    for mode in (
        Int8Mode("int8-dynamic", static=False, operators=("Gemm", "MatMul")),
        Int8Mode("int8-static", static=True),
        Int8Mode("int8-static-percentile", static=True, method="Percentile"),
        Int8Mode("int8-static-weights", static=True, operators=_WEIGHTED, options={"MatMulConstBOnly": True}),
    )
}


def prepare_graph(graph: Path, folder: Path) -> Path:
    """Write a graph with constants folded and norms in one operator, as the quantiser needs it; returns its path."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = folder / GRAPH
    with _quiet():
        # torch has written the shapes into the graph. Symbolic shape inference does not know all operators of a
        # language model, and then leaves files in the current folder.
        quant_pre_process(str(graph), str(prepared), skip_symbolic_shape=True, save_as_external_data=_is_large(graph))
    return prepared


def quantize_graph(
    prepared: Path, mode: Int8Mode, examples: Sequence[dict[str, Tensor]], folder: Path, *, reduce_range: bool
) -> list[Path]:
    """Write a graph in 8 bits into an empty folder; returns its files.

    Args:
        prepared: From `prepare_graph`.
        mode: How.
        examples: Inputs of one row each, which fix the scales of activations in a static mode.
        folder: Where.
        reduce_range: Weights in 7 bits: without VNNI instructions sums of two products in 8 bits overflow 16.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static

    shared: dict[str, Any] = {
        "per_channel": True,
        "reduce_range": reduce_range,
        "weight_type": QuantType.QInt8,
        "op_types_to_quantize": list(mode.operators) or None,
        "use_external_data_format": _is_large(prepared),
    }
    path = folder / GRAPH
    with _quiet():
        if mode.static:
            quantize_static(
                str(prepared),
                str(path),
                _make_reader(examples),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                calibrate_method=getattr(CalibrationMethod, mode.method),
                extra_options={"CalibStridedMinMax": _AT_ONCE, **mode.options},
                **shared,
            )
        else:
            quantize_dynamic(str(prepared), str(path), extra_options={**mode.options}, **shared)
    return sorted(folder.iterdir())


def count_calibrated(examples: int) -> int:
    """How many of so many examples calibrate: a multiple of what is held at once."""
    return examples // _AT_ONCE * _AT_ONCE


def _make_reader(examples: Sequence[dict[str, Tensor]]) -> Any:
    """ONNX Runtime's reader of these inputs, a range at a time."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.set_range(0, len(examples))

        def __len__(self) -> int:
            return len(examples)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.left = iter(examples[start_index:end_index])

        def get_next(self) -> dict[str, Any] | None:
            found = next(self.left, None)
            return None if found is None else {name: value.numpy() for name, value in found.items()}

    return Reader()


def has_vnni() -> bool:
    """Whether this CPU multiplies 8 bits without overflow; True where it does not say."""
    flags = list_cpu_flags()
    return "avx2" not in flags or not flags.isdisjoint(("avx512_vnni", "avx_vnni"))


def _is_large(graph: Path) -> bool:
    return sum(path.stat().st_size for path in graph.parent.iterdir()) > LARGE_BYTES


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantiser: it prints progress, and warns through the root logger of each tensor of one axis."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)

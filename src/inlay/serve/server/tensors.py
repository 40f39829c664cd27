"""Requests and answers of the Open Inference Protocol as bytes: JSON, and tensors in it or behind it."""

import base64
import binascii
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inlay.errors import BadInput
from inlay.serve.server.answers import parse_object
from inlay.serve.server.refusals import TooLarge
from inlay.tasks.serving import TensorSpec

Elements = np.ndarray | list[str] | list[bytes]

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP32": np.dtype("<f4"),
}
KINDS = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}  # what numpy makes of JSON, by what it may become
MOST_TIMEOUT = 1e12  # microseconds


@dataclass(frozen=True)
class WantedOutput:
    """A tensor that a request asks for.

    Attributes:
        name: Of the tensor.
        is_binary: Its data follows the JSON.
        is_named: The request names it; otherwise it is left out where an answer has none.
    """

    name: str
    is_binary: bool
    is_named: bool


@dataclass(frozen=True)
class InferRequest:
    """What a request holds.

    Attributes:
        id: Given back in the answer; None: there is none.
        rows: The values of each row, as `Answering.read` takes them.
        outputs: What is answered.
        timeout_s: None: the server's own.
    """

    id: str | None
    rows: list[dict[str, Any]]
    outputs: list[WantedOutput]
    timeout_s: float | None


def parse_request(
    body: bytes,
    header_length: str | None,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    most_rows: int,
) -> InferRequest:
    """Read a request.

    Args:
        body: JSON, and behind it the data of tensors.
        header_length: Bytes of the JSON; None: all.
        inputs: Tensors that a request to this adapter may have.
        outputs: Tensors of the answer.
        most_rows: Of a batch.

    Raises:
        InlayError: What is wrong with it, in one sentence.
    """
    head, data = _split_body(body, header_length)
    given = head.get("inputs")
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise BadInput("a request has inputs, a list of tensors.")
    specs = {spec.name: spec for spec in inputs}
    values: dict[str, list[Any]] = {}
    at = 0
    for tensor in given:
        spec = _find_spec(tensor.get("name"), specs, "input")
        if spec.name in values:
            raise BadInput(f"input {spec.name!r} is given twice.")
        shape = _read_shape(spec, tensor, most_rows)
        size = _read_parameters(tensor).get("binary_data_size")
        if size is None:
            values[spec.name] = _split_rows(spec, _read_json(spec, tensor, shape), shape)
            continue
        if type(size) is not int or not 0 <= size <= len(data) - at:
            left = len(data) - at
            raise BadInput(
                f"binary_data_size of {spec.name!r} must be 0 to {left}, as many bytes follow, got {size!r}."
            )
        if "data" in tensor:
            raise BadInput(f"input {spec.name!r} has both data and binary_data_size; give one of them.")
        values[spec.name] = _split_rows(spec, _read_binary(spec, data[at : at + size], shape), shape)
        at += size
    if at != len(data):
        raise BadInput(f"{len(data) - at} bytes follow the JSON that belong to no input.")
    counts = {name: len(rows) for name, rows in values.items()}
    if len(set(counts.values())) != 1:
        told = ", ".join(f"{name} has {count}" for name, count in counts.items()) or "there is none"
        raise BadInput(f"all inputs must have equally many rows along axis 0; {told}.")
    (count,) = set(counts.values())
    rows = [{name: values[name][row] for name in values} for row in range(count)]
    parameters = _read_parameters(head)
    identity = head.get("id")
    if identity is not None and not isinstance(identity, str):
        raise BadInput(f"id must be a text, got {type(identity).__name__}.")
    return InferRequest(identity, rows, _read_outputs(head, parameters, outputs), _read_timeout(parameters))


def encode_answer(
    head: dict[str, Any],
    replies: Sequence[Mapping[str, Elements]],
    wanted: Sequence[WantedOutput],
    specs: Sequence[TensorSpec],
) -> tuple[bytes, int | None]:
    """Write an answer, and say how many bytes of it are JSON; None: all.

    Args:
        head: What is said besides the tensors.
        replies: Tensors of each row.
        wanted: Which of them.
        specs: Of all outputs.

    Raises:
        InlayError: An output that an answer does not have; rows of different shapes.
    """
    known = {spec.name: spec for spec in specs}
    outputs: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for output in wanted:
        rows = [reply[output.name] for reply in replies if output.name in reply]
        if len(rows) < len(replies):
            if output.is_named:
                raise BadInput(f"this request has no output {output.name!r}: {known[output.name].help}")
            continue
        tensor, data = _encode_tensor(known[output.name], rows, output.is_binary)
        outputs.append(tensor)
        if data is not None:
            parts.append(data)
    text = json.dumps({**head, "outputs": outputs}, allow_nan=False, separators=(",", ":")).encode()
    if not any(output.is_binary for output in wanted):
        return text, None
    return b"".join([text, *parts]), len(text)


def _split_body(body: bytes, header_length: str | None) -> tuple[dict[str, Any], bytes]:
    """The JSON of a request, and what follows it."""
    length = len(body)
    if header_length is not None:
        if not header_length.isascii() or not header_length.isdigit() or len(header_length) > 18:
            raise BadInput("Inference-Header-Content-Length must be a number of bytes.")
        length = int(header_length)
        if length > len(body):
            raise BadInput(f"Inference-Header-Content-Length is {length}, but the body has {len(body)} bytes.")
    refusal = "the request is no JSON; where tensors follow it, Inference-Header-Content-Length ends it."
    return parse_object(body[:length], refusal), body[length:]


def _find_spec(name: Any, specs: Mapping[str, TensorSpec], kind: str) -> TensorSpec:
    if not isinstance(name, str) or name not in specs:
        raise BadInput(f"unknown {kind} {str(name)[:80]!r}; choose among {', '.join(specs)}.")
    return specs[name]


def _read_parameters(holder: Mapping[str, Any]) -> dict[str, Any]:
    parameters = holder.get("parameters", {})
    if not isinstance(parameters, dict):
        raise BadInput(f"parameters must be a JSON object, got {type(parameters).__name__}.")
    if "shared_memory_region" in parameters:
        raise BadInput("this server shares no memory with its clients; send the tensor's data.")
    return parameters


def _read_shape(spec: TensorSpec, tensor: Mapping[str, Any], most_rows: int) -> tuple[int, ...]:
    """The shape with the axis of the batch.

    Raises:
        InlayError: Another datatype, another shape, or too many rows.
    """
    datatype, shape = tensor.get("datatype"), tensor.get("shape")
    if datatype != spec.datatype:
        raise BadInput(f"input {spec.name!r} is {spec.datatype}, got {str(datatype)[:80]!r}.")
    wanted = ", ".join(["rows", *("any" if size < 0 else str(size) for size in spec.shape)])
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
        raise BadInput(f"the shape of input {spec.name!r} must be [{wanted}], got {str(shape)[:80]}.")
    fits = len(shape) == 1 + len(spec.shape) and all(
        own in (-1, size) for own, size in zip(spec.shape, shape[1:], strict=True)
    )
    if not fits or not shape[0]:
        raise BadInput(f"the shape of input {spec.name!r} must be [{wanted}], got {str(shape)[:80]}.")
    if shape[0] > most_rows:
        raise TooLarge(f"a request may have {most_rows} rows at most, got {shape[0]}.")
    return tuple(shape)


def _read_json(spec: TensorSpec, tensor: Mapping[str, Any], shape: tuple[int, ...]) -> Elements:
    """The elements of a tensor whose data is in the JSON, nested or flat."""
    data, count = tensor.get("data"), math.prod(shape)
    if not isinstance(data, list):
        raise BadInput(f"input {spec.name!r} needs data, a list, or binary_data_size.")
    if spec.datatype == "BYTES":
        texts = _flatten(data)
        if len(texts) != count or not all(isinstance(text, str) for text in texts):
            raise BadInput(f"input {spec.name!r} must be {count} texts, as its shape says.")
        return texts if spec.is_text else [decode_base64(spec.name, text) for text in texts]
    try:
        array = np.array(data)
    except (ValueError, OverflowError) as error:
        raise BadInput(f"the rows of input {spec.name!r} have different lengths.") from error
    dtype = DTYPES[spec.datatype]
    if array.size and array.dtype.kind not in KINDS[dtype.kind]:
        raise BadInput(f"the data of input {spec.name!r} must be {spec.datatype}.")
    if array.size != count:
        raise BadInput(f"input {spec.name!r} has {array.size} values, and its shape says {count}.")
    if array.ndim > 1 and array.shape != shape:
        raise BadInput(f"input {spec.name!r} is nested as {list(array.shape)}, and its shape is {list(shape)}.")
    return cast_numbers(spec, array).reshape(shape)


def _flatten(data: list[Any]) -> list[Any]:
    """The elements of lists in lists, in their order."""
    flat: list[Any] = []
    waiting = [iter(data)]
    while waiting:
        for element in waiting[-1]:
            if isinstance(element, list):
                waiting.append(iter(element))
                break
            flat.append(element)
        else:
            waiting.pop()
    return flat


def _read_binary(spec: TensorSpec, data: bytes, shape: tuple[int, ...]) -> Elements:
    """The elements of a tensor whose data are these bytes."""
    count = math.prod(shape)
    if spec.datatype == "BYTES":
        found, at = [], 0
        while at < len(data):
            if at + 4 > len(data):
                raise BadInput(f"the data of input {spec.name!r} ends within the length of an element.")
            (size,) = struct.unpack_from("<I", data, at)
            at += 4 + size
            if at > len(data):
                raise BadInput(f"the data of input {spec.name!r} ends within an element.")
            found.append(data[at - size : at])
        if len(found) != count:
            raise BadInput(f"input {spec.name!r} has {len(found)} elements, and its shape says {count}.")
        return [decode_text(spec.name, each) for each in found] if spec.is_text else found
    dtype = DTYPES[spec.datatype]
    if len(data) != count * dtype.itemsize:
        wanted = count * dtype.itemsize
        raise BadInput(f"input {spec.name!r} has {len(data)} bytes, and its shape says {wanted}.")
    if dtype.kind == "b":
        return (np.frombuffer(data, np.uint8) != 0).reshape(shape)
    return _check_finite(spec, np.frombuffer(data, dtype).reshape(shape).copy())  # torch wants one that it may write to


def _check_finite(spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadInput(f"the data of input {spec.name!r} must be finite numbers.")
    return array


def _split_rows(spec: TensorSpec, elements: Elements, shape: tuple[int, ...]) -> list[Any]:
    """What each row has: an array, a number, a text or a file."""
    if isinstance(elements, np.ndarray):
        return elements.tolist() if len(shape) == 1 else list(elements)
    if len(elements) != shape[0]:
        raise BadInput(f"input {spec.name!r} must have one element a row, got {len(elements)} for {shape[0]} rows.")
    return list(elements)


def _read_outputs(
    head: Mapping[str, Any], parameters: Mapping[str, Any], outputs: Sequence[TensorSpec]
) -> list[WantedOutput]:
    """Which tensors are answered, and how; without a list of them all."""
    given, is_binary = head.get("outputs"), parameters.get("binary_data_output", False)
    if not isinstance(is_binary, bool):
        raise BadInput(f"binary_data_output must be true or false, got {str(is_binary)[:80]!r}.")
    specs = {spec.name: spec for spec in outputs}
    if given is None or given == []:
        return [WantedOutput(name, is_binary, is_named=False) for name in specs]
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise BadInput("outputs must be a list of tensors, each with its name.")
    wanted: dict[str, WantedOutput] = {}
    for output in given:
        spec, own = _find_spec(output.get("name"), specs, "output"), _read_parameters(output)
        if spec.name in wanted:
            raise BadInput(f"output {spec.name!r} is asked for twice.")
        if "classification" in own:
            raise BadInput("this server ranks no classes of an output; ask for label and probabilities.")
        own_binary = own.get("binary_data", is_binary)
        if not isinstance(own_binary, bool):
            raise BadInput(f"binary_data must be true or false, got {str(own_binary)[:80]!r}.")
        wanted[spec.name] = WantedOutput(spec.name, own_binary, is_named=True)
    return list(wanted.values())


def _read_timeout(parameters: Mapping[str, Any]) -> float | None:
    """In seconds, of microseconds as Triton's clients send them."""
    timeout = parameters.get("timeout")
    if timeout is None:
        return None
    if type(timeout) not in (int, float) or not 0 < timeout <= MOST_TIMEOUT:
        raise BadInput(f"timeout must be a number of microseconds above 0, got {str(timeout)[:80]!r}.")
    return timeout / 1e6


def _encode_tensor(spec: TensorSpec, rows: list[Any], is_binary: bool) -> tuple[dict[str, Any], bytes | None]:
    """A tensor of all rows as the answer describes it, and its data where they follow the JSON."""
    described: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype}
    shapes = {row.shape if isinstance(row, np.ndarray) else (len(row),) for row in rows}
    if len(shapes) > 1:
        told = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise BadInput(
            f"rows have {spec.name} of different shapes, {told}, which are no tensor; ask for them one by one."
        )
    described["shape"] = [len(rows), *shapes.pop()]
    if isinstance(rows[0], np.ndarray):
        array = np.stack([np.asarray(row, DTYPES[spec.datatype]) for row in rows]) if len(rows) > 1 else rows[0]
        data: Any = array.astype(DTYPES[spec.datatype], copy=False)
        encoded = data.tobytes() if is_binary else data.ravel().tolist()
    else:
        elements = [element for row in rows for element in row]
        raw = [element.encode() if isinstance(element, str) else element for element in elements]
        if is_binary:
            encoded = b"".join(struct.pack("<I", len(each)) + each for each in raw)
        else:
            encoded = elements if spec.is_text else [base64.b64encode(each).decode() for each in raw]
    if not is_binary:
        return {**described, "data": encoded}, None
    return {**described, "parameters": {"binary_data_size": len(encoded)}}, encoded


def cast_numbers(spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    """Numbers of JSON in the type of a tensor.

    Raises:
        InlayError: They are too large for it, or not finite.
    """
    dtype = DTYPES[spec.datatype]
    if dtype.kind in "ui" and array.size:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        if int(array.min()) < low or int(array.max()) > high:
            raise BadInput(f"the data of input {spec.name!r} must be {low} to {high}.")
    with np.errstate(over="ignore"):
        return _check_finite(spec, array.astype(dtype))


def decode_base64(name: str, text: str) -> bytes:
    """The file that a text in base64 holds.

    Raises:
        InlayError: It is none.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInput(f"{name} is not valid base64: {error}.") from error


def decode_text(name: str, value: bytes) -> str:
    """The text that bytes hold.

    Raises:
        InlayError: They are no UTF-8.
    """
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{name} is no text in UTF-8.") from error

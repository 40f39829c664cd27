"""`/v1/classify` and `/v1/segment`: for people. An input as a file of a form, or in JSON, and the answer as words,
numbers and files in base64.

curl -F model=digits -F image=@seven.png http://127.0.0.1:8000/v1/classify
curl --json '{"model": "digits", "image": "<base64>"}' http://127.0.0.1:8000/v1/classify
curl -F model=nuclei -F image=@cells.png -F 'points=[[40, 60]]' http://127.0.0.1:8000/v1/segment
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from inlay.errors import BadInput
from inlay.serve.server.answers import check_json_size, name_signature, parse_object, run_unless_gone
from inlay.serve.server.service import Service
from inlay.serve.server.tensors import DTYPES, KINDS, cast_numbers, decode_base64, decode_text
from inlay.tasks.serving import TensorSpec

router = APIRouter()


@router.post("/v1/classify")
async def classify(request: Request) -> dict[str, Any]:
    """What one adapter says of one input, or of each of several."""
    return await _answer(request, "classify")


@router.post("/v1/segment")
async def segment(request: Request) -> dict[str, Any]:
    """The masks that one adapter finds in an image or a scan."""
    return await _answer(request, "segment")


async def _answer(request: Request, action: str) -> dict[str, Any]:
    service: Service = request.app.state.service
    given = await read_form(request)
    name = given.pop("model", None)
    if not isinstance(name, str):
        raise BadInput("a request names its adapter as model, which is missing.")
    if service.serving.action != action:
        other = service.serving.action
        remedy = f"; post to v1/{other}" if other else ""
        raise BadInput(f"this server is for {service.task.name}{remedy}.")
    specs = {spec.name: spec for spec in await service.list_inputs(name)}
    if unknown := [field for field in given if field not in specs]:
        raise BadInput(f"unknown field {unknown[0][:80]!r}; a request has model and {', '.join(specs)}.")
    rows = _split_rows(specs, given)
    if len(rows) > service.queue.limit:
        raise BadInput(f"a request may have {service.queue.limit} inputs at most, got {len(rows)}.")
    answers = await run_unless_gone(request, service.ask_rows(name, rows))
    signed = name_signature(answers[0].signature)
    if not any(isinstance(given.get(field), list) for field, spec in specs.items() if spec.datatype == "BYTES"):
        return {**signed, **answers[0].reply.facts}
    return {**signed, "answers": [{**name_signature(each.signature), **each.reply.facts} for each in answers]}


async def read_form(request: Request) -> dict[str, Any]:
    """Fields by name; of a form, files as bytes, and what comes several times as a list."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        fields: dict[str, Any] = {}
        async with request.form() as form:
            for key in form:
                values = [each if isinstance(each, str) else await each.read() for each in form.getlist(key)]
                fields[key] = values[0] if len(values) == 1 else values
        return fields
    return parse_object(await request.body(), "the body is neither a form nor JSON.")


def _split_rows(specs: Mapping[str, TensorSpec], given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The values of each input: where texts or files are lists, one of each; all else holds for every input."""
    several = {
        name: value for name, value in given.items() if specs[name].datatype == "BYTES" and isinstance(value, list)
    }
    counts = {name: len(value) for name, value in several.items()}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        told = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise BadInput(f"texts and files of several inputs must be equally many, and at least one; got {told}.")
    shared = {name: _read_value(specs[name], value) for name, value in given.items() if name not in several}
    if not several:
        return [shared]
    (count,) = set(counts.values())
    return [
        {**shared, **{name: _read_value(specs[name], value[row]) for name, value in several.items()}}
        for row in range(count)
    ]


def _read_value(spec: TensorSpec, value: Any) -> Any:
    """A text, the bytes of a file, which JSON holds in base64, or numbers, which a form holds as JSON."""
    if spec.datatype != "BYTES":
        return _read_numbers(spec, value)
    if isinstance(value, bytes):
        return decode_text(spec.name, value) if spec.is_text else value
    if not isinstance(value, str):
        raise BadInput(f"{spec.name} must be a text{'' if spec.is_text else ' in base64'}, got {type(value).__name__}.")
    return value if spec.is_text else decode_base64(spec.name, value)


def _read_numbers(spec: TensorSpec, value: Any) -> Any:
    """A number, or an array of the shape that the tensor has."""
    dtype = DTYPES[spec.datatype]
    if isinstance(value, bytes):  # a part of a form that is a file has no other bound
        check_json_size(value)
    try:
        array = np.array(json.loads(value) if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError, OverflowError) as error:
        raise BadInput(f"{spec.name} must be numbers, as JSON.") from error
    if not array.size:
        array = np.zeros([max(0, size) for size in spec.shape], dtype)
    shape = " x ".join("any" if size < 0 else str(size) for size in spec.shape) or "one"
    fits = array.ndim == len(spec.shape) and all(
        own in (-1, size) for own, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fits or array.dtype.kind not in KINDS[dtype.kind] or not np.isfinite(array).all():
        noun = {"b": "true or false", "f": "numbers"}.get(dtype.kind, "whole numbers")
        raise BadInput(f"{spec.name} must be {noun}, {shape}: {spec.help}")
    array = cast_numbers(spec, array)
    return array if spec.shape else array.item()

"""`/v1/classify`: for people. An input as a file of a form, or in JSON, and the answer as words and numbers.

curl -F model=digits -F image=@seven.png http://127.0.0.1:8000/v1/classify
curl -d '{"model": "digits", "image": "<base64>"}' http://127.0.0.1:8000/v1/classify
"""

import base64
import binascii
import json
from typing import Any

from fastapi import APIRouter, Request
from starlette.datastructures import UploadFile

from inlay.errors import BadInput
from inlay.serve.server.answers import name_signature, run_unless_gone
from inlay.serve.server.service import Service
from inlay.tasks.serving import TensorSpec

router = APIRouter()


@router.post("/v1/classify")
async def classify(request: Request) -> dict[str, Any]:
    """What one adapter says of one input."""
    service: Service = request.app.state.service
    given = await _read_form(request)
    name = given.pop("model", None)
    if not isinstance(name, str):
        raise BadInput("a request names its adapter as model, which is missing.")
    files = {spec.name: spec for spec in service.serving.inputs if spec.datatype == "BYTES"}
    if unknown := [field for field in given if field not in files]:
        raise BadInput(f"unknown field {unknown[0]!r}; a request has model and {', '.join(files)}.")
    values = {field: _read_value(files[field], value) for field, value in given.items()}
    answered = await run_unless_gone(request, service.ask(name, values))
    return {**name_signature(answered.signature), **answered.reply.facts}


async def _read_form(request: Request) -> dict[str, Any]:
    """Fields by name; of a form, files as bytes."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        async with request.form() as form:
            return {key: await value.read() if isinstance(value, UploadFile) else value for key, value in form.items()}
    body = await request.body()
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadInput("the body is neither a form nor JSON.") from error
    if not isinstance(given, dict):
        raise BadInput(f"the body must be a JSON object, got {type(given).__name__}.")
    return given


def _read_value(spec: TensorSpec, value: Any) -> str | bytes:
    """A text, or the bytes of a file, which JSON holds in base64."""
    if isinstance(value, bytes):
        return value if not spec.is_text else _decode_text(spec, value)
    if not isinstance(value, str):
        raise BadInput(f"{spec.name} must be a text{'' if spec.is_text else ' in base64'}, got {type(value).__name__}.")
    if spec.is_text:
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInput(f"{spec.name} is not valid base64: {error}.") from error


def _decode_text(spec: TensorSpec, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{spec.name} is no text in UTF-8.") from error

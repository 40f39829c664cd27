"""The Open Inference Protocol, version 2, that KServe and Triton speak: `/v2`.

Its models are adapters, and the version of one is the digest of its file. Axis 0 of each tensor is the batch; its rows
are asked one by one, and the server batches them with others. Tensors are in JSON, where a file is base64, or follow it
as bytes.

Source: https://github.com/kserve/open-inference-protocol, and Triton's extension for binary tensor data.
"""

import zlib
from collections.abc import Awaitable, Callable, Sequence
from importlib.metadata import version as find_version
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from inlay.errors import BadInput
from inlay.serve.server.answers import hide_paths, name_signature, run_unless_gone
from inlay.serve.server.gate import HOLD
from inlay.serve.server.refusals import Replaced, TooLarge, UnknownAdapter
from inlay.serve.server.service import Service
from inlay.serve.server.tensors import InferRequest, encode_answer, parse_request
from inlay.tasks.serving import TensorSpec

Endpoint = Callable[[Request], Awaitable[Response]]

router = APIRouter()
HEADER_LENGTH = "Inference-Header-Content-Length"
LARGE = 1 << 18  # bytes; a request or an answer of more is parsed or written off the event loop
ENCODINGS = {"gzip": 31, "deflate": 15}  # zlib's wbits


async def describe_server(request: Request) -> Response:
    """Its name and version."""
    return JSONResponse({"name": "inlay", "version": find_version("inlay"), "extensions": ["binary_tensor_data"]})


async def show_live(request: Request) -> Response:
    """Whether it answers at all, now or once it is ready; if not, it must be started anew."""
    is_live = _service_of(request).state != "failed"
    return JSONResponse({"live": is_live}, 200 if is_live else 503)


async def show_ready(request: Request) -> Response:
    """Whether it answers for its adapters."""
    is_ready = _service_of(request).state == "ready"
    return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)


async def describe_model(request: Request) -> Response:
    """The tensors of an adapter's requests and answers, and its signature."""
    service, name = _service_of(request), request.path_params["name"]
    file = await service.run_on_pool(service.find_file, name)
    _check_version(request, name, file.digest)
    facts = {
        "name": name,
        "versions": [file.digest],
        "platform": "inlay_adapter",
        "inputs": [_describe_tensor(spec) for spec in await service.list_inputs(name)],
        "outputs": [_describe_tensor(spec) for spec in service.serving.outputs],
        "parameters": name_signature(service.sign(name, file)),
    }
    return JSONResponse(facts)


async def show_model_ready(request: Request) -> Response:
    """That an adapter can be asked; otherwise the status and the sentence say why not."""
    service, name = _service_of(request), request.path_params["name"]
    file = await service.run_on_pool(service.find_file, name)
    _check_version(request, name, file.digest)
    return JSONResponse({"name": name, "ready": True})


async def list_models(request: Request) -> Response:
    """All adapters, and those that were given but do not fit, as Triton's index of a repository."""
    service = _service_of(request)
    files = service.bank.files
    listed = []
    for name in service.bank.names:
        version = {"version": files[name].digest} if name in files else {}
        listed.append({"name": name, **version, "state": "READY", "reason": ""})
    for name, reason in service.refused.items():
        if name not in service.bank.names:
            listed.append({"name": name, "state": "UNAVAILABLE", "reason": hide_paths(reason)})
    return JSONResponse(listed)


async def infer(request: Request) -> Response:
    """What an adapter says of each row of a batch."""
    service, name = _service_of(request), request.path_params["name"]
    if "version" in request.path_params:
        file = await service.run_on_pool(service.find_file, name)
        _check_version(request, name, file.digest)
    asked = await _read_request(request, service, await service.list_inputs(name))
    names = [output.name for output in asked.outputs]
    answers = await run_unless_gone(request, service.ask_rows(name, asked.rows, asked.timeout_s, names))
    signatures = {answer.signature for answer in answers}
    if len(signatures) > 1:
        raise Replaced(f"adapter {name!r} was replaced while its rows were answered; ask again.")
    signature = answers[0].signature
    _check_version(request, name, signature.digest)
    head: dict[str, Any] = {"model_name": name, "model_version": signature.digest}
    if asked.id is not None:
        head["id"] = asked.id
    head["parameters"] = name_signature(signature)
    replies = [answer.reply.tensors for answer in answers]
    size = sum(getattr(value, "nbytes", 0) for reply in replies for value in reply.values())
    arguments = head, replies, asked.outputs, service.serving.outputs
    body, header_length = (
        await service.run_on_pool(encode_answer, *arguments) if size > LARGE else encode_answer(*arguments)
    )
    if header_length is None:
        return Response(body, media_type="application/json")
    return Response(body, media_type="application/octet-stream", headers={HEADER_LENGTH: str(header_length)})


async def _read_request(request: Request, service: Service, inputs: Sequence[TensorSpec]) -> InferRequest:
    body, encoding = await request.body(), request.headers.get("content-encoding", "identity")
    length = request.headers.get(HEADER_LENGTH)

    def read() -> tuple[InferRequest, int]:
        whole = body if encoding == "identity" else _inflate(body, encoding, int(service.config.max_body_mb * 1e6))
        return parse_request(whole, length, inputs, service.serving.outputs, service.queue.limit), len(whole)

    is_large = encoding != "identity" or len(body) > LARGE
    asked, size = await service.run_on_pool(read) if is_large else read()
    if size > len(body):
        request.scope[HOLD](size - len(body))
    return asked


def _inflate(body: bytes, encoding: str, most: int) -> bytes:
    """A compressed body, of which no more than the limit is inflated."""
    if encoding not in ENCODINGS:
        raise BadInput(f"unknown Content-Encoding {encoding[:40]!r}; choose one of {', '.join(ENCODINGS)}.")
    stream = zlib.decompressobj(wbits=ENCODINGS[encoding])
    try:
        whole = stream.decompress(body, most + 1)
    except zlib.error as error:
        raise BadInput(f"the body cannot be read as {encoding}: {error}.") from error
    if len(whole) > most:
        raise TooLarge(f"the body of a request may have {most:,} bytes at most, also where it was compressed.")
    if not stream.eof or stream.unused_data:
        raise BadInput(f"the body is not one whole stream of {encoding}.")
    return whole


def _describe_tensor(spec: TensorSpec) -> dict[str, Any]:
    facts = {"optional": spec.optional, "help": spec.help}
    return {"name": spec.name, "datatype": spec.datatype, "shape": [-1, *spec.shape], "parameters": facts}


def _check_version(request: Request, name: str, digest: str) -> None:
    """Raise UnknownAdapter where the path asks for another version than there is."""
    asked = request.path_params.get("version", digest)
    if asked != digest:
        raise UnknownAdapter(f"adapter {name!r} has the version {digest}, not {asked[:80]!r}.")


def _service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _add_route(path: str, endpoint: Endpoint, method: str = "GET") -> None:
    """A plain route of Starlette costs half of FastAPI's own, but nothing says which one was taken; metrics need it."""

    async def answer(request: Request) -> Response:
        request.scope["route"] = route
        return await endpoint(request)

    router.add_route(path, answer, methods=[method])
    route = router.routes[-1]


for _path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
    _add_route(f"{_path}/infer", infer, "POST")
    _add_route(f"{_path}/ready", show_model_ready)
    _add_route(_path, describe_model)
_add_route("/v2", describe_server)
_add_route("/v2/health/live", show_live)
_add_route("/v2/health/ready", show_ready)
_add_route("/v2/repository/index", list_models, "POST")

"""The HTTP application: what becomes of errors. Routes are in files of their own, and so is what stands before them."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from inlay.errors import ComputationFailed, InlayError, WrongBase
from inlay.serve.server import adapters, classify, health, metrics, monai_label, open_inference, openai, page
from inlay.serve.server.adapters import LoadingRules
from inlay.serve.server.answers import make_error
from inlay.serve.server.gate import KEY, Gate, Journal, read_keys
from inlay.serve.server.refusals import Busy, Refusal
from inlay.serve.server.service import Service
from inlay.serve.server.trace import current_trace
from inlay.serve.server.uploads import Uploads
from inlay.serve.server.watch import FolderWatch

STOP_S = 5.0  # for the batch under way, once no request waits for it


def make_app(
    service: Service,
    *,
    api_key: str | None = None,
    watched: str | Path | None = None,
    loading: LoadingRules | None = None,
) -> FastAPI:
    """The application of a service, which starts and stops with it.

    Args:
        service: Answers requests.
        api_key: What requests bring as `Authorization: Bearer KEY`; several are separated by commas. Default: the
            environment's INLAY_API_KEY. Without either, everyone may ask.
        watched: A folder of adapters, which come and go with their folders.
        loading: What clients may load; None: nothing.

    Raises:
        BadInput: A key is empty; the folder cannot be watched.
    """
    watch = None if watched is None else FolderWatch(service, watched)

    @asynccontextmanager
    async def run_service(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        await asyncio.to_thread(service.loop.is_ready.wait)
        if watch is not None:
            watch.start()
        yield
        if watch is not None:
            watch.stop()
        await asyncio.to_thread(service.stop, STOP_S)

    app = FastAPI(title="inlay", lifespan=run_service, openapi_url=None)
    app.state.service = service
    app.add_exception_handler(InlayError, _answer_inlay_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_wrong_form)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.include_router(open_inference.router)  # routes are compared in this order: those of programs first
    app.include_router(classify.router)
    app.include_router(openai.router)
    app.include_router(health.router)
    app.include_router(metrics.router)
    app.include_router(page.router)
    if loading is not None:
        app.state.loading = loading
        app.include_router(adapters.router)
    keys = read_keys(os.environ.get(KEY) if api_key is None else api_key)
    if service.serving.annotating is not None:
        app.state.keys, app.state.uploads = keys, Uploads(int(service.config.max_body_mb * 1e6))
        app.include_router(monai_label.router)
    app.add_middleware(Gate, service=service, keys=keys)
    app.add_middleware(Journal, service=service)  # the one that is added last stands in front
    return app


async def _answer_inlay_error(request: Request, error: Exception) -> Response:
    current_trace().refusal = type(error).__name__
    status = 400
    if isinstance(error, Refusal):
        status = error.status
    elif isinstance(error, WrongBase):
        status = 409
    elif isinstance(error, ComputationFailed):
        status = 500
    headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, Busy) else None
    service: Service = request.app.state.service
    return make_error(request.url.path, status, service.hide_base(str(error)), headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return make_error(request.url.path, error.status_code, str(error.detail), error.headers)


async def _answer_wrong_form(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
    return make_error(request.url.path, 400, f"{where}: {first['msg']}.")


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """The client left before all of its request was there: no failure of the server."""
    return make_error(request.url.path, 499, "the client closed the connection.")

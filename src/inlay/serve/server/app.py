"""The HTTP application: who may ask, how large a request may be, and what becomes of errors. Routes are in files of
their own."""

import asyncio
import hmac
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inlay.errors import ComputationFailed, InlayError, WrongBase
from inlay.serve.server import classify, openai
from inlay.serve.server.answers import make_error
from inlay.serve.server.refusals import Busy, Refusal, TooLarge
from inlay.serve.server.service import Service

log = logging.getLogger(__name__)
KEY = "INLAY_API_KEY"  # environment variable: the key that requests must bring
OPEN_PATHS = ("/health", "/v2/health/live", "/v2/health/ready", "/")


def make_app(service: Service, *, api_key: str | None = None) -> FastAPI:
    """The application of a service, which starts and stops with it.

    Args:
        service: Answers requests.
        api_key: What requests bring as `Authorization: Bearer KEY`; default: the environment's INLAY_API_KEY. Without
            either, everyone may ask.
    """

    @asynccontextmanager
    async def run_service(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(title="inlay", lifespan=run_service, openapi_url=None)
    app.state.service = service
    app.add_exception_handler(InlayError, _answer_inlay_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_wrong_form)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_failure)
    app.include_router(classify.router)
    app.include_router(openai.router)
    app.add_api_route("/health", _answer_health, methods=["GET"])
    key = api_key or os.environ.get(KEY)
    app.add_middleware(Gate, max_bytes=int(service.config.max_body_mb * 1e6), key=key)
    return app


class Gate:
    """Lets requests in that bring the key and are not too large, before their body is read.

    Args:
        app: What answers them.
        max_bytes: Of a body.
        key: None: no key is needed.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, key: str | None) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self.expected is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self.expected):
                refusal = make_error(scope["path"], 401, "the API key is missing or wrong: Authorization: Bearer KEY.")
                await refusal(scope, receive, send)
                return
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self.max_bytes:
            await make_error(scope["path"], 413, self._explain_size())(scope, receive, send)
            return
        read = 0

        async def receive_bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.max_bytes:
                raise TooLarge(self._explain_size())
            return message

        await self.app(scope, receive_bounded, send)

    def _explain_size(self) -> str:
        return f"the body of a request may have {self.max_bytes:,} bytes at most."


async def _answer_inlay_error(request: Request, error: Exception) -> Response:
    status = 400
    if isinstance(error, Refusal):
        status = error.status
    elif isinstance(error, WrongBase):
        status = 409
    elif isinstance(error, ComputationFailed):
        status = 500
    headers = {"Retry-After": str(error.retry_after_s)} if isinstance(error, Busy) else None
    return make_error(request.url.path, status, str(error), headers)


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


async def _answer_failure(request: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return make_error(request.url.path, 500, "the server failed; its log says why.")


async def _answer_health(request: Request) -> dict[str, Any]:
    service: Service = request.app.state.service
    return {"status": "ok", "waiting": len(service.queue)}

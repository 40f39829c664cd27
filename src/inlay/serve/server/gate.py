"""What stands in front of all routes: the journal, which notes every request, and the gate, which lets it in or not."""

import asyncio
import hmac
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inlay.errors import BadInput
from inlay.serve.server.answers import make_error
from inlay.serve.server.logs import FACTS
from inlay.serve.server.refusals import Busy, TooLarge, TooSlow
from inlay.serve.server.service import Service
from inlay.serve.server.trace import Trace, begin_trace

log = logging.getLogger(__name__)
requests_log = logging.getLogger("inlay.serve.requests")
KEY = "INLAY_API_KEY"  # environment variable: the keys of which requests must bring one
OPEN_PATHS = (
    "/",
    "/health",
    "/v2/health/live",
    "/v2/health/ready",
)  # need no key
LOGIN_PATHS = ("/auth/", "/auth/token")  # where a key is asked for: they need none
QUIET_PATHS = (*OPEN_PATHS[1:], "/metrics")  # asked every few seconds: they have a line only where they fail
GONE = 499  # nginx's status of a request whose client left before it was answered
BODIES = 16  # of the largest size, that all requests under way may hold together
FULL = "the requests under way fill the memory for bodies; try again in 1 s."
HOLD = "inlay.hold"  # key of a request's scope: counts further bytes that it holds


class Journal:
    """Gives each request an id, a line in the log and its counts; what fails unforeseen is answered with status 500.

    Args:
        app: What answers.
        service: Whose metrics count.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trace, started, status = begin_trace(dict(scope["headers"])), time.perf_counter(), GONE
        echo = [(b"x-request-id", trace.id.encode())]
        if trace.traceparent:
            echo.append((b"traceparent", trace.traceparent.encode()))

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *echo]}
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        except Exception:
            log.exception("a request failed", extra={FACTS: {"request_id": trace.id}})
            if status != GONE:  # the answer has begun, and breaks off here
                raise
            failed = make_error(scope["path"], 500, "the server failed; its log says why.")
            await failed(scope, receive, send_noted)
        finally:
            self._note(scope, trace, status, time.perf_counter() - started)

    def _note(self, scope: Scope, trace: Trace, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "(none)")
        self.service.metrics.count_request(trace, route, status, seconds)
        if status < 400 and scope["path"] in QUIET_PATHS:
            return
        facts: dict[str, Any] = {"method": scope["method"], "route": route, "status": status}
        if trace.adapter:
            facts["adapter"] = trace.adapter[:100]
        facts["ms"] = round(seconds * 1000, 2)
        for name, value in (("ms_waiting", trace.waiting_s), ("ms_computing", trace.computing_s)):
            if value is not None:
                facts[name] = round(value * 1000, 2)
        prompt, written = trace.count_tokens()
        for name, count in (("batch", trace.batch), ("prompt_tokens", prompt), ("new_tokens", written)):
            if count:
                facts[name] = count
        if trace.refusal:
            facts["refusal"] = trace.refusal
        facts["request_id"] = trace.id
        if trace.traceparent:
            facts["trace_id"] = trace.traceparent.split("-")[1]
        requests_log.log(logging.ERROR if status == 500 else logging.INFO, "request", extra={FACTS: facts})


class Gate:
    """Lets requests in that bring a key and are not too large, before their body is read, while the server takes any.

    Args:
        app: What answers them.
        service: Which may be draining.
        keys: Any of them opens; none: no key is needed.
    """

    def __init__(self, app: ASGIApp, service: Service, keys: Sequence[str]) -> None:
        self.app = app
        self.service = service
        self.max_bytes = int(service.config.max_body_mb * 1e6)
        self.keys = keys
        self.held = 0  # bytes of all bodies under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        path = scope["path"]
        if self.service.state == "draining":
            closing = {"Connection": "close", "Retry-After": "1"}
            refusal = make_error(path, 503, "the server is stopping; ask another one.", closing)
        elif self.keys and path not in LOGIN_PATHS and not self._brings_key(headers.get(b"authorization", b"")):
            message = "the API key is missing or wrong: Authorization: Bearer KEY."
            refusal = make_error(path, 401, message, {"WWW-Authenticate": "Bearer"})
        elif _announced_size(headers) > self.max_bytes:
            refusal = make_error(path, 413, self._explain_size())
        elif self.held > BODIES * self.max_bytes:
            refusal = make_error(path, 429, FULL, {"Retry-After": "1"})
        else:
            await self._let_in(scope, receive, send)
            return
        await refusal(scope, receive, send)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        deadline = asyncio.get_running_loop().time() + self.service.config.timeout_s
        read, is_read = 0, False

        async def receive_bounded() -> Message:
            """The body, whose bytes and time are bounded; behind it, whether the client has left."""
            nonlocal read, is_read
            if is_read:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise TooSlow("the body of the request did not arrive in time.") from None
            size = len(message.get("body", b""))
            read += size
            self.held += size
            if read > self.max_bytes:
                raise TooLarge(self._explain_size())
            is_read = not message.get("more_body", False)
            return message

        def hold(size: int) -> None:
            """Count what a body has become besides, such as by inflating it."""
            nonlocal read
            read += size
            self.held += size
            if self.held > BODIES * self.max_bytes:
                raise Busy(FULL)

        scope[HOLD] = hold
        self.service.active += 1
        try:
            await self.app(scope, receive_bounded, send)
        finally:
            self.service.active -= 1
            self.held -= read

    def _brings_key(self, authorization: bytes) -> bool:
        scheme, _, given = authorization.partition(b" ")
        return is_key(given.strip(), self.keys) and scheme.lower() == b"bearer"

    def _explain_size(self) -> str:
        return f"the body of a request may have {self.max_bytes:,} bytes at most."


def is_key(given: bytes, keys: Sequence[str]) -> bool:
    """Whether this is one of the keys, found in a time that does not tell how much of it is right."""
    matches = [hmac.compare_digest(given, key.encode()) for key in keys]
    return any(matches)


def _announced_size(headers: Mapping[bytes, bytes]) -> int:
    text = headers.get(b"content-length", b"")
    return int(text) if text.isdigit() and len(text) < 20 else 0  # the bytes are counted anyway


def read_keys(text: str | None) -> list[str]:
    """API keys, separated by commas, so that an old one and its successor can both be valid.

    Raises:
        BadInput: One of them is empty.
    """
    if text is None:
        return []
    keys = [key.strip() for key in text.split(",")]
    if not all(keys):
        raise BadInput(f"an API key of {KEY} is empty, so it would keep nobody out; write it, or unset the variable.")
    return keys

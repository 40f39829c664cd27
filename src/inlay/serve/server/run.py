"""Run a server until it is told to stop; what it has accepted is answered first.

The port is open from the start. While the base is loaded, all requests get status 503, but `/v2/health/live` says that
the process lives: a probe need not know how long loading takes, and a port in use is found at once.
"""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import prometheus_client
import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from typing_extensions import override

from inlay.errors import BadInput
from inlay.serve.server.answers import make_error
from inlay.serve.server.gate import KEY, read_keys
from inlay.serve.server.logs import FACTS, LogFormat, set_up_logs
from inlay.serve.server.service import Service

log = logging.getLogger(__name__)
ALIVE = "/v2/health/live"
HEADERS_S = 10  # that a connection may take until the headers of its next request are there
GRACE_S = 1  # that connections get to close, once their requests are answered


def run_server(
    make_service: Callable[[], Service],
    make_app: Callable[[Service], ASGIApp],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    drain_s: float = 25.0,
    log_format: LogFormat = "text",
) -> None:
    """Answer requests until SIGTERM or SIGINT; then accept no more, and end once the accepted ones are answered.

    A second signal ends the process at once, with the status of that signal.

    Args:
        make_service: Loads what answers.
        make_app: Its routes.
        host: Address to listen at; 0.0.0.0 is every network of this machine.
        port: To listen at; 0 is any that is free.
        drain_s: How long accepted requests are answered after a signal. What is left then gets status 503.
        log_format: Of the lines on stderr.

    Raises:
        BadInput: The port cannot be opened, or the API key of the environment is empty.
        InlayError: What `make_service` and `make_app` say.
    """
    set_up_logs(log_format)
    keys = read_keys(os.environ.get(KEY))
    prometheus_client.disable_created_metrics()  # they double the series of counters and histograms
    with open_port(host, port) as listener:
        url = _name_url(listener)
        log.info("loading", extra={FACTS: {"url": url}})
        if not keys and host not in ("127.0.0.1", "::1", "localhost"):
            log.warning("anyone who reaches this address may ask: set %s to a key", KEY)
        with _answering_early(listener):
            service = make_service()
            app = make_app(service)
        for name, reason in service.refused.items():
            log.warning("not served", extra={FACTS: {"adapter": name, "reason": reason}})
        server = _Server(_configure(app, lifespan="on"), service, drain_s)
        facts = {"url": url, "base": service.base_name, "adapters": len(service.bank.names)}
        log.info("serving", extra={FACTS: facts})
        server.run(sockets=[listener])
    if not service.has_ended:
        log.error("a batch is still under way; the process ends without it")
        os._exit(1)  # the thread that computes cannot be stopped otherwise
    log.info("stopped")


def open_port(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        BadInput: The port is in use, or the address is not one of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=2048)
        # Its connections inherit this. asyncio sets it only on sockets whose protocol is named. Without it the second
        # part of an answer waits 40 ms for the client to acknowledge the first.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        is_name = isinstance(error, socket.gaierror)  # its numbers are no errno
        reason = (str(error.strerror) if is_name else os.strerror(error.errno or 0)).lower()
        raise BadInput(
            f"cannot listen at port {port} of {host}: {reason}; give another --port (0 is any that is free) or --host."
        ) from error


def _name_url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _configure(app: ASGIApp, *, lifespan: str) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan=lifespan,
        log_config=None,  # as `set_up_logs` says
        access_log=False,  # the journal has a line for each request
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=GRACE_S,
    )


@contextmanager
def _answering_early(listener: socket.socket) -> Iterator[None]:
    """Inside the block all requests get status 503, and SIGTERM ends the process: as the first of a container it would
    otherwise ignore that."""
    before = signal.signal(signal.SIGTERM, lambda sig, frame: os._exit(128 + sig))
    server = uvicorn.Server(_configure(_answer_early, lifespan="off"))
    copy = listener.dup()  # the server closes what it is given
    thread = threading.Thread(target=server.run, kwargs={"sockets": [copy]}, name="inlay-early", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
        signal.signal(signal.SIGTERM, before)


async def _answer_early(scope: Scope, receive: Receive, send: Send) -> None:
    headers = {"Connection": "close", "Retry-After": "1"}
    if scope["path"] == ALIVE:
        answer: ASGIApp = JSONResponse({"live": True}, headers=headers)
    elif scope["path"] == "/health":
        answer = JSONResponse({"status": "starting"}, 503, headers=headers)
    else:
        message = "the server is loading its base and adapters; try again later."
        answer = make_error(scope["path"], 503, message, headers)
    await answer(scope, receive, send)


class _Server(uvicorn.Server):
    """uvicorn's, which answers what it has accepted before it closes its port."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self._service, self._drain_s = service, drain_s
        self._end = 0.0  # of draining, by time.monotonic
        self._idle: dict[Any, tuple[Any, float]] = {}  # by connection its last request, and when it was seen first

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.state == "draining":
            os._exit(128 + sig)
        self._service.drain()

    @override
    async def on_tick(self, counter: int) -> bool:
        if self._service.state == "draining":
            if not self._end:
                self._end = time.monotonic() + self._drain_s
                log.info("draining", extra={FACTS: {"active": self._service.active}})
            if time.monotonic() > self._end and self._service.active:
                log.warning("requests are left", extra={FACTS: {"active": self._service.active}})
                self._service.give_up()
                self.should_exit = True
            self.should_exit |= not self._service.active
        if counter % 10 == 0:  # each second
            self._close_idle()
        return await super().on_tick(counter)

    def _close_idle(self) -> None:
        """Close connections on which no request has begun for a while; uvicorn waits for headers without an end."""
        now = time.monotonic()
        cycles = {each: each.cycle for each in self.server_state.connections}
        idle = {each: cycle for each, cycle in cycles.items() if cycle is None or cycle.response_complete}
        known = {each: seen for each, seen in self._idle.items() if each in idle and seen[0] is idle[each]}
        self._idle = {each: known.get(each, (cycle, now)) for each, cycle in idle.items()}
        for each, (_, since) in self._idle.items():
            if now - since > HEADERS_S:
                each.transport.close()

"""What is noted of a request while it is answered: its line in the log, and its counts."""

import re
import uuid
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

from inlay.serve.server.queue import Request

_REQUEST_ID = re.compile(rb"[\w.:/+=@-]{1,128}")  # anything else could be read as another line of a log
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")  # w3.org/TR/trace-context


@dataclass
class Trace:
    """Notes on one request over HTTP.

    Attributes:
        id: What the client sent as X-Request-ID, or a fresh one.
        traceparent: What the client sent under this name; empty if it sent none.
        adapter: What the request asked for.
        is_known: The server has such an adapter, so its name may become a label of a metric.
        requests: What it put into the queue, one for each row or text.
        refusal: Class of the error that it was answered with.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    traceparent: str = ""
    adapter: str = ""
    is_known: bool = False
    requests: list[Request] = field(default_factory=list)
    refusal: str = ""

    def name_adapter(self, name: str, *, is_known: bool) -> None:
        """Note which adapter the request asks for."""
        self.adapter, self.is_known = name, is_known

    @property
    def waiting_s(self) -> float | None:
        """In the queue, of the row that waited longest; None if none was taken."""
        return max((each.taken - each.arrived for each in self.requests if each.taken), default=None)

    @property
    def computing_s(self) -> float | None:
        """From leaving the queue to the answer, of the row that took longest; None if none was answered."""
        return max((each.answered - each.taken for each in self.requests if each.answered), default=None)

    @property
    def batch(self) -> int:
        """Rows of the largest batch that it was in."""
        return max((each.batch for each in self.requests), default=0)

    def count_tokens(self) -> tuple[int, int]:
        """Of its prompts, and written."""
        counts = [each.count_tokens() for each in self.requests]
        return sum(prompt for prompt, _ in counts), sum(written for _, written in counts)


_current: ContextVar[Trace] = ContextVar("inlay_trace")


def begin_trace(headers: Mapping[bytes, bytes]) -> Trace:
    """The notes on a request with these headers, which `current_trace` gives from here on."""
    trace = Trace()
    given, parent = headers.get(b"x-request-id", b""), headers.get(b"traceparent", b"")
    if _REQUEST_ID.fullmatch(given):
        trace.id = given.decode("ascii", "replace")
    if _TRACEPARENT.fullmatch(parent):
        trace.traceparent = parent.decode("ascii")
    _current.set(trace)
    return trace


def current_trace() -> Trace:
    """The notes on the request that is being answered; outside of one, notes that nobody reads."""
    return _current.get(None) or Trace()

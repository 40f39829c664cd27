"""Requests that wait for the model: a bounded number, each adapter's in turn.

An adapter with a thousand requests does not delay the single request of another one: batches are filled by going round
the adapters that have requests, one from each.
"""

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from inlay.serve.server.refusals import Busy, Stopping, TooLate


@dataclass(eq=False)
class Request:
    """One row for the model, and the future that gets its answer.

    Attributes:
        adapter: Its name in the bank.
        digest: Of the adapter's file by whose settings the row was made.
        row: What the model needs, as the task's `Serving` made it.
        shape: Rows of one batch have equal ones.
        deadline: By `time.monotonic`; a request that is taken later is refused.
        arrived: By `time.monotonic`.
        taken: When it left the queue for a batch; 0 before.
        answered: When its answer was computed; 0 before.
        batch: Rows of the batch that it was in.
        left: Nobody waits for the answer any more; where it is being computed, that may end.
        future: Of the answer. Cancelling it takes the request out of the queue.
    """

    adapter: str
    digest: str
    row: Any
    shape: Hashable = None
    deadline: float = math.inf
    arrived: float = field(default_factory=time.monotonic)
    taken: float = 0.0
    answered: float = 0.0
    batch: int = 0
    future: Future[Any] = field(default_factory=Future)
    left: bool = False

    def cancel(self) -> None:
        """Say that nobody waits for the answer any more: the request leaves the queue."""
        self.left = True
        self.future.cancel()

    def count_tokens(self) -> tuple[int, int]:
        """Of its prompt, and written so far."""
        return 0, 0

    def begin(self) -> bool:
        """Mark the request as one that is being answered; False if it was cancelled before."""
        return self.future.running() or self.future.set_running_or_notify_cancel()


class RequestQueue:
    """Requests by adapter, taken out in turn.

    Args:
        limit: Requests that may wait at the same time.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._waiting: OrderedDict[str, deque[Request]] = OrderedDict()  # the adapter whose turn it is first
        self._count = 0
        self._closed = False
        self._changed = threading.Condition()
        self._seconds_each = 0.0  # between two requests taken while others wait, a running mean
        self._last_taken = 0.0

    def __len__(self) -> int:
        return self._count

    def put(self, request: Request) -> None:
        """Let a request wait.

        Raises:
            Busy: So many wait already.
            Stopping: The queue is closed.
        """
        with self._changed:
            if self._closed:
                raise Stopping("the server is stopping and takes no more requests; ask another one.")
            if self._count >= self.limit:
                self._leave_out_ended()
            if self._count >= self.limit:
                seconds = max(1, math.ceil(self._count * self._seconds_each))
                raise Busy(f"{self._count} requests are waiting already; try again in {seconds} s.", seconds)
            self._waiting.setdefault(request.adapter, deque()).append(request)
            self._count += 1
            self._changed.notify_all()

    def put_back(self, request: Request) -> None:
        """Let a request that was taken wait again, as the next one of its adapter, whose turn it is first."""
        with self._changed:
            self._waiting.setdefault(request.adapter, deque()).appendleft(request)
            self._waiting.move_to_end(request.adapter, last=False)
            self._count += 1

    def take(
        self,
        rows: int,
        *,
        wait_s: float = 0.0,
        adapters: int | None = None,
        fits: Callable[[Sequence[Request], Request], bool] = lambda taken, request: True,
        block: bool = True,
    ) -> list[Request]:
        """The next requests, all of one shape; an empty list once the queue is closed and empty.

        Cancelled requests are left out; those whose deadline has passed are refused here.

        Args:
            rows: At most so many.
            wait_s: How long the first request waits for others to fill the batch, in seconds.
            adapters: Different ones at most.
            fits: Whether there is room for a request next to those that are taken. One without room waits, and those
                that came after it do not pass it, so that the room it needs becomes free.
            block: Wait for a request where there is none; otherwise the list may be empty. Then some request must fit
                by itself.
        """
        with self._changed:
            while True:
                self._leave_out_ended()
                if not self._count:
                    if self._closed or not block:
                        return []
                    self._changed.wait()
                    continue
                oldest = min(requests[0].arrived for requests in self._waiting.values())
                left = oldest + wait_s - time.monotonic()
                if self._count < rows and left > 0 and not self._closed:
                    self._changed.wait(left)
                    continue
                taken = self._take_in_turn(rows, adapters, fits)
                if taken:
                    self._measure_pace(len(taken))
                if taken or not block:
                    return taken

    def close(self) -> None:
        """Take no more requests; those that wait are still handed out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def refuse_waiting(self, error: Exception) -> None:
        """Answer all requests that wait with an error."""
        with self._changed:
            for requests in self._waiting.values():
                for request in requests:
                    if request.begin():
                        request.future.set_exception(error)
            self._waiting.clear()
            self._count = 0

    def _take_in_turn(
        self, rows: int, adapters: int | None, fits: Callable[[Sequence[Request], Request], bool]
    ) -> list[Request]:
        """One request of each adapter, round after round, of the shape of the first."""
        now = time.monotonic()
        taken: list[Request] = []
        first_without_room = math.inf
        served: dict[str, None] = {}
        found = True
        while found and len(taken) < rows:
            found = False
            for name, requests in self._waiting.items():
                if len(taken) == rows:
                    break
                is_new = name not in served
                if not requests or (is_new and adapters is not None and len(served) == adapters):
                    continue
                if taken and requests[0].shape != taken[0].shape:
                    continue
                if requests[0].arrived > first_without_room:
                    continue
                if not fits(taken, requests[0]):
                    first_without_room = requests[0].arrived
                    continue
                request = requests.popleft()
                self._count -= 1
                found = True
                if request.begin():
                    request.taken = now
                    taken.append(request)
                    served[name] = None
        for name in served:
            self._waiting.move_to_end(name)
        self._forget_empty()
        return taken

    def _leave_out_ended(self) -> None:
        """Drop what was cancelled, and refuse what is too late."""
        now = time.monotonic()
        for name, requests in self._waiting.items():
            kept: deque[Request] = deque()
            for request in requests:
                if request.future.cancelled():
                    continue
                if request.deadline > now:
                    kept.append(request)
                elif request.begin():
                    waited = now - request.arrived
                    request.future.set_exception(TooLate(f"the request waited {waited:.2f} s, past its deadline."))
            self._count -= len(requests) - len(kept)
            self._waiting[name] = kept
        self._forget_empty()

    def _forget_empty(self) -> None:
        for name in [name for name, requests in self._waiting.items() if not requests]:
            del self._waiting[name]

    def _measure_pace(self, taken: int) -> None:
        """Keep the mean time between requests while others wait, which tells a refused client when to come back."""
        now = time.monotonic()
        if self._count and self._last_taken:
            each = (now - self._last_taken) / taken
            self._seconds_each = each if not self._seconds_each else 0.9 * self._seconds_each + 0.1 * each
        self._last_taken = now

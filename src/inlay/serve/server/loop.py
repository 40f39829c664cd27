"""What the threads have in common that take requests from a queue and answer them."""

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

log = logging.getLogger(__name__)


class Loop(ABC):
    """A thread that answers requests until their queue is closed and empty.

    Attributes:
        is_ready: Set once it takes requests; the first one does not wait for what is done once.
        has_failed: It has ended by an error, which the log shows; nothing is answered any more.

    Args:
        name: Of the thread.
        prepare: Called first, on the thread.
    """

    def __init__(self, name: str, prepare: Callable[[], None]) -> None:
        self.is_ready = threading.Event()
        self.has_failed = False
        self._prepare = prepare
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def run(self) -> None:
        """Answer requests; called on the thread."""

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end of the thread; True if it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._prepare()
            self.is_ready.set()
            self.run()
        except Exception:
            log.exception("the thread that computes has ended; restart the server")
            self.has_failed = True
            self.is_ready.set()  # nobody need wait any more

"""The thread that owns a bank: it computes requests of many adapters in mixed batches."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from typing_extensions import override

from inlay.adapters.file import AdapterFile
from inlay.errors import ComputationFailed, InlayError
from inlay.serve.bank import Bank
from inlay.serve.catalogue import Catalogue
from inlay.serve.server.loop import Loop
from inlay.serve.server.queue import Request, RequestQueue
from inlay.serve.server.refusals import DoesNotFit, Replaced, UnknownAdapter, name_misfit
from inlay.tasks.serving import Row, Serving

log = logging.getLogger(__name__)


class BatchLoop(Loop):
    """Takes requests from a queue, and answers each with what the model made of its row.

    Args:
        bank: This thread alone computes with it; others may add and remove adapters meanwhile.
        serving: Of the task of its adapters.
        queue: Where requests wait.
        max_batch: Rows in a batch at most; fewer where the task says so.
        max_wait_s: How long a request waits for others to fill its batch.
        prepare: Called first, on the thread that computes.
        watch: Called with each batch before it is computed.
    """

    def __init__(
        self,
        bank: Bank,
        serving: Serving,
        queue: RequestQueue,
        *,
        max_batch: int,
        max_wait_s: float,
        prepare: Callable[[], None] = lambda: None,
        watch: Callable[[Sequence[Request]], None] = lambda requests: None,
    ) -> None:
        super().__init__("inlay-batches", prepare)
        self.bank = bank
        self.serving = serving
        self.queue = queue
        self.max_batch = min(max_batch, serving.largest_batch(bank.model.config) or max_batch)
        self.max_wait_s = max_wait_s
        self.watch = watch
        self._weight = next(p for p in bank.model.parameters() if p.is_floating_point())

    def make_request(self, name: str, file: AdapterFile, row: Row, deadline: float) -> Request:
        """A request for the queue: a row that was made by the settings of an adapter's file."""
        return Request(name, file.digest, row, row.shape, deadline)

    @override
    def run(self) -> None:
        while requests := self.queue.take(self.max_batch, wait_s=self.max_wait_s, adapters=self.bank.room):
            self.watch(requests)
            self.answer(requests)

    def answer(self, requests: Sequence[Request]) -> None:
        """Compute a batch and answer its requests.

        A batch that fails is computed again for each of its adapters, so that one which does not fit fails by itself.
        """
        names = list(dict.fromkeys(request.adapter for request in requests))
        try:
            self._compute(requests, names)
        except Exception as error:
            if len(names) > 1:
                for name in names:
                    self.answer([request for request in requests if request.adapter == name])
                return
            for request in requests:
                if not request.future.done():
                    request.future.set_exception(explain_failure(error))

    def _compute(self, requests: Sequence[Request], names: Sequence[str]) -> None:
        with ExitStack() as block:
            try:
                block.enter_context(self.bank.rows(names))  # those that are not in memory are read and checked
            except InlayError as error:
                raise explain_misfit(error, self.bank, names) from error
            current = []
            for request in requests:
                if self.bank.files[request.adapter].digest == request.digest:
                    current.append(request)
                else:
                    request.future.set_exception(Replaced(f"adapter {request.adapter!r} was replaced; ask again."))
            if not current:
                return
            batch = self.serving.collate([request.row for request in current], self._weight)
            output = self.bank(batch, [request.adapter for request in current])
            rows = self.serving.take_rows(output, len(current))
        now = time.monotonic()
        for request, found in zip(current, rows, strict=True):
            request.answered, request.batch = now, len(current)
            request.future.set_result(found)


def explain_misfit(error: Exception, bank: Catalogue, names: Sequence[str]) -> InlayError:
    """What a client is told where a bank cannot take the adapters of its rows into memory."""
    if not isinstance(error, InlayError):
        return explain_failure(error)
    if any(name not in bank.names for name in names):
        return UnknownAdapter(str(error))
    return DoesNotFit(name_misfit(error, names[0], bank.find_path(names[0])))


def explain_failure(error: Exception) -> InlayError:
    """What a client is told where a batch could not be computed; the log has the rest."""
    if isinstance(error, InlayError):
        return error
    log.error("a batch failed", exc_info=error)
    return ComputationFailed("the model could not compute this request; the server's log says why.")

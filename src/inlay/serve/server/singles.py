"""The thread that computes requests one by one, each under an adapter in a model of its own, such as scans."""

import logging
import time
from collections.abc import Callable, Sequence

from typing_extensions import override

from inlay.adapters.file import AdapterFile
from inlay.adapters.load import LoadedAdapter
from inlay.errors import InlayError
from inlay.serve.model_bank import ModelBank
from inlay.serve.server.batches import explain_failure, explain_misfit
from inlay.serve.server.loop import Loop
from inlay.serve.server.queue import Request, RequestQueue
from inlay.serve.server.refusals import Replaced, TooLate
from inlay.tasks.serving import Limits, Row, SingleServing

log = logging.getLogger(__name__)
WAITING = 16  # a request that waits holds its file, which may be as large as a body


class _Left(Exception):
    """The client has gone."""


class SingleLoop(Loop):
    """Takes requests from a queue one at a time. One that nobody waits for any more, or whose deadline passes, ends
    before its next forward pass.

    Args:
        bank: Where adapters are; others may add and remove some meanwhile.
        serving: Of the task of its adapters.
        queue: Where requests wait.
        limits: Of requests.
        prepare: Called first, on the thread that computes.
        watch: Called with each request before it is computed.
    """

    def __init__(
        self,
        bank: ModelBank,
        serving: SingleServing,
        queue: RequestQueue,
        *,
        limits: Limits,
        prepare: Callable[[], None] = lambda: None,
        watch: Callable[[Sequence[Request]], None] = lambda requests: None,
    ) -> None:
        super().__init__("inlay-singles", prepare)
        self.bank = bank
        self.serving = serving
        self.queue = queue
        self.limits = limits
        self.watch = watch

    def make_request(self, name: str, file: AdapterFile, row: Row, deadline: float) -> Request:
        """A request for the queue: what was read by the settings of an adapter's file."""
        return Request(name, file.digest, row, row.shape, deadline)

    @override
    def run(self) -> None:
        while requests := self.queue.take(1):
            self.watch(requests)
            self.answer(requests[0])

    def answer(self, request: Request) -> None:
        """Compute a request and answer it."""

        def check_wanted() -> None:
            if request.left:
                raise _Left
            if time.monotonic() > request.deadline:
                raise TooLate("the request was not answered before its deadline.")

        try:
            adapter = self._load(request)
            found = self.serving.compute(request.row, adapter, self.limits, check_wanted)
            request.answered, request.batch = time.monotonic(), 1
        except _Left:
            log.info("a client has left; its request is not computed to its end")
            request.future.set_exception(TooLate("the client has left."))
        except Exception as error:
            request.future.set_exception(explain_failure(error))
        else:
            request.future.set_result(found)

    def _load(self, request: Request) -> LoadedAdapter:
        try:
            adapter = self.bank.load(request.adapter)
        except InlayError as error:
            raise explain_misfit(error, self.bank, [request.adapter]) from error
        if self.bank.files[request.adapter].digest != request.digest:
            raise Replaced(f"adapter {request.adapter!r} was replaced; ask again.")
        return adapter

"""Texts on their way from the thread that writes them to the event loop that sends them."""

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

from inlay.adapters.file import AdapterFile
from inlay.serve.server.generation import TextRequest
from inlay.serve.server.refusals import TooLate
from inlay.tasks.serving import Piece, Written


class TextStream:
    """The pieces of one text, for the event loop in which it is made.

    Args:
        request: Before it is put into the queue.
        file: Of its adapter.
    """

    def __init__(self, request: TextRequest, file: AdapterFile) -> None:
        self.request = request
        self.file = file
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self._first: Piece | None = None
        request.on_piece = self._push
        request.future.add_done_callback(self._push_error)

    async def wait_for_first(self) -> None:
        """Wait until the text has begun.

        Raises:
            InlayError: Why it has not, such as TooLate at the request's deadline.
        """
        try:
            async with asyncio.timeout(max(0.0, self.request.deadline - time.monotonic())):
                self._first = await self._take()
        except TimeoutError:
            raise TooLate("the request was not answered before its deadline.") from None
        finally:
            if self._first is None:
                self.close()

    async def read(self) -> AsyncIterator[Piece]:
        """The pieces, as they are written; the last one says why it is the last.

        Raises:
            InlayError: The text cannot be finished.
        """
        assert self._first is not None
        piece = self._first
        yield piece
        while piece.finish is None:
            piece = await self._take()
            yield piece

    async def read_all(self) -> Written:
        """The whole text."""
        try:
            return await asyncio.wrap_future(self.request.future)
        finally:
            self.close()

    def close(self) -> None:
        """End the text where it is not finished: nobody reads it any more."""
        self.request.cancel()

    async def _take(self) -> Piece:
        found = await self._arrived.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _push(self, piece: Piece | BaseException) -> None:
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, piece)

    def _push_error(self, future: "Future[Any]") -> None:
        if not future.cancelled() and (error := future.exception()) is not None and not self._loop.is_closed():
            self._push(error)

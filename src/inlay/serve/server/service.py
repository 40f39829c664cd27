"""What a server answers with: one bank, the queue in front of it, and the loop behind."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from inlay.adapters.file import AdapterFile
from inlay.adapters.task import find_task_of_file
from inlay.errors import BadInput, InlayError
from inlay.serve.bank import Bank
from inlay.serve.server.batches import BatchLoop
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.generation import GenerationLoop, TextRequest
from inlay.serve.server.queue import Request, RequestQueue
from inlay.serve.server.refusals import DoesNotFit, Replaced, TooLate, UnknownAdapter
from inlay.serve.server.streams import TextStream
from inlay.tasks.serving import Answering, Reply, Serving, Writing
from inlay.tasks.task import Task

T = TypeVar("T")


@dataclass(frozen=True)
class Signature:
    """What computed an answer.

    Attributes:
        adapter: Its name.
        digest: Of its file.
        base: Name of the base.
        base_digest: Of the base's weights, as their sketch tells them apart.
    """

    adapter: str
    digest: str
    base: str
    base_digest: str


@dataclass(frozen=True)
class Answered:
    """A reply, and what computed it."""

    reply: Reply
    signature: Signature
    labels: list[str] = field(default_factory=list)


class Service:
    """A bank that answers requests from an event loop.

    Attributes:
        task: Of all adapters.
        refused: Why adapters that were given are not served, by name.
        started: When it was made, in seconds since 1970.

    Args:
        bank: Base and adapters.
        config: Bounds.

    Raises:
        InlayError: No adapter that fits, or a task that is not served.
    """

    def __init__(self, bank: Bank, config: ServiceConfig) -> None:
        self.bank = bank
        self.config = config
        self.refused = {name: str(error) for name, error in bank.refused.items()}
        self.task = _find_task(bank, self.refused)
        self.serving = self.task.serving()
        self.queue = RequestQueue(config.max_queue)
        self.loop = _make_loop(bank, self.serving, self.queue, config)
        self.started = int(time.time())
        self.base_digest = bank.identity.digest
        self._pool = ThreadPoolExecutor(config.threads, "inlay-decode")

    def start(self) -> None:
        """Begin to answer."""
        self.loop.start()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Take no more requests, answer those that wait, and end; False if that takes longer than the timeout."""
        self.queue.close()
        ended = self.loop.join(timeout_s)
        self._pool.shutdown(cancel_futures=True)
        return ended

    def find_file(self, name: str) -> AdapterFile:
        """What the file of an adapter says.

        Raises:
            UnknownAdapter: There is none of that name.
            DoesNotFit: Its file is damaged.
        """
        if name in self.refused:
            raise DoesNotFit(self.refused[name])
        if name not in self.bank.names:
            raise UnknownAdapter(f"unknown adapter {name!r}; the list of models names those of this server.")
        try:
            return self.bank.read_file(name)
        except InlayError as error:
            raise DoesNotFit(str(error)) from error

    def sign(self, name: str, file: AdapterFile) -> Signature:
        """What an answer of this adapter names."""
        return Signature(name, file.digest, str(self.bank.model.name_or_path), self.base_digest)

    async def ask(self, name: str, values: Mapping[str, Any], timeout_s: float | None = None) -> Answered:
        """The answer of an adapter to one input.

        Args:
            name: Of the adapter.
            values: As `Serving.read` takes them.
            timeout_s: Shorter than the server's own.

        Raises:
            InlayError: What `Serving.read` says, or a refusal.
        """
        if isinstance(self.loop, GenerationLoop):
            stream = await self.write(name, values, timeout_s)
            found = await stream.read_all()
            return self._answer(found, stream.request, stream.file)

        async def wait(request: Request, file: AdapterFile) -> Answered:
            self.queue.put(request)
            found = await _wait_for(request.future, request.deadline)
            return self._answer(found, request, file)

        return await self._try(name, values, timeout_s, wait)

    async def write(self, name: str, values: Mapping[str, Any], timeout_s: float | None = None) -> TextStream:
        """The text of an adapter behind a prompt, whose first piece is there.

        Args:
            name: Of the adapter.
            values: As `Writing.read` takes them.
            timeout_s: For the first piece; shorter than the server's own.

        Raises:
            InlayError: What `Writing.read` says, or a refusal.
        """
        if not isinstance(self.loop, GenerationLoop):
            raise BadInput(f"this server is for {self.task.name}, and writes no text.")

        async def begin(request: Request, file: AdapterFile) -> TextStream:
            assert isinstance(request, TextRequest)
            stream = TextStream(request, file)
            self.queue.put(request)
            await stream.wait_for_first()
            return stream

        return await self._try(name, values, timeout_s, begin)

    async def _try(
        self,
        name: str,
        values: Mapping[str, Any],
        timeout_s: float | None,
        answer: Callable[[Request, AdapterFile], Coroutine[Any, Any, T]],
    ) -> T:
        """Ask for an answer; again where the adapter is replaced between reading the request and computing it."""
        deadline = time.monotonic() + min(timeout_s or self.config.timeout_s, self.config.timeout_s)
        for attempt in range(3):
            file = self.find_file(name)
            row = await self._run_on_pool(self._read_row, file, values)
            request = self.loop.make_request(name, file, row, deadline)
            try:
                return await answer(request, file)
            except Replaced:
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    def _answer(self, found: Any, request: Request, file: AdapterFile) -> Answered:
        reply = self.serving.reply(found, request.row, file.labels, self.bank.model.config)
        return Answered(reply, self.sign(request.adapter, file), file.labels)

    def _read_row(self, file: AdapterFile, values: Mapping[str, Any]) -> Any:
        with torch.inference_mode():
            return self.serving.read(values, self.bank.load_processor(file), self.config.limits)

    async def _run_on_pool(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


async def _wait_for(future: Future[Any], deadline: float) -> Any:
    """The result of a future, which is cancelled where nobody waits for it any more.

    Raises:
        TooLate: The deadline passed.
    """
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            return await asyncio.wrap_future(future)
    except TimeoutError:
        raise TooLate("the request was not answered before its deadline.") from None


def _make_loop(
    bank: Bank, serving: Answering, queue: RequestQueue, config: ServiceConfig
) -> BatchLoop | GenerationLoop:
    """What computes the requests: one forward pass each, or a token at a time."""
    wait_s = config.max_wait_ms / 1000
    if not isinstance(serving, Writing):
        assert isinstance(serving, Serving)
        return BatchLoop(bank, serving, queue, max_batch=config.max_batch, max_wait_s=wait_s)
    return GenerationLoop(
        bank,
        serving,
        queue,
        max_batch=config.max_batch,
        max_wait_s=wait_s,
        max_new_tokens=config.max_new_tokens,
        max_write_s=config.max_write_s,
        cache_mb=config.cache_mb,
    )


def _find_task(bank: Bank, refused: dict[str, str]) -> Task:
    """That of the first adapter; those for other tasks are taken out of the bank, and `refused` says so."""
    if not bank.names:
        reasons = " ".join(refused.values())
        raise BadInput(f"a server needs an adapter, which says what the base is for. {reasons}".strip())
    first, *others = bank.names
    task = find_task_of_file(bank.read_file(first), bank.model.config)
    for name in others:
        other = find_task_of_file(bank.read_file(name), bank.model.config)
        if other.name != task.name:
            bank.remove(name)
            refused[name] = f"adapter {name!r} is for {other.name}, and this server is for {task.name}."
    return task

"""What a server answers with: one bank, the queue in front of it, and the loop behind."""

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from inlay.adapters.file import AdapterFile
from inlay.adapters.task import find_task_of_file
from inlay.errors import BadInput, InlayError
from inlay.serve.bank import Bank
from inlay.serve.server.batches import BatchLoop
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.queue import Request, RequestQueue
from inlay.serve.server.refusals import DoesNotFit, Replaced, TooLate, UnknownAdapter
from inlay.tasks.serving import Reply, Row
from inlay.tasks.task import Task


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
        self.loop = BatchLoop(
            bank, self.serving, self.queue, max_batch=config.max_batch, max_wait_s=config.max_wait_ms / 1000
        )
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
        deadline = time.monotonic() + min(timeout_s or self.config.timeout_s, self.config.timeout_s)
        for attempt in range(3):
            file = self.find_file(name)
            row = await self._run_on_pool(self._read_row, file, values)
            request = Request(name, file.digest, row, row.shape, deadline)
            self.queue.put(request)
            try:
                found = await _wait_for(request.future, deadline)
            except Replaced:
                if attempt == 2:
                    raise
                continue
            reply = self.serving.reply(found, row, file.labels, self.bank.model.config)
            return Answered(reply, self.sign(name, file), file.labels)
        raise AssertionError("unreachable")

    def _read_row(self, file: AdapterFile, values: Mapping[str, Any]) -> Row:
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

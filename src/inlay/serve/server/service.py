"""What a server answers with: one bank, the queue in front of it, and the loop behind."""

import asyncio
import contextvars
import copy
import logging
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from inlay.adapters.file import AdapterFile, expand_path
from inlay.adapters.golden import compute_output
from inlay.adapters.task import find_task_of_file
from inlay.bases.device import Device
from inlay.bases.load import Dtype, read_config, resolve_base
from inlay.errors import BadInput, DamagedFile, InlayError
from inlay.serve.bank import Bank
from inlay.serve.catalogue import Catalogue, find_first, name_adapters
from inlay.serve.model_bank import ModelBank
from inlay.serve.server.batches import BatchLoop
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.generation import GenerationLoop, TextRequest
from inlay.serve.server.logs import FACTS
from inlay.serve.server.metrics import Metrics
from inlay.serve.server.queue import Request, RequestQueue
from inlay.serve.server.refusals import DoesNotFit, Replaced, Stopping, TooLate, UnknownAdapter, name_misfit
from inlay.serve.server.singles import WAITING, SingleLoop
from inlay.serve.server.streams import TextStream
from inlay.serve.server.trace import current_trace
from inlay.tasks.serving import Reply, ServedAdapter, Serving, SingleServing, TensorSpec, Writing
from inlay.tasks.task import Task

log = logging.getLogger(__name__)
T = TypeVar("T")
MOST_DESCRIBED = 1_000
State = Literal["starting", "ready", "draining", "failed"]


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
    labels: Sequence[str] = field(default_factory=list)


class Service:
    """A bank that answers requests from an event loop.

    Attributes:
        task: Of all adapters.
        refused: Why adapters that were given are not served, by name.
        base_name: Of the base, as answers have it: a name or Hub id as it is, of a folder here the last part.
        started: When it was made, in seconds since 1970.
        metrics: What it counts.
        active: Requests over HTTP that were accepted and are not answered yet.
        has_ended: `stop` was called, and nothing is computed any more.

    Args:
        bank: Base and adapters.
        config: Bounds.

    Raises:
        InlayError: No adapter that fits, or a task that is not served.
    """

    def __init__(self, bank: Bank | ModelBank, config: ServiceConfig) -> None:
        self.bank = bank
        self.config = config
        self.refused = {
            name: name_misfit(error, name, bank.refused_paths[name]) for name, error in bank.refused.items()
        }
        self.task = _find_task(bank, self.refused)
        self.serving = self.task.serving()
        is_single = isinstance(self.serving, SingleServing)
        self.queue = RequestQueue(min(config.max_queue, WAITING) if is_single else config.max_queue)
        self.loop = self._make_loop()
        self.metrics = Metrics(bank, self.queue, self.loop)
        self.started = int(time.time())
        self._base_path = expand_path(str(bank.model.name_or_path))
        self.base_name = self._base_path.resolve().name if self._base_path.is_dir() else str(bank.model.name_or_path)
        self.base_digest = bank.identity.digest
        self.active = 0
        self.has_ended = False
        self._is_draining = False
        self._changing = threading.Lock()  # adapters come and go one after the other
        self._described: dict[str, tuple[AdapterFile, ServedAdapter]] = {}
        self._pool = ThreadPoolExecutor(config.threads, "inlay-decode")

    @property
    def state(self) -> State:
        """Whether it answers: `ready`; not yet; only what it has accepted; or no more, as its thread has failed."""
        if self._is_draining:
            return "draining"
        if self.loop.has_failed:
            return "failed"
        return "ready" if self.loop.is_ready.is_set() else "starting"

    def start(self) -> None:
        """Begin to answer."""
        self.loop.start()

    def drain(self) -> None:
        """Accept no more requests over HTTP; those that were accepted are answered."""
        self._is_draining = True

    def give_up(self) -> None:
        """Refuse the requests that still wait."""
        self.queue.close()
        self.queue.refuse_waiting(Stopping("the server is stopping and could not answer this request in time."))

    def stop(self, timeout_s: float | None = None) -> bool:
        """Take no more requests, answer those that wait, and end; False if that takes longer than the timeout."""
        self.queue.close()
        self.has_ended = self.loop.join(timeout_s)
        self._pool.shutdown(wait=self.has_ended, cancel_futures=True)
        return self.has_ended

    def find_file(self, name: str) -> AdapterFile:
        """What the file of an adapter says.

        Raises:
            UnknownAdapter: There is none of that name.
            DoesNotFit: Its file is damaged.
        """
        is_served = name in self.bank.names
        current_trace().name_adapter(name, is_known=is_served or name in self.refused)
        if not is_served and name in self.refused:
            raise DoesNotFit(self.refused[name])
        if not is_served:
            raise UnknownAdapter(f"unknown adapter {name!r}; the list of models names those of this server.")
        try:
            return self.bank.read_file(name)
        except InlayError as error:
            raise DoesNotFit(name_misfit(error, name, self.bank.find_path(name))) from error

    def describe_adapter(self, name: str) -> tuple[AdapterFile, ServedAdapter]:
        """What the file of an adapter says, and what requests must know of it.

        Raises:
            InlayError: As `find_file`.
        """
        file = self.find_file(name)
        return file, self._describe_adapter(name, file)

    async def list_inputs(self, name: str) -> Sequence[TensorSpec]:
        """What a request to an adapter holds.

        Raises:
            InlayError: As `find_file`.
        """
        if not isinstance(self.serving, SingleServing):  # whose adapters do not differ: nothing is to be read
            return self.serving.inputs
        _, adapter = await self.run_on_pool(self.describe_adapter, name)
        return self.serving.list_inputs(adapter)

    def sign(self, name: str, file: AdapterFile) -> Signature:
        """What an answer of this adapter names."""
        return Signature(name, file.digest, self.base_name, self.base_digest)

    def hide_base(self, text: str) -> str:
        """A sentence in which a base that is a folder here has its name in place of its path."""
        if not self._base_path.is_dir():
            return text
        for path in (str(self._base_path.resolve()), str(self._base_path), str(self.bank.model.name_or_path)):
            text = text.replace(path, self.base_name) if "/" in path else text
        return text

    def add_adapter(self, path: str | Path, name: str, *, replace: bool = True) -> bool:
        """Check an adapter and serve it under a name; called on any thread.

        Requests are answered meanwhile, but for the time in which the bank reads and checks it. One that is served
        already, by its path and digest, is left as it is.

        Args:
            path: A folder.
            name: For requests.
            replace: In the place of one of that name; without it False is returned where there is one.

        Raises:
            DoesNotFit: It does not fit, is for another task, or cannot be read; what was served before is served on.
        """
        with self._changing:
            if name in self.bank.names and not replace:
                return False
            try:
                file = self.bank.read_folder(path)
                if not self._serves(file, path, name):
                    _check_task(file, name, self.task, self.bank)
                    self.bank.add(path, name)
                    log.info("adapter added", extra={FACTS: {"adapter": name, "digest": file.digest}})
            except InlayError as error:
                raise DoesNotFit(name_misfit(error, name, path)) from error
            self.refused.pop(name, None)
        return True

    def _serves(self, file: AdapterFile, path: str | Path, name: str) -> bool:
        if name not in self.bank.names or Path(self.bank.find_path(name)) != Path(path):
            return False
        return self.bank.read_file(name).digest == file.digest

    def remove_adapter(self, name: str) -> None:
        """Serve an adapter no longer; requests that wait for it are refused as unknown. Called on any thread."""
        with self._changing:
            self.bank.remove(name)
            self.metrics.forget(name)
        log.info("adapter removed", extra={FACTS: {"adapter": name}})

    async def ask(
        self,
        name: str,
        values: Mapping[str, Any],
        timeout_s: float | None = None,
        tensors: Collection[str] | None = None,
    ) -> Answered:
        """The answer of an adapter to one input.

        Args:
            name: Of the adapter.
            values: As `Answering.read` takes them.
            timeout_s: Shorter than the server's own.
            tensors: Names of the outputs that a program wants; None: facts for people.

        Raises:
            InlayError: What `Answering.read` says, or a refusal.
        """
        if isinstance(self.loop, GenerationLoop):
            stream = await self.write(name, values, timeout_s)
            found = await stream.read_all()
            return await self._answer(found, stream.request, stream.file, tensors)

        async def wait(request: Request, file: AdapterFile) -> Answered:
            self.queue.put(request)
            found = await _wait_for(request)
            return await self._answer(found, request, file, tensors)

        return await self._try(name, values, timeout_s, wait)

    async def ask_rows(
        self,
        name: str,
        rows: Sequence[Mapping[str, Any]],
        timeout_s: float | None = None,
        tensors: Collection[str] | None = None,
    ) -> list[Answered]:
        """The answers of an adapter to several inputs, in their order; the first one that fails takes the others back.

        Raises:
            InlayError: As `ask`; of what cannot be read it says in which row, from 0.
        """

        async def ask(row: int) -> Answered:
            try:
                return await self.ask(name, rows[row], timeout_s, tensors)
            except (BadInput, DamagedFile) as error:
                raise type(error)(f"row {row}: {error}") from error

        if len(rows) == 1:
            return [await self.ask(name, rows[0], timeout_s, tensors)]
        tasks = [asyncio.ensure_future(ask(row)) for row in range(len(rows))]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

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
            file, row = await self.run_on_pool(self._read_row, name, values)
            request = self.loop.make_request(name, file, row, deadline)
            current_trace().requests.append(request)
            try:
                return await answer(request, file)
            except Replaced:
                if attempt == 2:
                    raise
        raise AssertionError("unreachable")

    async def _answer(
        self, found: Any, request: Request, file: AdapterFile, tensors: Collection[str] | None
    ) -> Answered:
        adapter = self._describe_adapter(request.adapter, file)
        if self.serving.makes_files:
            reply = await self.run_on_pool(self.serving.reply, found, request.row, adapter, tensors)
        else:
            reply = self.serving.reply(found, request.row, adapter, tensors)
        return Answered(reply, self.sign(request.adapter, file), adapter.labels)

    def _read_row(self, name: str, values: Mapping[str, Any]) -> tuple[AdapterFile, Any]:
        file = self.find_file(name)  # of an adapter that is not in memory the disk is read
        with torch.inference_mode():
            return file, self.serving.read(values, self._describe_adapter(name, file), self.config.limits)

    def _describe_adapter(self, name: str, file: AdapterFile) -> ServedAdapter:
        """What requests must know of an adapter; kept while its file is the same."""
        known = self._described.get(name)
        if known is not None and (known[0] is file or known[0].digest == file.digest):
            return known[1]
        config, labels = copy.copy(self.bank.model.config), list(file.labels)
        if self.task.classifies:
            labels = labels or self.task.labels(self.bank.model, None)
            config.num_labels = len(labels)
        if len(self._described) >= MOST_DESCRIBED:  # names of adapters that are gone
            self._described.clear()
        adapter = ServedAdapter(name, self.bank.load_processor(file), labels, file.groups, config)
        self._described[name] = file, adapter
        return adapter

    def _make_loop(self) -> BatchLoop | GenerationLoop | SingleLoop:
        """What computes the requests: one forward pass each, a token at a time, or one by one."""
        bank, serving, config = self.bank, self.serving, self.config
        follow: dict[str, Any] = {"prepare": self._warm_up, "watch": self._count_batch}
        if isinstance(bank, ModelBank) and isinstance(serving, SingleServing):
            return SingleLoop(bank, serving, self.queue, limits=config.limits, **follow)
        shared: dict[str, Any] = {"max_batch": config.max_batch, "max_wait_s": config.max_wait_ms / 1000, **follow}
        if isinstance(bank, Bank) and isinstance(serving, Serving):
            return BatchLoop(bank, serving, self.queue, **shared)
        if isinstance(bank, Bank) and isinstance(serving, Writing):
            return GenerationLoop(
                bank,
                serving,
                self.queue,
                max_new_tokens=config.max_new_tokens,
                max_write_s=config.max_write_s,
                cache_mb=config.cache_mb,
                **shared,
            )
        raise BadInput(f"a {type(bank).__name__} does not serve {self.task.name}; `open_bank` makes the right one.")

    def _count_batch(self, requests: Sequence[Request]) -> None:
        self.metrics.count_batch(requests)

    def _warm_up(self) -> None:
        """Compute one row, so that no request waits for what torch and the processor do once.

        A row is enough: a first batch of 32 rows took 5 % more CPU time than the next ones, at the width of ViT-base.
        """
        name = self.bank.names[0]
        try:
            processor = self.bank.load_processor(self.bank.read_file(name))
            compute_output(self.bank.as_model(name), processor, self.task)
        except InlayError as error:
            log.warning("the first adapter cannot be warmed up: %s", error)

    async def run_on_pool(self, function: Any, *arguments: Any) -> Any:
        """What a function gives on one of the threads that read requests."""
        run = contextvars.copy_context().run  # with the notes on the request
        return await asyncio.get_running_loop().run_in_executor(self._pool, run, function, *arguments)


async def _wait_for(request: Request) -> Any:
    """What was computed of a request, which is given up where nobody waits for it any more.

    Raises:
        TooLate: The deadline passed.
    """
    try:
        async with asyncio.timeout(max(0.0, request.deadline - time.monotonic())):
            return await asyncio.wrap_future(request.future)
    except TimeoutError:
        raise TooLate("the request was not answered before its deadline.") from None
    finally:
        request.cancel()


def open_bank(
    base: str | Path,
    adapters: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    *,
    budget_mb: float | None = None,
    device: Device | None = None,
    dtype: Dtype | Literal["auto"] = "float32",
) -> Bank | ModelBank:
    """The bank that serves the task of the first adapter; adapters that do not fit are left out.

    Args:
        base: A name for `load_base`.
        adapters: As for `Bank`.
        budget_mb: As for `Bank`.
        device: As for `Bank`.
        dtype: As for `Bank`; "auto" is float32 where each adapter has a model of its own.

    Raises:
        InlayError: As `Bank`.
    """
    config = read_config(str(base), resolve_base(str(base)), None)
    first = find_first(name_adapters(adapters), config.model_type)
    task = None if first is None else find_task_of_file(first, config)
    if task is not None and isinstance(task.serving(), SingleServing):
        kept: Dtype = "float32" if dtype == "auto" else dtype
        return ModelBank(base, adapters, budget_mb=budget_mb, skip_unfit=True, device=device, dtype=kept)
    return Bank(base, adapters, budget_mb=budget_mb, skip_unfit=True, device=device, dtype=dtype)


def _find_task(bank: Bank | ModelBank, refused: dict[str, str]) -> Task:
    """That of the first adapter; those for other tasks are taken out of the bank, and `refused` says so."""
    found: Task | None = None
    for name in bank.names:
        try:
            file = bank.read_file(name)
            found = found or find_task_of_file(file, bank.model.config)
            _check_task(file, name, found, bank)
        except InlayError as error:
            refused[name] = name_misfit(error, name, bank.find_path(name))
            bank.remove(name)
    if found is None:
        reasons = " ".join(refused.values())
        raise BadInput(f"no adapter can be served on this base: {reasons or 'none was given.'}")
    return found


def _check_task(file: AdapterFile, name: str, task: Task, bank: Catalogue) -> None:
    """Raise BadInput for an adapter of another task."""
    other = find_task_of_file(file, bank.model.config)
    if other.name != task.name:
        raise BadInput(f"adapter {name!r} is for {other.name}, and this server is for {task.name}.")

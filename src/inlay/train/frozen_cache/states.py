"""The output of the frozen part of a model for every example of a data set: computed once, stored, and reused.

In memory the states are one tensor. On disk they are one raw file, in the order of the data, in the folder
`frozen_states` next to the run's folder. Its name is

    <key>-<hash of all inputs>-<crc32>.states

The key is a hash of the weights that are not trained, the names of the frozen blocks, the number of rows computed at
once, and the states of the first examples, bit for bit. Whatever else decides the states (a setting, a library, a
machine) changes these first states. The hash of the inputs covers the tensors that the model gets, hence the images and
their preprocessing. A file is written under another name, then renamed. It is used if its length and checksum are
right, and replaced otherwise. The folder stays below `cache_gb`: the least recently used files are deleted first.
"""

import hashlib
import os
import random
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn
from torch.utils.data import Dataset

from inlay.train.config import TrainConfig
from inlay.train.evaluation import count_rows, split_batch
from inlay.train.launch import build_loader

if TYPE_CHECKING:
    from collections.abc import Callable

    Collate = Callable[[list[Any]], dict[str, Any]]

MARKS = "_marks"
DAY_S = 86_400


class NotCacheable(Exception):
    """States cannot be stored or used; the message gives the reason."""


@dataclass(frozen=True)
class EntryPoint:
    """Where the model starts during training, and the states that enter there.

    Attributes:
        frozen: The frozen blocks in running order.
        blocks: All blocks in running order.
        shape: Shape of the states of one example.
        dtype: Data type of the states.
        extras: Length of the tuple that a block returns, minus one; None if it returns a tensor.
    """

    frozen: tuple[str, ...]
    blocks: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype
    extras: int | None


def random_generators(device: torch.device | None = None) -> tuple[Any, ...]:
    """The states of the global random generators."""
    numpy: Any = np.random.get_state(legacy=True)  # noqa: NPY002 - the one that augmentations use
    states = [random.getstate(), numpy[1].tobytes(), numpy[2], torch.get_rng_state().numpy().tobytes()]
    if device is not None and device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    return tuple(states)


class _StopForward(Exception):
    """Ends a forward pass after the last frozen block, and carries its output."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


@dataclass
class FrozenPartRunner:
    """Runs examples through the frozen part, in the order of the data."""

    model: nn.Module
    entry: EntryPoint
    accelerator: Accelerator
    config: TrainConfig
    collate: "Collate"
    blank: tuple[str, ...]  # inputs that the states replace
    key: str = ""  # from `digest_states`, for states on disk

    def iterate_batches(self, data: Any, compute: bool) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the batches of all processes.

        A batch holds the inputs that the states do not replace, a hash of each example's whole input in `MARKS`
        (B, 32), bytes, and the `cached_states` (B, ...) if they are to be computed.
        """
        loader = build_loader(
            _WatchedDataset(data),
            _MarkingCollate(self.collate),
            self.config.workers,
            self.accelerator,
            batch_size=self.config.batch_size,
        )
        for batch in loader:
            marks = batch.pop(MARKS)
            states = self.compute_batch(batch) if compute else None
            rows = {k: v for k, v in batch.items() if k not in self.blank}
            rows |= {} if states is None else {"cached_states": states}
            wrong = None
            if states is not None and states.shape[1:] != self.entry.shape:
                wrong = f"examples differ in shape ({tuple(self.entry.shape)}, {tuple(states.shape[1:])})"
            raise_together(self.accelerator, wrong)
            rows = self.accelerator.gather_for_metrics({**rows, MARKS: marks})
            if rows[MARKS][:, 0].any():
                raise NotCacheable("an example is augmented at random, so every epoch differs")
            yield {**rows, MARKS: rows[MARKS][:, 1:]}

    @torch.no_grad()
    def compute_batch(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The output of the frozen part for a batch (B, ...), in the pieces of a step, or more if memory runs out."""
        self.model.eval()
        count = self.config.accumulate
        while True:
            try:
                return torch.cat([self._compute_piece(piece) for piece in split_batch(batch, count)])
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or count >= count_rows(batch):
                    raise
            count *= 2
            clear_device_cache(garbage_collection=True)

    def _compute_piece(self, piece: dict[str, torch.Tensor]) -> torch.Tensor:
        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _StopForward(output if self.entry.extras is None else output[0])

        handle = self.model.get_submodule(self.entry.frozen[-1]).register_forward_hook(stop)
        try:
            with self.accelerator.autocast():
                self.model(**piece)
        except _StopForward as reached:
            return reached.states
        finally:
            handle.remove()
        raise AssertionError("a block that ran while the model was observed did not run again")


class _WatchedDataset(Dataset[Any]):
    """Items, each with True if a global random generator advanced while the item was read."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        before = random_generators()
        return self.data[index], random_generators() != before


@dataclass
class _MarkingCollate:
    """Collates watched items and adds `MARKS`, 33 bytes per row: a flag for random items, and a hash of the inputs."""

    collate: "Collate"

    def __call__(self, items: list[tuple[Any, bool]]) -> dict[str, Any]:
        batch = dict(self.collate([item for item, _ in items]))
        marks = []
        for i, (_, is_random) in enumerate(items):
            digest = hashlib.blake2b(digest_size=32)
            for name in sorted(batch.keys() - {"labels"}):
                digest.update(f"{name} {batch[name].dtype} {tuple(batch[name].shape[1:])}".encode())
                digest.update(batch[name][i].contiguous().view(-1).view(torch.uint8).numpy())
            marks.append(bytes([is_random]) + digest.digest())
        return {**batch, MARKS: torch.tensor([list(mark) for mark in marks], dtype=torch.uint8)}


def compute_states(data: Any, runner: "FrozenPartRunner") -> dict[str, torch.Tensor]:
    """The `cached_states` and the inputs that they do not replace, one row per example; in memory or mapped from disk.

    Raises:
        NotCacheable: The states cannot be stored; the message gives the reason.
    """
    if runner.config.cache_frozen == "disk":
        return _compute_on_disk(data, runner)
    stored, done = torch.empty((len(data), *runner.entry.shape), dtype=runner.entry.dtype), 0

    def store(states: torch.Tensor) -> None:
        nonlocal done
        stored[done : done + len(states)] = states
        done += len(states)

    columns, _ = _collect_columns(runner.iterate_batches(data, compute=True), store)
    return {"cached_states": stored, **columns}


def _collect_columns(
    batches: "Iterable[dict[str, torch.Tensor]]", store: "Callable[[torch.Tensor], None]"
) -> tuple[dict[str, torch.Tensor], str]:
    """Pass the states of each batch to `store`. Returns the other columns whole, and the hash of all inputs."""
    columns: dict[str, list[torch.Tensor]] = {}
    inputs = hashlib.blake2b(digest_size=8)
    for rows in batches:
        inputs.update(rows.pop(MARKS).cpu().contiguous().numpy())
        if "cached_states" in rows:
            store(rows.pop("cached_states"))
        for name, value in rows.items():
            columns.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values) for name, values in columns.items()}, inputs.hexdigest()


def _compute_on_disk(data: Any, runner: "FrozenPartRunner") -> dict[str, torch.Tensor]:
    accelerator, entry = runner.accelerator, runner.entry
    folder = Path(runner.config.output_dir).absolute().parent / "frozen_states"
    size = len(data) * entry.shape.numel() * entry.dtype.itemsize
    path, columns = None, dict[str, torch.Tensor]()
    has_candidate = _ask_main_process(accelerator, lambda: any(folder.glob(f"{runner.key}-*")))
    if has_candidate:  # only then is it worth while to read all inputs
        columns, inputs = _collect_columns(runner.iterate_batches(data, compute=False), lambda states: None)
        path = _ask_main_process(accelerator, lambda: _find_file(folder, f"{runner.key}-{inputs}-", size))
    if path is None:
        part = _PartialFile(folder, runner.key, size, runner.config.cache_gb) if accelerator.is_main_process else None
        try:
            store = part.append if part else lambda states: None
            columns, inputs = _collect_columns(runner.iterate_batches(data, compute=True), store)
            path, fault = _ask_main_process(accelerator, lambda: part.finish(inputs) if part else None)
        finally:
            if part:
                part.discard()
        if fault:
            raise NotCacheable(f"{folder} cannot be written ({fault})")
    states = torch.from_file(str(path), shared=False, size=size // entry.dtype.itemsize, dtype=entry.dtype)
    return {"cached_states": states.view(len(data), *entry.shape), **columns}


def _ask_main_process(accelerator: Accelerator, ask: "Callable[[], Any]") -> Any:
    """The answer of the main process, in all processes."""
    answer = [ask() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    return answer[0]


def _find_file(folder: Path, name: str, size: int) -> str | None:
    """The complete, undamaged file whose name begins with `name`, or None. Damaged ones are deleted."""
    for path in folder.glob(f"{name}*.states"):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
        if path.stat().st_size == size and path.stem == f"{name}{crc:08x}":
            os.utime(path)  # marks it as recently used
            return str(path)
        path.unlink()
    return None


class _PartialFile:
    """A file of states that is being written, under a temporary name."""

    def __init__(self, folder: Path, key: str, size: int, bound_gb: float) -> None:
        self.path = folder / f".{key}-{os.getpid()}.part"
        self.key, self.size, self.crc, self.fault = key, size, 0, ""
        self.file: BinaryIO | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _free_space(folder, int(bound_gb * 1e9) - size)
            self.file = self.path.open("wb")
        except OSError as error:
            self.fault = str(error)

    def append(self, states: torch.Tensor) -> None:
        """Append rows. An error is reported by `finish`, as the other processes take part until then."""
        if self.fault or self.file is None:
            return
        raw = _raw_bytes(states)
        self.crc = zlib.crc32(raw, self.crc)
        try:
            self.file.write(raw)
        except OSError as error:
            self.fault = str(error)

    def finish(self, inputs: str) -> tuple[str, str]:
        """Rename the file. Returns its final path, and the error if there was one."""
        path = self.path.with_name(f"{self.key}-{inputs}-{self.crc:08x}.states")
        if not self.fault and self.file is not None:
            try:
                self.file.close()
                self.path.replace(path)
            except OSError as error:
                self.fault = str(error)
        return str(path), self.fault

    def discard(self) -> None:
        """Close the file, and delete it if it has not been renamed."""
        if self.file is not None:
            with suppress(OSError):  # a full disk
                self.file.close()
        with suppress(OSError):
            self.path.unlink()


def _free_space(folder: Path, most: int) -> None:
    """Delete the least recently used files until at most `most` bytes are left, and old files of killed runs."""
    for part in folder.glob(".*.part"):
        if time.time() - part.stat().st_mtime > DAY_S:
            part.unlink(missing_ok=True)
    files = sorted(folder.glob("*.states"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files:
        most -= path.stat().st_size
        if most < 0:
            path.unlink(missing_ok=True)


def digest_states(model: nn.Module, entry: EntryPoint, states: torch.Tensor, at_once: int) -> str:
    """16 hexadecimal digits for everything but the inputs that decides the states; see the top of this file.

    Args:
        model: The whole model, with its blocks in place.
        entry: The frozen blocks.
        states: States of the first examples.
        at_once: Rows that go through the model together. The rounding of sums depends on it.
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    digest = hashlib.blake2b(f"{entry.frozen} {at_once} {states.dtype} {tuple(states.shape)}".encode(), digest_size=8)
    digest.update(_raw_bytes(states))
    for name, value in model.state_dict().items():
        if name not in trained and isinstance(value, torch.Tensor):
            digest.update(name.encode())
            digest.update(_raw_bytes(value))
    return digest.hexdigest()


def _raw_bytes(values: torch.Tensor) -> Any:
    return values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def raise_together(accelerator: Accelerator, reason: str | None) -> None:
    """Raise NotCacheable in all processes if one of them has a reason."""
    if accelerator.num_processes > 1:
        reason = next(filter(None, gather_object([reason])), None)
    if reason:
        raise NotCacheable(reason)

"""The states that leave the frozen part of a model, for every example of a data set: computed once, kept, found again.

In memory they are one tensor. On disk they are one file in `frozen_states` beside the run's folder, raw and in the
order of the data, named

    <key>-<hash of all inputs>-<crc32>.states

where the key is a hash of the weights that are not trained, of the frozen blocks' names, of the rows computed at once
and of the states of the first examples, bit for bit: whatever else decides them (a setting, a library, a machine) shows
there. The hash of the inputs is that of the tensors the model gets, so of pictures and preprocessing. A file is written
under another name, then renamed; it is used if length and checksum are right, and replaced otherwise. The folder is
held below `cache_gb`: the files that were not used for longest go first.
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
    """The reason why states cannot be kept."""


@dataclass(frozen=True)
class Cut:
    """Where a model is entered, and what enters there.

    Attributes:
        frozen: The frozen blocks in running order.
        blocks: All blocks in running order.
        shape: Shape of the states of one example.
        dtype: Their type.
        extras: Length of the tuple that a block puts out, less one; None if it puts out a tensor.
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


class _Reached(Exception):
    """Ends a forward pass behind the last frozen block."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


@dataclass
class Runner:
    """Runs examples through the frozen part, in the order of the data."""

    model: nn.Module
    cut: Cut
    accelerator: Accelerator
    config: TrainConfig
    collate: "Collate"
    blank: tuple[str, ...]  # inputs that the states stand for
    key: str = ""  # `digest_states` the states, for those on disk

    def batches(self, data: Any, run: bool) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of all processes: the inputs that stay, `kept` if the frozen part is to `run`, and a hash of each
        example's whole input (B, 32), bytes.
        """
        loader = build_loader(
            _Watched(data),
            _Marked(self.collate),
            self.config.workers,
            self.accelerator,
            batch_size=self.config.batch_size,
        )
        for batch in loader:
            marks = batch.pop(MARKS)
            states = self.states(batch) if run else None
            rows = {k: v for k, v in batch.items() if k not in self.blank}
            rows |= {} if states is None else {"kept": states}
            wrong = None
            if states is not None and states.shape[1:] != self.cut.shape:
                wrong = f"examples differ in shape ({tuple(self.cut.shape)}, {tuple(states.shape[1:])})"
            raise_together(self.accelerator, wrong)
            rows = self.accelerator.gather_for_metrics({**rows, MARKS: marks})
            if rows[MARKS][:, 0].any():
                raise NotCacheable("an example is augmented at random, so no two epochs are alike")
            yield {**rows, MARKS: rows[MARKS][:, 1:]}

    @torch.no_grad()
    def states(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What leaves the frozen part for a batch: (B, ...). In the pieces of a step, or more if memory runs out."""
        self.model.eval()
        count = self.config.accumulate
        while True:
            try:
                return torch.cat([self._states(piece) for piece in split_batch(batch, count)])
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or count >= count_rows(batch):
                    raise
            count *= 2
            clear_device_cache(garbage_collection=True)

    def _states(self, piece: dict[str, torch.Tensor]) -> torch.Tensor:
        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _Reached(output if self.cut.extras is None else output[0])

        handle = self.model.get_submodule(self.cut.frozen[-1]).register_forward_hook(stop)
        try:
            with self.accelerator.autocast():
                self.model(**piece)
        except _Reached as reached:
            return reached.states
        finally:
            handle.remove()
        raise AssertionError("a block that has run in the observation does not run")


class _Watched(Dataset[Any]):
    """Items, each with True if a global random generator has moved while it was made."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        before = random_generators()
        return self.data[index], random_generators() != before


@dataclass
class _Marked:
    """Collates watched items; `MARKS` are 33 bytes a row: whether chance was drawn, and a hash of the inputs."""

    collate: "Collate"

    def __call__(self, items: list[tuple[Any, bool]]) -> dict[str, Any]:
        batch = dict(self.collate([item for item, _ in items]))
        marks = []
        for i, (_, chance) in enumerate(items):
            digest = hashlib.blake2b(digest_size=32)
            for name in sorted(batch.keys() - {"labels"}):
                digest.update(f"{name} {batch[name].dtype} {tuple(batch[name].shape[1:])}".encode())
                digest.update(batch[name][i].contiguous().view(-1).view(torch.uint8).numpy())
            marks.append(bytes([chance]) + digest.digest())
        return {**batch, MARKS: torch.tensor([list(mark) for mark in marks], dtype=torch.uint8)}


def compute_states(data: Any, runner: "Runner") -> dict[str, torch.Tensor]:
    """`kept` states and the inputs that stay, one row an example; in memory, or mapped from a file.

    Raises:
        Unkept: with the reason why not.
    """
    if runner.config.cache_frozen == "disk":
        return _on_disk(data, runner)
    kept, done = torch.empty((len(data), *runner.cut.shape), dtype=runner.cut.dtype), 0

    def put(states: torch.Tensor) -> None:
        nonlocal done
        kept[done : done + len(states)] = states
        done += len(states)

    columns, _ = _collect(runner.batches(data, run=True), put)
    return {"kept": kept, **columns}


def _collect(
    batches: "Iterable[dict[str, torch.Tensor]]", put: "Callable[[torch.Tensor], None]"
) -> tuple[dict[str, torch.Tensor], str]:
    """Hand each batch's states to `put`; the other columns whole, and the hash of all inputs."""
    columns: dict[str, list[torch.Tensor]] = {}
    inputs = hashlib.blake2b(digest_size=8)
    for rows in batches:
        inputs.update(rows.pop(MARKS).cpu().contiguous().numpy())
        if "kept" in rows:
            put(rows.pop("kept"))
        for name, value in rows.items():
            columns.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values) for name, values in columns.items()}, inputs.hexdigest()


def _on_disk(data: Any, runner: "Runner") -> dict[str, torch.Tensor]:
    accelerator, cut = runner.accelerator, runner.cut
    folder = Path(runner.config.output_dir).absolute().parent / "frozen_states"
    size = len(data) * cut.shape.numel() * cut.dtype.itemsize
    path, columns = None, dict[str, torch.Tensor]()
    if _told(accelerator, lambda: any(folder.glob(f"{runner.key}-*"))):  # read all inputs only where it may help
        columns, inputs = _collect(runner.batches(data, run=False), lambda states: None)
        path = _told(accelerator, lambda: _find(folder, f"{runner.key}-{inputs}-", size))
    if path is None:
        part = _Part(folder, runner.key, size, runner.config.cache_gb) if accelerator.is_main_process else None
        try:
            columns, inputs = _collect(runner.batches(data, run=True), part.put if part else lambda states: None)
            path, fault = _told(accelerator, lambda: part.rename(inputs) if part else None)
        finally:
            if part:
                part.discard()
        if fault:
            raise NotCacheable(f"{folder} cannot be written ({fault})")
    states = torch.from_file(str(path), shared=False, size=size // cut.dtype.itemsize, dtype=cut.dtype)
    return {"kept": states.view(len(data), *cut.shape), **columns}


def _told(accelerator: Accelerator, ask: "Callable[[], Any]") -> Any:
    """What the main process finds, in all of them."""
    answer = [ask() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    return answer[0]


def _find(folder: Path, name: str, size: int) -> str | None:
    """The whole and undamaged file whose name begins so; damaged ones are deleted."""
    for path in folder.glob(f"{name}*.states"):
        crc = 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                crc = zlib.crc32(block, crc)
        if path.stat().st_size == size and path.stem == f"{name}{crc:08x}":
            os.utime(path)  # the folder drops what was not used for longest
            return str(path)
        path.unlink()
    return None


class _Part:
    """A file of states that is being written, under a name that nobody looks for."""

    def __init__(self, folder: Path, key: str, size: int, bound_gb: float) -> None:
        self.path, self.key, self.size, self.crc, self.fault = folder / f".{key}-{os.getpid()}.part", key, size, 0, ""
        self.file: BinaryIO | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _make_room(folder, int(bound_gb * 1e9) - size)
            self.file = self.path.open("wb")
        except OSError as error:
            self.fault = str(error)

    def put(self, states: torch.Tensor) -> None:
        """Append rows. A fault is told at the end, as other processes take part until then."""
        if self.fault or self.file is None:
            return
        raw = _bytes(states)
        self.crc = zlib.crc32(raw, self.crc)
        try:
            self.file.write(raw)
        except OSError as error:
            self.fault = str(error)

    def rename(self, inputs: str) -> tuple[str, str]:
        """The file's final path, and what went wrong."""
        path = self.path.with_name(f"{self.key}-{inputs}-{self.crc:08x}.states")
        if not self.fault and self.file is not None:
            try:
                self.file.close()
                self.path.replace(path)
            except OSError as error:
                self.fault = str(error)
        return str(path), self.fault

    def discard(self) -> None:
        """Close and delete what has not been renamed."""
        if self.file is not None:
            with suppress(OSError):  # a full disk
                self.file.close()
        with suppress(OSError):
            self.path.unlink()


def _make_room(folder: Path, most: int) -> None:
    """Delete the files unused for longest until `most` bytes are left, and what killed runs left over."""
    for part in folder.glob(".*.part"):
        if time.time() - part.stat().st_mtime > DAY_S:
            part.unlink(missing_ok=True)
    files = sorted(folder.glob("*.states"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files:
        most -= path.stat().st_size
        if most < 0:
            path.unlink(missing_ok=True)


def digest_states(model: nn.Module, cut: Cut, states: torch.Tensor, at_once: int) -> str:
    """16 hexadecimal digits for what, beside the inputs, decides the states; see the top of this file.

    Args:
        model: The whole model, with its blocks in place.
        cut: Its frozen blocks.
        states: Of the first examples.
        at_once: Rows that go through the model together: sums are rounded in an order that depends on it.
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    digest = hashlib.blake2b(f"{cut.frozen} {at_once} {states.dtype} {tuple(states.shape)}".encode(), digest_size=8)
    digest.update(_bytes(states))
    for name, value in model.state_dict().items():
        if name not in trained and isinstance(value, torch.Tensor):
            digest.update(name.encode())
            digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(values: torch.Tensor) -> Any:
    return values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def raise_together(accelerator: Accelerator, reason: str | None) -> None:
    """Give up in all processes if one has a reason to."""
    if accelerator.num_processes > 1:
        reason = next(filter(None, gather_object([reason])), None)
    if reason:
        raise NotCacheable(reason)

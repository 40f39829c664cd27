"""Training data that is read as it is needed: shards in a random order, rows shuffled in blocks, an exact position.

A step costs the same time and memory however many rows there are. One thread of each process reads its shards, and the
data workers decode what it has read. So the batch of a step depends on the seed, the data and the number of processes
only, and not on the number of workers.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from copy import copy
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from accelerate.utils import gather_object
from torch.utils.data import Dataset, IterableDataset, Sampler, default_collate

from inlay.errors import BadInput, DamagedFile, InlayError
from inlay.train.sampler import GROUP, seed_draw

if TYPE_CHECKING:
    import datasets

    Collate = Callable[[list[Any]], dict[str, Any]]

logger = logging.getLogger(__name__)

BUFFER = 1000  # rows that are shuffled together
OPEN = 8  # shards that are read in turn
KEPT = 1000  # steps for which the position is known: loaders fetch far fewer in advance

Row: TypeAlias = dict[str, Any]
Position: TypeAlias = dict[str, Any]  # as JSON takes it
Draw: TypeAlias = tuple[Any, int]  # an example, and the number of its draw since the run began


def _keep_rows(rows: Sequence[Row], places: Sequence[str]) -> Sequence[Any]:
    return rows


def _keep_example(example: Any) -> Any:
    return example


@dataclass(frozen=True)
class Stream:
    """Training data without a length for `fit`.

    Each pass reads the shards in another order, several of them in turn, and shuffles the rows in blocks. Processes
    share the data as `datasets.distributed.split_dataset_by_node` does: each reads its own shards where their number is
    a multiple of that of the processes, and otherwise every row but those of the others.

    Attributes:
        rows: The rows in shards, such as `load_dataset("webdataset", data_files="train-*.tar", streaming=True)`.
        arrange: Makes a list of examples from the rows of a block and the places where they stand (train-003.tar:17),
            in the thread that reads: drops some, makes tokens. It must depend on these only. Default: an example is a
            row.
        prepare: Makes an item of an example in a data worker, under a random seed of its own: decodes, augments.
        buffer: Rows in a block.
        length: Size of an example; then a batch holds examples of similar size. Default: all have one size.
        corrupt: What becomes of an example for which `prepare` raises `DamagedFile`: it ends the run, or is skipped
            with a warning. Another example of its batch then takes its place.
        names: What messages call the shards.
    """

    rows: "datasets.IterableDataset"
    arrange: Callable[[Sequence[Row], Sequence[str]], Sequence[Any]] = _keep_rows
    prepare: Callable[[Any], Any] = _keep_example
    buffer: int = BUFFER
    length: Callable[[Any], int] | None = None
    corrupt: Literal["refuse", "skip"] = "refuse"
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.buffer < 1:
            raise BadInput(f"the buffer of a stream holds at least 1 row, got {self.buffer}.")

    @property
    def shards(self) -> int:
        """Their number."""
        return self.rows.num_shards

    @classmethod
    def from_data(cls, train_data: Any) -> "Stream | None":
        """Training data of `fit` as a stream; None if it is not streamed.

        Raises:
            InlayError: An iterable that has no shards, in which no position could be found again.
        """
        if isinstance(train_data, cls) or not isinstance(train_data, IterableDataset):
            return train_data if isinstance(train_data, cls) else None
        if not hasattr(train_data, "num_shards"):
            raise BadInput(
                f"a {type(train_data).__name__} cannot be read from where a run was stopped; pass a "
                "datasets.IterableDataset, a Stream of one, or a dataset with a length."
            )
        return cls(train_data)

    def read_first(self, count: int, seed: int = 0) -> list[Any]:
        """The first examples of a pass whose order the seed decides, at most so many."""
        found: list[Any] = []
        with closing(_Reader(self, 1, seed, 0, 1, None)) as reader:
            while len(found) < count:
                block = reader.read_block()
                found += block.examples
                if block.pass_ends:
                    break
        return found[:count]

    @property
    def needs_workers(self) -> bool:
        """Whether anything is left to do for data workers."""
        return self.prepare is not _keep_example

    @property
    def report(self) -> str:
        """What it is, in a few words."""
        return f"a stream of {self.shards:,} shard{'' if self.shards == 1 else 's'}"

    def identity(self) -> dict[str, int]:
        """What decides the order of its rows, besides the seed and the number of processes."""
        return {"shards": self.shards, "buffer": self.buffer}

    def name_shard(self, shard: int) -> str:
        """What messages call a shard."""
        return self.names[shard] if self.names else f"shard {shard}"


@dataclass
class _OpenShard:
    """A shard that is being read: its number, and how many of its rows were read."""

    shard: int
    read: int
    rows: Generator[Row, None, None]


@dataclass(frozen=True)
class _Block:
    """Shuffled examples.

    Attributes:
        examples: Of some rows.
        start: Where the reader stood before it read these.
        pass_ends: Whether they were the last ones of a pass.
        found: Examples of this pass so far.
    """

    examples: list[Any]
    start: Position
    pass_ends: bool
    found: int


class _Reader:
    """The endless blocks of one process: pass after pass over its shards."""

    def __init__(
        self, stream: Stream, batch_size: int, seed: int, process: int, processes: int, start: Position | None
    ) -> None:
        self.stream, self.batch_size, self.seed = stream, batch_size, seed
        self.process, self.processes = process, processes
        start = start or {"epoch": 0, "block": 0, "opened": 0, "turn": 0, "found": 0, "drawn": 0, "open": []}
        self.epoch, self.block, self.drawn = start["epoch"], start["block"], start["drawn"]
        self.opened, self.turn, self.found = start["opened"], start["turn"], start["found"]  # in this pass
        self.open = [self._open_shard(shard, read) for shard, read in start["open"]]

    def read_block(self) -> _Block:
        """The next rows of this pass as examples, shuffled."""
        start = self._position()
        rows, places = [], []
        for row, place in islice(self._read_pass(), self.stream.buffer):
            rows.append(row)
            places.append(place)
        examples = self._shuffle(self.stream.arrange(rows, places) if rows else [])
        self.block += 1
        self.found += len(examples)
        self.drawn += len(examples)
        block = _Block(examples, start, len(rows) < self.stream.buffer, self.found)
        if block.pass_ends:
            self.epoch, self.opened, self.turn, self.found = self.epoch + 1, 0, 0, 0
        return block

    def close(self) -> None:
        """Close the shards: what reads parquet must not be open when the process ends."""
        for each in self.open:
            each.rows.close()

    def _position(self) -> Position:
        return {
            "epoch": self.epoch,
            "block": self.block,
            "opened": self.opened,
            "turn": self.turn,
            "found": self.found,
            "drawn": self.drawn,
            "open": [[each.shard, each.read] for each in self.open],
        }

    def _read_pass(self) -> Iterator[tuple[Row, str]]:
        """The rows that are left in this pass, from one open shard after the other, with their places."""
        shards = self._order_shards()
        while True:
            while len(self.open) < OPEN and self.opened < len(shards):
                self.open.append(self._open_shard(shards[self.opened], 0))
                self.opened += 1
            if not self.open:
                return
            self.turn %= len(self.open)
            current = self.open[self.turn]
            row = self._read_row(current)
            if row is None:
                del self.open[self.turn]
                continue
            current.read += 1
            self.turn += 1
            yield row, f"{self.stream.name_shard(current.shard)}:{current.read}"

    def _read_row(self, current: _OpenShard) -> Row | None:
        """The next row of a shard; None at its end.

        Raises:
            InlayError: The shard is broken, or has gone out of reach.
        """
        try:
            return next(current.rows, None)
        except Exception as error:  # each format and each kind of storage raises its own
            reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise DamagedFile(
                f"{self.stream.name_shard(current.shard)} cannot be read after row {current.read} "
                f"({reason[0].rstrip('.')}); repair it or leave it out."
            ) from error

    def _order_shards(self) -> list[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.stream.shards).tolist()
        return order[self.process :: self.processes] if self._owns_shards else order

    @property
    def _owns_shards(self) -> bool:
        """Whether processes share the shards, and not the rows of each."""
        return self.stream.shards % self.processes == 0

    def _open_shard(self, shard: int, read: int) -> _OpenShard:
        from datasets.distributed import split_dataset_by_node

        rows = self.stream.rows.shard(self.stream.shards, shard)
        if not self._owns_shards:
            rows = split_dataset_by_node(rows, self.process, self.processes)
        return _OpenShard(shard, read, _iterate(rows, read))

    def _shuffle(self, examples: Sequence[Any]) -> list[Any]:
        """In random order; with `length` in batches of like examples, sorted over the batches of 32 steps."""
        generator = np.random.default_rng((self.seed, self.process, self.block, 1))
        shuffled = [examples[i] for i in generator.permutation(len(examples))]
        if self.stream.length is None:
            return shuffled
        size = self.batch_size
        missing = -self.drawn % size  # examples that the last batch of the block before lacks
        batches = []
        for first in range(missing, len(shuffled), GROUP * size):
            alike = sorted(shuffled[first : first + GROUP * size], key=self.stream.length)
            batches += [alike[at : at + size] for at in range(0, len(alike), size)]
        rest = batches.pop() if batches and len(batches[-1]) < size else []
        mixed = [example for i in generator.permutation(len(batches)) for example in batches[i]]
        return [*shuffled[:missing], *mixed, *rest]


def _iterate(rows: "datasets.IterableDataset", first: int) -> Generator[Row, None, None]:
    """Rows of a shard from one on."""
    yield from islice(rows, first, None)


class StreamSampler(Sampler[list[Draw]]):
    """Batches for one process, from a stored position on.

    Args:
        stream: Where examples come from.
        batch_size: Examples of a step for this process.
        steps: Of the whole run.
        seed: Decides the order.
        done: Steps that were taken.
        positions: Where the reader of each process stood then (`find_position`); empty at the start.
        process: Number of this process.
        processes: How many there are.

    Raises:
        InlayError: The positions are those of another number of processes.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        steps: int,
        seed: int,
        done: int = 0,
        positions: Sequence[Position] = (),
        process: int = 0,
        processes: int = 1,
    ) -> None:
        if positions and len(positions) != processes:
            raise BadInput(
                f"the stream was read by {len(positions)} processes until step {done}, and {processes} cannot go on "
                f"from there; start {len(positions)}, or train again with --overwrite."
            )
        self.stream, self.batch_size, self.steps, self.seed, self.done = stream, batch_size, steps, seed, done
        self.process, self.processes = process, processes
        self._positions = {done: positions[process] if positions else {}}

    def __len__(self) -> int:
        return self.steps - self.done

    def __iter__(self) -> Iterator[list[Draw]]:
        with closing(self._read_examples(self._positions[self.done])) as examples:
            for step in range(self.done, self.steps):
                batch, ends = zip(*islice(examples, self.batch_size), strict=True)
                self._positions[step + 1] = ends[-1]
                self._positions.pop(step - KEPT, None)
                first = (step * self.processes + self.process) * self.batch_size
                yield [(example, first + i) for i, example in enumerate(batch)]

    def start_at(self, step: int) -> "StreamSampler":
        """The same batches from a recent step on."""
        again = copy(self)
        again.done, again._positions = step, {step: self._positions[step]}
        return again

    def find_position(self, step: int) -> Position:
        """Where this process goes on reading after so many steps, as JSON takes it."""
        return self._positions[step]

    def _read_examples(self, start: Position) -> Generator[tuple[Any, Position], None, None]:
        """Examples, each with the position behind it; a block is read while the one before it is used."""
        reader = _Reader(self.stream, self.batch_size, self.seed, self.process, self.processes, start)
        used = start.get("used", 0)
        with closing(reader), ThreadPoolExecutor(1, "read_stream") as thread:
            following = thread.submit(reader.read_block)
            while True:
                block = following.result()
                if block.pass_ends and not block.found:
                    raise BadInput("the stream has no example to train on; pass shards with some.")
                following = thread.submit(reader.read_block)
                for place in range(used, len(block.examples)):
                    yield block.examples[place], {**block.start, "used": place + 1}
                used = 0


class StreamItems(Dataset[Any]):
    """Makes items of drawn examples, each under its own random seed; one that cannot be made is its error."""

    def __init__(self, stream: Stream, seed: int) -> None:
        self.stream, self.seed = stream, seed

    def __getitem__(self, draw: Draw) -> Any:
        example, number = draw
        seed_draw(self.seed, number)
        try:
            return self.stream.prepare(example)
        except InlayError as error:  # as a value: a DataLoader would wrap it in the text of a traceback
            return error


class StreamCollate:
    """A batch of the items that could be made, some of them twice where others could not, and the errors of those."""

    def __init__(self, collate: "Collate | None") -> None:
        self.collate = collate or default_collate

    def __call__(self, items: Sequence[Any]) -> tuple[dict[str, Any] | None, list[InlayError]]:
        """The batch, None where no item could be made, and the errors."""
        errors = [item for item in items if isinstance(item, InlayError)]
        whole = [item for item in items if not isinstance(item, InlayError)]
        if not whole:
            return None, errors
        others = cycle(whole)
        return self.collate([next(others) if isinstance(item, InlayError) else item for item in items]), errors


class StreamLoader:
    """The batches of one process, on the CPU.

    Raises:
        InlayError: An item could not be made, and `Stream.corrupt` does not skip it; no item of a batch could.
    """

    def __init__(self, batches: Any, sampler: StreamSampler) -> None:
        self.batches, self.sampler = batches, sampler

    def __iter__(self) -> Iterator[dict[str, Any]]:
        skipped = set[str]()
        for batch, errors in self.batches:
            for error in errors:
                if self.sampler.stream.corrupt == "refuse" or not isinstance(error, DamagedFile):
                    raise error
                if str(error) not in skipped:
                    logger.warning("left out: %s", error)
                    skipped.add(str(error))
            if batch is None:
                raise DamagedFile(f"none of the {len(errors)} examples of a batch can be read; the first: {errors[0]}")
            yield batch

    def find_positions(self, step: int) -> list[Position]:
        """Of each process, where it goes on reading after so many steps. All processes take part."""
        found: list[Position] = gather_object([self.sampler.find_position(step)])
        return found

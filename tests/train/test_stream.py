"""Streams: the order, where processes and workers read, and a run that goes on exactly where it stood."""

import json
import os
import re
import signal

import datasets
import numpy as np
import pytest
import torch
from points import Interrupted, log_of, same, stop_at
from test_resume import JOB, logged, wait_for_step
from train_job import Net, Points

import forked_program
from inlay.errors import BadInput, ComputationFailed, DamagedFile
from inlay.train.config import TrainConfig
from inlay.train.loop import fit
from inlay.train.stream import Stream, StreamSampler

ROWS, SHARDS = 53, 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Shards of different sizes, as .jsonl and as .parquet of several row groups."""
    folder = tmp_path_factory.mktemp("shards")
    datasets.disable_progress_bars()
    for shard, numbers in enumerate(np.array_split(range(ROWS), [5, 20, 21])):
        rows = datasets.Dataset.from_dict({"number": numbers.tolist()})
        rows.to_json(folder / f"{shard}.jsonl")
        rows.to_parquet(folder / f"{shard}.parquet", batch_size=4)
    return folder


def open_rows(files, kind="json"):
    suffix = {"json": "jsonl"}.get(kind, kind)
    return datasets.load_dataset(kind, data_files=f"{files}/*.{suffix}", split="train", streaming=True)


def draw(stream, steps, batch_size=4, **start):
    """The numbers of each batch, and where the reader stood after each step."""
    sampler = StreamSampler(stream, batch_size, steps, 3, **start)
    batches = [[example["number"] for example, _ in batch] for batch in sampler]
    return batches, [json.loads(json.dumps(sampler.find_position(step))) for step in range(sampler.done, steps + 1)]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_pass_has_each_row_once_and_goes_on_from_any_step(files, kind):
    stream = Stream(open_rows(files, kind), buffer=10)
    batches, positions = draw(stream, 30)
    numbers = [number for batch in batches for number in batch]
    assert sorted(numbers[:ROWS]) == sorted(numbers[ROWS : 2 * ROWS]) == list(range(ROWS))
    assert numbers[:ROWS] != numbers[ROWS : 2 * ROWS] and numbers[:ROWS] != sorted(numbers[:ROWS])
    assert len({number for number in numbers[:20] if number < 21}) < 20, "the first block is of one shard or two"
    for step in range(1, 30):
        assert draw(stream, 30, done=step, positions=[positions[step]])[0] == batches[step:]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_rows(files, processes):
    """Two processes have two shards each. Three read all four shards, every third row of each."""
    stream = Stream(open_rows(files), buffer=1)
    seen = []
    for process in range(processes):
        batches, positions = draw(stream, ROWS, batch_size=1, process=process, processes=processes)
        seen += [batch[0] for batch, end in zip(batches, positions[1:], strict=True) if end["epoch"] == 0]
    assert sorted(seen) == list(range(ROWS))
    with pytest.raises(BadInput, match="read by 2 processes until step 5, and 3 cannot go on"):
        StreamSampler(stream, 1, 9, 0, done=5, positions=[{}, {}], processes=3)


def test_batches_of_examples_of_like_size(files):
    """A block ends with what fills no batch; the batch that begins there is filled from the next one."""
    stream = Stream(open_rows(files), length=lambda row: row["number"])
    batches, positions = draw(stream, 26)
    first, second = batches[:13], batches[14:26]
    assert all(max(batch) - min(batch) == 3 for batch in first)
    assert max(max(batch) - min(batch) for batch in second) <= 6
    assert [batch[0] for batch in first] != sorted(batch[0] for batch in first)
    assert draw(stream, 26, done=20, positions=[positions[20]])[0] == batches[20:]


def test_what_a_block_becomes_and_a_stream_of_nothing(files):
    def arrange(rows, places):
        assert re.fullmatch(r"[0-3]\.jsonl:\d+", places[0])
        return [row for row in rows if row["number"] % 2]

    names = [f"{shard}.jsonl" for shard in range(SHARDS)]
    batches, _ = draw(Stream(open_rows(files), arrange, buffer=7, names=names), 26, batch_size=1)
    assert sorted(number for (number,) in batches) == list(range(1, ROWS, 2))
    assert len(Stream(open_rows(files)).read_first(99)) == ROWS
    assert len(Stream(open_rows(files), buffer=2).read_first(5)) == 5
    stream = Stream(open_rows(files), lambda rows, places: [])
    with pytest.raises(BadInput, match="no example to train on"):
        draw(stream, 1)
    with pytest.raises(BadInput, match="at least 1 row"):
        Stream(open_rows(files), buffer=0)


def make_point(row):
    """As `Points`, by all three generators."""
    points = Points(ROWS, 1, noise=True)
    return points[row["number"]]


def train(folder, net, stream, **config):
    settings = {"steps": 24, "batch_size": 8, "eval_every": 7, "save_every": 5, "workers": 0, **config}
    return fit(net, stream, Points(13, 2), TrainConfig(str(folder), **settings))


def test_a_run_goes_on_bit_for_bit_with_any_number_of_workers(files, tmp_path):
    stream = Stream(open_rows(files, "parquet"), prepare=make_point, buffer=9)
    whole = Net(dropout=0.3)
    train(tmp_path / "whole", whole, stream)
    assert [row["step"] for row in log_of(tmp_path / "whole") if "train_loss" in row] == [7, 14, 21, 24]
    stopped = Net(dropout=0.3)
    stop_at(stopped, 13)
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", stopped, stream, workers=2)
    resumed = Net(dropout=0.3)
    result = train(tmp_path / "stopped", resumed, stream)
    assert result.resumed and result.steps == 24
    same(whole, resumed)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "stopped")


def stream_job(out, folder):
    return [JOB, "--out", out / "weights", "--output_dir", out / "run", "--stream", folder, "--steps", 24]


def test_two_processes_that_are_killed_go_on_bit_for_bit(files, tmp_path, forked):
    options = ["--batch_size", 8, "--save_every", 4, "--pause", 0.01, "--workers", 1]

    def start(out):
        return [forked(*stream_job(out, files), *options, environment=rank) for rank in forked_program.two_ranks()]

    for process in start(tmp_path / "whole"):
        forked_program.finish(process)
    killed = start(tmp_path / "killed")
    wait_for_step(tmp_path / "killed", 9, killed[0].is_alive)
    for process in killed:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert 9 <= logged(tmp_path / "killed") < 24
    for process in start(tmp_path / "killed"):
        said = forked_program.finish(process)
    assert "resumed True" in said
    assert (tmp_path / "whole/weights").read_bytes() == (tmp_path / "killed/weights").read_bytes()


def test_what_cannot_be_read_is_skipped_or_refused(files, tmp_path, caplog):
    def prepare(row):
        if row["number"] % 5 == 0:
            raise DamagedFile(f"'{row['number']}.jpg' cannot be read")
        return make_point(row)

    with pytest.raises(DamagedFile, match=r"^'\d+.jpg' cannot be read$"):
        train(tmp_path / "refuse", Net(), Stream(open_rows(files), prepare=prepare), workers=1)
    result = train(tmp_path / "skip", Net(), Stream(open_rows(files), prepare=prepare, corrupt="skip"))
    assert result.steps == 24
    named = [record.getMessage() for record in caplog.records]
    assert sorted(named) == sorted(f"left out: '{number}.jpg' cannot be read" for number in range(0, ROWS, 5))

    def fail(row):
        raise DamagedFile("a.jpg is broken")

    with pytest.raises(DamagedFile, match=r"none of the 8 examples .* can be read; the first: a\.jpg"):
        train(tmp_path / "none", Net(), Stream(open_rows(files), prepare=fail, corrupt="skip"))


def test_a_batch_with_nan_is_read_again_to_name_it(files, tmp_path):
    def prepare(row):
        point = make_point(row)
        return {**point, "pixel_values": point["pixel_values"] * float("nan")} if row["number"] == 30 else point

    with pytest.raises(ComputationFailed, match=r"at step \d+: .* the input 'pixel_values' holds NaN or Inf \(rows"):
        train(tmp_path, Net(), Stream(open_rows(files), prepare=prepare), workers=1)


def test_a_stream_needs_steps_and_shards(files, tmp_path):
    with pytest.raises(BadInput, match=r"no length, so epochs .*--steps"):
        train(tmp_path, Net(), open_rows(files), steps=None)

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from iter(int, 1)

    with pytest.raises(BadInput, match="Endless cannot be read from where a run was stopped"):
        train(tmp_path, Net(), Endless())


def test_rows_that_are_items_need_no_stream(tmp_path):
    points = Points(ROWS, 1)
    rows = datasets.Dataset.from_dict({"pixel_values": points.values.tolist(), "labels": points.labels.tolist()})
    rows = rows.to_iterable_dataset(num_shards=3).with_format("torch")
    result = train(tmp_path, Net(), rows)
    assert result.steps == 24 and json.loads((tmp_path / "run.json").read_text())["shards"] == 3
    assert result.metrics["loss"] < 1.0

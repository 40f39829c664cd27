"""Mixed batches: each request gets its own adapter's answer, or the sentence that says why not."""

import shutil
from pathlib import Path

import pytest
import torch

from inlay import Bank, ComputationFailed
from inlay.adapters.file import WEIGHTS
from inlay.serve.server.batches import BatchLoop
from inlay.serve.server.queue import Request, RequestQueue
from inlay.serve.server.refusals import DoesNotFit, Replaced, UnknownAdapter
from inlay.tasks import TASKS
from inlay.tasks.serving import Row
from serve.banked import VIT, alone, compare, pair, pixels

SERVING = TASKS["image-classification"].serving()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pair(VIT, "lora", tmp_path_factory.mktemp("bank"))


@pytest.fixture
def copies(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copies"))


def make_loop(bank, **settings):
    return BatchLoop(bank, SERVING, RequestQueue(99), **{"max_batch": 4, "max_wait_s": 0.0, **settings})


def make_requests(bank, names):
    values = pixels(rows=len(names))["pixel_values"]
    rows = [Row({"pixel_values": each}, tuple(each.shape)) for each in values]
    return [Request(name, bank.read_file(name).digest, row, row.shape) for name, row in zip(names, rows, strict=True)]


def logits(requests):
    return [request.future.result(60)["logits"] for request in requests]


def test_requests_get_the_answers_of_their_adapters(folder):
    bank, batches = Bank(VIT, folder), []
    loop = make_loop(bank, watch=lambda requests: batches.append(len(requests)))
    names = ["a", "b", "b", "a", "a"]
    requests = make_requests(bank, names)
    for request in requests:
        loop.queue.put(request)
    loop.start()
    compare(logits(requests), alone(VIT, folder, pixels(), names))
    assert batches == [4, 1]
    loop.queue.close()
    assert loop.join(60)


def test_a_budget_for_one_adapter_splits_the_batch(folder):
    bank = Bank(VIT, folder, budget_mb=2.2 * Bank(VIT, [folder / "b"]).bytes / 2 / 1e6)
    names = ["a", "b", "a", "b", "a"]
    loop, requests = make_loop(bank, max_batch=8), make_requests(bank, names)
    loop.answer(requests)
    compare(logits(requests), alone(VIT, folder, pixels(), names))
    assert len(bank.resident) == 1


def test_an_adapter_that_does_not_fit_fails_by_itself(copies):
    bank = Bank(VIT, copies, budget_mb=100)  # read when they are asked for
    requests = make_requests(bank, ["a", "b"])
    weights = copies / "b" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    make_loop(bank).answer(requests)
    compare(logits(requests[:1]), alone(VIT, copies, pixels(), ["a"]))
    with pytest.raises(DoesNotFit, match=r"truncated|bytes"):
        requests[1].future.result(0)


def test_an_adapter_that_was_removed_meanwhile(copies):
    bank = Bank(VIT, copies)
    requests = make_requests(bank, ["a", "b"])
    bank.remove("b")
    make_loop(bank).answer(requests)
    assert requests[0].future.result(0)
    with pytest.raises(UnknownAdapter, match="unknown adapter 'b'"):
        requests[1].future.result(0)


def test_a_row_that_was_read_for_another_version_is_not_computed(copies):
    bank = Bank(VIT, copies)
    requests = make_requests(bank, ["a", "b"])
    bank.add(copies / "b", "a")
    make_loop(bank).answer(requests)
    compare(logits(requests[1:]), alone(VIT, copies, pixels(), [None, "b"])[1:])
    with pytest.raises(Replaced, match="'a' was replaced"):
        requests[0].future.result(0)


def test_a_failure_of_the_model_is_told_without_its_details(folder, monkeypatch, caplog):
    bank = Bank(VIT, folder)
    requests = make_requests(bank, ["a"])
    monkeypatch.setattr(SERVING, "take_rows", lambda output, count: 1 / 0)
    make_loop(bank).answer(requests)
    with pytest.raises(ComputationFailed, match="the server's log says why"):
        requests[0].future.result(0)
    assert "ZeroDivisionError" in caplog.text


def test_a_base_in_bfloat16(folder):
    bank = Bank(VIT, folder, dtype="bfloat16", device="cpu")
    requests = make_requests(bank, ["a", "b"])
    make_loop(bank).answer(requests)
    for found, expected in zip(logits(requests), alone(VIT, folder, pixels(), ["a", "b"]), strict=True):
        assert found.dtype == torch.float32
        assert (found[: len(expected)] - expected).abs().max() < 0.1 * expected.abs().max()

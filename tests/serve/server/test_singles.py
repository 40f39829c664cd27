"""Requests that are computed one by one: in turn, ended where nobody waits, refused with the right sentence."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from inlay import BadInput, ComputationFailed, DamagedFile
from inlay.serve.server.queue import Request, RequestQueue
from inlay.serve.server.refusals import DoesNotFit, Replaced, TooLate, UnknownAdapter
from inlay.serve.server.service import _wait_for
from inlay.serve.server.singles import SingleLoop
from inlay.tasks.serving import Limits, Row


class Adapters:
    """A bank of three adapters, one of which cannot be loaded."""

    names = ("a", "b", "damaged")
    files = {name: SimpleNamespace(digest=f"digest of {name}") for name in names}  # noqa: RUF012

    def find_path(self, name):
        return f"/home/{name}"

    def load(self, name):
        if name not in self.names:
            raise BadInput(f"unknown adapter {name!r}")
        if name == "damaged":
            raise DamagedFile("/home/damaged is truncated")
        return SimpleNamespace(name=name)


class Passes:
    """A task whose requests take so many passes."""

    def __init__(self):
        self.begun, self.passes = threading.Event(), []

    def compute(self, row, adapter, limits, before_pass):
        for _ in range(row.inputs["passes"]):
            before_pass()
            self.passes.append(adapter.name)
            self.begun.set()
            time.sleep(0.001)
        return {"of": adapter.name}


@pytest.fixture
def loop():
    loop = SingleLoop(Adapters(), Passes(), RequestQueue(9), limits=Limits())
    loop.start()
    yield loop
    loop.queue.close()
    assert loop.join(10)


def ask(loop, name, passes=1, digest=None, seconds=60.0):
    file = SimpleNamespace(digest=digest or f"digest of {name}")
    request = loop.make_request(name, file, Row({"passes": passes}), time.monotonic() + seconds)
    loop.queue.put(request)
    return request


def test_requests_are_answered_in_turn(loop):
    requests = [ask(loop, name) for name in "aaab"]
    assert [request.future.result(10)["of"] for request in requests] == list("aaab")
    assert "b" in loop.serving.passes[1:3]  # not behind all of the other adapter's
    assert loop.is_ready.is_set() and not loop.has_failed


def test_what_nobody_waits_for_ends_between_passes(loop):
    async def leave():
        request = ask(loop, "a", passes=10_000)
        waiting = asyncio.create_task(_wait_for(request))
        assert await asyncio.to_thread(loop.serving.begun.wait, 10)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        return request

    request = asyncio.run(leave())
    assert isinstance(request.future.exception(10), TooLate) and len(loop.serving.passes) < 10_000
    assert ask(loop, "b").future.result(10) == {"of": "b"}


def test_a_deadline_ends_a_request_between_passes(loop):
    request = ask(loop, "a", passes=10_000, seconds=0.05)
    assert "deadline" in str(request.future.exception(10)) and 0 < len(loop.serving.passes) < 10_000
    with pytest.raises(TooLate):
        asyncio.run(_wait_for(Request("a", "", None, deadline=time.monotonic() + 0.01)))


@pytest.mark.parametrize(
    ("name", "more", "kind"),
    [
        ("c", {}, UnknownAdapter),
        ("damaged", {}, DoesNotFit),
        ("a", {"digest": "of an earlier file"}, Replaced),
        ("a", {"passes": "many"}, ComputationFailed),
    ],
)
def test_refusals(loop, name, more, kind):
    assert isinstance(ask(loop, name, **more).future.exception(10), kind)
    assert ask(loop, "b").future.result(10) == {"of": "b"}

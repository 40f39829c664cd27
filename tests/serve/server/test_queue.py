"""The queue in front of a bank: a bound, turns, deadlines and requests that nobody waits for any more."""

import math
import threading
import time

import pytest

from inlay.serve.server.queue import Request, RequestQueue
from inlay.serve.server.refusals import Busy, Stopping, TooLate


def put(queue, *adapters, shape=None, deadline=math.inf):
    requests = [Request(name, "", None, shape, deadline) for name in adapters]
    for request in requests:
        queue.put(request)
    return requests


def names(requests):
    return [request.adapter for request in requests]


def test_adapters_take_turns():
    queue = RequestQueue(100)
    put(queue, *"aaaaaa", "b", "c", "c")
    assert names(queue.take(4)) == ["a", "b", "c", "a"]
    put(queue, "d")
    assert names(queue.take(3)) == ["a", "c", "d"]  # none was served more often while another waited
    assert names(queue.take(9)) == ["a", "a", "a"]


def test_an_adapter_waits_for_one_batch_of_the_others_only():
    queue = RequestQueue(100)
    put(queue, *"abababab")
    queue.take(2)
    put(queue, "late")
    assert "late" in names(queue.take(3))


def test_a_batch_has_one_shape_and_so_many_adapters_at_most():
    queue = RequestQueue(100)
    put(queue, "a", "b", shape=1)
    put(queue, "c", shape=2)
    put(queue, "a", "d", shape=1)
    assert names(queue.take(9, adapters=2)) == ["a", "b", "a"]
    assert names(queue.take(9, adapters=2)) == ["c"]
    assert names(queue.take(9)) == ["d"]


def test_the_first_shape_is_that_of_the_adapter_whose_turn_it_is():
    queue = RequestQueue(100)
    for _ in range(3):
        put(queue, "many", shape=1)
    put(queue, "few", shape=2)
    assert [names(queue.take(1)) for _ in range(3)] == [["many"], ["few"], ["many"]]


def test_a_full_queue_says_when_to_come_back():
    queue = RequestQueue(2)
    put(queue, "a", "b")
    with pytest.raises(Busy, match=r"2 requests are waiting already; try again in 1 s\.") as refusal:
        put(queue, "c")
    assert refusal.value.retry_after_s == 1 and len(queue) == 2
    queue.take(1)
    put(queue, "c")


def test_cancelled_requests_leave_the_queue_and_their_room():
    queue = RequestQueue(2)
    first, _ = put(queue, "a", "b")
    assert first.future.cancel()
    put(queue, "c")
    assert names(queue.take(9)) == ["b", "c"] and len(queue) == 0


def test_a_request_that_is_taken_is_not_cancelled_any_more():
    queue = RequestQueue(2)
    put(queue, "a")
    (taken,) = queue.take(1)
    assert not taken.future.cancel() and taken.future.running()


def test_requests_past_their_deadline_are_refused():
    queue = RequestQueue(9)
    (late,) = put(queue, "a", deadline=time.monotonic() - 1)
    put(queue, "b")
    assert names(queue.take(9)) == ["b"]
    with pytest.raises(TooLate, match="past its deadline"):
        late.future.result(0)


def test_a_request_waits_for_others_until_the_batch_is_full():
    queue = RequestQueue(9)
    put(queue, "a")
    threading.Timer(0.05, put, (queue, "b", "c")).start()
    assert names(queue.take(3, wait_s=60)) == ["a", "b", "c"]  # and not 60 s


def test_a_request_waits_no_longer_than_that():
    queue = RequestQueue(9)
    put(queue, "a")
    assert names(queue.take(3, wait_s=0.01)) == ["a"]


def test_what_waits_in_a_closed_queue_is_still_taken():
    queue = RequestQueue(9)
    put(queue, "a")
    queue.close()
    with pytest.raises(Stopping, match="takes no more requests"):
        put(queue, "b")
    assert names(queue.take(3, wait_s=60)) == ["a"]  # nothing can come any more
    assert queue.take(3) == []


def test_taking_without_waiting():
    assert RequestQueue(9).take(3, block=False) == []


def test_closing_wakes_who_waits():
    queue = RequestQueue(9)
    threading.Timer(0.02, queue.close).start()
    assert queue.take(3) == []

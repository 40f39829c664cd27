"""Continuous batching: texts join and leave between tokens, each with the weights with which it began."""

import asyncio
import itertools
import math
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch

from inlay import BadInput, Bank, ComputationFailed
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.generation import GenerationLoop
from inlay.serve.server.queue import RequestQueue
from inlay.serve.server.refusals import DoesNotFit, Replaced, TooLate
from inlay.serve.server.service import Service
from inlay.tasks import TASKS
from inlay.tasks.serving import Limits, ServedAdapter
from serve.banked import GPT2, loaded, save

NEVER = math.inf
SETTINGS = {"max_batch": 4, "max_wait_s": 0.0, "max_new_tokens": 500, "max_write_s": 60.0, "cache_mb": 50.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    for seed, name in enumerate("abc", 1):
        save(GPT2, ("lora", 4), folder / name, seed, std=0.2)
    return folder


@pytest.fixture
def make_loop(folder):
    """Loops, not started, whose threads end with the test."""
    loops = []

    def make(bank=None, **settings):
        bank = bank or Bank(GPT2, [folder / "a", folder / "b"], check_golden=False)
        serving = TASKS["text-generation"].serving()
        loop = GenerationLoop(bank, serving, RequestQueue(99), **{**SETTINGS, **settings})
        loop.read = lambda values, file: serving.read(values, ServedAdapter("a", bank.load_processor(file)), Limits())
        loops.append(loop)
        return loop

    yield make
    for loop in loops:
        loop.queue.close()
        if loop._thread.ident:
            assert loop.join(60)


def ask(loop, name, ids, most, then=lambda piece: None, ends=(), **values):
    """Put a request for a text of `most` tokens into the queue; `then` is called with each piece."""
    file = loop.bank.read_file(name)
    row = loop.read({"input_ids": ids, "max_tokens": most, **values}, file)
    row = replace(row, ends=frozenset(ends))  # without end tokens texts have a known length
    request = loop.make_request(name, file, row, NEVER)
    request.on_piece = then
    loop.queue.put(request)
    return request


def write_alone(folder, name, ids, most, **settings):
    """What transformers writes."""
    tokens = torch.tensor([ids])
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": most, **settings}
    found = loaded(GPT2, folder, name).generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **settings)
    decode = TASKS["text-generation"].load_processor(GPT2, None).tokenizer.decode
    whole, known = (decode(each, skip_special_tokens=True) for each in (found[0], ids))
    return whole.removeprefix(known)


def at(step, act):
    """A reader who does something at the piece of that number."""
    pieces = []

    def read(piece):
        pieces.append(piece)
        if len(pieces) == step:
            act()

    return read


def test_a_short_text_does_not_wait_for_a_long_one(make_loop, folder):
    loop, order = make_loop(), []
    asked = []

    def ask_short():
        asked.append(ask(loop, "b", [7, 8, 9], 4, lambda piece: order.append(("short", piece.finish))))

    read = at(5, ask_short)
    long = ask(loop, "a", [5], 16, lambda piece: (order.append(("long", piece.finish)), read(piece)))
    loop.start()
    assert long.future.result(60).text == write_alone(folder, "a", [5], 16)
    assert asked[0].future.result(0).text == write_alone(folder, "b", [7, 8, 9], 4)
    begin, end = order.index(("short", None)), order.index(("short", "length"))
    assert begin == 5 and end <= begin + 8  # a token of each in turn
    assert loop.bank._holds == set()


def test_an_end_token_ends_a_text_and_is_no_part_of_it(make_loop, folder):
    loop, ids = make_loop(), torch.tensor([[5, 9]])
    tokens = loaded(GPT2, folder, "a").generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[
        0, 2:
    ]
    end = tokens[6].item()
    place = tokens.tolist().index(end)
    ended = ask(loop, "a", [5, 9], 12, ends=[end, 1])
    other = ask(loop, "a", [5, 9], 12)
    loop.start()
    found = ended.future.result(60)
    assert (found.text, found.tokens, found.finish) == (write_alone(folder, "a", [5, 9], place), place + 1, "stop")
    assert other.future.result(60).finish == "length"


def test_a_seed_draws_what_transformers_draws(make_loop, folder):
    loop = make_loop()
    shape = {"temperature": 1.3, "top_p": 0.8, "top_k": 30}
    requests = [ask(loop, "a", [5, 6], 8, seed=seed, **shape) for seed in (1, 2)]
    ask(loop, "b", [9] * 20, 15)
    loop.start()
    for seed, request in zip((1, 2), requests, strict=True):
        torch.manual_seed(seed)
        wanted = write_alone(folder, "a", [5, 6], 8, do_sample=True, **shape)
        assert request.future.result(60).text == wanted


@pytest.mark.parametrize("what", ["replace", "remove"])
def test_a_text_keeps_the_weights_it_began_with(make_loop, folder, what, tmp_path):
    own = shutil.copytree(folder / "a", tmp_path / "a")
    bank = Bank(GPT2, [own, folder / "b"], check_golden=False)
    loop, later = make_loop(bank), []
    acts = {
        "replace": lambda: bank.add(folder / "c", "a"),
        "remove": lambda: bank.remove("a"),
    }

    def act():
        acts[what]()
        bank.add(folder / "c", "new")  # takes a free slot, and not that of the text
        if what == "replace":
            later.append(ask(loop, "a", [5, 6, 7], 6))

    text = ask(loop, "a", [5, 6, 7], 12, at(3, act))
    loop.start()
    assert text.future.result(60).text == write_alone(folder, "a", [5, 6, 7], 12)
    for request in later:
        assert request.future.result(60).text == write_alone(folder, "c", [5, 6, 7], 6)


def test_a_prompt_read_for_the_replaced_adapter_is_read_again(make_loop, folder):
    loop = make_loop(Bank(GPT2, {"a": folder / "a"}, check_golden=False))
    request = ask(loop, "a", [5], 3)
    loop.bank.add(folder / "c", "a")
    loop.start()
    with pytest.raises(Replaced, match="ask again"):
        request.future.result(60)


def test_another_thread_replaces_an_adapter_while_texts_are_written(make_loop, folder):
    loop, started = make_loop(), threading.Event()
    text = ask(loop, "a", [5], 250, at(2, started.set))
    loop.start()
    assert started.wait(60)
    loop.bank.add(folder / "c", "a")
    assert not text.future.done()  # the loop gives the bank away between two tokens
    text.cancel()


def test_adapters_wait_for_the_budget_in_their_turn(make_loop, folder):
    """One that came later, for the adapter in memory, does not pass the one that waits for room."""
    size = Bank(GPT2, [folder / "a"], check_golden=False).bytes / 2
    bank = Bank(GPT2, folder, budget_mb=2.2 * size / 1e6, check_golden=False)
    loop, order, names = make_loop(bank), [], ["a", "b", "a"]

    def ask_more():
        requests.extend(ask(loop, name, [9], 3, at(3, lambda name=name: order.append(name))) for name in names[1:])

    requests = []
    requests.append(ask(loop, "a", [5], 5, at(2, ask_more)))
    loop.start()
    requests[0].future.result(60)
    assert [request.future.result(60).text for request in requests[1:]] == [
        write_alone(folder, name, [9], 3) for name in names[1:]
    ]
    assert order == ["b", "a"] and bank.room == 1


def test_the_cache_bounds_the_texts_under_way(make_loop, folder):
    loop = make_loop()
    room = make_loop(loop.bank, cache_mb=2 * (70 + 8 + 64) * loop.batch.token_bytes / 1e6)
    widths = []
    requests = [ask(room, name, [5] * 70, 8, lambda piece: widths.append(room.writing)) for name in "abab"]
    room.start()
    assert {request.future.result(60).tokens for request in requests} == {8} and max(widths) == 2
    with pytest.raises(BadInput, match="has 215 tokens and max_tokens 8, but 220 fit in all"):
        ask(room, "a", [5] * 215, 8)


def test_prompt_and_text_must_fit_the_positions(make_loop, tmp_path):
    save(GPT2, ("prompt", 5), tmp_path / "p")
    loop = make_loop(Bank(GPT2, tmp_path, check_golden=False))
    positions = loop.positions
    with pytest.raises(BadInput, match=f"has 3 tokens, its adapter 5 and max_tokens 4096, but {positions} fit"):
        loop.make_request("p", loop.bank.read_file("p"), _row(loop, [1, 2, 3], 4096), NEVER)
    assert loop.make_request("p", loop.bank.read_file("p"), _row(loop, [1], None), NEVER).new_tokens == min(
        500, positions - 6
    )


def _row(loop, ids, most):
    return replace(loop.read({"input_ids": ids}, loop.bank.read_file("p")), max_new_tokens=most)


def test_a_text_that_takes_too_long_and_one_that_nobody_reads_end(make_loop):
    loop = make_loop()
    late, left, other = (ask(loop, name, [5], 12) for name in "aba")

    def end():
        late.write_by = time.monotonic() - 1
        left.cancel()

    other.on_piece = at(5, end)
    loop.start()
    assert other.future.result(60).tokens == 12
    with pytest.raises(TooLate, match="not written within 60 s"):
        late.future.result(0)
    assert not left.future.done()


def test_an_adapter_that_does_not_fit_fails_by_itself(make_loop, folder, tmp_path):
    own = shutil.copytree(folder / "a", tmp_path / "a")
    bank = Bank(GPT2, [own, folder / "b"], budget_mb=100)
    loop = make_loop(bank)
    requests = [ask(loop, name, [5], 3) for name in "ab"]
    (own / "adapter_model.safetensors").write_bytes(b"no tensors")
    loop.start()
    assert requests[1].future.result(60).text == write_alone(folder, "b", [5], 3)
    with pytest.raises(DoesNotFit):
        requests[0].future.result(60)


def test_after_a_failed_step_others_are_written(make_loop, folder, monkeypatch):
    loop = make_loop()
    step = loop.batch.step
    calls = []

    def fail_once():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        logits = step()
        if len(calls) == 4:
            logits[0] = math.nan
        return logits

    monkeypatch.setattr(loop.batch, "step", fail_once)
    failed = ask(loop, "a", [5], 9)
    loop.start()
    with pytest.raises(ComputationFailed, match="could not compute"):
        failed.future.result(60)
    damaged = ask(loop, "b", [5], 9)
    with pytest.raises(ComputationFailed, match="NaN"):
        damaged.future.result(60)
    assert ask(loop, "b", [5], 9).future.result(60).text == write_alone(folder, "b", [5], 9)
    assert loop.bank._holds == set()


def test_a_closed_queue_lets_texts_be_finished(make_loop):
    loop = make_loop()
    request = ask(loop, "a", [5], 20, at(2, loop.queue.close))
    loop.start()
    assert loop.join(60) and request.future.result(0).tokens == 20


def test_each_text_is_that_of_the_file_it_names_while_files_come_and_go(folder):
    """Texts of three names, under which files are changed all the time."""
    bank = Bank(GPT2, folder, check_golden=False)
    digests = {bank.read_file(name).digest: name for name in "abc"}
    service = Service(bank, ServiceConfig(max_batch=4))
    service.start()
    done = threading.Event()

    def change():
        for i in itertools.count():
            bank.add(folder / "abc"[i % 3], "ab"[i % 2])
            bank.evict("c")
            if done.wait(0.01):
                return

    async def write(i):
        prompt = [5 + i % 2] * (1 + i % 4)
        try:
            stream = await service.write("abc"[i % 3], {"input_ids": prompt, "max_tokens": 2 + i % 4})
        except Replaced:  # each time that it was read
            return None
        return digests[stream.file.digest], prompt, 2 + i % 4, (await stream.read_all()).text

    async def write_all():
        return [text for i in range(0, 24, 12) for text in await asyncio.gather(*map(write, range(i, i + 12)))]

    thread = threading.Thread(target=change)
    thread.start()
    try:
        texts = [text for text in asyncio.run(write_all()) if text]
    finally:
        done.set()
        thread.join()
    assert len(texts) > 12
    for name, prompt, most, text in texts:
        assert text == write_alone(folder, name, prompt, most)
    assert service.stop(60) and bank._holds == set()

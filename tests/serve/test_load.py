"""The load generator, against a server whose times and answers are known."""

import asyncio
import base64
import gzip
import io
import json
import threading
from concurrent.futures import Future
from contextlib import contextmanager, suppress

import nibabel
import numpy as np
import pytest
from PIL import Image

from command import run
from inlay import Bank, InlayError
from inlay.serve.load import Outcome, draw_arrivals, find_percentiles, run_load, summarise
from inlay.serve.load_config import LoadConfig
from inlay.serve.server.app import make_app
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.service import Service, open_bank
from serve.banked import GPT2, SAM, VIT, save
from serve.server.live import listen
from serve.test_tasks import save_masks, save_volumes


class StubServer:
    """Answers in HTTP/1.1 as `reply` says, and keeps what it was asked.

    Attributes:
        asked: Targets and bodies, in order.
        writers: Of the connections that were opened.
    """

    def __init__(self, reply):
        self.reply, self.asked, self.writers = reply, [], []

    async def run(self, url):
        """Until `stop` is set; puts the URL into a future."""
        self.stop = asyncio.Event()
        async with await asyncio.start_server(self.answer, "127.0.0.1", 0) as server:
            url.set_result(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            await self.stop.wait()
            for writer in self.writers:
                writer.close()
            await asyncio.sleep(0.01)

    async def answer(self, reader, writer):
        self.writers.append(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                target, body = head.split()[1].decode(), await reader.readexactly(length)
                self.asked.append((target, body))
                await self.reply(writer, target, body)


def say(writer, facts, status=200):
    body = json.dumps(facts).encode()
    writer.write(b"HTTP/1.1 %d OK\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body))


async def classify(writer, target, body):
    say(writer, {"model": json.loads(body)["model"], "label": "cat"})


@contextmanager
def serve(reply):
    """The stub in a thread, and its URL."""
    stub, url = StubServer(reply), Future()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(stub.run(url),))
    thread.start()
    try:
        yield stub, url.result(10)
    finally:
        loop.call_soon_threadsafe(stub.stop.set)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def config(**settings):
    return LoadConfig(**{"requests": 20, "warm_up": 0, "clients": 4, "kind": "image", "side": 8, **settings})


def test_a_closed_loop_sends_the_same_requests_for_a_seed():
    with serve(classify) as (stub, url):
        found = run_load(url, config(warm_up=5), ["a", "b"])
        asked = sorted(stub.asked)
        (load,) = found["loads"]
        assert load["statuses"] == {"200": 20} and len(asked) == 25 and len(stub.writers) == 4
        assert {json.loads(body)["model"] for _, body in asked} == {"a", "b"}
        assert load["per_second"] == pytest.approx(20 / load["seconds"])
        assert 0 < load["latency_ms"]["p50"] <= load["latency_ms"]["p99"] <= load["latency_ms"]["max"]
        stub.asked.clear()
        run_load(url, config(warm_up=5), ["a", "b"])
        assert sorted(stub.asked) == asked
        stub.asked.clear()
        run_load(url, config(warm_up=5, seed=1), ["a", "b"])
        assert sorted(stub.asked) != asked


def test_adapters_are_asked_as_often_as_zipf_says():
    with serve(classify) as (stub, url):
        run_load(url, config(requests=1100, popularity="zipf"), ["a", "b", "c"])
    names = [json.loads(body)["model"] for _, body in stub.asked]
    shares = [names.count(name) for name in "abc"]
    assert shares == pytest.approx([600, 300, 200], abs=50)  # 1, 1/2, 1/3 of 11/6


def test_an_open_loop_counts_from_when_a_request_was_due():
    """A server that stands still for 0.4 s once: 40 requests that fall into that time wait, not only the one in it."""
    stopped = []

    async def stand_still_once(writer, target, body):
        if len(stub.asked) == 20:
            stopped.append(asyncio.get_running_loop().time() + 0.4)
        while stopped and (left := stopped[0] - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(left)
        await classify(writer, target, body)

    with serve(stand_still_once) as (stub, url):
        (load,) = run_load(url, config(requests=100), ["a"], [100])["loads"]
    assert load["rate"] == 100 and load["statuses"] == {"200": 100}
    assert load["seconds"] >= draw_arrivals(100, 100, 0)[-1]
    assert load["latency_ms"]["p95"] > 300 and load["late_ms"]["p50"] < load["latency_ms"]["p95"] / 2


def test_arrivals_are_those_of_a_poisson_process():
    arrivals = np.array(draw_arrivals(20_000, 50, 3))
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03) and gaps.std() == pytest.approx(1 / 50, rel=0.03)
    counts = np.bincount(arrivals.astype(int))[:-1]
    assert counts.mean() == pytest.approx(50, rel=0.03) and counts.var() == pytest.approx(50, rel=0.2)


def test_errors_are_counted_by_status():
    async def fail_often(writer, target, body):
        name = json.loads(body)["model"]
        if name == "busy":
            say(writer, {"error": {"message": "full"}}, 429)
        elif name == "base":
            say(writer, {"model": "the base", "label": "cat"})
        elif name == "silent":
            await asyncio.sleep(3)
        elif name == "gone":
            writer.close()
        elif name == "garbage":
            writer.write(b"no HTTP\r\n\r\n")
        else:
            await classify(writer, target, body)

    names = ["good", "busy", "base", "silent", "gone", "garbage"]
    with serve(fail_often) as (_, url):
        (load,) = run_load(url, config(requests=60, clients=30, timeout_s=0.2), names)["loads"]
    assert sum(load["statuses"].values()) == 60
    assert set(load["statuses"]) == {
        "200",
        "429",
        "200, but of another adapter",
        "none in 0.2 s",
        "none: RemoteProtocolError",
    }
    assert load["per_second"] == pytest.approx(load["statuses"]["200"] / load["seconds"])


def test_texts_count_their_tokens():
    async def write_slowly(writer, target, body):
        asked = json.loads(body)
        assert target == "/v1/completions" and asked["stream"] and asked["max_tokens"] == 5
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")

        async def send(text):
            data = b"data: %s\n\n" % text
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
            await asyncio.sleep(0.03)

        await asyncio.sleep(0.05)
        for _ in range(5):
            await send(json.dumps({"model": asked["model"], "choices": [{"text": "x"}]}).encode())
        await send(json.dumps({"model": asked["model"], "choices": [], "usage": {"completion_tokens": 5}}).encode())
        await send(b"[DONE]")
        writer.write(b"0\r\n\r\n")

    with serve(write_slowly) as (_, url):
        (load,) = run_load(url, config(kind="prompt", requests=4, new_tokens=5), ["a"])["loads"]
    assert load["statuses"] == {"200": 4}
    assert load["first_token_ms"]["p50"] >= 50 and load["token_ms"]["p50"] >= 6 * 30 / 4
    assert load["latency_ms"]["p50"] >= load["first_token_ms"]["p50"] + 4 * load["token_ms"]["p50"] - 50
    assert load["tokens_per_second"] == pytest.approx(20 / load["seconds"])


def test_what_a_server_takes_and_has_is_asked_of_it():
    async def describe(writer, target, body):
        if target == "/v1/models":
            say(writer, {"data": [{"id": "base", "parent": None}, {"id": "a b", "parent": "base"}]})
        elif target == "/v2/models/a%20b":
            say(writer, {"inputs": [{"name": "text", "datatype": "BYTES"}]})
        else:
            await classify(writer, target, body)

    with serve(describe) as (stub, url):
        found = run_load(url, config(kind=None, requests=3), [])
    assert found["kind"] == "text" and found["adapters"] == 1 and found["loads"][0]["statuses"] == {"200": 3}
    assert {*json.loads(stub.asked[-1][1])} == {"model", "text"}


def test_inputs_of_ones_own(tmp_path, pictures):
    lines = tmp_path / "texts.txt"
    lines.write_text("one\n\ntwo\n")
    with serve(classify) as (stub, url):
        run_load(url, config(kind="text", inputs=str(lines)), ["a"])
        assert {json.loads(body)["text"] for _, body in stub.asked} == {"one", "two"}
        stub.asked.clear()
        run_load(url, config(inputs=str(pictures), requests=40), ["a"])
        assert len({json.loads(body)["image"] for _, body in stub.asked}) == 5
        with pytest.raises(InlayError, match="is not a folder of images"):
            run_load(url, config(inputs=str(lines)), ["a"])


@pytest.mark.parametrize(("kind", "save_adapters"), [("mask", save_masks), ("scan", save_volumes)])
def test_masks_and_scans_are_answered(kind, save_adapters, tmp_path):
    """By a server, in both protocols; what is made is what other programs read."""
    service = Service(open_bank(SAM, save_adapters(tmp_path)), ServiceConfig())
    with listen(make_app(service)) as (host, port):
        for protocol in ("v1", "v2"):
            settings = config(kind=None, requests=3, clients=2, protocol=protocol, side=48, scan_side=20)
            found = run_load(f"http://{host}:{port}", settings, ["a"])
            assert found["kind"] == kind and found["loads"][0]["statuses"] == {"200": 3}


def test_scans_are_nifti_and_masks_have_a_point_in_the_middle(tmp_path, pictures):
    with serve(classify) as (stub, url):
        run_load(url, config(kind="scan", scan_side=20, requests=8), ["a"])
        assert {target for target, _ in stub.asked} == {"/v1/segment"}
        scans = {json.loads(body)["scan"] for _, body in stub.asked}
        stub.asked.clear()
        file = gzip.decompress(base64.b64decode(scans.pop()))
        image = nibabel.Nifti1Image.from_bytes(file)
        assert scans and image.shape == (20, 20, 20) and np.array_equal(image.affine, np.eye(4))
        assert image.get_fdata().std() > 100 and image.header.get_xyzt_units()[0] == "mm"
        (tmp_path / "patient").mkdir()
        (tmp_path / "patient" / "a.nii").write_bytes(file)
        run_load(url, config(kind="scan", inputs=str(tmp_path), requests=1), ["a"])
        assert base64.b64decode(json.loads(stub.asked[0][1])["scan"]) == file
        with pytest.raises(InlayError, match="is not a folder of NIfTI scans"):
            run_load(url, config(kind="scan", inputs=str(pictures)), ["a"])
        stub.asked.clear()
        run_load(url, config(kind="mask", inputs=str(pictures), requests=1), ["a"])
        ((target, body),) = stub.asked
        width, height = Image.open(io.BytesIO(base64.b64decode(json.loads(body)["image"]))).size
        assert target == "/v1/segment" and json.loads(body)["points"] == [[width / 2, height / 2]]


def test_percentiles_are_those_of_numpy():
    outcomes = [Outcome(0, 0, ended / 1000, "200") for ended in range(1, 101)] + [Outcome(0, 0, 9, "429")]
    found = summarise(outcomes, 2.0)
    assert found["per_second"] == 50 and found["statuses"] == {"200": 100, "429": 1}
    assert found["latency_ms"] == pytest.approx({"p50": 50.5, "p95": 95.05, "p99": 99.01, "max": 100})
    assert find_percentiles([]) == {}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["127.0.0.1:1"], "no server answers at http://127.0.0.1:1"),
        (["ftp://x"], "'ftp://x' is no address of a server"),
        (["127.0.0.1:1", "--rate", "0"], "a rate is a positive number of requests a second, got 0"),
    ],
)
def test_mistakes_are_one_sentence(capsys, monkeypatch, arguments, sentence):
    status, _, err = run(capsys, monkeypatch, "bench-serve", *arguments)
    assert status == 2 and sentence in err and err.count("\n") == 1


def test_the_verb_prints_a_table_and_json(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with serve(classify) as (_, url):
        common = [url, "--adapters", "a, b", "--kind", "image", "--side", "8", "--requests", "9", "--warm-up", "0"]
        status, out, _ = run(capsys, monkeypatch, "bench-serve", *common, "--rate", "200,400")
        lines = out.splitlines()
        assert status == 0 and lines[0].startswith("images to 2 adapters of http://127.0.0.1:")
        assert lines[2].split()[:6] == ["200", "a", "second", "9", "of", "9"] and lines[3].startswith("400 a second")
        status, out, _ = run(capsys, monkeypatch, "bench-serve", *common, "--json")
        assert status == 0 and json.loads(out)["loads"][0]["clients"] == 64


def test_a_server_of_images_and_one_of_language(tmp_path):
    """What it lists and takes is found out, and every request is answered, by both protocols."""
    for base, method, prompts in ((VIT, ("lora", 2), False), (GPT2, ("lora", 2), True)):
        save(base, method, tmp_path / base.partition(":")[2])
        service = Service(Bank(base, [tmp_path / base.partition(":")[2]], check_golden=False), ServiceConfig())
        with listen(make_app(service)) as (host, port, *_):
            for protocol in ("v1",) if prompts else ("v1", "v2"):
                asked = config(kind=None, side=32, requests=6, protocol=protocol, new_tokens=3)
                found = run_load(f"{host}:{port}", asked)
                (load,) = found["loads"]
                assert found["kind"] == ("prompt" if prompts else "image") and load["statuses"] == {"200": 6}
                if prompts:
                    assert load["tokens_per_second"] == pytest.approx(6 * 3 / load["seconds"])

"""A server from its start to its end: before it is ready, under signals, and where its port is taken."""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import uvicorn

import command
from forked_program import PATIENCE_S
from inlay import BadInput
from inlay.serve.server import run
from inlay.serve.server.queue import Request, RequestQueue
from inlay.serve.server.refusals import Stopping
from serve.banked import VIT, save
from serve.server.clients import ask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save(VIT, ("lora", 2), folder / "a")
    return folder


def serve(adapters):
    """What the forked process does: it loads until there is a file `go`, and computes once there is one `compute`."""
    from inlay import Bank
    from inlay.serve.server.app import make_app
    from inlay.serve.server.config import ServiceConfig
    from inlay.serve.server.service import Service

    def make_service():
        service = Service(Bank(VIT, adapters), ServiceConfig())
        collate = service.serving.collate
        service.serving.collate = lambda *arguments: wait_for(adapters / "compute") or collate(*arguments)
        wait_for(adapters / "go")
        return service

    run.run_server(make_service, make_app, port=0, log_format="json")


def wait_for(path):
    end = time.monotonic() + PATIENCE_S
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)


def start(forked, folder):
    """A server that still loads, and its client."""
    process = forked(__file__, folder)
    for _ in range(PATIENCE_S * 20):
        said = process.said.read_text() if process.said.exists() else ""
        if '"url"' in said:
            return process, httpx.Client(base_url=said.split('"url": "')[1].split('"')[0], timeout=PATIENCE_S)
        time.sleep(0.05)
    raise AssertionError(said)


def wait_until_ready(client, folder):
    (folder / "go").touch()
    for _ in range(PATIENCE_S * 50):
        with suppress(httpx.TransportError):  # what answered while it loaded may close a connection as it ends
            if client.get("/health").status_code == 200:
                return
        time.sleep(0.02)
    raise AssertionError("the server is not ready")


def test_a_server_starts_answers_and_drains(forked, folder):
    process, client = start(forked, folder)
    assert client.get("/health").status_code == 503 and client.get("/health").json() == {"status": "starting"}
    assert client.get("/v2/health/live").status_code == 200
    early = client.post("/v1/classify", json={})
    assert early.status_code == 503 and early.headers["Retry-After"] == "1" and "loading" in early.text
    wait_until_ready(client, folder)

    answers = []
    accepted = [threading.Thread(target=lambda: answers.append(ask(client, "a"))) for _ in range(2)]
    for thread in accepted:
        thread.start()
    while "inlay_batch_rows_count 1.0" not in client.get("/metrics").text:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    while client.get("/health").json()["status"] != "draining":
        time.sleep(0.02)
    refused = ask(client, "a")
    assert refused.status_code == 503 and refused.headers["Connection"] == "close" and "stopping" in refused.text
    (folder / "compute").touch()
    for thread in accepted:
        thread.join()
    assert [answer.status_code for answer in answers] == [200, 200]
    process.join(PATIENCE_S)
    said = process.said.read_text()
    assert process.exitcode == 0 and '"message": "stopped"' in said and "Traceback" not in said
    with pytest.raises(httpx.ConnectError):
        client.get("/health")


def test_what_is_not_answered_in_time_is_refused():
    class Stub:
        state, active, queue = "ready", 1, RequestQueue(9)

        def drain(self):
            self.state = "draining"

        def give_up(self):
            self.queue.close()
            self.queue.refuse_waiting(Stopping("the server is stopping"))

    async def tick(server):
        return await server.on_tick(1)

    service = Stub()
    server = run._Server(uvicorn.Config(None), service, drain_s=0.05)
    waiting = Request("a", "", None)
    service.queue.put(waiting)
    assert not asyncio.run(tick(server))
    server.handle_exit(signal.SIGTERM, None)
    assert not asyncio.run(tick(server)) and not waiting.future.done()
    time.sleep(0.06)
    assert asyncio.run(tick(server))
    with pytest.raises(Stopping):
        waiting.future.result()


def test_a_second_signal_ends_it_at_once(monkeypatch):
    class Draining:
        state, drain = "draining", staticmethod(lambda: None)

    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    run._Server(uvicorn.Config(None), Draining, drain_s=60).handle_exit(signal.SIGTERM, None)
    assert ended == [128 + signal.SIGTERM]


def test_an_answer_in_two_parts_does_not_wait_for_the_client():
    with run.open_port("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_client_that_sends_its_headers_slowly_is_cut_off_and_a_busy_one_is_not(monkeypatch):
    """Bytes that trickle in keep uvicorn waiting for ever."""

    async def answer(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    class Stub:
        state, active, drain = "ready", 0, staticmethod(lambda: None)

    monkeypatch.setattr(run, "HEADERS_S", 0.3)
    with run.open_port("127.0.0.1", 0) as listener:
        server = run._Server(run._configure(answer, lifespan="off"), Stub, drain_s=0)
        monkeypatch.setattr(server, "on_tick", lambda counter: run._Server.on_tick(server, 0))  # each tick closes
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener.dup()]})
        thread.start()
        slow, busy = (socket.create_connection(listener.getsockname()) for _ in range(2))
        with slow, busy:
            slow.settimeout(PATIENCE_S)
            start, closed = time.monotonic(), False
            while time.monotonic() < start + 1.5:
                busy.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                assert busy.recv(9999).startswith(b"HTTP/1.1 200")
                if not closed:
                    try:
                        slow.sendall(b"G" if time.monotonic() < start + 0.2 else b"E")
                    except OSError:
                        closed = True
                time.sleep(0.05)
            assert closed
        server.should_exit = True
        thread.join()


def test_a_port_in_use_is_one_sentence(folder, capsys, monkeypatch):
    monkeypatch.setattr(run, "set_up_logs", lambda form: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, err = command.run(capsys, monkeypatch, "serve", VIT, folder, "--port", port)
    assert status == 2
    assert err == (
        f"error: cannot listen at port {port} of 127.0.0.1: address already in use; give another --port (0 is any "
        "that is free) or --host.\n"
    )
    with pytest.raises(BadInput, match=r"cannot listen at port 80 of no-such-host\.invalid"):
        run.open_port("no-such-host.invalid", 80)


def test_an_empty_key_is_found_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(run, "set_up_logs", lambda form: None)
    monkeypatch.setenv("INLAY_API_KEY", "")
    with pytest.raises(BadInput, match="INLAY_API_KEY is empty"):
        run.run_server(pytest.fail, pytest.fail, port=0)


def test_an_address_of_ipv6():
    try:
        listener = run.open_port("::1", 0)
    except BadInput:
        pytest.skip("no IPv6 here")
    with listener:
        assert run._name_url(listener).startswith("http://[::1]:")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--watch", "other"], "--watch takes one folder"),
        (["--allow-loading", "none"], "none is not a folder"),
        (["--max-batch", "0"], "max_batch must be"),
    ],
)
def test_wrong_options_are_one_sentence(folder, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(run, "run_server", pytest.fail)
    status, _, err = command.run(capsys, monkeypatch, "serve", VIT, folder, *arguments)
    assert status == 2 and words in err and err.count("\n") == 1


if __name__ == "__main__":
    logging.raiseExceptions = False
    serve(Path(sys.argv[1]))

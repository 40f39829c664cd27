"""Keys, limits and slow clients; ids and lines of requests."""

import asyncio
import json
import logging
import re

import pytest

from inlay import BadInput
from inlay.serve.server.answers import MOST_LISTS, MOST_VALUES
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.gate import BODIES, Gate, read_keys
from inlay.serve.server.logs import _JsonLines, _TextLines
from serve.banked import VIT, pair
from serve.server.clients import ask, open_client, png

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return pair(VIT, "lora", tmp_path_factory.mktemp("guarded"))


@pytest.fixture(scope="module")
def client(folder):
    with open_client(folder) as client:
        yield client


@pytest.fixture
def lines(monkeypatch):
    """What the log of requests says, as it would be written."""
    found, logger = [], logging.getLogger("inlay.serve.requests")
    handler = logging.Handler()
    handler.emit = lambda record: found.append((_JsonLines().format(record), _TextLines().format(record)))
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.manager._clear_cache()
    return found


# ---- keys


def test_any_of_several_keys_opens_and_only_whole_ones(folder):
    with open_client(folder, api_key="old, new") as client:
        for given, status in [
            ("Bearer old", 200),
            ("bearer new", 200),
            ("Bearer ol", 401),
            ("Bearer old, new", 401),
            ("Bearer ", 401),
            ("old", 401),
            ("Basic old", 401),
        ]:
            assert ask(client, "a", headers={"Authorization": given}).status_code == status, given
        refused = client.get("/metrics")
        assert refused.status_code == 401 and refused.headers["WWW-Authenticate"] == "Bearer"
        assert client.get("/health").status_code == 200
        assert client.get("/metrics", headers={"Authorization": "Bearer new"}).status_code == 200


@pytest.mark.parametrize("text", ["", " ", "a,", "a,,b"])
def test_an_empty_key_keeps_nobody_out_and_is_refused(text):
    with pytest.raises(BadInput, match="is empty"):
        read_keys(text)


def test_keys_of_the_environment():
    assert read_keys(None) == [] and read_keys("a") == ["a"] and read_keys(" a , b ") == ["a", "b"]


# ---- bodies


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/completions", "/v2/models/a/infer"])
@pytest.mark.parametrize("body", [b"[" + b"[]," * MOST_LISTS + b"0]", b'{"a": [' + b"0," * MOST_VALUES + b"0,0]}"])
def test_json_that_would_hold_up_all_others_is_not_read(client, path, body, monkeypatch):
    """A list takes 30 times the bytes in which it is written."""
    monkeypatch.setattr(json, "loads", pytest.fail)
    answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and b"5,000,000 values at most" in answer.content


def test_a_form_of_thousands_of_fields(client):
    for name, value in (("data", {f"f{i}": "x" for i in range(3000)}), ("files", {f"f{i}": b"x" for i in range(3000)})):
        response = client.post("/v1/classify", **{name: value})
        assert response.status_code == 400 and "Too many" in response.text


def test_a_field_that_should_have_been_a_file(client):
    response = client.post("/v1/classify", data={"model": "a", "image": "x" * 2_000_000}, files={"more": b""})
    assert response.status_code == 400


def run_gate(app, receive, **settings):
    """Messages that a gate sends for a request without a length."""

    class Stub:
        config = ServiceConfig(**settings)
        state, active = "ready", 0

    sent = []

    async def send(message):
        sent.append(message)

    gate = Gate(app, Stub, [])
    scope = {"type": "http", "path": "/v1/classify", "headers": []}
    try:
        asyncio.run(gate(scope, receive, send))
    finally:
        assert Stub.active == 0
    return gate, sent


async def read_all(scope, receive, send):
    while (await receive()).get("more_body"):
        pass


def test_a_body_that_does_not_end_in_time():
    async def receive():
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    with pytest.raises(Exception, match="did not arrive in time") as found:
        run_gate(read_all, receive, timeout_s=0.1)
    assert found.value.status == 408


def test_all_bodies_together_are_bounded():
    async def receive():
        return {"type": "http.request", "body": bytes(1000), "more_body": False}

    gate, _ = run_gate(read_all, receive, max_body_mb=0.001)
    assert gate.held == 0  # what was read is given back
    gate.held = BODIES * 1000 + 1
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(gate({"type": "http", "path": "/v1/classify", "headers": []}, receive, send))
    assert sent[0]["status"] == 429 and (b"retry-after", b"1") in sent[0]["headers"]


# ---- ids and lines


def test_an_answer_has_the_clients_id_or_a_fresh_one(client):
    given = {"X-Request-ID": "order-7/3", "traceparent": TRACEPARENT}
    answer = ask(client, "a", headers=given)
    assert {key: answer.headers[key] for key in given} == given
    for wrong in ("a b", "x" * 200, "a\tb", '"', "ä".encode("latin-1")):
        answer = ask(client, "a", headers={"X-Request-ID": wrong, "traceparent": "00-xyz"})
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"]) and "traceparent" not in answer.headers
    assert ask(client, "nobody").headers["x-request-id"]  # a refusal has one too


def test_a_line_for_each_request_and_none_for_a_probe(client, lines):
    ask(client, "a", headers={"X-Request-ID": "one", "traceparent": TRACEPARENT})
    ask(client, "no\nline")
    client.get("/nowhere")
    client.get("/health")
    client.get("/metrics")
    answered, unknown, nowhere = (json.loads(line) for line, _ in lines)
    assert answered["route"] == "/v1/classify" and answered["method"] == "POST" and answered["status"] == 200
    assert answered["adapter"] == "a" and answered["request_id"] == "one" and answered["batch"] == 1
    assert answered["trace_id"] == TRACEPARENT.split("-")[1]
    assert 0 <= answered["ms_waiting"] + answered["ms_computing"] <= answered["ms"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", answered["time"])
    assert unknown["status"] == 404 and unknown["adapter"] == "no\nline" and unknown["refusal"] == "UnknownAdapter"
    assert nowhere["status"] == 404 and nowhere["route"] == "(none)"
    for line, text in lines:
        assert "\n" not in line + text
        assert png().hex()[:40] not in line + text
    assert 'adapter="no\\nline"' in lines[1][1] and " status=200 " in lines[0][1]


def test_what_fails_unforeseen_is_500_with_an_id_and_no_trace(client, monkeypatch, lines):
    def fail(*arguments):
        raise RuntimeError("a secret of /srv/models")

    monkeypatch.setattr(client.app.state.service.serving, "read", fail)
    answer = ask(client, "a")
    assert answer.status_code == 500 and answer.headers["x-request-id"]
    assert answer.json()["error"]["message"] == "the server failed; its log says why."
    assert json.loads(lines[0][0])["status"] == 500 and json.loads(lines[0][0])["level"] == "error"
    assert 'route="/v1/classify",status="500"' in client.get("/metrics").text


def test_a_draining_service_answers_no_new_request(folder):
    with open_client(folder) as client:
        assert client.get("/health").json() == {"status": "ready", "waiting": 0, "adapters": 2}
        client.app.state.service.drain()
        refused = ask(client, "a")
        assert refused.status_code == 503 and refused.headers["Connection"] == "close"
        assert refused.headers["Retry-After"] == "1"
        health = client.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "draining"


def test_a_service_whose_thread_has_ended_says_so(folder, monkeypatch):
    with open_client(folder) as client:
        monkeypatch.setattr(client.app.state.service.loop, "has_failed", True)
        for path in ("/health", "/v2/health/ready", "/v2/health/live"):
            assert client.get(path).status_code == 503

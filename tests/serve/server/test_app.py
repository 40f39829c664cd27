"""The HTTP application: answers, refusals and their statuses, keys, limits, and clients that leave."""

import asyncio
import base64
import shutil
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from inlay import Bank, load_adapter, predict
from inlay.adapters.file import CONFIG, WEIGHTS
from inlay.serve.server.answers import hide_paths
from inlay.serve.server.app import make_app
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.service import Service
from serve.banked import GPT2, VIT, pair, save
from serve.server.clients import ask, open_client, png


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = pair(VIT, "lora", tmp_path_factory.mktemp("served"))
    save(GPT2, ("lora", 2), folder / "text")
    shutil.copytree(folder / "a", folder / "damaged")
    weights = folder / "damaged" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


@pytest.fixture
def make_client(folder):
    """Clients of services with these settings; services end with the test."""
    with ExitStack() as clients:
        yield lambda **settings: clients.enter_context(open_client(folder, **settings))


def test_an_answer_is_that_of_the_adapter_alone_and_says_what_made_it(make_client, folder):
    client = make_client()
    for name in "ab":
        (expected,) = predict(load_adapter(folder / name), [png()])
        for response in (
            ask(client, name),
            client.post("/v1/classify", json={"model": name, "image": base64.b64encode(png()).decode()}),
        ):
            answer = response.json()
            assert response.status_code == 200 and answer["label"] == expected.label
            assert list(answer["probabilities"]) == expected.labels
            assert list(answer["probabilities"].values()) == pytest.approx(expected.probabilities, rel=1e-4)
            assert answer["model"] == name and answer["base"] == VIT
            assert answer["adapter_digest"] == client.app.state.service.bank.files[name].digest
            assert answer["base_digest"] == client.app.state.service.bank.identity.digest


def test_many_clients_at_once(make_client, folder):
    client, answers = make_client(), {}
    alone = {name: load_adapter(folder / name) for name in "ab"}

    def run(index):
        answers[index] = ask(client, "ab"[index % 2], png(index)).json()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, answer in answers.items():
        (expected,) = predict(alone["ab"[index % 2]], [png(index)])
        assert list(answer["probabilities"].values()) == pytest.approx(expected.probabilities, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("c", 404, "unknown adapter 'c'"),
        ("builtin:vit-tiny", 404, "unknown adapter"),
        ("", 404, "unknown adapter ''"),
        ("text", 409, "was trained on builtin:gpt2-tiny"),
        ("damaged", 409, "truncated"),
    ],
)
def test_what_is_no_adapter_of_the_server_is_never_answered_by_the_base(make_client, folder, name, status, words):
    response = ask(make_client(), name)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]
    assert str(folder) not in response.text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"content": b"\xff\xfe"}, "neither a form nor JSON"),
        ({"content": b"[" * 100_000}, "neither a form nor JSON"),
        ({"json": [1]}, "must be a JSON object, got list"),
        ({"json": {"image": ""}}, "names its adapter as model"),
        ({"json": {"model": ["a"], "image": ""}}, "names its adapter as model"),
        ({"json": {"model": "a"}}, "one of image, pixels and pixel_values, got none"),
        ({"json": {"model": "a", "image": "?"}}, "image is not valid base64"),
        ({"json": {"model": "a", "image": 3}}, "image must be a text in base64, got int"),
        ({"json": {"model": "a", "image": "aGk="}}, "cannot be read as an image"),
        ({"json": {"model": "a", "picture": ""}}, "unknown field 'picture'; a request has model and image"),
    ],
)
def test_malformed_requests(make_client, body, words):
    response = make_client().post("/v1/classify", **body)
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_limits_hold_before_anything_is_decoded(make_client):
    client = make_client(max_body_mb=0.01, max_pixels=40 * 39)
    assert ask(client, "a").json()["error"]["message"] == "the image has 40 x 40 pixels; the limit is 1,560 in all."
    large = ask(client, "a", bytes(20_000))
    assert large.status_code == 413 and "10,000 bytes at most" in large.text
    streamed = client.post(
        "/v1/classify", content=(bytes(1000) for _ in range(20))
    )  # of a length that is not announced
    assert streamed.status_code == 413


def test_a_key(make_client, monkeypatch):
    client = make_client(api_key="secret")
    assert ask(client, "a").status_code == 401
    assert ask(client, "a", headers={"Authorization": "Bearer other"}).status_code == 401
    assert ask(client, "a", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/health").status_code == 200
    monkeypatch.setenv("INLAY_API_KEY", "of the environment")
    assert ask(make_client(), "a").status_code == 401


def test_a_full_queue_and_a_deadline(make_client):
    client = make_client(max_queue=1, max_batch=1, timeout_s=0.4)
    service = client.app.state.service
    with service.bank.rows([]):  # nothing is computed meanwhile
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(ask(client, "a"))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    busy = [answer for answer in answers if answer.status_code == 429]
    late = [answer for answer in answers if answer.status_code == 504]
    assert busy and late and len(busy) + len(late) == 6
    assert busy[0].headers["Retry-After"] == "1" and "waiting already" in busy[0].text
    assert ask(client, "a").status_code == 200


def test_a_client_that_leaves_takes_its_request_back(make_client):
    client = make_client(max_batch=1)
    service = client.app.state.service

    async def leave():
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as own:
            asking = asyncio.create_task(own.post("/v1/classify", data={"model": "a"}, files={"image": png()}))
            while not len(service.queue):
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    taken = threading.Event()
    service.loop.watch = lambda requests: taken.set()
    with service.bank.rows([]):
        blocker = threading.Thread(target=ask, args=(client, "b"))
        blocker.start()
        taken.wait(60)
        asyncio.run(leave())
        assert service.queue.take(1, block=False) == []
    blocker.join()


def test_accepted_requests_are_answered_when_the_server_stops(folder):
    service = Service(Bank(VIT, folder, skip_unfit=True), ServiceConfig(max_batch=1))
    answers = []
    with TestClient(make_app(service)) as client:
        with service.bank.rows([]):
            threads = [threading.Thread(target=lambda: answers.append(ask(client, "a"))) for _ in range(4)]
            for thread in threads:
                thread.start()
            while len(service.queue) < 3:  # the fourth is with the loop
                time.sleep(0.01)
        service.queue.close()
        for thread in threads:
            thread.join()
        assert ask(client, "a").status_code == 503
    assert [answer.status_code for answer in answers] == [200] * 4


def test_a_replaced_adapter_answers_by_its_new_version(make_client, folder, tmp_path):
    client = make_client()
    service, first = client.app.state.service, ask(client, "a").json()
    read = service.serving.read

    def replace_meanwhile(values, processor, limits):
        service.serving.read = read
        service.bank.add(folder / "b", "a")
        return read(values, processor, limits)

    service.serving.read = replace_meanwhile
    second = ask(client, "a").json()
    assert second["adapter_digest"] != first["adapter_digest"]
    assert second["probabilities"] == pytest.approx(ask(client, "b").json()["probabilities"])


def test_sentences_tell_nothing_of_the_machine():
    assert hide_paths("'/home/me/adapters/cats' holds no adapters") == "'cats' holds no adapters"
    assert hide_paths(f"{Path.cwd() / CONFIG} is damaged: ~/x/y.") == f"{CONFIG} is damaged: y."
    assert hide_paths("google/vit-base has 3/4 of http://host/a/b") == "google/vit-base has 3/4 of http://host/a/b"

"""Replicas behind Ray Serve: its local testing mode, without a cluster; benchmarks/serve_ray.py starts a cluster."""

import asyncio
import base64
import json

import pytest

from inlay import load_adapter, predict
from inlay.serve.server.config import ServiceConfig
from serve.banked import VIT, pair
from serve.server.soak import make_png

serve = pytest.importorskip("ray.serve", reason="ray[serve] is not installed: pip install 'inlay[ray]'")

from starlette.requests import Request  # noqa: E402

from inlay.serve.ray import find_adapter, make_application  # noqa: E402


def make_request(path, body=b"", method="POST"):
    async def receive():
        return {"type": "http.request", "body": body}

    scope = {"type": "http", "http_version": "1.1", "method": method, "scheme": "http", "path": path}
    return Request({**scope, "query_string": b"", "headers": [], "server": ("here", 80)}, receive)


def read(response):
    async def collect():
        return b"".join([part async for part in response.body_iterator])

    return json.loads(asyncio.run(collect()))


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_replica_answers_as_a_server_does(tmp_path):
    folder = pair(VIT, "lora", tmp_path)
    config = ServiceConfig(max_body_mb=0.1, threads=1)
    application = make_application(VIT, str(folder), config=config)
    handle = serve.run(application, _local_testing_mode=True)
    image = make_png(0)
    for name in "ab":
        asked = {"model": name, "image": base64.b64encode(image).decode()}
        response = handle.remote(make_request("/v1/classify", json.dumps(asked).encode())).result()
        (expected,) = predict(load_adapter(folder / name), [image])
        assert response.status_code == 200
        assert list(read(response)["probabilities"].values()) == pytest.approx(expected.probabilities, rel=1e-4)
    unknown = handle.remote(make_request("/v1/classify", b'{"model": "c", "image": ""}')).result()
    assert unknown.status_code == 404 and "unknown adapter 'c'" in read(unknown)["error"]["message"]
    large = handle.remote(make_request("/v1/classify", bytes(100_001))).result()
    assert large.status_code == 413
    assert handle.remote(make_request("/health", method="GET")).result().status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v2/models/cats/infer", b"", "cats"),
        ("/v2/models/cats", b'{"model": "dogs"}', "cats"),
        ("/v1/models/user/x", b"", "user"),
        ("/v1/classify", b'{"image": "aGk=", "model" : "cats"}', "cats"),
        ("/v1/classify", b'--x\r\ncontent-disposition: form-data; name="model"\r\n\r\ncats\r\n--x--', "cats"),
        ("/v1/completions", b'{"model": ["cats"]}', ""),
        ("/health", b"", ""),
        ("/v1/classify", b'{"model": "\xff"}', "\ufffd"),
    ],
)
def test_the_adapter_that_a_request_names(path, body, name):
    assert find_adapter(path, body) == name

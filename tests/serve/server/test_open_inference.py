"""The Open Inference Protocol as a real client speaks it, and what it refuses."""

import gzip
import io
import json
import zlib
from functools import cache

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from inlay import Bank, load_adapter, load_processor, predict
from inlay.serve.server.app import make_app
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.service import Service
from serve.banked import GPT2, LABELS, VIT, pair, save
from serve.server.live import listen

SIDE = 32
load = cache(load_adapter)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = pair(VIT, "lora", tmp_path_factory.mktemp("served"))
    save(GPT2, ("lora", 2), folder / "text")
    return folder


@pytest.fixture(scope="module")
def service(folder):
    config = ServiceConfig(max_body_mb=1.0, max_queue=16, max_pixels=100_000)
    return Service(Bank(VIT, folder, skip_unfit=True), config)


@pytest.fixture(scope="module")
def url(service):
    with listen(make_app(service)) as (host, port):
        yield f"{host}:{port}"


@pytest.fixture
def client(url):
    with InferenceServerClient(url) as client:
        yield client


def draw(seed, side=40):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tensor(name, datatype, array, **how):
    made = InferInput(name, list(array.shape), datatype)
    return made.set_data_from_numpy(array, **how)


def files(*contents):
    return np.array([*contents, b""], np.object_)[:-1]


def check_answer(result, folder, name, images):
    """Against the adapter loaded alone."""
    adapter = load(folder / name)
    expected = predict(adapter, [Image.fromarray(each) for each in images], top=9)
    found, labels = result.as_numpy("probabilities"), result.as_numpy("label")
    assert labels.shape == (len(images), 1) and found.shape == (len(images), len(LABELS[name]))
    for row, label, want in zip(found, labels[:, 0], expected, strict=True):
        assert (label.decode() if isinstance(label, bytes) else label) == want.label
        order = [LABELS[name].index(each) for each in want.labels]
        np.testing.assert_allclose(row[order], want.probabilities, rtol=1e-4)
    with torch.no_grad():
        pixels = torch.cat([load_processor(VIT)(each, return_tensors="pt")["pixel_values"] for each in images])
        logits = adapter.model(pixel_values=pixels).logits.numpy()
    np.testing.assert_allclose(result.as_numpy("logits"), logits, rtol=1e-4, atol=1e-4)


def test_what_the_server_says_of_itself_and_of_its_adapters(client, service):
    assert client.is_server_live() and client.is_server_ready()
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    digest = service.bank.files["a"].digest
    facts = client.get_model_metadata("a")
    assert facts["name"] == "a" and facts["versions"] == [digest] and facts == client.get_model_metadata("a", digest)
    tensors = {each["name"]: (each["datatype"], each["shape"]) for each in facts["inputs"]}
    assert tensors["image"] == ("BYTES", [-1]) and tensors["pixels"] == ("UINT8", [-1, -1, -1, 3])
    assert [each["name"] for each in facts["outputs"]] == ["logits", "probabilities", "label"]
    assert facts["parameters"]["base"] == VIT and facts["parameters"]["adapter_digest"] == digest
    assert client.is_model_ready("a") and client.is_model_ready("a", digest)
    assert not client.is_model_ready("c") and not client.is_model_ready("text") and not client.is_model_ready("a", "1")
    states = {each["name"]: each["state"] for each in client.get_model_repository_index()}
    assert states == {"a": "READY", "b": "READY", "text": "UNAVAILABLE"}


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_a_batch_of_pixels(client, folder, service, binary, compression):
    images = np.stack([draw(1, SIDE), draw(2, SIDE)])
    wanted = [InferRequestedOutput(name, binary_data=binary) for name in ("label", "probabilities", "logits")]
    result = client.infer(
        "b",
        [tensor("pixels", "UINT8", images, binary_data=binary)],
        outputs=wanted,
        request_id="seven",
        request_compression_algorithm=compression,
    )
    check_answer(result, folder, "b", images)
    said = result.get_response()
    assert said["id"] == "seven" and said["model_name"] == "b"
    assert said["model_version"] == said["parameters"]["adapter_digest"] == service.bank.files["b"].digest
    assert said["parameters"]["base_digest"] == service.bank.identity.digest
    assert [each["name"] for each in said["outputs"]] == ["label", "probabilities", "logits"]


def test_files_and_what_the_processor_makes(client, folder):
    images = [draw(3), draw(4, 50)]
    check_answer(client.infer("a", [tensor("image", "BYTES", files(*map(png, images)))]), folder, "a", images)
    made = load_processor(VIT)(images, return_tensors="np")["pixel_values"]
    check_answer(client.infer("a", [tensor("pixel_values", "FP32", made)]), folder, "a", images)


def test_one_output_of_one_version(client, service):
    version = service.bank.files["a"].digest
    asked = {"inputs": [tensor("image", "BYTES", files(png(draw(5))))], "outputs": [InferRequestedOutput("label")]}
    result = client.infer("a", model_version=version, **asked)
    assert [each["name"] for each in result.get_response()["outputs"]] == ["label"]
    with pytest.raises(InferenceServerException, match=f"adapter 'a' has the version {version}, not '7'") as caught:
        client.infer("a", model_version="7", **asked)
    assert caught.value.status() == "404"


def test_the_route_is_counted(client, url):
    client.infer("a", [tensor("image", "BYTES", files(png(draw(5))))])
    counted = 'inlay_requests_total{adapter="a",route="/v2/models/{name}/infer",status="200"}'
    assert counted in httpx.get(f"http://{url}/metrics").text


def test_json_as_curl_sends_it(url, folder):
    """Nested data, and a file in base64; the answer is flat."""
    image = draw(6, SIDE)
    body = {"inputs": [{"name": "pixels", "shape": [1, SIDE, SIDE, 3], "datatype": "UINT8", "data": [image.tolist()]}]}
    said = httpx.post(f"http://{url}/v2/models/a/infer", json=body).json()
    (expected,) = predict(load(folder / "a"), [Image.fromarray(image)])
    outputs = {each["name"]: each for each in said["outputs"]}
    assert outputs["label"] == {"name": "label", "datatype": "BYTES", "shape": [1, 1], "data": [expected.label]}
    assert max(outputs["probabilities"]["data"]) == pytest.approx(expected.probabilities[0], rel=1e-4)
    assert "id" not in said


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [("c", "404", "unknown adapter 'c'"), ("text", "409", "was trained on builtin:gpt2-tiny")],
)
def test_what_is_no_adapter_of_the_server(client, name, status, words):
    with pytest.raises(InferenceServerException, match=words) as caught:
        client.infer(name, [tensor("image", "BYTES", files(png(draw(5))))])
    assert caught.value.status() == status


def test_a_deadline_of_the_client(client, service):
    service.bank._lock.acquire()
    try:
        with pytest.raises(InferenceServerException, match="deadline") as caught:
            client.infer("a", [tensor("image", "BYTES", files(png(draw(5))))], timeout=30_000)
    finally:
        service.bank._lock.release()
    assert caught.value.status() == "504"


def ask(url, inputs, *, behind=b"", headers=None, **more):
    head = inputs if isinstance(inputs, bytes) else json.dumps({"inputs": inputs, **more}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))} if headers is None else headers
    return httpx.post(f"http://{url}/v2/models/a/infer", content=head + behind, headers=headers)


def one(**more):
    return [{"name": "pixels", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [0] * 12} | more]


def binary(size, **more):
    given = one(parameters={"binary_data_size": size}, **more)[0]
    del given["data"]
    return [given]


@pytest.mark.parametrize(
    ("inputs", "more", "words"),
    [
        (b"\xff", {}, "the request is no JSON"),
        (b"[" * 50_000, {}, "the request is no JSON"),
        (b"[]", {}, "must be a JSON object, got list"),
        ({}, {}, "inputs, a list of tensors"),
        ([], {}, "equally many rows along axis 0; there is none"),
        (one(name="picture"), {}, "unknown input 'picture'; choose among image, pixels, pixel_values, group, top"),
        (one(name=["pixels"]), {}, "unknown input"),
        (one(datatype="FP32"), {}, "input 'pixels' is UINT8, got 'FP32'"),
        (one(shape=[1, 2, 2]), {}, "must be [rows, any, any, 3], got [1, 2, 2]"),
        (one(shape=[1, 2, 2, 4]), {}, "must be [rows, any, any, 3]"),
        (one(shape=[0, 2, 2, 3]), {}, "must be [rows, any, any, 3]"),
        (one(shape=[True, 2, 2, 3]), {}, "must be [rows, any, any, 3]"),
        (one(shape=[1, 2, -2, 3]), {}, "must be [rows, any, any, 3]"),
        (one(shape=[1, 0, 2, 3], data=[]), {}, "are no image"),
        (one(data=[0] * 11), {}, "has 11 values, and its shape says 12"),
        (one(data=[[0] * 12]), {}, "is nested as [1, 12], and its shape is [1, 2, 2, 3]"),
        (one(data=[[0], [0, 1]]), {}, "different lengths"),
        (one(data=[0] * 11 + [256]), {}, "must be 0 to 255"),
        (one(data=[0] * 11 + [2**70]), {}, "must be UINT8"),
        (one(data=[0.5] * 12), {}, "must be UINT8"),
        (one(data=["0"] * 12), {}, "must be UINT8"),
        (one(data="AAAA"), {}, "needs data, a list, or binary_data_size"),
        (one() + one(), {}, "input 'pixels' is given twice"),
        (one(parameters={"shared_memory_region": "x"}), {}, "shares no memory"),
        (one(parameters=3), {}, "parameters must be a JSON object"),
        (binary(13), {"behind": bytes(12)}, "must be 0 to 12"),
        (binary("12"), {"behind": bytes(12)}, "must be 0 to 12"),
        (binary(-1), {"behind": bytes(12)}, "must be 0 to 12"),
        (binary(11), {"behind": bytes(11)}, "has 11 bytes, and its shape says 12"),
        (binary(12), {"behind": bytes(13)}, "1 bytes follow the JSON that belong to no input"),
        (binary(12, name="image", datatype="BYTES", shape=[1]), {"behind": bytes(12)}, "has 3 elements"),
        (binary(3, name="image", datatype="BYTES", shape=[1]), {"behind": bytes(3)}, "within the length"),
        (binary(4, name="image", datatype="BYTES", shape=[1]), {"behind": b"\1\0\0\0"}, "ends within an element"),
        (binary(5, name="group", datatype="BYTES", shape=[1]), {"behind": b"\1\0\0\0\xff"}, "no text in UTF-8"),
        (one(name="image", datatype="BYTES", shape=[1], data=["?"]), {}, "image is not valid base64"),
        (one(name="image", datatype="BYTES", shape=[1], data=[3]), {}, "must be 1 texts"),
        (one(name="image", datatype="BYTES", shape=[1], data=["aGk="]), {}, "cannot be read as an image"),
        (one(name="pixel_values", datatype="FP32", shape=[1, 1, 1, 1], data=[0]), {}, "must be 3 x 32 x 32 (C H W)"),
        (one(name="pixel_values", datatype="FP32", shape=[1, 1, 1, 1], data=[1e39]), {}, "must be finite"),
        (one(name="group", datatype="BYTES", shape=[1], data=["x"]) + one(), {}, "no group of labels 'x'"),
        (one(name="top", datatype="INT32", shape=[2], data=[1, 1]) + one(), {}, "top has 2, pixels has 1"),
        (one(), {"outputs": [{"name": "mask"}]}, "unknown output 'mask'; choose among logits, probabilities, label"),
        (one(), {"outputs": {"name": "label"}}, "outputs must be a list"),
        (one(), {"outputs": [{"name": "label"}] * 2}, "asked for twice"),
        (
            one(),
            {"outputs": [{"name": "label", "parameters": {"binary_data": 1}}]},
            "binary_data must be true or false",
        ),
        (one(), {"outputs": [{"name": "label", "parameters": {"classification": 2}}]}, "ranks no classes"),
        (one(), {"parameters": {"timeout": 0}}, "timeout must be a number of microseconds above 0"),
        (one(), {"parameters": {"timeout": True}}, "timeout must be a number"),
        (one(), {"parameters": {"binary_data_output": "yes"}}, "binary_data_output must be true or false"),
        (one(), {"id": 3}, "id must be a text"),
        (one(), {"headers": {"Inference-Header-Content-Length": "9999"}}, "is 9999, but the body has"),
        (one(), {"headers": {"Inference-Header-Content-Length": "-1"}}, "must be a number of bytes"),
        (one(), {"headers": {"Content-Encoding": "br"}}, "unknown Content-Encoding 'br'; choose one of gzip, deflate"),
        (one(), {"headers": {"Content-Encoding": "gzip"}}, "cannot be read as gzip"),
    ],
)
def test_malformed_requests(url, inputs, more, words):
    response = ask(url, inputs, **more)
    assert response.status_code == 400 and words in response.json()["error"]


def test_what_is_too_large(url):
    many = one(shape=[17, 1, 1, 3], data=[0] * 51)
    assert (ask(url, many).status_code, ask(url, many).json()["error"]) == (
        413,
        "a request may have 16 rows at most, got 17.",
    )
    bomb = zlib.compress(bytes(2_000_000))
    large = ask(url, bomb, headers={"Content-Encoding": "deflate"})
    assert large.status_code == 413 and "also where it was compressed" in large.json()["error"]
    cut = ask(url, gzip.compress(b"{}")[:-3], headers={"Content-Encoding": "gzip"})
    assert cut.status_code == 400 and "not one whole stream of gzip" in cut.json()["error"]
    wide = one(shape=[1, 400, 251, 3])
    assert (
        "the limit is 100,000 in all" in ask(url, binary(301_200, shape=[1, 400, 251, 3]), behind=bytes(301_200)).text
    )
    assert ask(url, wide).status_code == 400


def test_what_was_compressed_counts_towards_the_memory_for_bodies(url, monkeypatch):
    body = json.dumps({"inputs": one()}).encode()
    packed, headers = gzip.compress(body + b" " * 500_000), {"Content-Encoding": "gzip"}
    assert ask(url, packed, headers=headers).status_code == 200
    monkeypatch.setattr("inlay.serve.server.gate.BODIES", 0.4)
    full = ask(url, packed, headers=headers)
    assert (full.status_code, full.headers["Retry-After"]) == (429, "1") and "fill the memory" in full.json()["error"]
    assert ask(url, body, headers={}).status_code == 200


def test_answers_that_are_not_finite(url):
    """An adapter's own processor makes no such pixels."""
    huge = np.full((1, 3, SIDE, SIDE), 3e38, np.float32)
    given = binary(huge.nbytes, name="pixel_values", datatype="FP32", shape=list(huge.shape))
    response = ask(url, given, behind=huge.tobytes())
    assert response.status_code == 400 and "the model's answer is not finite" in response.json()["error"]

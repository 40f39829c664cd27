"""What people ask: files and JSON, one input or several, masks and scans as files in the answer."""

import base64
import gzip
import io
import json
from functools import cache

import nibabel
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from inlay import Bank, combine, load_adapter, predict, predict_masks, segment
from inlay.serve.server.app import make_app
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.service import Service, open_bank
from serve.banked import SAM, VIT, pair
from serve.test_tasks import draw, png, save_masks, save_volumes, scan

load = cache(load_adapter)


def make_client(bank, **settings):
    return TestClient(make_app(Service(bank, ServiceConfig(**settings))))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Classifiers, and the sum of both, which has a group of labels of each."""
    folder = pair(VIT, "lora", tmp_path_factory.mktemp("images"))
    combine({folder / "a": 1.0, folder / "b": 1.0}, out=folder / "both")
    with make_client(Bank(VIT, folder), max_queue=8) as client:
        yield client, folder


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    folder = save_masks(tmp_path_factory.mktemp("masks"))
    with make_client(Bank(SAM, folder), max_voxels=100_000) as client:
        yield client, folder


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    folder = save_volumes(tmp_path_factory.mktemp("volumes"))
    with make_client(open_bank(SAM, folder), max_voxels=30_000) as client:
        yield client, folder


def check_classes(answer, expected):
    assert answer["label"] == expected.label and list(answer["probabilities"]) == expected.labels
    assert list(answer["probabilities"].values()) == pytest.approx(expected.probabilities, rel=1e-4)


def test_several_files_are_answered_in_their_order(images):
    client, folder = images
    contents = [png(draw(seed)) for seed in range(3)]
    files = [("image", content) for content in contents]
    as_form = client.post("/v1/classify", data={"model": "b", "top": "2"}, files=files).json()
    texts = [base64.b64encode(content).decode() for content in contents]
    as_json = client.post("/v1/classify", json={"model": "b", "top": 2, "image": texts}).json()
    assert as_form["model"] == as_json["model"] == "b" and len(as_form["answers"]) == 3
    expected = predict(load(folder / "b"), contents, top=2)
    for found in (as_form, as_json):
        for answer, want in zip(found["answers"], expected, strict=True):
            check_classes(answer, want)
            assert answer["adapter_digest"] == found["adapter_digest"]


def test_a_group_of_labels(images):
    client, folder = images
    (expected,) = predict(load(folder / "both"), [png(draw(5))], group="a", top=2)
    asked = {"model": "both", "group": "a", "top": 2, "image": base64.b64encode(png(draw(5))).decode()}
    check_classes(client.post("/v1/classify", json=asked).json(), expected)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"model": "both", "image": "", "group": "c"}, "no group of labels 'c', it has the groups a, b"),
        ({"model": "a", "image": "", "group": "a"}, "it has no groups; leave group out"),
        ({"model": "a", "image": "", "top": 0}, "top must be at least 1, got 0"),
        ({"model": "a", "image": "", "top": "x"}, "top must be numbers, as JSON"),
        ({"model": "a", "image": "", "top": 1.5}, "top must be whole numbers, one"),
        ({"model": "a", "image": "", "top": [1, 2]}, "top must be whole numbers, one"),
        ({"model": "a", "image": "", "top": 2**40}, "'top' must be -2147483648 to 2147483647"),
        ({"model": "a", "image": []}, "at least one; got 0 of image"),
        (
            {"model": "a", "image": ["", ""], "group": ["a"]},
            "equally many, and at least one; got 2 of image",
        ),
        ({"model": "a", "image": ["aGk="] * 9}, "a request may have 8 inputs at most, got 9"),
        (
            {"model": "a", "image": [base64.b64encode(png(draw(1))).decode(), "aGk="]},
            "row 1: the bytes given cannot be",
        ),
        ({"model": "a", "image": [1]}, "image must be a text in base64, got int"),
    ],
)
def test_what_is_refused(images, asked, words):
    response = images[0].post("/v1/classify", json=asked)
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_masks_come_back_as_images(masks):
    client, folder = masks
    asked = {"model": "a", "points": "[[20, 25], [5, 5]]", "labels": "[1, 0]"}
    answer = client.post("/v1/segment", data=asked, files={"image": png(draw(1))}).json()
    expected = predict_masks(load(folder / "a"), png(draw(1)), points=[(20, 25)], negatives=[(5, 5)])
    (found,) = answer["masks"]
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["png"]))))
    assert mask.dtype == bool and (mask != expected.masks[0]).mean() < 1e-3 and answer["model"] == "a"
    assert found["predicted_iou"] == pytest.approx(expected.scores[0], rel=1e-3)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "nothing is asked for: give points inside of an object, or boxes"),
        ({"points": [[1, 2, 3]]}, "points must be numbers, any x 2"),
        ({"points": [[1, 2], [3]]}, "points must be numbers, as JSON"),
        ({"points": [[1, 60]]}, "is no point x, y within 40 x 48 pixels"),
        ({"points": [[1, 2]], "labels": [1, 0]}, "there are 1 points and 2 labels"),
        ({"points": [[1, 2]], "labels": [2]}, "1 inside of the object and 0 outside, got [2]"),
        ({"boxes": [[5, 5, 5, 9]]}, "holds nothing"),
        ({"boxes": [[1, 1, 5, 9]] * 65}, "64 points or boxes at most"),
        ({"boxes": [[1, 1, 5, 9]] * 60}, "masks of 60 boxes in 40 x 48 pixels are 115,200 pixels in all; the limit is"),
        ({"points": [["a", 2]]}, "points must be numbers"),
        ({"points": [[1, 2]], "labels": []}, "there are 1 points and 0 labels"),
        ({"points": [[1, 1e39]]}, "must be finite numbers"),
    ],
)
def test_prompts_that_are_refused(masks, asked, words):
    image = base64.b64encode(png(draw(1))).decode()
    response = masks[0].post("/v1/segment", json={"model": "a", "image": image, **asked})
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_each_task_has_its_route(images, masks):
    for (client, _), wrong, right in ((images, "segment", "classify"), (masks, "classify", "segment")):
        response = client.post(f"/v1/{wrong}", json={"model": "a", "image": ""})
        assert response.status_code == 400 and f"post to v1/{right}." in response.json()["error"]["message"]


def test_a_scan_comes_back_as_a_file_and_volumes(volumes):
    client, folder = volumes
    asked = {"model": "b", "largest": "true", "points": json.dumps([[3, 4, 5]]), "point_labels": "[2]"}
    answer = client.post("/v1/segment", data=asked, files={"scan": gzip.compress(scan(3))}).json()
    found = segment(load(folder / "b"), scan(3), points=[(3, 4, 5, 2)], largest=True, progress=False)
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(answer["mask"])))
    np.testing.assert_array_equal(np.asarray(image.dataobj), found.mask)
    assert answer["volumes_ml"] == pytest.approx(found.volumes_ml) and answer["labels"] == {"1": "left", "2": "right"}


@pytest.mark.parametrize(
    ("data", "asked", "words"),
    [
        (b"", {}, "cannot be read as a scan of three axes: an empty file"),
        (b"<html>" * 100, {}, "cannot be read as a scan of three axes"),
        (scan(3)[:-9], {}, "cannot be read as a scan of three axes: truncated"),
        (gzip.compress(scan(3))[:-900], {}, "cannot be read as a scan of three axes: truncated"),
        (scan(3, (40, 40, 40)), {}, "the scan has 40 x 40 x 40 voxels; the limit is 30,000 in all"),
        (
            scan(3, slice_mm=20.0),
            {},
            "at the spacing of the adapter the scan has 120 x 18 x 22 voxels; the limit is 30,000",
        ),
        (scan(3), {"points": "[[30, 1, 1]]"}, "lies outside the scan of 22 x 18 x 12 voxels"),
        (scan(3), {"points": "[[3, 1, 1]]", "point_labels": "[7]"}, "unknown label 7; the adapter has 0 background"),
        (scan(3), {"points": "[[3, 1, 1]]", "point_labels": "[1, 2]"}, "there are 1 points and 2 point_labels"),
        (scan(3), {"model": "a", "flips": "true"}, "was not trained on mirrored scans"),
        (scan(3), {"flips": "1"}, "flips must be true or false, one"),
    ],
)
def test_scans_that_are_refused(volumes, data, asked, words):
    response = volumes[0].post("/v1/segment", data={"model": "b", **asked}, files={"scan": data})
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def infer(client, name, outputs=(), **tensors):
    """By the Open Inference Protocol, in JSON; tensors by name with their datatype and shape."""
    inputs = [
        {"name": key, "datatype": datatype, "shape": shape, "data": data}
        for key, (datatype, shape, data) in tensors.items()
    ]
    asked = {"inputs": inputs, "outputs": [{"name": output} for output in outputs]}
    return client.post(f"/v2/models/{name}/infer", json=asked)


def as_arrays(response):
    assert response.status_code == 200, response.text
    return {each["name"]: np.array(each["data"]).reshape(each["shape"]) for each in response.json()["outputs"]}


def test_masks_as_tensors(masks):
    client, folder = masks
    files = [base64.b64encode(png(draw(seed, size))).decode() for seed, size in ((1, (48, 40)), (2, (20, 30)))]
    boxes = [[[1, 1, 9, 9], [2, 3, 18, 15]]] * 2
    found = as_arrays(infer(client, "b", image=("BYTES", [1], files[:1]), boxes=("FP32", [1, 2, 4], boxes[:1])))
    expected = predict_masks(load(folder / "b"), png(draw(1, (48, 40))), boxes=boxes[0])
    assert found["masks"].shape == (1, 2, 48, 40) and (found["masks"][0] != expected.masks).mean() < 1e-3
    np.testing.assert_allclose(found["predicted_iou"][0], expected.scores, rtol=1e-3)
    both = {"image": ("BYTES", [2], files), "boxes": ("FP32", [2, 2, 4], boxes)}
    assert as_arrays(infer(client, "b", ["predicted_iou"], **both))["predicted_iou"].shape == (2, 2)
    refused = infer(client, "b", **both)
    assert refused.status_code == 400
    assert "rows have masks of different shapes, [2, 20, 30] and [2, 48, 40]" in refused.json()["error"]


def test_scans_as_tensors(volumes):
    client, folder = volumes
    file = "BYTES", [1], [base64.b64encode(scan(3)).decode()]
    found = as_arrays(infer(client, "b", scan=file, keep_probabilities=("BOOL", [1], [True])))
    expected = segment(load(folder / "b"), scan(3), keep_probabilities=True, progress=False)
    np.testing.assert_array_equal(found["mask"][0], expected.class_mask)
    np.testing.assert_allclose(found["probabilities"][0], expected.probabilities.astype(np.float32), rtol=1e-6)
    assert found["labels"].tolist() == [["left", "right"]] and found["volumes_ml"].shape == (1, 2)
    image = nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(found["mask_file"][0, 0])))
    np.testing.assert_array_equal(np.asarray(image.dataobj), expected.mask)
    assert "probabilities" not in as_arrays(infer(client, "b", scan=file))
    refused = infer(client, "b", ["probabilities"], scan=file)
    assert refused.status_code == 400 and "this request has no output 'probabilities'" in refused.json()["error"]


def test_adapters_of_scans_come_and_go(volumes):
    client, folder = volumes
    service = client.app.state.service
    service.add_adapter(folder / "a", "c")
    answer = client.post("/v1/segment", data={"model": "c"}, files={"scan": scan(3)}).json()
    assert answer["adapter_digest"] == service.bank.read_file("a").digest and list(answer["volumes_ml"]) == ["tumour"]
    service.remove_adapter("c")
    assert client.post("/v1/segment", data={"model": "c"}, files={"scan": scan(3)}).status_code == 404

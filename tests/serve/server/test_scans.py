"""Scans over HTTP: one file for each channel, masks to correct and scribbles, in /v1/segment and /v2."""

import base64
import gzip
import json

import nibabel
import numpy as np
import pytest
from fastapi.testclient import TestClient

from inlay import load_adapter, segment
from inlay.serve.server.app import make_app
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.service import Service, open_bank
from inlay.tasks.volumes.formats import read_volume, write_volume
from inlay.tasks.volumes.strokes import Stroke, fill_scribble
from serve.banked import SAM
from serve.test_tasks import save_channels, save_volumes, scan

MOST = 2 * 22 * 18 * 12  # voxels of two channels
SHAPE = (22, 18, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_channels(save_volumes(tmp_path_factory.mktemp("volumes")))


@pytest.fixture(scope="module")
def client(folder):
    service = Service(open_bank(SAM, folder), ServiceConfig(max_voxels=MOST, max_body_mb=2.0))
    with TestClient(make_app(service), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def adapters(folder):
    return {name: load_adapter(folder / name) for name in ("a", "b", "two")}


def ask(client, model, files, **fields):
    return client.post("/v1/segment", data={"model": model, **fields}, files=files)


def read_file(data):
    return np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(data)).dataobj)


def read_answer(response):
    assert response.status_code == 200, response.text
    return read_file(base64.b64decode(response.json()["mask"]))


def make_mask(values, shape=SHAPE, affine=(-1.0, 1.0, 2.0, 1.0)):
    """A mask on the grid of `scan`, with a box of each value."""
    mask = np.zeros(shape, np.uint8)
    for i, value in enumerate(values):
        mask[2 + 8 * i : 8 + 8 * i, 4:9, 3:7] = value
    return nibabel.Nifti1Image(mask, np.diag(affine)).to_bytes()


def infer(client, model, tensors, outputs=("mask",)):
    """A request of the Open Inference Protocol: {name: (datatype, array, or file)}."""
    inputs = []
    for name, (datatype, data) in tensors.items():
        if datatype == "BYTES":
            inputs.append({"name": name, "datatype": datatype, "shape": [1], "data": [base64.b64encode(data).decode()]})
        else:
            array = np.asarray(data)
            inputs.append(
                {"name": name, "datatype": datatype, "shape": [1, *array.shape], "data": array.ravel().tolist()}
            )
    asked = {"inputs": inputs, "outputs": [{"name": name} for name in outputs]}
    return client.post(f"/v2/models/{model}/infer", json=asked)


def test_a_channel_comes_as_a_file_of_its_own(client, adapters):
    flair, t1 = scan(3), gzip.compress(scan(4))
    expected = segment(adapters["two"], {"t1": t1, "flair": flair}, progress=False).mask
    swapped = segment(adapters["two"], {"t1": flair, "flair": t1}, progress=False).mask
    assert not np.array_equal(expected, swapped)
    found = ask(client, "two", {"scan_t1": t1, "scan_flair": flair})  # by name, whatever the order
    assert np.array_equal(read_answer(found), expected)
    encoded = {f"scan_{name}": base64.b64encode(data).decode() for name, data in (("t1", t1), ("flair", flair))}
    assert np.array_equal(read_answer(client.post("/v1/segment", json={"model": "two", **encoded})), expected)
    answer = infer(client, "two", {"scan_t1": ("BYTES", t1), "scan_flair": ("BYTES", flair)})
    assert np.array_equal(np.reshape(answer.json()["outputs"][0]["data"], SHAPE), expected)
    both = nibabel.Nifti1Image(
        np.stack([read_scan(flair), read_scan(gzip.decompress(t1))], -1), np.diag([-1.0, 1, 2, 1])
    )
    both.header.set_xyzt_units("mm")
    assert np.array_equal(read_answer(ask(client, "two", {"scan": both.to_bytes()})), expected)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mgz", ".mgh"])
def test_a_scan_and_a_mask_may_be_in_other_formats(client, suffix, tmp_path):
    """NRRD, MetaImage and MGH give the mask that NIfTI gives, in /v1 and /v2; so do channels in two formats."""

    def convert(data):
        (tmp_path / "scan.nii").write_bytes(data)
        write_volume(tmp_path / f"scan{suffix}", *read_volume(tmp_path / "scan.nii"))
        return (tmp_path / f"scan{suffix}").read_bytes()

    expected = read_answer(ask(client, "a", {"scan": scan(3)}))
    assert np.array_equal(read_answer(ask(client, "a", {"scan": convert(scan(3))})), expected)
    answer = infer(client, "a", {"scan": ("BYTES", convert(scan(3)))})
    assert np.array_equal(np.reshape(answer.json()["outputs"][0]["data"], SHAPE) > 0, expected > 0)
    mask = make_mask([4])
    mended = read_answer(ask(client, "a", {"scan": scan(3), "mask": mask}, points="[[3, 4, 5]]"))
    again = ask(client, "a", {"scan": convert(scan(3)), "mask": convert(mask)}, points="[[3, 4, 5]]")
    assert np.array_equal(read_answer(again), mended)
    channels = {"scan_t1": scan(4), "scan_flair": scan(3)}
    mixed = channels | {"scan_t1": convert(scan(4))}
    assert np.array_equal(read_answer(ask(client, "two", mixed)), read_answer(ask(client, "two", channels)))


def read_scan(data):
    return np.asarray(nibabel.Nifti1Image.from_bytes(data).dataobj)


def test_each_adapter_says_which_files_it_takes(client):
    inputs = {tensor["name"]: tensor for tensor in client.get("/v2/models/two").json()["inputs"]}
    assert {"scan", "scan_flair", "scan_t1", "mask", "scribbles"} < set(inputs)
    assert inputs["scan"]["parameters"]["optional"] and "channel t1" in inputs["scan_t1"]["parameters"]["help"]
    plain = {tensor["name"] for tensor in client.get("/v2/models/a").json()["inputs"]}
    assert plain == set(inputs) - {"scan_flair", "scan_t1"}
    about = client.get("/page/about").json()
    assert set(about["own_inputs"]) == {"two"}
    assert {field["name"] for field in about["own_inputs"]["two"]} == set(inputs)


@pytest.mark.parametrize(
    ("model", "files", "words"),
    [
        ("two", {"scan_flair": scan(3)}, "the channels flair, t1: t1 is missing"),
        ("two", {"scan_flair": scan(3), "scan_t2": scan(3)}, "unknown field 'scan_t2'; a request has model and scan"),
        ("two", {}, "send scan, or scan_flair and scan_t1"),
        ("two", {"scan": scan(3), "scan_t1": scan(3)}, "comes as scan or as scan_t1; leave one out"),
        ("two", {"scan_flair": scan(3), "scan_t1": b"no scan"}, "scan_t1: the file given cannot be read"),
        ("two", {"scan_flair": scan(3), "scan_t1": gzip.compress(scan(4))[:-9]}, "scan_t1: the file given cannot be"),
        ("two", {"scan_flair": scan(3), "scan_t1": scan(4, slice_mm=3.0)}, "t1 of 'scan', is not on the grid"),
        ("two", {"scan_flair": scan(3), "scan_t1": scan(4, (22, 18, 11))}, "t1 of 'scan', is not on the grid"),
        ("two", {"scan_flair": scan(3), "scan_t1": scan(4, (22, 18, 13))}, "the channels have 9,900 voxels together"),
        ("a", {"scan_flair": scan(3)}, "unknown field 'scan_flair'"),
        ("a", {"scan": scan(3), "mask": b"no mask"}, "cannot be read as a scan"),
        ("a", {"scan": scan(3), "mask": make_mask([4], (9, 9, 9))}, "9 x 9 x 9 voxels and the scan 22 x 18 x 12"),
        ("a", {"scan": scan(3), "mask": make_mask([4], affine=(1, 1, 2, 1))}, "the mask is not on the grid"),
        ("a", {"scan": scan(3), "mask": make_mask([1])}, "the mask holds 1; it may hold 0 and"),
    ],
)  # fmt: skip
def test_files_that_are_refused(client, model, files, words):
    response = ask(client, model, files) if files else client.post("/v1/segment", data={"model": model})
    assert response.status_code == 400 and words in response.json()["error"]["message"]
    tensors = {name: ("BYTES", data) for name, data in files.items()}
    other = infer(client, model, tensors) if files else None
    assert other is None or other.status_code == 400


def test_the_sum_of_all_files_is_bounded(client):
    large = np.random.default_rng(0).integers(0, 255, 1_100_000, np.uint8).tobytes()
    assert ask(client, "two", {"scan_flair": large, "scan_t1": large}).status_code == 413


def test_a_mask_is_corrected_where_a_point_says_so(client, adapters):
    given, fields = make_mask([1, 2]), {"points": "[[20, 10, 5]]", "point_labels": "[1]"}
    expected = segment(adapters["b"], scan(3), mask=given, points=[(20, 10, 5, 1)], progress=False).mask
    before = read_scan(given)
    found = read_answer(ask(client, "b", {"scan": scan(3), "mask": gzip.compress(given)}, **fields))
    assert np.array_equal(found, expected) and found[20, 10, 5] == 1 and not np.array_equal(found, before)
    assert (found == before).mean() > 0.5  # what the point does not reach stays
    tensors = {"scan": ("BYTES", scan(3)), "mask": ("BYTES", given), "points": ("FP32", [[20, 10, 5]])}
    tensors["point_labels"] = ("INT32", [1])
    answer = infer(client, "b", tensors, ["mask_file"])
    assert np.array_equal(read_file(base64.b64decode(answer.json()["outputs"][0]["data"][0])), expected)
    again = {"scan": scan(3), "mask": base64.b64decode(answer.json()["outputs"][0]["data"][0])}
    assert ask(client, "b", again, **fields).status_code == 200  # an answer is a mask that can be sent


def test_scribbles_are_strokes_along_their_lines(client, adapters):
    lines = [[(3, 4, 5), (12, 4, 5), (12, 10, 5)], [(20, 2, 1), (20, 15, 1)]]
    strokes = [Stroke(fill_scribble(line), label) for line, label in zip(lines, (2, 0), strict=True)]
    expected = segment(adapters["b"], scan(3), points=[(1, 1, 1, 1)], strokes=strokes, progress=False).mask
    for stroke, label in zip(strokes, (2, 0), strict=True):
        assert (expected[tuple(stroke.voxels.T)] == label).all()
    fields = {"points": "[[1, 1, 1]]", "point_labels": "[1]", "scribble_labels": "[2, 0]"}
    fields["scribbles"] = json.dumps([[*place, i] for i, line in enumerate(lines) for place in line])
    assert np.array_equal(read_answer(ask(client, "b", {"scan": scan(3)}, **fields)), expected)
    many = [[x, y, 3, 22 * y + x] for y in range(5) for x in range(22)]
    answered = ask(client, "b", {"scan": scan(3)}, scribbles=json.dumps(many))
    assert answered.status_code == 200


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scribbles": "[[1, 1, 1]]"}, "scribbles must be numbers, any x 4"),
        ({"scribbles": "[[1, 1, 1, 1]]"}, "which line a place is of"),
        ({"scribbles": "[[1, 1, 1, 0.5]]"}, "which line a place is of"),
        ({"scribbles": "[[1, 1, 1, 0], [2, 2, 2, 1]]", "scribble_labels": "[1]"}, "2 scribbles and 1 scribble_labels"),
        ({"scribble_labels": "[1]"}, "0 scribbles and 1 scribble_labels"),
        ({"scribbles": "[[1, 1, 1, 0], [99, 2, 2, 0]]"}, "outside the scan"),
        ({"scribbles": "[[1, 1, 1, 0]]", "scribble_labels": "[7]"}, "7"),
        ({"scribbles": json.dumps([[1, 1, 1, i] for i in range(257)])}, "257 scribbles are too many"),
    ],
)
def test_scribbles_that_are_refused(client, fields, words):
    response = ask(client, "b", {"scan": scan(3)}, **fields)
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_as_many_points_as_there_may_be_need_no_scribbles(client):
    points = json.dumps([[1, 1, 1]] * 256)
    assert ask(client, "a", {"scan": scan(3)}, points=points).status_code == 200
    refused = ask(client, "a", {"scan": scan(3)}, points=points, scribbles="[[1, 1, 1, 0]]")
    assert refused.status_code == 400 and "1 scribbles are too many" in refused.text

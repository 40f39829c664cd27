"""What 3D Slicer's module for MONAI Label asks, by plain HTTP and by MONAI Label's own client."""

import gzip
import importlib.util
import json
import os
import re
import time
import warnings
from email import message_from_bytes
from pathlib import Path

import nibabel
import numpy as np
import pytest
from fastapi.testclient import TestClient

from inlay import segment
from inlay.serve.server.app import make_app
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.refusals import UnknownScan
from inlay.serve.server.service import Service, open_bank
from inlay.serve.server.uploads import FILES, LIFETIME_S, Uploads
from inlay.tasks.volumes.formats import read_volume, write_volume
from inlay.tasks.volumes.strokes import Stroke
from serve.banked import SAM
from serve.server.live import listen
from serve.test_tasks import save_volumes, scan

CLIENT = Path(os.environ.get("MONAILABEL_CLIENT", "monailabel_client")) / "monailabel/client/client.py"
KEYS = "one key, another"


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return open_bank(SAM, save_volumes(tmp_path_factory.mktemp("volumes")))


@pytest.fixture(scope="module")
def app(bank):
    return make_app(Service(bank, ServiceConfig(max_voxels=30_000, max_body_mb=2.0)))


@pytest.fixture(scope="module")
def client(app):
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def infer(client, model, params=None, file=None, **query):
    files = {} if file is None else {"file": ("/home/someone/scan.nii.gz", file)}
    return client.post(f"/infer/{model}", params=query, data={"params": json.dumps(params or {})}, files=files)


def read_parts(response):
    """The fields of an answer in several parts, read by Python's own parser of mail."""
    head = f"Content-Type: {response.headers['content-type']}\r\n\r\n".encode()
    parts = message_from_bytes(head + response.content).get_payload()
    return {part.get_param("name", header="content-disposition"): part for part in parts}


def read_mask(data):
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(data))


def class_mask(bank, name, **prompts):
    return segment(bank.load(name), scan(3), progress=False, **prompts).class_mask


def test_each_adapter_is_listed_for_the_whole_scan_for_clicks_and_for_scribbles(client):
    info = client.get("/info/").json()
    kinds = {name: model["type"] for name, model in info["models"].items()}
    listed = {"": "segmentation", "_clicks": "deepedit", "_scribbles": "scribbles"}
    assert kinds == {name + behind: kind for name in "ab" for behind, kind in listed.items()}
    assert info["models"]["b"]["labels"] == {"left": 1, "right": 2, "background": 0}
    assert info["models"]["a"]["labels"] == {
        "tumour": 1,
        "background": 0,
    }  # in Slicer's order, whatever the own numbers
    assert {model["dimension"] for model in info["models"].values()} == {3}
    assert info["models"]["a"]["config"] == {"largest": False}
    assert info["models"]["b"]["config"] == {"largest": False, "flips": False}
    assert info["labels"] == ["tumour", "left", "right", "background"] and "config" not in info
    assert len(info["models"]["a"]["adapter_digest"]) > 8


def test_the_mask_comes_as_slicer_reads_it(client, bank):
    response = infer(client, "a", {"result_extension": ".nii.gz", "client_id": None}, scan(3))
    parts = read_parts(response)
    said = json.loads(parts["params"].get_payload(decode=True))
    mask = read_mask(parts["image"].get_payload(decode=True))
    assert np.array_equal(np.asarray(mask.dataobj), class_mask(bank, "a")) and mask.get_data_dtype() == np.uint8
    assert np.allclose(mask.affine, np.diag([-1, 1, 2, 1]))
    assert said["label_names"] == {"tumour": 1} and said["model"] == "a"
    assert said["volumes_ml"]["tumour"] == pytest.approx(float((np.asarray(mask.dataobj) == 1).sum() * 2 / 1000))
    assert parts["image"].get_filename().endswith(".nii.gz") and "someone" not in response.text
    assert response.headers["x-inlay-adapter-digest"] == said["adapter_digest"]
    plain = infer(client, "a", None, scan(3), output="image")
    assert read_mask(plain.content).shape == (22, 18, 12) and plain.headers["x-inlay-model"] == "a"
    assert infer(client, "a", None, scan(3), output="json").json() == said


@pytest.mark.parametrize("suffix", [".nrrd", ".seg.nrrd", ".mha", ".mgz", ".nii"])
def test_the_mask_comes_in_the_format_that_is_asked_for(client, bank, suffix, tmp_path):
    """Slicer asks for .nrrd."""
    response = infer(client, "a", {"result_extension": suffix}, scan(3), output="image")
    file = tmp_path / f"mask{suffix}"
    assert f'{suffix}"' in response.headers["content-disposition"]
    file.write_bytes(response.content)
    mask, affine = read_volume(file, "label")
    assert np.array_equal(mask, class_mask(bank, "a")) and np.allclose(affine, np.diag([-1, 1, 2, 1]))


def test_without_simpleitk_slicer_gets_nifti(client, monkeypatch):
    monkeypatch.setattr("inlay.tasks.volumes.annotating.find_spec", lambda name: None)
    response = infer(client, "a", {"result_extension": ".nrrd"}, scan(3), output="image")
    assert '.nii.gz"' in response.headers["content-disposition"] and read_mask(response.content).shape == (22, 18, 12)


def test_a_format_that_masks_do_not_have_is_refused(client):
    response = infer(client, "a", {"result_extension": ".stl"}, scan(3))
    assert response.status_code == 400
    assert "unknown result_extension '.stl'; choose one of .nii.gz, .nii, .nrrd" in response.text


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".mgz"])
def test_a_scan_in_another_format_is_held_and_clicked(client, bank, suffix, tmp_path):
    nibabel.Nifti1Image.from_bytes(scan(3)).to_filename(tmp_path / "scan.nii")
    write_volume(tmp_path / f"scan{suffix}", *read_volume(tmp_path / "scan.nii"))
    sent = (tmp_path / f"scan{suffix}").read_bytes()
    made = client.put("/session/", files=[("files", (f"mri{suffix}", sent))]).json()
    params = {"right": [[3, 4, 5]], "roi": [-3.2, 9, 30, 4, 2, 8], "label": "left"}
    found = infer(client, "b", params, session_id=made["session_id"], output="image")
    expected = infer(client, "b", params, scan(3), output="image")
    assert np.array_equal(np.asarray(read_mask(found.content).dataobj), np.asarray(read_mask(expected.content).dataobj))


def test_clicks_are_voxels_of_the_file_that_was_sent(client, bank):
    params = {"left": [], "right": [[3, 4, 5]], "background": [[10, 2, 1]], "label": "right", "largest": True}
    found = infer(client, "b_clicks", params, scan(3), output="image")
    points = [(3, 4, 5, "right"), (10, 2, 1, 0)]
    expected = class_mask(bank, "b", points=points, largest=True)
    assert np.array_equal(np.asarray(read_mask(found.content).dataobj), expected)
    assert not np.array_equal(expected, class_mask(bank, "b", largest=True))
    params = {"foreground": [[3, 4, 5]], "background": [[10, 2, 1]], "label": "right", "largest": True}
    again = infer(client, "b", params, scan(3), output="image")
    assert np.array_equal(np.asarray(read_mask(again.content).dataobj), expected)
    region = infer(client, "b", {"roi": [-3.2, 9, 30, 4, 2, 8], "label": "left"}, scan(3), output="image")
    boxed = class_mask(bank, "b", boxes=[(0, 17, 2, 9, 4, 8, "left")])
    assert np.array_equal(np.asarray(read_mask(region.content).dataobj), boxed)


def paint(values, affine=(-1.0, 1.0, 2.0, 1.0)):
    """A label map on the grid of `scan`: {value: slices of its box}."""
    painted = np.zeros((22, 18, 12), np.uint8)
    for value, box in values.items():
        painted[box] = value
    return nibabel.Nifti1Image(painted, np.diag(affine)).to_bytes()


# What Slicer sends with scribbles: all segments in one label map, numbered in their order.
LABEL_INFO = [
    {"name": name, "id": i}
    for i, name in enumerate(["tumour", "left", "right", "background_scribbles", "foreground_scribbles"], start=1)
]
LEFT, RIGHT = np.s_[2:8, 4:9, 3:7], np.s_[12:18, 4:9, 3:7]
INSIDE, OUTSIDE = np.s_[4:12, 12, 5], np.s_[3:5, 5, 4]


def ask_scribbles(client, params, label, model="b_scribbles"):
    fields = {"params": json.dumps({"label_info": LABEL_INFO, **params})}
    return client.post(f"/infer/{model}", data=fields, files={"file": scan(3), "label": label})


@pytest.mark.parametrize("turned", [False, True])
def test_scribbles_correct_the_mask_under_them(client, bank, turned):
    label = paint({1: np.s_[19:, :2, :2], 2: LEFT, 3: RIGHT, 5: INSIDE, 4: OUTSIDE})
    if turned:  # the same voxels, counted from the other end
        array = np.asarray(nibabel.Nifti1Image.from_bytes(label).dataobj)[::-1]
        turn = nibabel.affines.from_matvec(np.diag([1.0, 1, 2]), [-21, 0, 0])
        label = nibabel.Nifti1Image(array, turn).to_bytes()
    response = ask_scribbles(client, {"selected_label_name": "left", "roi": []}, label)
    parts = read_parts(response)
    found = np.asarray(read_mask(parts["image"].get_payload(decode=True)).dataobj)
    given = np.zeros((22, 18, 12), np.uint8)
    given[RIGHT] = 2
    given[LEFT] = given[INSIDE] = 1
    given[OUTSIDE] = 0
    inside, outside = np.array([(x, 12, 5) for x in range(4, 12)]), np.array([(3, 5, 4), (4, 5, 4)])
    expected = class_mask(bank, "b", strokes=[Stroke(inside, "left"), Stroke(outside, 0)], mask=given)
    assert np.array_equal(found, expected == 1)  # of the class alone, as Slicer puts it into its segment
    assert found[INSIDE].all() and not found[OUTSIDE].any()
    said = json.loads(parts["params"].get_payload(decode=True))
    assert said["label_names"] == {"left": 1} and list(said["volumes_ml"]) == ["left"]


def test_a_label_map_without_scribbles_is_a_mask_to_correct(client, bank):
    label, given = paint({1: LEFT, 2: RIGHT}), np.zeros((22, 18, 12), np.uint8)
    given[LEFT], given[RIGHT] = 1, 2
    params = {"left": [[10, 14, 9]]}
    fields = {"params": json.dumps(params)}
    found = client.post(
        "/infer/b_clicks?output=image", data=fields, files={"file": scan(3), "label": gzip.compress(label)}
    )
    expected = class_mask(bank, "b", points=[(10, 14, 9, "left")], mask=given)
    assert np.array_equal(np.asarray(read_mask(found.content).dataobj), expected)


@pytest.mark.parametrize(
    ("params", "label", "words"),
    [
        ({}, paint({2: LEFT}), "scribbles and a roi need a label: one of left, right; got None"),
        ({"selected_label_name": "tumour"}, paint({2: LEFT}), "one of left, right; got 'tumour'"),
        ({"selected_label_name": "left"}, paint({9: LEFT}), "the label map holds 9, which label_info does not name"),
        ({"selected_label_name": "left"}, paint({2: LEFT}, (1, 1, 2, 1)), "is not on the grid of the scan"),
        ({"selected_label_name": "left"}, scan(0), "which label_info does not name"),
        ({"selected_label_name": "left"}, scan(0, (9, 9, 9)), "9 x 9 x 9 voxels and the scan 22 x 18 x 12"),
        ({"selected_label_name": "left"}, b"no label map", "cannot be read as a scan"),
        ({"label_info": [1]}, paint({2: LEFT}), "label_info must be a list of"),
        ({"label_info": {"id": 1}}, paint({2: LEFT}), "label_info must be a list of"),
        ({"label_info": [{"name": "left", "id": "1"}]}, paint({2: LEFT}), "label_info must be a list of"),
    ],
)
def test_label_maps_that_are_refused(client, params, label, words):
    response = ask_scribbles(client, params, label)
    assert response.status_code == 400 and words in response.text


def test_itk_counts_voxels_as_clicks_do(client, bank, tmp_path):
    """Slicer writes, reads and counts through ITK."""
    itk = pytest.importorskip("SimpleITK", reason="no SimpleITK to write a scan with, as Slicer would")
    (tmp_path / "scan.nii").write_bytes(scan(3))
    image = itk.ReadImage(str(tmp_path / "scan.nii"))
    itk.WriteImage(image, str(tmp_path / "saved.nii.gz"))
    sent = (tmp_path / "saved.nii.gz").read_bytes()
    (tmp_path / "mask.nii.gz").write_bytes(infer(client, "b", {"right": [[3, 4, 5]]}, sent, output="image").content)
    mask = itk.ReadImage(str(tmp_path / "mask.nii.gz"))
    expected = class_mask(bank, "b", points=[(3, 4, 5, "right")])
    assert np.array_equal(itk.GetArrayFromImage(mask).transpose(2, 1, 0), expected)  # [i, j, k] by GetPixel
    for place in ((0, 0, 0), (21, 0, 3), (3, 4, 5)):
        assert np.allclose(mask.TransformIndexToPhysicalPoint(place), image.TransformIndexToPhysicalPoint(place))


def test_a_scan_that_was_sent_once_is_asked_about_again(client):
    made = client.put("/session/", files=[("files", ("mri.nii.gz", gzip.compress(scan(3))))]).json()
    key = made["session_id"]
    assert client.get(f"/session/{key}").json() == made["session_info"] and "mri" not in json.dumps(made)
    first = infer(client, "a", session_id=key, output="image")
    put = client.put(
        "/datastore/?image=MRHead", data={"params": '{"client_id": "me"}'}, files={"file": ("x.nii", scan(3))}
    )
    assert put.json() == {"image": "MRHead"}
    second = infer(client, "a", {"client_id": "me"}, image="MRHead", output="image")
    assert first.content == second.content
    other = infer(client, "a", {"client_id": "somebody else"}, image="MRHead")
    assert other.status_code == 404 and "no scan of that name from this client" in other.text
    assert client.delete(f"/session/{key}").status_code == 200
    for response in (client.get(f"/session/{key}"), infer(client, "a", session_id=key)):
        assert response.status_code == 404 and "send the scan again" in response.text
    assert client.get("/datastore/?output=all").json() == {"objects": {}}
    assert client.get("/train/?check_if_running=true").status_code == 404  # means that nothing is trained


@pytest.mark.parametrize(
    ("model", "params", "status", "words"),
    [
        ("c", {}, 404, "unknown adapter 'c'"),
        ("c_clicks", {}, 404, "unknown adapter 'c_clicks'"),
        ("b", {"foreground": [[1, 1, 1]]}, 400, "need a label: one of left, right; got None"),
        ("b", {"middle": [[1, 1, 1]]}, 400, "adapter 'b' has no class 'middle' to click at; it has left, right"),
        ("b", {"left": [[1, 1]]}, 400, "the clicks of 'left' must be voxels"),
        ("b", {"left": [[[1, 2], 3, 4]]}, 400, "the clicks of 'left' must be voxels"),
        ("b", {"left": [[100, 1, 1]]}, 400, "lies outside the scan of 22 x 18 x 12 voxels"),
        ("b", {"left": [[1, 1, 1]] * 300}, 400, "256 points at most"),
        ("b", {"roi": [1, 2], "label": "left"}, 400, "roi must be six numbers"),
        ("b", [1], 400, "params must be a JSON object"),
    ],
)
def test_requests_that_are_refused(client, model, params, status, words):
    response = infer(client, model, params, scan(3))
    assert response.status_code == status and words in response.text


def test_files_that_are_refused(client):
    assert "a request has a scan" in infer(client, "a").text
    several = client.post("/infer/a", files=[("file", scan(3)), ("label", scan(3)), ("label", scan(3))])
    assert several.status_code == 400 and "label must be one file" in several.text
    assert "unknown output 'dicom_seg'" in infer(client, "a", None, scan(3), output="dicom_seg").text
    for data, words in ((b"x", "cannot be read as a scan"), (scan(3, (40, 40, 40)), "the limit is 30,000")):
        response = client.put("/session/", files={"files": data})
        assert response.status_code == 400 and words in response.text
    two = client.put("/session/", files=[("files", scan(3)), ("files", scan(3))])
    assert two.status_code == 400 and "2 files were sent" in two.text
    assert client.put("/session/", data={"files": "text"}).status_code == 400
    assert client.put("/session/", files={"files": b"0" * 2_000_001}).status_code == 413
    label = client.put("/datastore/label?image=x", files={"label": scan(3)})
    assert label.status_code == 403 and "keeps no labels" in label.text


def test_a_key_is_the_password(bank):
    with TestClient(make_app(Service(bank, ServiceConfig()), api_key=KEYS)) as client:
        assert client.get("/info/").status_code == 401 and client.get("/auth/").json() == {"enabled": True}
        assert client.get("/auth/token/valid").status_code == 401
        wrong = client.post("/auth/token", data={"username": "me", "password": "guess"})
        assert wrong.status_code == 403 and "guess" not in wrong.text
        token = client.post("/auth/token", data={"username": "me", "password": "another"}).json()
        headers = {"Authorization": f"{token['token_type']} {token['access_token']}"}
        assert client.get("/info/", headers=headers).status_code == 200
        assert client.get("/auth/token/valid", headers=headers).status_code == 200


def test_uploads_are_bounded(monkeypatch):
    uploads = Uploads(100)
    for i in range(9):
        uploads.put(i, bytes(100))
    uploads.get(1, "file")
    uploads.put(9, bytes(100))
    assert uploads.size == 800
    for gone in (0, 2):
        with pytest.raises(UnknownScan, match="holds no file; send the scan again"):
            uploads.get(gone, "file")
    assert len(uploads.get(1, "file")) == 100
    for i in range(FILES + 1):
        uploads.put(i, b"1")
    assert uploads.size == FILES
    now = time.monotonic()
    monkeypatch.setattr("inlay.serve.server.uploads.time.monotonic", lambda: now + LIFETIME_S + 1)
    with pytest.raises(UnknownScan):
        uploads.get(FILES, "file")
    assert uploads.size == 0


@pytest.fixture(scope="module")
def client_module():
    """MONAI Label's own client: the file that Slicer's module brings too."""
    if not CLIENT.is_file():
        pytest.skip("no MONAI Label: pip install --no-deps --target DIR monailabel; set MONAILABEL_CLIENT=DIR")
    pytest.importorskip("cgi", reason="MONAI Label's client needs Python's cgi, which Python 3.13 lacks")
    spec = importlib.util.spec_from_file_location("monailabel_client", CLIENT)
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # cgi
        spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the client leaves files and connections open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_client_of_monai_label(client_module, bank, tmp_path):
    """What Slicer's module does: fetch info, send the volume, segment all of it, then click."""
    file = tmp_path / "volume.nii.gz"
    file.write_bytes(gzip.compress(scan(3)))
    app = make_app(Service(bank, ServiceConfig()), api_key=KEYS)
    with listen(app) as (host, port):

        def connect():
            """A client for each request, as Slicer's module makes them: they spoil the headers that they keep."""
            client = client_module.MONAILabelClient(f"http://{host}:{port}", str(tmp_path), "user-xyz")
            assert client.auth_enabled()
            client.update_auth(client.auth_token("me", "one key"))
            assert client.auth_valid_token()
            return client

        assert not connect().train_status(check_if_running=True) and connect().datastore() == {"objects": {}}
        models = connect().info()["models"]
        connect().upload_image(str(file), "MRHead")
        path, params = connect().infer("b", "MRHead", {"result_extension": ".nrrd"})
        assert re.fullmatch(r"[0-9a-f]{16}\.nii\.gz", Path(path).name)
        assert {**params["label_names"], "background": 0} == models["b"]["labels"]
        assert np.array_equal(np.asarray(nibabel.load(path).dataobj), class_mask(bank, "b"))
        session = connect().create_session(str(file))["session_id"]
        assert connect().get_session(session)
        clicks = {"left": [], "right": [[3, 4, 5]], "label": "right"}
        path, _ = connect().infer("b_clicks", "MRHead", clicks, session_id=session)
        expected = class_mask(bank, "b", points=[(3, 4, 5, "right")])
        assert np.array_equal(np.asarray(nibabel.load(path).dataobj), expected)
        label = tmp_path / "scribbles.nii.gz"
        label.write_bytes(gzip.compress(paint({2: LEFT, 5: INSIDE})))
        painted = {"label_info": LABEL_INFO, "selected_label_name": "left", "roi": []}
        path, params = connect().infer("b_scribbles", "MRHead", painted, str(label), session_id=session)
        found = np.asarray(nibabel.load(path).dataobj)
        assert found[INSIDE].all() and found.max() == 1 and params["label_names"] == {"left": 1}
        path, _ = connect().infer("a", "", {}, file=str(file))
        assert np.array_equal(np.asarray(nibabel.load(path).dataobj), class_mask(bank, "a"))
        connect().remove_session(session)
        with pytest.raises(client_module.MONAILabelClientException) as failed:
            connect().infer("nobody", "MRHead", {})
        assert "unknown adapter" in failed.value.msg

"""Adapters that clients load and unload: vLLM's fields, statuses and sentences, and which folders are out of reach."""

import json
import shutil

import pytest

from inlay import BadInput, load_base, load_processor
from inlay.adapters.file import CONFIG, METRICS, WEIGHTS
from inlay.files.tensor_header import encode_header, sign
from inlay.serve.server.adapters import LoadingRules
from inlay.serve.server.answers import make_error
from inlay.serve.server.refusals import DoesNotFit
from serve.banked import GPT2, VIT, save
from serve.server.clients import ask, open_client

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A served folder, a root that clients may load from, and what is next to it."""
    place = tmp_path_factory.mktemp("places")
    save(VIT, ("lora", 2), place / "served" / "a")
    save(VIT, ("lora", 2), place / "root" / "b", 2)
    save(VIT, ("lora", 2), place / "root" / "inner" / "c", 3)
    save(GPT2, ("lora", 2), place / "root" / "text")
    shutil.copytree(place / "served" / "a", place / "root-secret" / "a")
    (place / "root" / "out").symlink_to(place / "root-secret" / "a")
    (place / "root" / "within").symlink_to(place / "root" / "b")
    damaged = shutil.copytree(place / "root" / "b", place / "root" / "damaged") / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    return place


@pytest.fixture(scope="module")
def client(places):
    rules = LoadingRules.from_options([str(places / "root")], False)
    with open_client(places / "served", loading=rules) as client:
        yield client


def load(client, name, path, **more):
    return client.post(LOAD, json={"lora_name": name, "lora_path": str(path), **more})


def test_an_adapter_is_loaded_and_unloaded_as_by_vllm(client, places):
    loaded = load(client, "x", places / "root" / "b")
    assert loaded.status_code == 200 and loaded.text == "Success: LoRA adapter 'x' added successfully."
    first = ask(client, "x").json()["adapter_digest"]
    again = load(client, "x", "inner/c")
    assert again.status_code == 400 and "'x' has already been loaded" in again.json()["error"]["message"]
    assert ask(client, "x").json()["adapter_digest"] == first
    assert load(client, "x", "inner/c", load_inplace=True).status_code == 200
    assert ask(client, "x").json()["adapter_digest"] != first
    gone = client.post(UNLOAD, json={"lora_name": "x", "lora_int_id": 1})
    assert gone.status_code == 200 and gone.text == "Success: LoRA adapter 'x' removed successfully."
    assert ask(client, "x").status_code == 404
    assert client.post(UNLOAD, json={"lora_name": "x"}).status_code == 404


def test_one_that_does_not_fit_is_refused_and_leaves_what_was_there(client, places):
    load(client, "x", "b", load_inplace=True)
    first = ask(client, "x").json()["adapter_digest"]
    for path, words in (("text", "is for text-generation"), ("damaged", "truncated")):
        for name, in_place in (("y", False), ("x", True)):
            refused = load(client, name, path, load_inplace=in_place)
            assert refused.status_code == 409 and words in refused.json()["error"]["message"], refused.text
            assert str(places) not in refused.text
    assert ask(client, "x").json()["adapter_digest"] == first and ask(client, "y").status_code == 404
    client.post(UNLOAD, json={"lora_name": "x"})


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("b", 200),
        ("./inner/../b", 200),
        ("within", 200),
        ("none", 404),
        ("inner/none", 404),
        ("out", 403),
        ("../root-secret/a", 403),
        ("../served/a", 403),
        ("../none", 403),
        ("/etc", 403),
        ("/none", 403),
        ("~", 404),
        ("b\0", 403),
        ("x" * 5000, 404),
        ("user/name", 404),
    ],
)
def test_only_what_is_in_a_root_is_loaded(client, path, status):
    """A folder outside is refused alike, whether or not it exists."""
    answer = load(client, "x", path)
    assert answer.status_code == status, answer.text
    client.post(UNLOAD, json={"lora_name": "x"})


@pytest.mark.parametrize(
    "body",
    [{}, {"lora_name": "x"}, {"lora_name": "", "lora_path": "b"}, {"lora_name": 1, "lora_path": "b"}, [],
     {"lora_name": "a/b", "lora_path": "b"}, {"lora_name": "x\n", "lora_path": "b"},
     {"lora_name": "x" * 200, "lora_path": "b"}, {"lora_name": "x", "lora_path": ["b"]}],
)  # fmt: skip
def test_malformed_requests(client, body):
    assert client.post(LOAD, json=body).status_code == 400
    assert client.post(UNLOAD, json=[]).status_code == 400


def test_a_page_of_another_site_cannot_load(client):
    """A browser sends such a type without asking the server first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        body = b'{"lora_name": "x", "lora_path": "b"}'
        assert client.post(LOAD, content=body, headers={"Content-Type": kind}).status_code == 400


def test_without_leave_there_is_no_such_route(places):
    assert LoadingRules.from_options([], False) is None
    with open_client(places / "served") as client:
        assert load(client, "x", places / "root" / "b").status_code == 404
        assert client.post(UNLOAD, json={"lora_name": "a"}).status_code == 404
        assert ask(client, "a").status_code == 200


def test_ids_of_the_hub_need_leave_of_their_own(places, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "inlay.serve.server.adapters.download", lambda *parts: asked.append(parts) or places / "root" / "b"
    )
    shutil.copytree(places / "root" / "b", tmp_path / "user" / "name")
    monkeypatch.chdir(tmp_path)  # a folder of that name in the working directory is no root
    rules = LoadingRules.from_options([], True)
    with open_client(places / "served", loading=rules) as client:
        assert load(client, "x", "user/name").status_code == 200
        assert load(client, "y", "user/name/inner").status_code == 200
        assert asked == [("user/name", None), ("user/name", None, "inner")]
        for path in ("../x", "user/..", "/user/name", "./user/name", "a/b/c/d", "-"):
            assert load(client, "z", path).status_code == 403
        assert len(asked) == 2


def _rewrite(folder, change):
    """Change the header of the file with the tensors, and sign it again."""
    data = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    record = json.loads(header["__metadata__"]["inlay"])
    change(record)
    header["__metadata__"]["inlay"] = json.dumps(record)
    (folder / WEIGHTS).write_bytes(sign(encode_header(header) + data[end:]))


FAULTS = {
    "truncated": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]),
    "a changed byte": lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9] + b"123456789"),
    "empty": lambda f: (f / WEIGHTS).write_bytes(b""),
    "a pointer": lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "a pickle": lambda f: (f / WEIGHTS).write_bytes(b"\x80\x04" + bytes(99)),
    "only a pickle": lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
    "no config": lambda f: (f / CONFIG).unlink(),
    "no JSON": lambda f: (f / CONFIG).write_text("{"),
    "another config": lambda f: (f / CONFIG).write_text((f / CONFIG).read_text().replace('"r": 2', '"r": 3')),
    "a link out": lambda f: [(f / METRICS).unlink(missing_ok=True), (f / METRICS).symlink_to("/etc/hostname")],
    "a newer format": lambda f: _rewrite(f, lambda record: record.update(format=99)),
    "another base": lambda f: _rewrite(f, lambda record: record["base"].update(name=f"{f}/base", sketch={})),
    "another output": lambda f: _rewrite(f, lambda record: record.update(golden=[1.0] * 3)),
    "not an adapter": lambda f: [path.unlink() for path in f.iterdir()],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_refusal_tells_where_an_adapter_is(client, places, tmp_path_factory, fault):
    """Whatever characters the path has."""
    root = tmp_path_factory.mktemp("x") / "al's (hidden) place" / "on disk"
    shutil.copytree(places / "root" / "b", root / "faulty")
    FAULTS[fault](root / "faulty")
    service = client.app.state.service
    with pytest.raises(DoesNotFit) as found:
        service.add_adapter(root / "faulty", "faulty")
    answer = make_error("/v1/classify", 409, service.hide_base(str(found.value))).body.decode()
    assert "faulty" in answer and not any(
        word in answer for word in ("hidden", "place", "disk", "tmp", "pytest", "/etc")
    )


def test_no_answer_tells_where_the_base_is(places, tmp_path):
    base = tmp_path / "al's (hidden) place" / "my base"
    load_base(VIT, labels=["cat", "dog", "emu"]).save_pretrained(base)
    load_processor(VIT).save_pretrained(base)
    rules = LoadingRules.from_options([str(places / "root")], False)
    with open_client(places / "served", base=str(base), loading=rules) as client:
        answers = [
            ask(client, "a"),
            client.get("/v1/models"),
            client.get("/page/about"),
            load(client, "x", "text"),
            load(client, "x", "none"),
        ]
    assert answers[0].json()["base"] == "my base"
    for answer in answers:
        assert not any(word in answer.text for word in ("hidden", "place", "tmp", "pytest")), answer.text


def test_a_root_is_a_folder(places):
    with pytest.raises(BadInput, match="is not a folder"):
        LoadingRules.from_options([str(places / "none")], False)

"""Push and pull through huggingface_hub's own client, over HTTP, against a Hub here that fails when asked to."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import logging as hub_logging
from PIL import Image

from command import run
from hub.client import TOKEN, online
from hub.server import oid
from inlay import InlayError, load_adapter, pull_adapter, push_adapter, read_adapter
from inlay.adapters.card import make_card as write_card
from inlay.adapters.file import CARD, CONFIG, METRICS, ORIGIN, WEIGHTS
from inlay.adapters.hub import repository as module
from inlay.adapters.hub.index import write_index

FILES = {CONFIG, WEIGHTS, METRICS, CARD, "training.png"}


@pytest.fixture
def hub(tmp_path):
    with online(tmp_path / "cache") as server:
        yield server


@pytest.fixture(scope="session")
def trained(make, processor, tmp_path_factory):
    """An adapter with a history, so with a curve."""
    from inlay import save_adapter

    history = [{"step": s, "train_loss": 1 / s, "loss": 1.1 / s, "accuracy": 1 - 1 / s} for s in (10, 20, 30)]
    metrics = {"validation": {"accuracy": 0.9, "loss": 0.4}, "dataset": "builtin:digits", "history": history}
    model = make(seed=5)
    return model, save_adapter(model, tmp_path_factory.mktemp("pushed") / "zoo", processor=processor, metrics=metrics)


@pytest.fixture
def adapter(trained, tmp_path):
    return shutil.copytree(trained[1], tmp_path / "zoo")


def served(hub, repo="ann/zoo"):
    return hub.repos[repo].commits[hub.repos[repo].head]


def cached(tmp_path):
    """What would be loaded from the cache: files under a snapshot."""
    return list((tmp_path / "cache").rglob("snapshots/*/*"))


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# there and back


def test_what_is_pushed_comes_back_and_computes_the_same(hub, trained, adapter, outputs, tmp_path, monkeypatch):
    pushed = push_adapter(adapter, "ann/zoo")
    calls = len(hub.calls)
    assert {file.path for file in pushed.files} == FILES == served(hub).keys() - {".gitattributes"}
    assert hub.repos["ann/zoo"].messages == ["initial", "Push zoo with inlay"]  # the Hub's own, and one
    assert pushed.commit == hub.repos["ann/zoo"].head and calls <= 10, hub.calls
    loaded = load_adapter("ann/zoo")
    torch.testing.assert_close(outputs(loaded.model), outputs(trained[0]), rtol=0, atol=1e-6)
    assert loaded.verified and loaded.file.origin == {"repo": "ann/zoo", "commit": pushed.commit}
    assert loaded.file.name == "ann/zoo"
    assert (loaded.file.folder / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    assert len(hub.calls) - calls <= 2 + 2 * len(FILES)
    before = len(hub.calls)
    load_adapter("ann/zoo")
    assert len(hub.calls) - before == 1, "what is in the cache is not fetched again"
    offline(monkeypatch)
    torch.testing.assert_close(outputs(load_adapter("ann/zoo").model), outputs(loaded.model), rtol=0, atol=0)


def test_a_name_on_the_hub_is_that_of_an_adapter_or_of_a_model(hub, adapter, tmp_path):
    from inlay import load_base
    from inlay.adapters.hub.fetch import fetch_if_adapter

    push_adapter(adapter, "ann/zoo")
    load_base("builtin:vit-tiny").save_pretrained(tmp_path / "base")
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("ann/base")
    api.upload_folder(repo_id="ann/base", folder_path=tmp_path / "base")
    assert (fetch_if_adapter("ann/zoo") / CONFIG).is_file()
    assert fetch_if_adapter("ann/base") is None
    assert not [path for path in cached(tmp_path) if path.name == "model.safetensors"], "its weights are not needed"
    with pytest.raises(InlayError, match="there is no folder 'ann/none' here, and as a Hub id it fails"):
        fetch_if_adapter("ann/none")
    with pytest.raises(InlayError, match="does not exist; give the folder of an adapter or of a model"):
        fetch_if_adapter(tmp_path / "none")
    with pytest.raises(InlayError, match="neither an adapter nor a model"):
        fetch_if_adapter(tmp_path)


def test_an_older_commit_gives_the_older_weights(hub, adapter, make, processor, outputs):
    from inlay import save_adapter

    first = push_adapter(adapter, "ann/zoo")
    old = outputs(load_adapter(adapter).model)
    save_adapter(make(seed=8), adapter, processor=processor)
    second = push_adapter(adapter, "ann/zoo")
    assert first.commit != second.commit
    torch.testing.assert_close(outputs(load_adapter("ann/zoo", revision=first.commit).model), old, rtol=0, atol=0)
    assert load_adapter("ann/zoo").file.origin["commit"] == second.commit
    with pytest.raises(InlayError, match="no such revision"):
        load_adapter("ann/zoo", revision="v9")


def test_an_unchanged_adapter_makes_no_commit_and_sends_nothing(hub, adapter):
    first = push_adapter(adapter, "ann/zoo")
    before = len(hub.calls)
    assert push_adapter(adapter, "ann/zoo").commit == first.commit
    assert not any(call.startswith("PUT") or "/commit/" in call for call in hub.calls[before:])


def test_pull_copies_it_and_notes_the_commit(hub, adapter, tmp_path):
    pushed = push_adapter(adapter, "ann/zoo")
    pulled = pull_adapter("ann/zoo", tmp_path / "mine")
    origin = json.loads((pulled.folder / ORIGIN).read_text())
    assert origin["commit"] == pulled.commit == pushed.commit and origin["repo"] == "ann/zoo"
    assert origin["sha256"][WEIGHTS] == oid((adapter / WEIGHTS).read_bytes(), True)
    assert {path.name for path in pulled.folder.iterdir()} == FILES | {ORIGIN}
    assert not any(path.is_symlink() for path in pulled.folder.iterdir())
    assert read_adapter(pulled.folder).origin["commit"] == pushed.commit
    pull_adapter("ann/zoo", tmp_path / "mine")  # again, over it
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    with pytest.raises(InlayError, match="exists and is not an adapter"):
        pull_adapter("ann/zoo", tmp_path / "thesis")
    assert (tmp_path / "thesis" / "thesis.txt").read_text() == "mine"
    assert push_adapter(pulled.folder, "ann/copy").commit and ORIGIN not in served(hub, "ann/copy")


def test_a_folder_of_adapters_goes_and_comes_whole(hub, adapter, tmp_path, outputs):
    many = tmp_path / "many"
    shutil.copytree(adapter, many / "one")
    shutil.copytree(adapter, many / "two")
    (many / "notes.txt").write_text("mine")
    pushed = push_adapter(many, "ann/many")
    assert len(pushed.files) == 2 * len(FILES) + 3 and "notes.txt" not in served(hub, "ann/many")
    card = served(hub, "ann/many")["two/README.md"][0].decode()
    assert 'load_adapter("ann/many/two")' in card and '(base, "ann/many", subfolder="two")' in card
    loaded = load_adapter("ann/many/two")
    assert loaded.file.name == "ann/many/two" and loaded.file.origin["commit"] == pushed.commit
    assert not any("/one/" in call for call in hub.calls if "resolve" in call), "the other is not fetched with it"
    shutil.copytree(adapter, tmp_path / "here" / "own")
    pull_adapter("ann/many", tmp_path / "here")
    rows = json.loads((tmp_path / "here" / "index.json").read_text())
    assert [row["name"] for row in rows] == ["one", "own", "two"]
    assert (tmp_path / "here" / "one" / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()
    with pytest.raises(InlayError, match="ann/many on the Hub is not an adapter"):
        load_adapter("ann/many")
    with pytest.raises(InlayError, match="not an adapter; name another repository"):
        push_adapter(adapter, "ann/many")


def test_the_cards_two_ways_to_load_run_from_the_hub(hub, trained, adapter, outputs, tmp_path, capsys, monkeypatch):
    """As a reader of the repository's page would: both snippets, with nothing put in their place."""
    push_adapter(adapter, "ann/zoo")
    card = served(hub)[CARD][0].decode()
    assert "FOLDER" not in card and "![Loss and scores by step](training.png)" in card
    ours, plain = re.findall(r"```python\n(.*?)```", card, re.S)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    exec(ours, {})
    assert "label" in capsys.readouterr().out
    found = {}
    exec(plain, found)
    torch.testing.assert_close(outputs(found["model"]), outputs(trained[0]), rtol=0, atol=1e-6)


def test_the_header_is_what_the_hub_displays_and_finds_it_by(hub, adapter):
    file = read_adapter(adapter)
    record = {**file.record, "base": {**file.record["base"], "name": "google/vit-base", "revision": "a" * 40}}
    text = write_card(record, file.config, {**file.metrics, "dataset": "ann/pets", "license": "mit"})
    head = ModelCard(text).data
    assert (head.library_name, head.base_model, head.base_model_relation) == ("peft", "google/vit-base", "adapter")
    assert (head.license, head.datasets, head.pipeline_tag) == ("mit", ["ann/pets"], "image-classification")
    shown = {(r.dataset_type, r.dataset_split, r.metric_type): r.metric_value for r in head.eval_results}
    assert shown == {("ann/pets", "validation", "accuracy"): 0.9, ("ann/pets", "validation", "loss"): 0.4}
    assert f'revision="{"a" * 40}"' in text and "https://huggingface.co/datasets/ann/pets" in text
    assert "attached to `fc1`, `fc2`, `k_proj`" in text and "arXiv:2106.09685" in text and "## Limits" in text
    here = {**file.metrics, "dataset": "/data/me/pets", "training": {"dataset": "/data/me/pets"}}
    assert "/data/me" not in write_card(file.record, file.config, here), "a path of this machine is nobody's business"


# what is sent


def test_a_dry_run_says_what_would_go_and_asks_nobody(hub, adapter):
    (adapter / "optimizer.pt").write_bytes(b"pickle")
    planned = push_adapter(adapter, "ann/zoo", dry_run=True)
    assert planned.commit is None and hub.calls == [] and hub.repos == {}
    assert {file.path for file in planned.files} == FILES
    assert planned.files == push_adapter(adapter, "ann/zoo").files
    sent = next(file for file in planned.files if file.path == WEIGHTS)
    assert (sent.bytes, sent.sha256) == (
        (adapter / WEIGHTS).stat().st_size,
        oid((adapter / WEIGHTS).read_bytes(), True),
    )
    for file in planned.files:
        assert file.sha256 == oid(served(hub)[file.path][0], True)
        assert re.search(rf"{re.escape(file.path)} +{file.bytes:,} bytes  sha256 {file.sha256}", str(planned))


def test_private_is_private_and_a_public_repository_stays_untouched(hub, adapter, monkeypatch):
    push_adapter(adapter, "ann/own", private=True)
    assert hub.repos["ann/own"].private
    push_adapter(adapter, "ann/own")
    push_adapter(adapter, "ann/open")
    with pytest.raises(InlayError, match="is public already, but private was asked for"):
        push_adapter(adapter, "ann/open", private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    with pytest.raises(InlayError, match="the Hub has no 'ann/own', or not for you"):
        load_adapter("ann/own")


def damaged(adapter):
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-9])


def edited(adapter):
    (adapter / CONFIG).write_text((adapter / CONFIG).read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))


def leaking(adapter):
    (adapter / METRICS).write_text(json.dumps({"tracker": {"key": TOKEN}}))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (damaged, "truncated"),
        (edited, "is not what was saved with the weights"),
        (leaking, "metrics.json holds what looks like a Hub token"),
        (lambda adapter: (adapter / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
        (lambda adapter: (adapter / CONFIG).unlink(), "holds no adapter"),
    ],
)
def test_only_a_whole_adapter_is_sent(hub, adapter, change, sentence):
    change(adapter)
    with pytest.raises(InlayError, match=sentence) as error:
        push_adapter(adapter, "ann/zoo")
    assert hub.calls == [] and TOKEN not in str(error.value)


def test_a_repository_with_something_else_is_left_alone(hub, adapter):
    push_adapter(adapter, "ann/zoo")
    hub.repos["ann/zoo"].add({"config.json": (b"{}", False), "model.safetensors": (b"..", True)}, "a model")
    with pytest.raises(InlayError, match=r"ann/zoo holds config\.json and more, not an adapter"):
        push_adapter(adapter, "ann/zoo")


@pytest.mark.parametrize("name", ["zoo", "ann/zoo/more", "ann/../zoo", "", "ann/zoo.git"])
def test_a_bad_name_is_refused_before_anything(hub, adapter, name):
    with pytest.raises(InlayError, match="give user/name"):
        push_adapter(adapter, name)
    assert hub.calls == []


@pytest.mark.parametrize("revision", ["", " ", "../..", "main/../../x"])
def test_a_bad_revision_is_refused_before_anything(hub, tmp_path, revision):
    with pytest.raises(InlayError, match="is no branch, tag or commit of ann/zoo"):
        pull_adapter("ann/zoo", tmp_path / "copy", revision=revision)
    assert hub.calls == [] and not (tmp_path / "copy").exists()


def test_a_pulled_folder_of_adapters_replaces_no_readme(hub, adapter, tmp_path):
    push_adapter(adapter.parent, "ann/zoos")
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("# My project")
    with pytest.raises(InlayError, match=r"README\.md is not an index of adapters"):
        pull_adapter("ann/zoos", project)
    assert [path.name for path in project.iterdir()] == ["README.md"]


# faults on the way up


UP = {
    "create": "POST /api/repos/create",
    "info": "GET /api/models/ann/zoo",
    "card": "POST /api/validate-yaml",
    "preupload": "preupload",
    "batch": "objects/batch",
    "upload": "PUT /lfs",
    "commit": "commit/main",
    "seen": "paths-info",
}


@pytest.mark.parametrize("kind", ["503", "drop", "lost", "429"])
@pytest.mark.parametrize("where", UP)
def test_a_fault_on_the_way_is_outlived_with_one_commit(hub, adapter, where, kind):
    hub.fail(UP[where], kind)
    push_adapter(adapter, "ann/zoo")
    assert hub.repos["ann/zoo"].messages == ["initial", "Push zoo with inlay"]
    assert served(hub)[WEIGHTS][0] == (adapter / WEIGHTS).read_bytes()
    load_adapter("ann/zoo")


@pytest.mark.parametrize("where", ["upload", "commit"])
def test_a_push_that_breaks_off_leaves_nothing_to_load_and_goes_on(hub, adapter, where, monkeypatch):
    hub.fail(UP[where], "drop", times=1000)
    with pytest.raises(InlayError, match="try the same again later, what has arrived is kept") as error:
        push_adapter(adapter, "ann/zoo")
    assert error.value.__cause__ is None and served(hub).keys() == {".gitattributes"}
    with pytest.raises(InlayError, match=r"is not an adapter: it has no adapter_config\.json"):
        load_adapter("ann/zoo")
    hub.faults.clear()
    before = len(hub.calls)
    push_adapter(adapter, "ann/zoo")
    uploads = [call for call in hub.calls[before:] if call.startswith("PUT")]
    assert len(uploads) == (2 if where == "upload" else 0), "what has arrived is not sent again"
    load_adapter("ann/zoo")


def test_two_that_push_at_once_never_mix(hub, adapter, make, processor, monkeypatch):
    """Another commit arrives after the Hub was looked at: the push starts over on top of it."""
    from inlay import save_adapter

    push_adapter(adapter, "ann/zoo")
    save_adapter(make(seed=9), adapter, processor=processor)
    repo, batch = hub.repos["ann/zoo"], module.CommitOperationAdd
    other = {**served(hub), METRICS: (b"{}", False)}
    once = []

    def add(*arguments):
        if not once:
            once.append(repo.add(other, "of another"))
        return batch(*arguments)

    monkeypatch.setattr(module, "CommitOperationAdd", add)
    push_adapter(adapter, "ann/zoo")
    assert repo.messages == ["initial", "Push zoo with inlay", "of another", "Push zoo with inlay"]
    assert served(hub)[METRICS][0] == (adapter / METRICS).read_bytes()
    assert served(hub)[WEIGHTS][0] == (adapter / WEIGHTS).read_bytes()


def test_a_hub_that_names_other_bytes_is_not_believed(hub, adapter, monkeypatch):
    push_adapter(adapter, "ann/zoo")
    data, _ = served(hub)[CONFIG]
    served(hub)[CONFIG] = (data + b" ", False)
    monkeypatch.setattr(
        module.HfApi, "create_commit", lambda self, repo, *a, **k: type("Made", (), {"oid": hub.repos[repo].head})
    )
    with pytest.raises(InlayError, match=r"does not have the bytes of adapter_config\.json that were sent"):
        push_adapter(adapter, "ann/zoo")


# faults on the way down


@pytest.mark.parametrize("kind", ["503", "cut", "drop", "garble", "etag", "429"])
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_fault_on_the_way_down_is_outlived(hub, adapter, trained, outputs, name, kind):
    push_adapter(adapter, "ann/zoo")
    hub.fail(rf"{'HEAD' if kind == 'etag' else 'GET'} /ann/zoo/resolve/.*{name}", kind)
    loaded = load_adapter("ann/zoo")
    torch.testing.assert_close(outputs(loaded.model), outputs(trained[0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["503", "cut", "garble", "etag", "404"])
def test_what_does_not_arrive_whole_is_never_loadable(hub, adapter, kind, tmp_path, monkeypatch):
    push_adapter(adapter, "ann/zoo")
    hub.fail(rf"{'HEAD' if kind == 'etag' else 'GET'} /ann/zoo/resolve/.*{WEIGHTS}", kind, times=1000)
    for target in (lambda: load_adapter("ann/zoo"), lambda: pull_adapter("ann/zoo", tmp_path / "mine")):
        with pytest.raises(InlayError):
            target()
    assert not (tmp_path / "mine").exists() and not [p for p in cached(tmp_path) if p.name == WEIGHTS]
    offline(monkeypatch)
    with pytest.raises(InlayError):
        load_adapter("ann/zoo")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.faults.clear()
    assert load_adapter("ann/zoo").verified


def test_a_file_that_is_damaged_in_the_cache_is_found_and_fetched_again(hub, adapter, tmp_path, monkeypatch):
    push_adapter(adapter, "ann/zoo")
    folder = load_adapter("ann/zoo").file.folder
    blob = (folder / METRICS).resolve()
    blob.chmod(0o644)
    blob.write_bytes(b"{}")  # readable, but not what the Hub has
    assert read_adapter(load_adapter("ann/zoo").file.folder).metrics["validation"]["accuracy"] == 0.9
    blob = (folder / METRICS).resolve()
    blob.write_bytes(b"{}")
    offline(monkeypatch)
    with pytest.raises(InlayError, match=r"metrics\.json|incomplete|offline"):
        load_adapter("ann/zoo")


# who may


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        ("", "nobody is logged in|run `hf auth login`, or set HF_TOKEN"),
        ("hf_" + "c" * 34, "run `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_without_a_right_one_sentence_says_so(hub, adapter, token, sentence, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InlayError, match=sentence):
        push_adapter(adapter, "ann/zoo")
    with pytest.raises(InlayError, match=sentence):
        module.check_push("ann/zoo")
    assert hub.repos == {}


def test_another_ones_name_is_refused(hub, adapter):
    with pytest.raises(InlayError, match=r"may not write to bob/zoo \(403\)"):
        push_adapter(adapter, "bob/zoo")
    with pytest.raises(InlayError, match="may write to ann, not to bob/zoo"):
        module.check_push("bob/zoo")
    module.check_push("ann/zoo")
    hub.role = "read"
    with pytest.raises(InlayError, match="may only read"):
        module.check_push("ann/zoo")


@pytest.mark.parametrize("where", ["create", "commit", "upload"])
def test_a_token_that_a_server_sends_back_is_not_repeated(hub, adapter, where, caplog, capsys):
    hub_logging.set_verbosity_debug()
    hub_logging.enable_propagation()
    hub.fail(UP[where], "500", times=1000, body="broken, your header was {authorization}, " + TOKEN)
    try:
        with caplog.at_level("DEBUG"), pytest.raises(InlayError) as error:
            push_adapter(adapter, "ann/zoo")
    finally:
        hub_logging.disable_propagation()
        hub_logging.set_verbosity_warning()
    out, err = capsys.readouterr()
    assert isinstance(error.value.__context__, HfHubHTTPError | RuntimeError) and error.value.__suppress_context__
    for text in (str(error.value), caplog.text, out, err):
        assert TOKEN not in text
    assert "trying again in" in caplog.text


def test_offline_and_unknown_are_one_sentence(hub, adapter, monkeypatch):
    with pytest.raises(
        InlayError, match="there is no folder 'ann/none' here, and as a Hub id it fails: the Hub has no"
    ):
        load_adapter("ann/none")
    offline(monkeypatch)
    with pytest.raises(InlayError, match="this process is offline: unset HF_HUB_OFFLINE"):
        push_adapter(adapter, "ann/zoo")
    with pytest.raises(InlayError, match="this process is offline"):
        load_adapter("ann/none")


# the command


def test_push_pull_search_and_list_as_commands(hub, adapter, tmp_path, capsys, monkeypatch):
    status, out, _ = run(capsys, monkeypatch, "push", adapter, "ann/zoo", "--dry-run")
    assert status == 0 and "would go to ann/zoo" in out and hub.calls == []
    status, out, _ = run(capsys, monkeypatch, "push", adapter, "ann/zoo", "--license", "apache-2.0")
    assert status == 0 and f"commit {hub.repos['ann/zoo'].head}" in out
    assert b"license: apache-2.0" in served(hub)[CARD][0]
    status, out, _ = run(capsys, monkeypatch, "pull", "ann/zoo", "-o", tmp_path / "local" / "zoo")
    assert status == 0 and hub.repos["ann/zoo"].head in out
    status, out, _ = run(capsys, monkeypatch, "info", tmp_path / "local" / "zoo", "--json")
    assert json.loads(out)["from"] == f"ann/zoo at {hub.repos['ann/zoo'].head}"
    found = {}
    for query in ("builtin:vit-tiny", "image-classification", "zoo"):
        status, out, _ = run(capsys, monkeypatch, "search", query, "--folder", tmp_path / "local", "--json")
        found[query] = [(row["where"], row["path"]) for row in json.loads(out)]
        assert status == 0 and found[query] == [("local", str(tmp_path / "local" / "zoo")), ("hub", "ann/zoo")]
    status, out, _ = run(capsys, monkeypatch, "search", "google/vit-base", "--folder", tmp_path / "local")
    assert "nothing for 'google/vit-base'" in out and "filter" not in out
    offline(monkeypatch)
    status, out, _ = run(capsys, monkeypatch, "search", "vit-tiny", "--folder", tmp_path / "local")
    assert status == 0 and "LoRA" in out and "the Hub was not asked" in out
    status, out, err = run(capsys, monkeypatch, "push", adapter, "ann/zoo")
    assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_a_base_on_the_hub_finds_its_adapters(hub, adapter, monkeypatch):
    from inlay.adapters.hub.search import search

    push_adapter(adapter, "ann/zoo")
    data, _ = served(hub)[CARD]
    served(hub)[CARD] = (data.replace(b"library_name", b"base_model: google/vit-base\nlibrary_name"), False)
    (row,) = search("google/vit-base")
    assert row["path"] == "ann/zoo" and row["base"] == "google/vit-base" and row["method"] == "lora"


def test_an_index_is_pushed_as_it_would_be_written(hub, adapter, tmp_path):
    many = tmp_path / "many"
    shutil.copytree(adapter, many / "one")
    push_adapter(many, "ann/many")
    write_index(many)
    for name in ("index.json", "index.html"):
        assert served(hub, "ann/many")[name][0] == (many / name).read_bytes()

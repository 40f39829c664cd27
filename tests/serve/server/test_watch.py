"""Adapters that come to a watched folder, change there and go, under every way of copying them."""

import shutil

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from inlay import BadInput, Bank, load_base
from inlay.adapters.file import CONFIG, WEIGHTS
from inlay.bases.sites import lora_targets
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.refusals import DoesNotFit
from inlay.serve.server.service import Service
from inlay.serve.server.watch import FolderWatch
from serve.banked import GPT2, VIT, save


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Adapters from which folders are copied."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate("abc", 1):
        save(VIT, ("lora", 2), folder / name, seed)
    save(GPT2, ("lora", 2), folder / "text")
    return folder


@pytest.fixture
def served(made, tmp_path):
    """A watch of a folder that has one adapter, `first`."""
    folder = tmp_path / "served"
    shutil.copytree(made / "a", folder / "first")
    service = Service(Bank(VIT, folder, skip_unfit=True), ServiceConfig())
    watch = FolderWatch(service, folder)
    settle(watch)
    return watch


def settle(watch):
    """A change is seen by the first look, and counts by the second."""
    watch.look()
    watch.look()


def digest(watch, name):
    return watch.service.find_file(name).digest


def digest_of(folder):
    return Bank(VIT, [folder]).files[folder.name].digest


def test_nothing_is_read_twice_while_nothing_changes(served):
    loads = served.service.bank.counts.loads
    settle(served)
    assert served.service.bank.names == ["first"] and served.service.bank.counts.loads == loads == 1


def test_an_adapter_comes_changes_and_goes(served, made):
    shutil.copytree(made / "b", served.folder / "new")
    served.look()
    assert served.service.bank.names == ["first"]  # it may still be copied
    served.look()
    assert served.service.bank.names == ["first", "new"] and digest(served, "new") == digest_of(made / "b")

    shutil.copytree(made / "c", served.folder / "new", dirs_exist_ok=True)
    settle(served)
    assert digest(served, "new") == digest_of(made / "c")

    shutil.rmtree(served.folder / "new")
    served.look()
    assert "new" in served.service.bank.names  # between two steps of a replacement it may be gone for a moment
    served.look()
    assert served.service.bank.names == ["first"]


def test_a_folder_is_replaced_by_renaming(served, made):
    """mv old away, mv new there; and a link that is turned, as deployments do: times and sizes are equal."""
    shutil.copytree(made / "b", served.folder / ".coming")  # a hidden folder is not looked at
    settle(served)
    assert served.service.bank.names == ["first"]
    (served.folder / "first").rename(served.folder / ".gone")
    (served.folder / ".coming").rename(served.folder / "first")
    settle(served)
    assert digest(served, "first") == digest_of(made / "b")

    link = served.folder / "linked"
    link.symlink_to(made / "a")
    settle(served)
    assert digest(served, "linked") == digest_of(made / "a")
    link.unlink()
    link.symlink_to(made / "c")
    settle(served)
    assert digest(served, "linked") == digest_of(made / "c")


def test_one_file_is_replaced_by_renaming(served, made):
    shutil.copy(made / "b" / WEIGHTS, served.folder / "first" / "temporary")
    (served.folder / "first" / "temporary").replace(served.folder / "first" / WEIGHTS)
    settle(served)
    assert digest(served, "first") == digest_of(made / "b")  # both have one config


def test_a_folder_that_is_copied_slowly(served, made):
    new, weights = served.folder / "new", (made / "b" / WEIGHTS).read_bytes()
    new.mkdir()
    settle(served)
    assert "new" not in served.service.refused  # nothing says yet that it will be an adapter
    shutil.copy(made / "b" / CONFIG, new)
    settle(served)
    with pytest.raises(DoesNotFit, match=rf"has no {WEIGHTS}"):
        served.service.find_file("new")
    for end in (1000, 20_000):
        (new / WEIGHTS).write_bytes(weights[:end])
        settle(served)
        with pytest.raises(DoesNotFit, match=r"new.*truncated") as found:
            served.service.find_file("new")
        assert str(served.folder) not in str(found.value)
    (new / WEIGHTS).write_bytes(weights)
    settle(served)
    assert digest(served, "new") == digest_of(made / "b") and not served.service.refused


def test_a_version_that_does_not_fit_leaves_the_one_before(served, made, caplog):
    before = digest(served, "first")
    (served.folder / "first" / WEIGHTS).write_bytes((made / "b" / WEIGHTS).read_bytes()[:-10])
    settle(served)
    assert digest(served, "first") == before and "adapter refused" in caplog.text
    shutil.rmtree(served.folder / "first")
    settle(served)
    assert served.service.bank.names == []


@pytest.mark.parametrize(("name", "words"), [("text", "was trained on builtin:gpt2-tiny|is for text-generation")])
def test_an_adapter_of_another_base_or_task_is_refused(served, made, name, words):
    shutil.copytree(made / name, served.folder / name)
    settle(served)
    with pytest.raises(DoesNotFit, match=words):
        served.service.find_file(name)
    shutil.rmtree(served.folder / name)
    settle(served)
    assert not served.service.refused


def test_what_clients_have_loaded_stays(served, made):
    served.service.add_adapter(made / "b", "loaded")
    settle(served)
    assert served.service.bank.names == ["first", "loaded"]
    shutil.copytree(made / "c", served.folder / "loaded")
    shutil.rmtree(served.folder / "first")
    settle(served)
    assert served.service.bank.names == ["loaded"] and digest(served, "loaded") == digest_of(made / "c")


def test_a_folder_that_cannot_be_read_removes_nothing(served):
    served.folder.rename(served.folder.with_name("away"))
    for _ in range(2):
        with pytest.raises(OSError):
            served.look()
    assert served.service.bank.names == ["first"]


def test_one_adapter_is_no_folder_to_watch(served):
    for wrong in (served.folder / "first", served.folder / "none"):
        with pytest.raises(BadInput, match="cannot be watched"):
            FolderWatch(served.service, wrong)


def test_an_adapter_of_plain_peft_has_a_digest_of_its_bytes_and_config(served):
    """Its file holds none; without one a replaced version would answer for the one before."""
    folder = served.folder / "plain"
    model = load_base(VIT)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model)))
    model.save_pretrained(folder, save_embedding_layers=False)
    settle(served)
    first = digest(served, "plain")
    assert len(first) == 32 and served.service.bank.read_folder(folder).digest == first

    tensors = load_file(folder / WEIGHTS)
    save_file({key: value + 1 for key, value in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    settle(served)
    second = digest(served, "plain")
    text = (folder / CONFIG).read_text()
    assert '"lora_alpha": 8' in text
    (folder / CONFIG).write_text(text.replace('"lora_alpha": 8', '"lora_alpha": 4'))
    settle(served)
    assert len({first, second, digest(served, "plain")}) == 3

"""An adapter on disk: whole, small, the same for the same weights, and readable without inlay."""

import stat

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import AutoModelForImageClassification

from inlay.adapters.file import CARD, CONFIG, METRICS, WEIGHTS, read_adapter
from inlay.adapters.load import load_adapter
from inlay.adapters.save import save_adapter
from inlay.bases.load import resolve_base
from inlay.errors import InlayError

LABELS = ["cat", "dog", "emu", "fox", "gnu"]


def test_round_trip_restores_outputs_labels_head_and_preprocessing(original, outputs, processor):
    model, folder = original
    loaded = load_adapter(folder)
    torch.testing.assert_close(outputs(loaded.model), outputs(model), rtol=0, atol=0)
    assert loaded.labels == LABELS == loaded.file.labels
    assert loaded.model.get_base_model().config.label2id["emu"] == 2
    assert loaded.processor.to_dict() == processor.to_dict()
    assert loaded.verified and loaded.deviation < 1e-4
    assert not any(p.requires_grad for p in loaded.model.get_base_model().vit.embeddings.parameters())
    assert not loaded.model.training


def test_file_is_the_trainable_bytes_and_at_most_8_kb(original):
    model, folder = original
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    assert trainable < (folder / WEIGHTS).stat().st_size <= trainable + 8192


def test_what_lies_in_the_folder(original):
    folder = original[1]
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, CARD, METRICS}
    file = read_adapter(folder)
    assert file.name == "zoo" and file.base_name == "builtin:vit-tiny" and file.record["head"] == ["classifier"]
    assert file.record["base"]["blocks"] == 4 and file.record["base"]["precision"] == "float32"
    assert file.record["preprocessing"]["size"] == {"height": 32, "width": 32}
    assert len(file.record["golden"]) == 5
    assert file.metrics["validation"] == {"accuracy": 0.875, "loss": 0.5} and "peft" in file.metrics["versions"]
    card = (folder / CARD).read_text()
    assert "library_name: peft" in card and "value: 0.875" in card and "2 = emu" in card


def test_files_are_readable_for_the_group(original):
    for path in original[1].iterdir():
        assert path.stat().st_mode & stat.S_IRGRP, path


def test_equal_adapters_are_equal_files(original, make, processor, tmp_path):
    again = save_adapter(make(), tmp_path / "zoo", processor=processor)
    for name in (CONFIG, WEIGHTS):
        assert (again / name).read_bytes() == (original[1] / name).read_bytes()


def test_another_adapter_name_gives_the_same_folder(original, make, processor, outputs, tmp_path):
    model = make()
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    with torch.no_grad():
        for key, value in model.named_parameters():
            if ".second." in key:
                value.normal_(std=0.1)
    loaded = load_adapter(save_adapter(model, tmp_path / "second", processor=processor))
    torch.testing.assert_close(outputs(loaded.model), outputs(model))
    assert {path.name for path in (tmp_path / "second").iterdir()} == {CONFIG, WEIGHTS, CARD, METRICS}


def test_a_crash_while_saving_leaves_the_old_adapter(zoo, make, processor, outputs, original, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("inlay.adapters.save.write_json", crash)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(make(seed=3), zoo, processor=processor)
    assert [path.name for path in zoo.parent.iterdir()] == ["zoo"]
    torch.testing.assert_close(outputs(load_adapter(zoo).model), outputs(original[0]))


def test_saving_over_an_old_adapter_replaces_it(zoo, make, processor, outputs):
    model = make(seed=3)
    save_adapter(model, zoo, processor=processor)
    assert [path.name for path in zoo.parent.iterdir()] == ["zoo"]
    torch.testing.assert_close(outputs(load_adapter(zoo).model), outputs(model))


def test_saving_into_the_current_folder(make, processor, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_adapter(make(), ".", processor=processor)
    assert read_adapter(tmp_path / "here").name == "here"


def test_the_mode_of_each_module_is_kept(make, processor, tmp_path):
    model = make().train()
    model.get_submodule("base_model.model.vit.layernorm").eval()
    before = [module.training for module in model.modules()]
    save_adapter(model, tmp_path / "zoo", processor=processor)
    assert [module.training for module in model.modules()] == before


def test_an_adapter_trained_in_mixed_precision_is_saved_without_its_autocast(make, processor, outputs, tmp_path):
    model = make()
    plain = outputs(model)
    AcceleratorState._reset_state(reset_partial_state=True)  # another test of this process may have trained without
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert not torch.equal(outputs(prepared), plain)
    loaded = load_adapter(save_adapter(model, tmp_path / "zoo", processor=processor))
    assert loaded.deviation < 1e-4
    torch.testing.assert_close(outputs(loaded.model), plain)
    assert not torch.equal(outputs(model), plain), "the autocast must still be there for a training that goes on"
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("what", ["foreign folder", "a file"])
def test_refuses_a_place_that_is_no_adapter(what, make, processor, tmp_path):
    place = tmp_path / "place"
    if what == "a file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "thesis.txt").write_text("mine")
    with pytest.raises(InlayError, match="exists and is not an adapter; give another folder"):
        save_adapter(make(), place, processor=processor)
    assert (place if place.is_file() else place / "thesis.txt").read_text() == "mine"


def spoil(model):
    next(p for n, p in model.named_parameters() if "lora_B" in n).data[0, 0] = float("nan")
    return model


def blow_up(model):
    model.get_submodule("base_model.model.vit.layernorm").weight.data.fill_(float("inf"))
    return model


def merged(model):
    model.merge_adapter()
    return model


def disabled(model):
    model.base_model.disable_adapter_layers()
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil, r"the weight '.*lora_B.*' holds NaN or Inf; nothing was saved"),
        (blow_up, r"output on the golden input is NaN or Inf; nothing was saved"),
        (merged, r"one active adapter, neither merged nor disabled"),
        (disabled, r"one active adapter, neither merged nor disabled"),
        (lambda model: model.get_base_model(), r"takes a model wrapped by get_peft_model, got ViTForImage"),
    ],
)
def test_refuses_what_would_not_load_right(change, message, make, processor, tmp_path):
    with pytest.raises(InlayError, match=message):
        save_adapter(change(make()), tmp_path / "zoo", processor=processor)
    assert not list(tmp_path.iterdir())


def test_refuses_to_lose_a_new_head(make, processor, tmp_path):
    with pytest.raises(InlayError, match=r"the head is new, .* train it: modules_to_save=\['classifier'\]"):
        save_adapter(make(modules_to_save=None), tmp_path / "zoo", processor=processor)
    own = make(labels=None, modules_to_save=None)
    assert load_adapter(save_adapter(own, tmp_path / "own", processor=processor)).verified


def test_refuses_an_initialisation_that_changes_the_base(make, processor, tmp_path):
    with pytest.raises(InlayError, match="'pissa' changes the base"):
        save_adapter(make(init_lora_weights="pissa"), tmp_path / "zoo", processor=processor)


def test_a_folder_of_plain_peft_can_be_saved_over_and_read_by_transformers(original, outputs):
    """AutoModel and PeftModel in this process: no record of inlay disturbs them."""
    base = AutoModelForImageClassification.from_pretrained(
        resolve_base("builtin:vit-tiny"), num_labels=5, ignore_mismatched_sizes=True, dtype="float32"
    )
    model = PeftModel.from_pretrained(base, str(original[1])).eval()
    torch.testing.assert_close(outputs(model), outputs(original[0]))


def test_who_trained_it_is_recorded_where_it_is_said(monkeypatch):
    from inlay.adapters.save import read_author

    monkeypatch.delenv("INLAY_AUTHOR", raising=False)
    assert read_author() == {}
    monkeypatch.setenv("INLAY_AUTHOR", " A. Author ")
    assert read_author() == {"trained_by": "A. Author"}

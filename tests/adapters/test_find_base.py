"""An adapter whose base was named by a path that leads nowhere now."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

from inlay import load_adapter, load_base, load_processor, save_adapter
from inlay.errors import InlayError


@pytest.fixture
def named(tmp_path, monkeypatch):
    """A folder with an adapter in runs/a, whose base was bases/v, relative to that folder."""
    monkeypatch.chdir(tmp_path)
    load_base("builtin:vit-tiny").save_pretrained("bases/v")
    load_processor("builtin:vit-tiny").save_pretrained("bases/v")
    model = get_peft_model(load_base("bases/v"), LoraConfig(target_modules=["fc1"]))
    save_adapter(model, "runs/a", processor=load_processor("bases/v"))
    return tmp_path


def test_a_relative_path_from_another_folder_names_the_base_that_lies_there(named, monkeypatch):
    assert load_adapter("runs/a").verified
    monkeypatch.chdir(named / "runs")
    with pytest.raises(InlayError) as caught:
        load_adapter("a")
    offered = f"base={str(named / 'bases' / 'v')!r}"
    assert "was trained on 'bases/v'" in str(caught.value) and offered in str(caught.value)
    assert load_adapter("a", base=named / "bases" / "v").verified


def test_a_base_of_another_structure_is_not_offered(named, monkeypatch):
    shutil.rmtree("bases/v")
    load_base("builtin:gpt2-tiny").save_pretrained("bases/v")
    monkeypatch.chdir(named / "runs")
    with pytest.raises(InlayError, match="give base= with where it is now"):
        load_adapter("a")


def test_a_folder_of_models_is_searched_by_structure_and_sketch(named):
    shutil.move("bases", "elsewhere")
    with pytest.raises(InlayError, match=r"was trained on 'bases/v': .* give base= with where it is now"):
        load_adapter("runs/a")
    other = load_base("builtin:vit-tiny")
    with torch.no_grad():
        other.vit.layernorm.bias += 0.1  # tried first, by its name
    other.save_pretrained("elsewhere/a")
    load_base("builtin:gpt2-tiny").save_pretrained("elsewhere/b")
    loaded = load_adapter("runs/a", base="elsewhere")
    assert loaded.verified and loaded.model.get_base_model().name_or_path == "elsewhere/v"
    shutil.rmtree("elsewhere/v")
    with pytest.raises(InlayError, match=r"none of the models in 'elsewhere' is 'bases/v'.*\(1 of its structure"):
        load_adapter("runs/a", base="elsewhere")


@pytest.mark.parametrize("path", ["C:\\\\models\\\\v", "/home/someone/models/v", "..\\\\v", "models/v", "~/v", "D:/v"])
def test_a_path_of_another_machine(path, named):
    config = named / "runs/a/adapter_config.json"
    weights = named / "runs/a/adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file(load_file(weights), weights)  # as plain peft saves it
    config.write_text(config.read_text().replace('"bases/v"', f'"{path}"'))
    with pytest.raises(InlayError, match="give base= with where it is now"):
        load_adapter("runs/a")
    shutil.copytree("bases/v", "v")
    with pytest.raises(InlayError, match=r"Or give base='.*v', which has its name"):
        load_adapter("runs/a")
    assert load_adapter("runs/a", base="v").model

"""Adapters for volumes: saved with classes and preprocessing, checked at loading, refused where they do not fit."""

import json
import re

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import SamModel

from inlay import InlayError, VolumeProcessor, load_adapter, load_base, read_adapter, save_adapter
from inlay.adapters.task import find_task_of_file
from inlay.tasks.volumes.formats import write_volume
from methods.bases import randomise
from methods.volumes import build, settings, volumes
from places import ROOT


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sam")
    build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    model = get_peft_model(load_base(base), settings()).eval()
    randomise(model, "default")
    folder = tmp_path_factory.mktemp("adapters") / "lesions"
    metrics = {"validation": {"dice": 0.5}, "dataset": "scans"}
    save_adapter(model, folder, processor=VolumeProcessor((2.0, 1.0, 1.0), (16, 32, 32)), metrics=metrics)
    with torch.no_grad():
        return folder, model(pixel_values=volumes()).logits


def test_it_comes_back_with_classes_and_preprocessing(saved):
    folder, expected = saved
    assert find_task_of_file(read_adapter(folder)).name == "volume-segmentation"
    loaded = load_adapter(folder)
    assert loaded.labels == ["organ", "lesion"] and loaded.verified and loaded.deviation < 1e-5
    assert loaded.processor.to_dict() == VolumeProcessor((2.0, 1.0, 1.0), (16, 32, 32)).to_dict()
    with torch.no_grad():
        assert torch.allclose(loaded.model(pixel_values=volumes()).logits, expected, atol=1e-4)
    bytes_ = sum(torch.tensor(shape).prod().item() * 4 for shape in read_adapter(folder).shapes.values())
    assert loaded.file.bytes_weights < bytes_ + 200 * len(loaded.file.shapes) + 8000


def test_what_training_knew_of_its_data_comes_back(base, tmp_path):
    """The axes it mirrored, and the classes' numbers in the label maps; on the card too."""
    model = get_peft_model(load_base(base), settings()).eval()
    processor = VolumeProcessor(None, (16, 32, 32), flip=(2, 1), values=(1000, 4))
    folder = save_adapter(model, tmp_path / "a", processor=processor)
    loaded = load_adapter(folder).processor
    assert loaded.flip == (1, 2) and loaded.values == (1000, 4)
    assert "0 = background, 1000 = organ, 4 = lesion" in (folder / "README.md").read_text()
    plain = save_adapter(model, tmp_path / "b", processor=VolumeProcessor(None, (16, 32, 32), values=(1, 2)))
    assert set(read_adapter(plain).record["preprocessing"]) == {"spacing_mm", "crop", "intensity", "low", "high"}


def test_classes_keep_the_order_of_the_outputs_however_often_they_are_saved(saved, tmp_path):
    """Names in another order than the alphabet's: organ before lesion. Earlier files hold them sorted in the config."""
    first = load_adapter(saved[0])
    again = load_adapter(save_adapter(first.model, tmp_path / "again", processor=first.processor))
    assert first.labels == again.labels == ["organ", "lesion"] == again.model.active_peft_config.classes
    shipped = load_adapter(ROOT / "adapters_hub" / "lesions-spatial-sam-tiny")
    assert shipped.file.config["classes"] == ["lesion", "organ"]
    copy = save_adapter(shipped.model, tmp_path / "copy", processor=shipped.processor)
    assert read_adapter(copy).labels == shipped.labels == ["organ", "lesion"]


def test_in_float16_the_file_is_half_as_large(base, tmp_path):
    model = get_peft_model(load_base(base), settings()).eval()
    randomise(model, "default")
    sizes = {}
    for dtype in ("float32", "float16"):
        folder = save_adapter(model, tmp_path / dtype, processor=VolumeProcessor(None, (16, 32, 32)), dtype=dtype)
        sizes[dtype] = read_adapter(folder).bytes_weights
    loaded = load_adapter(tmp_path / "float16")
    with torch.no_grad():  # the model was rounded, so both compute the same
        found, expected = (m(pixel_values=volumes()).logits for m in (loaded.model, model))
    assert sizes["float16"] < 0.6 * sizes["float32"] and torch.allclose(found, expected, atol=1e-4)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    with pytest.raises(InlayError, match="float16"):
        save_adapter(model, tmp_path / "x", processor=VolumeProcessor(None, (16, 32, 32)), dtype="int8")


def test_plain_peft_loads_it(saved, base):
    folder, expected = saved
    model = PeftModel.from_pretrained(SamModel.from_pretrained(base), folder).eval()
    with torch.no_grad():
        assert torch.allclose(model(pixel_values=volumes()).logits, expected, atol=1e-4)


def test_the_cards_two_ways_to_load_run(saved, tmp_path, monkeypatch, capsys):
    folder, expected = saved
    ours, plain = re.findall(
        r"```python\n(.*?)```", (folder / "README.md").read_text().replace("FOLDER", str(folder)), re.S
    )
    monkeypatch.chdir(tmp_path)
    write_volume("scan.nii.gz", np.zeros((20, 20, 20), np.uint8), np.eye(4))
    exec(ours, {})
    assert capsys.readouterr().out.strip().startswith("{'organ': ")
    found = {}
    exec(plain, found)
    with torch.no_grad():
        assert torch.allclose(found["model"](pixel_values=volumes()).logits, expected, atol=1e-4)


def test_its_card_says_how_scans_are_read(saved):
    card = (saved[0] / "README.md").read_text()
    for said in (
        "pipeline_tag: image-segmentation",
        "0 = background, 1 = organ, 2 = lesion",
        "2 x 1 x 1 mm",
        "segment(",
    ):
        assert said in card
    assert "num_labels" not in card


def test_another_sam_is_refused(saved, tmp_path):
    other = build()
    with torch.no_grad():
        for parameter in other.vision_encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    other.save_pretrained(tmp_path)
    with pytest.raises(InlayError, match="other weights of the same shape"):
        load_adapter(saved[0], tmp_path)
    with pytest.raises(InlayError, match=r"model type|model_type"):
        load_adapter(saved[0], "builtin:vit-tiny")


def test_in_half_precision_and_an_edited_config(saved, base, tmp_path):
    folder, expected = saved
    half = load_adapter(folder, base, dtype="bfloat16")
    with torch.no_grad():
        found = half.model(pixel_values=volumes().bfloat16()).logits.float()
    assert (found - expected).abs().max() < 0.2 * expected.abs().max()
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"shift": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InlayError, match="not what was saved"):
        load_adapter(tmp_path)

"""The adapters that the repository ships: whole, listed, and as good as their cards say."""

import json

import pytest

from inlay import load_adapter, load_images, predict
from inlay.adapters.hub.index import write_index
from inlay.adapters.summary import summarise_adapter
from places import ROOT

HUB = ROOT / "adapters_hub"


def test_the_index_is_up_to_date(tmp_path):
    import shutil

    shutil.copytree(HUB, tmp_path / "hub")
    write_index(tmp_path / "hub")
    for name in ("index.json", "README.md", "index.html"):
        assert (tmp_path / "hub" / name).read_text() == (HUB / name).read_text()


def test_digits_are_read_as_well_as_the_card_says():
    adapter = load_adapter(HUB / "digits-lora-vit-tiny")
    assert adapter.verified and adapter.deviation < 1e-3
    rows = load_images("builtin:digits", seed=0).validation
    answers = [adapter.labels[label] for label in rows["label"]]
    found = predict(adapter, [image["bytes"] for image in rows["image"]], top=1)
    right = sum(p.label == answer for p, answer in zip(found, answers, strict=True)) / len(answers)
    assert right == pytest.approx(
        summarise_adapter(adapter.file.folder)["validation"]["accuracy"], abs=2 / len(answers)
    )
    assert right > 0.95


def test_no_file_names_a_machine():
    for path in HUB.rglob("*.json"):
        content = json.dumps(json.loads(path.read_text()))
        assert str(ROOT) not in content and "/tmp/" not in content and "/home/" not in content

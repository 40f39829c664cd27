"""Images are decoded once for a data set, by one process; the next start looks at their dates only."""

import io
import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from forked_program import finish
from inlay import InlayError, load_images, load_masks
from inlay.tasks.images import checked


@pytest.fixture
def cache(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    return folder


@pytest.fixture
def decoded(monkeypatch, cache):
    """The images that are decoded to be checked, by the name of their file."""
    seen, original = [], checked.digest_image

    def digest_image(image):
        seen.append(Path(image["path"] or "").name)
        return original(image)

    monkeypatch.setattr(checked, "digest_image", digest_image)
    return seen


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).save(tmp_path / name / f"{name}{i}.png")
    return tmp_path


def test_the_second_start_decodes_what_has_changed_only(photos, decoded):
    first = load_images(str(photos))
    assert len(decoded) == 10
    decoded.clear()
    second = load_images(str(photos))
    assert decoded == [] and second.validation["image"][:] == first.validation["image"][:]
    Image.new("RGB", (6, 8)).save(photos / "cat" / "cat3.png")
    (photos / "dog" / "dog4.png").unlink()
    Image.new("RGB", (9, 9)).save(photos / "dog" / "new.png")
    load_images(str(photos))
    assert sorted(decoded) == ["cat3.png", "new.png"]


def test_what_cannot_be_read_is_remembered_too(photos, decoded):
    (photos / "cat" / "bad.png").write_bytes(b"no image")
    for count in (11, 0):
        decoded.clear()
        with pytest.raises(InlayError, match=r"bad\.png \(not an image\)"):
            load_images(str(photos))
        assert len(decoded) == count
    os.utime(photos / "cat" / "bad.png", ns=(0, 0))  # the date is looked at, not only the size
    with pytest.raises(InlayError, match=r"bad\.png"):
        load_images(str(photos))
    assert decoded == ["bad.png"]


def test_splits_do_not_forget_each_other(photos, decoded, tmp_path_factory):
    from inlay.tasks.images.data import load_images_to_score

    root = tmp_path_factory.mktemp("split")
    for split in ("train", "test"):
        (root / split).symlink_to(photos, target_is_directory=True)
    data = load_images(str(root))
    load_images_to_score(str(root), data.labels, adapter="a", split="test")
    decoded.clear()
    load_images(str(root))
    load_images_to_score(str(root), data.labels, adapter="a", split="test")
    assert decoded == []


def test_bytes_in_a_table_are_remembered_by_the_date_of_the_table(decoded, tmp_path):
    rng = np.random.default_rng(0)

    def write(count):
        images = []
        for _ in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8)).save(file, "PNG")
            images.append({"bytes": file.getvalue(), "path": None})
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        columns = {"image": images, "label": ["x", "y"] * (count // 2)}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")

    write(6)
    counts = []
    for change in (False, False, True):
        if change:
            write(8)
        decoded.clear()
        load_images(str(tmp_path / "a.parquet"))
        counts.append(len(decoded))
    assert counts == [6, 0, 8]


def test_images_with_maps_are_remembered_too(decoded, tmp_path):
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for i in range(4):
        Image.fromarray(np.full((6, 6, 3), i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(np.eye(6, dtype=np.uint8)).save(tmp_path / "labels" / f"{i}.png")
    first = load_masks(str(tmp_path))
    assert len(decoded) == 4
    decoded.clear()
    assert load_masks(str(tmp_path)) == first and decoded == []


@pytest.mark.parametrize("damage", ["bytes", "columns", "read-only"])
def test_a_memory_that_cannot_be_used_costs_time_only(photos, decoded, cache, monkeypatch, damage):
    if damage == "read-only":
        monkeypatch.setattr(checked.os, "access", lambda *_: False)
    load_images(str(photos))
    found = list((cache / "inlay_images").glob("*.parquet"))
    assert len(found) == (damage != "read-only")
    if damage == "bytes":
        found[0].write_bytes(b"PAR1 and nothing else")
    elif damage == "columns":
        datasets.Dataset.from_dict({"other": [1]}).to_parquet(found[0])
    decoded.clear()
    load_images(str(photos))
    assert len(decoded) == 10


COUNTING = """
import json, sys
import datasets
from inlay.tasks.images import checked
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
seen, original = [], checked.digest_image
checked.digest_image = lambda image: (seen.append(1), original(image))[1]
from inlay import load_images
data = load_images(sys.argv[1])
print(json.dumps([len(seen), sorted(image["path"] for image in data.validation["image"])]))
"""


@pytest.mark.launch
def test_of_two_processes_one_decodes(forked, photos, cache, tmp_path_factory):
    program = tmp_path_factory.mktemp("program") / "count.py"
    program.write_text(COUNTING)
    started = [forked(program, photos, cache) for _ in range(2)]
    said = [json.loads(finish(process).splitlines()[-1]) for process in started]
    assert sorted(count for count, _ in said) == [0, 10] and said[0][1] == said[1][1]

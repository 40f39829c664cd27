"""Images from shards: what is held out, labels, damaged images, and the recipe as it stands."""

import io
import json
import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from inlay import ImageTask, load_adapter
from inlay.errors import BadInput, DamagedFile, InlayError, Unsupported
from inlay.tasks.evaluation import Request, Training
from inlay.tasks.images.evaluate import evaluate
from inlay.tasks.images.stream import load_image_stream, load_image_stream_to_score
from inlay.tasks.shards import is_held_out
from tar_shards import write_tar

ROOT = Path(__file__).parents[3]
COUNT, SHARDS = 90, 3
CLASSES = ["dark", "light"]


def draw_png(number):
    """Dark or light noise, each image another."""
    generator = np.random.default_rng(number)
    low = 150 * (number % 2)
    file = io.BytesIO()
    Image.fromarray(generator.integers(low, low + 100, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def images():
    return [draw_png(number) for number in range(COUNT)]


@pytest.fixture(scope="module")
def tars(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("tars")
    for shard in range(SHARDS):
        numbers = range(shard, COUNT, SHARDS)
        write_tar(
            folder / f"train-{shard:02}.tar",
            [(f"a/{i:03}", {"png": images[i], "cls": b"%d" % (i % 2)}) for i in numbers],
        )
    (folder / "labels.txt").write_text("\n".join(CLASSES))
    return folder


def read_pass(stream):
    return stream.read_first(10 * COUNT)


def test_what_is_held_out_is_not_trained_on(tars, images, tmp_path):
    data = load_image_stream(f"{tars}/train-*.tar")
    held = [image["bytes"] for image in data.validation["image"]]
    trained = [example["image"]["bytes"] for example in read_pass(data.train)]
    assert sorted(held) == sorted(image for image in images if is_held_out(image, 0)) and len(held) > 1
    assert sorted(held + trained) == sorted(images)
    assert data.labels == tuple(CLASSES) and data.train.shards == SHARDS
    rows = [(draw_png(i), i % 2) for i in range(COUNT)]
    assert {(e["image"]["bytes"], e["label"]) for e in read_pass(data.train)} < set(rows)
    whole = [
        (f"{i:03}", {"png": images[i], "json": json.dumps({"label": CLASSES[i % 2]}).encode()}) for i in range(COUNT)
    ]
    write_tar(tmp_path / "one.tar", whole)
    again = load_image_stream(str(tmp_path / "one.tar"))
    assert sorted(image["bytes"] for image in again.validation["image"]) == sorted(held), "in another order and shard"
    assert again.labels == data.labels, "the labels are found in the shard"


def test_parquet_with_declared_classes_and_groups(tmp_path, images):
    features = datasets.Features(
        {"picture": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES), "patient": datasets.Value("int64")}
    )
    columns = {"picture": [{"bytes": image, "path": None} for image in images], "label": [i % 2 for i in range(COUNT)]}
    columns["patient"] = [i // 2 for i in range(COUNT)]
    rows = datasets.Dataset.from_dict(columns, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    data = load_image_stream(str(tmp_path), group="patient")
    held = set(data.validation["group"])
    assert data.labels == tuple(CLASSES) and len(data.validation) == 2 * len(held)
    assert held == {str(i) for i in range(COUNT // 2) if is_held_out(str(i).encode(), 0)}
    assert not held & {example["group"] for example in read_pass(data.train)}
    rows.select(range(9)).to_parquet(tmp_path / "validation.parquet")
    own = load_image_stream(str(tmp_path))
    assert len(own.validation) == 9 and len(read_pass(own.train)) == COUNT
    with pytest.raises(BadInput, match="no column 'site' to keep together"):
        load_image_stream(str(tmp_path), group="site")


def test_damaged_images_are_named_with_shard_and_key(tars, tmp_path, images, caplog):
    trained = next(i for i in range(COUNT) if not is_held_out(images[i][:60], 0))
    samples = [(f"{i:03}", {"png": images[i], "cls": b"%d" % (i % 2)}) for i in range(COUNT)]
    samples[trained] = (f"{trained:03}", {"png": images[trained][:60], "cls": b"1"})
    write_tar(tmp_path / "train.tar", samples)
    (tmp_path / "labels.txt").write_text("\n".join(CLASSES))
    task = ImageTask(dataset=str(tmp_path / "train.tar"), augment="none")
    stream = task.load(0).train
    (bad,) = [e for e in read_pass(stream) if len(e["image"]["bytes"]) == 60]
    place = rf"{trained:03}\.png \(train\.tar:{trained + 1}\)"
    with pytest.raises(DamagedFile, match=f"^'{place}' cannot be read as an image: "):
        stream.prepare(bad)
    held = next(i for i in range(500) if is_held_out(b"broken %d" % i, 0))
    samples[trained] = (f"{trained:03}", {"png": b"broken %d" % held, "cls": b"1"})
    write_tar(tmp_path / "train.tar", samples)
    with pytest.raises(DamagedFile, match=rf"{place} \(not an image\)"):
        load_image_stream(str(tmp_path / "train.tar"))
    load_image_stream(str(tmp_path / "train.tar"), corrupt="skip")
    assert "left out 1 images that cannot be read" in caplog.text


def test_a_broken_shard_is_named(tmp_path, images):
    samples = [(f"{i:03}", {"png": images[i], "cls": b"%d" % (i % 2)}) for i in range(COUNT)]
    write_tar(tmp_path / "train.tar", samples)
    (tmp_path / "labels.txt").write_text("\n".join(CLASSES))
    whole = (tmp_path / "train.tar").read_bytes()
    (tmp_path / "train.tar").write_bytes(whole[: len(whole) // 2 + 700])
    with pytest.raises(DamagedFile, match=r"^train\.tar cannot be read after row \d+ \(.*\); repair it"):
        load_image_stream(str(tmp_path / "train.tar"))


def test_labels_that_are_none(tmp_path, images):
    def write(labels):
        write_tar(tmp_path / "a.tar", [(f"{i}", {"png": images[i], "cls": labels[i]}) for i in range(len(labels))])
        return str(tmp_path / "a.tar")

    with pytest.raises(BadInput, match="has one class, 1; a classifier needs at least two"):
        load_image_stream(write([b"1"] * 40))
    (tmp_path / "classes.txt").write_text("cat\ndog")
    with pytest.raises(BadInput, match=r"a.tar:\d+ has the label 2, and there are 2 class names, from 0 on"):
        read_pass(load_image_stream(write([b"0", b"1", b"2"] * 20)).train)
    write_tar(tmp_path / "b.tar", [("0", {"png": images[0], "txt": b"a cat"})])
    with pytest.raises(BadInput, match=r"must have one column of labels .* but has none among png, txt"):
        load_image_stream(str(tmp_path / "b.tar"))
    with pytest.raises(BadInput, match=r"none of the images .* were held out, as there are too few to stream"):
        seed = next(seed for seed in range(99) if not any(is_held_out(image, seed) for image in images[:2]))
        load_image_stream(write([b"0", b"1"]), seed=seed)


@pytest.fixture(scope="module")
def trained(tars, tmp_path_factory):
    """What the recipe makes of shards, as it stands."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--dataset", f"{tars}/train-*.tar", "--steps", "20", "--batch_size", "16", "--workers", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lora_vit.py", *options, "--output_dir", str(folder), "--shuffle_buffer", "40"])
        runpy.run_path(str(ROOT / "recipes/lora_vit.py"), run_name="__main__")
    return folder / "adapter"


def test_the_recipe_trains_on_shards_and_the_adapter_is_scored_on_what_was_held_out(trained, tars):
    metrics = json.loads((trained / "metrics.json").read_text())
    name = f"{tars}/train-*.tar"
    assert metrics["dataset"] == name and metrics["training"]["steps"] == 20
    assert metrics["validation"]["accuracy"] == 1.0
    card = (trained / "README.md").read_text()
    assert "train-*.tar" in card and str(tars) not in card
    adapter = load_adapter(trained)
    assert adapter.labels == CLASSES
    found = evaluate(adapter, name, Request(resamples=10, training=Training.from_metrics(metrics)))
    assert found.split == "validation" and found.scores["accuracy"].value == 1.0
    assert found.count == len(load_image_stream(name).validation)
    assert "of the part that recipes hold out (seed 0)" in " ".join(found.notes)
    with pytest.raises(Unsupported, match="not 'train' of"):
        load_image_stream_to_score(name, CLASSES, split="train")
    with pytest.raises(InlayError, match="has the label 'dark', which is none of"):
        load_image_stream_to_score(name, ["red", "blue"])


def test_what_compares_is_told_that_a_stream_has_no_three_parts(tars):
    with pytest.raises(Unsupported, match="is streamed, so it is not split into three parts"):
        ImageTask(dataset=f"{tars}/train-*.tar").load_parts()

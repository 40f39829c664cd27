"""Pictures from every source, whole and broken, as a model gets them."""

import io
import json
import logging
import random
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate
from transformers import ConvNextImageProcessorPil, ViTImageProcessorPil

from inlay import ImageTask
from inlay.errors import InlayError
from inlay.tasks.evaluation import SPLITS
from inlay.tasks.image_decoding import open_image
from inlay.tasks.images.data import load_images, load_images_to_score
from inlay.tasks.images.view import ImageView, NormalisedBatches
from inlay.tasks.tables import hub_splits
from inlay.train.sampler import SeededDataset, SeededSampler
from places import SHARED

FLOWERS = SHARED / "flowers5/dev"
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """No network, and nothing left in the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def save(path, colour=RED, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def class_folders(root, **counts):
    for name, count in counts.items():
        for i in range(count):
            save(root / name / f"{i:02}.png", (i, sum(name.encode()) % 256, 0))  # no image twice
    return root


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def names(rows):
    return sorted(Path(picture["path"]).name for picture in rows["image"][:])


def per_class(data, rows):
    return {data.labels[i]: rows["label"][:].count(i) for i in set(rows["label"][:])}


def refused(*words, **arguments):
    with pytest.raises(InlayError) as caught:
        load_images(**arguments)
    message = str(caught.value)
    assert all(str(word) in message for word in words), message
    assert "\n" not in message and message.endswith(".")


# open_image


def test_transparency_is_laid_on_white():
    clear_black = encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))
    assert open_image(clear_black).getpixel((0, 0)) == WHITE
    half = open_image(encoded(Image.new("LA", (2, 2), (0, 128)))).getpixel((0, 0))
    assert half[0] == half[1] == half[2] == pytest.approx(127, abs=1)
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    palette.putdata([0, 1])
    opened = open_image(encoded(palette, transparency=0))
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [WHITE, BLUE]


def test_16_bit_greys_are_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 257, 32896, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        assert np.asarray(open_image(encoded(Image.fromarray(grey), kind)))[0, :, 0].tolist() == [
            0,
            1,
            128,
            255,
        ]
    (tmp_path / "a.pgm").write_bytes(b"P5\n2 1\n65535\n\x80\x80\xff\xff")
    assert np.asarray(open_image(tmp_path / "a.pgm"))[0, :, 1].tolist() == [128, 255]


def test_pixels_without_a_range_are_refused():
    for kind in (np.float32, np.int32):
        with pytest.raises(InlayError, match="no known range"):
            open_image(encoded(Image.fromarray(np.ones((2, 2), kind)), "TIFF"))


def test_exif_orientation_is_honoured(tmp_path):
    image = Image.new("RGB", (20, 10), BLUE)
    image.paste(RED, (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: the left side becomes the top
    image.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    assert opened.size == (10, 20)
    assert (opened.getpixel((5, 2)), opened.getpixel((5, 18))) == (RED, BLUE)


def test_animation_cmyk_and_one_pixel():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    assert open_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).getpixel((0, 0)) == RED
    cmyk = open_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))
    assert cmyk == pytest.approx(RED, abs=6)
    assert open_image(encoded(Image.new("1", (1, 1), 1))).getpixel((0, 0)) == WHITE


@pytest.mark.parametrize("form", [str, Path, lambda p: p.read_bytes(), lambda p: {"bytes": None, "path": str(p)}])
def test_every_form_of_source(tmp_path, form):
    image = open_image(form(save(tmp_path / "a.png")))
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (8, 6), RED)


def broken(root):
    """Files that are not whole pictures, each with what is to be said of it."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    (root / "short.jpg").write_bytes(encoded(noise, "JPEG")[:-500])
    (root / "short.png").write_bytes(encoded(noise)[:-500])
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("<html>404</html>")
    return {
        "short.jpg": "truncated",
        "short.png": "",
        "empty.jpg": "not an image",
        "text.jpg": "not an image",
    }


def test_broken_files_are_named(tmp_path):
    for name, reason in {**broken(tmp_path), "none.jpg": "no such file"}.items():
        with pytest.raises(InlayError, match=rf"{name}.*{reason}"):
            open_image(tmp_path / name)
    with pytest.raises(InlayError, match="the bytes given"):
        open_image(b"GIF89a")
    with pytest.raises(InlayError, match="no image"):
        open_image({"bytes": None, "path": None})


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "bomb.png", size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InlayError, match=r"bomb.png.*exceeds limit"):
        open_image(tmp_path / "bomb.png")


# Folders


def test_folder_without_splits_is_split_by_seed(tmp_path):
    class_folders(tmp_path, dog=10, cat=20, test=5)
    data = load_images(str(tmp_path))
    assert data.labels == ("cat", "dog", "test")  # a class may be called after a split
    assert per_class(data, data.validation) == {"cat": 4, "dog": 2, "test": 1}
    assert per_class(data, data.train) == {"cat": 16, "dog": 8, "test": 4}
    assert data.train.features["image"] == datasets.Image(decode=False)
    assert set(data.train.column_names) == {"image", "label"}
    # The same pictures on every machine: written down here, not computed.
    held = [f"{i:02}.png" for i in (0, 3, 4, 5, 7, 15, 18)]
    assert names(data.validation) == names(load_images(str(tmp_path)).validation) == held
    assert names(load_images(str(tmp_path), seed=1).validation) != held
    for row in (*data.train, *data.validation):
        assert Path(row["image"]["path"]).parent.name == data.labels[row["label"]]


def test_changed_folder_is_seen(tmp_path):
    class_folders(tmp_path, a=3, b=3)
    assert len(load_images(str(tmp_path)).train) == 4
    save(tmp_path / "c" / "0.png"), save(tmp_path / "c" / "1.png")
    (tmp_path / "a" / "00.png").unlink()
    data = load_images(str(tmp_path))
    assert data.labels == ("a", "b", "c")
    assert len(data.train) + len(data.validation) == 7


@pytest.mark.parametrize("held", ["validation", "val", "valid", "dev", "Val"])
def test_split_folders_are_kept(tmp_path, held):
    class_folders(tmp_path / "train", a=2, b=1, c=1)
    class_folders(tmp_path / held, a=3, c=1)  # a class may lack in validation
    if held == "val":
        class_folders(tmp_path / "test", a=9)  # is never looked at
    data = load_images(str(tmp_path))
    assert data.labels == ("a", "b", "c")
    assert (per_class(data, data.train), per_class(data, data.validation)) == (
        {"a": 2, "b": 1, "c": 1},
        {"a": 3, "c": 1},
    )


def test_train_folder_alone_and_class_called_train(tmp_path):
    data = load_images(str(class_folders(tmp_path / "x" / "train", a=5, b=5).parent))
    assert (len(data.train), len(data.validation)) == (8, 2)
    assert load_images(str(class_folders(tmp_path / "y", train=2, car=2))).labels == ("car", "train")


def test_hidden_files_and_others_are_not_pictures(tmp_path, caplog):
    class_folders(tmp_path, a=2, b=2)
    (tmp_path / "a" / "._00.png").write_text("resource fork")
    (tmp_path / ".git").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("")
    data = load_images(str(tmp_path))
    assert (len(data.train), len(data.validation)) == (2, 2)
    assert "1 files" in caplog.text and "notes.txt" in caplog.text


def test_folders_that_make_no_task(tmp_path):
    refused("class folders", "there are none", name=str(tmp_path))
    save(tmp_path / "a.jpg")
    refused("class folders", "there are none", name=str(tmp_path))
    class_folders(tmp_path, a=2)
    refused("has one class, a;", "at least two", name=str(tmp_path))
    (tmp_path / "b").mkdir()
    refused("'b' holds no images", name=str(tmp_path))
    class_folders(tmp_path / "b", deep=1)
    refused("'b' holds folders", name=str(tmp_path))


def test_classes_of_validation_must_be_in_training(tmp_path):
    class_folders(tmp_path / "train", a=1, b=1)
    class_folders(tmp_path / "val", a=1, z=1)
    refused("the classes z of", "only in validation", name=str(tmp_path))


def test_class_of_one_picture_stays_in_training(tmp_path, caplog):
    data = load_images(str(class_folders(tmp_path / "x", a=4, b=1)))
    assert (per_class(data, data.train), per_class(data, data.validation)) == ({"a": 3, "b": 1}, {"a": 1})
    assert "classes with one image" in caplog.text
    refused("only one image of each of a, b", "none can be held out", name=str(class_folders(tmp_path / "y", a=1, b=1)))


# Broken pictures


def test_corrupt_pictures_are_refused_by_name(tmp_path):
    class_folders(tmp_path, a=4, b=4)
    found = broken(tmp_path / "a")
    refused("4 of 12", *found, "corrupt='skip'", name=str(tmp_path))
    for i in range(5):
        (tmp_path / "b" / f"z{i}.jpg").write_bytes(b"")
    refused("9 of 17", ", ...", name=str(tmp_path))


def test_corrupt_pictures_are_skipped_by_name(tmp_path, caplog):
    class_folders(tmp_path, a=4, b=4)
    found = broken(tmp_path / "a")
    data = load_images(str(tmp_path), corrupt="skip")
    assert len(data.train) + len(data.validation) == 8
    assert not set(found) & {*names(data.train), *names(data.validation)}
    assert "left out 4" in caplog.text and all(name in caplog.text for name in found)


def test_skipping_must_leave_every_class_and_split(tmp_path):
    class_folders(tmp_path / "train", a=2, b=2)
    class_folders(tmp_path / "val", a=1)
    (tmp_path / "val" / "a" / "00.png").write_bytes(b"")
    refused("none of the images of validation", name=str(tmp_path), corrupt="skip")
    for i in range(2):
        (tmp_path / "train" / "b" / f"{i:02}.png").write_bytes(b"")
    refused("none of the images of b", name=str(tmp_path), corrupt="skip")


# Tables


def csv(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("separator", [",", "\t"])
def test_csv_paths_are_relative_to_the_file(tmp_path, monkeypatch, separator, capfd):
    monkeypatch.chdir(tmp_path.parent)  # not where the file lies
    folder = tmp_path / "we[i]rd *dir"
    rows = [f"pics/{i}.png{separator}{('NA', 'None')[i % 2]}" for i in range(10)]
    for i in range(10):
        save(folder / "pics" / f"{i}.png", (i, 0, 0))
    name = csv(folder / f"list.{'csv' if separator == ',' else 'tsv'}", f"file{separator}species", *rows)
    capfd.readouterr()
    data = load_images(name)
    assert data.labels == ("NA", "None")  # words to pandas' reader, which would drop them
    assert (len(data.train), len(data.validation)) == (8, 2)
    for row in (*data.train, *data.validation):
        assert open_image(row["image"]).getpixel((0, 0))[0] % 2 == row["label"]
    assert capfd.readouterr() == ("", "")
    save(folder / "pics/new.png")
    csv(Path(name), f"file{separator}species", *rows, f"pics/new.png{separator}other")
    assert load_images(name).labels == ("NA", "None", "other")  # the library's cache notices


def test_whole_numbers_are_sorted_by_value(tmp_path):
    lines = [f"{save(tmp_path / f'{i}.png').name},{label}" for i, label in enumerate([10, 9, 10, 9, 100, 100])]
    assert load_images(csv(tmp_path / "a.csv", "image,label", *lines)).labels == ("9", "10", "100")
    lines = [f'{{"image": "{i}.png", "label": {str(i % 2 == 0).lower()}}}' for i in range(6)]
    assert load_images(csv(tmp_path / "a.jsonl", *lines)).labels == ("false", "true")  # as JSON writes them


def test_folder_of_tables(tmp_path):
    save(tmp_path / "a.png")
    csv(tmp_path / "train.csv", "image,label", "a.png,x", "a.png,y")
    csv(tmp_path / "valid.csv", "image,label", "a.png,y")
    data = load_images(str(tmp_path))
    assert (len(data.train), data.validation["label"][:]) == (2, [1])
    csv(tmp_path / "more.csv", "image,label", "a.png,x")
    refused("named after splits", "more.csv", name=str(tmp_path))


def test_metadata_table_beside_pictures(tmp_path):
    for i in range(4):
        save(tmp_path / "images" / f"{i}.png")
    csv(tmp_path / "metadata.csv", "file_name,label", *(f"images/{i}.png,{'xy'[i % 2]}" for i in range(4)))
    assert load_images(str(tmp_path)).labels == ("x", "y")


def test_tables_that_make_no_task(tmp_path, capfd):
    for i in range(4):
        save(tmp_path / f"{i}.png")
    pictures = [f"{i}.png" for i in range(4)]
    table = tmp_path / "a.csv"

    def rows(*labels):
        return [f"{picture},{label}" for picture, label in zip(pictures, labels, strict=False)]

    refused("label column", "image, x, y", name=csv(table, "image,x,y", "0.png,1,2"))
    refused("label column", "label, class", name=csv(table, "image,label,class", "0.png,1,2"))
    refused("image column", "file, label", name=csv(table, "file,label", "0,1"))
    refused("label column", "nix", name=csv(table, "image,label", *rows(1, 2)), label_column="nix")
    refused("label", "2 rows", "1, 3", name=csv(table, "image,label", *rows("x", "", "y", "")))
    refused("has one class, 1;", "at least two", name=csv(table, "image,label", *rows(1, 1, 1, 1)))
    refused("has no rows", name=csv(table, "image,label"))
    capfd.readouterr()
    refused("csv", "a.csv", name=csv(table, "image,label", "0.png,x", '"0.png'))
    assert capfd.readouterr() == ("", "")  # the error alone says it
    refused("gone.png (no such file)", name=csv(table, "image,label", *rows("x", "y"), "gone.png,x"))
    refused("a.txt", "one table", name=csv(tmp_path / "a.txt", "image,label"))
    chosen = load_images(csv(table, "image,x,y", "0.png,1,3", "1.png,2,3", "2.png,2,3"), label_column="x")
    assert chosen.labels == ("1", "2")


def parquet(path, pictures, labels, **features):
    columns = {"img": pictures, "label": labels}
    datasets.Dataset.from_dict(columns, features=datasets.Features(features) if features else None).to_parquet(path)
    return str(path)


def pngs(count):
    return [encoded(Image.new("RGB", (4, 4), (i, 0, 0))) for i in range(count)]


@pytest.mark.parametrize("form", ["image", "struct", "bytes"])
def test_parquet_with_embedded_pictures(tmp_path, form):
    pictures = pngs(6) if form == "bytes" else [{"bytes": png, "path": None} for png in pngs(6)]
    kinds = datasets.ClassLabel(names=["unused", "odd", "even"])
    features = {"img": datasets.Image(), "label": kinds} if form == "image" else {}
    data = load_images(parquet(tmp_path / "a.parquet", pictures, [1 + i % 2 for i in range(6)], **features))
    assert data.labels == (("unused", "odd", "even") if form == "image" else ("1", "2"))
    assert (len(data.train), len(data.validation)) == (4, 2)
    for row in data.train:
        parity = open_image(row["image"]).getpixel((0, 0))[0] % 2
        assert parity == row["label"] - (form == "image")


def test_parquet_rows_are_named_by_number(tmp_path):
    name = parquet(tmp_path / "a.parquet", [*pngs(4), b"nothing"], list("xyxyx"))
    refused("1 of 5", "row 4 of train (not an image)", name=name)
    data = load_images(name, corrupt="skip")
    assert len(data.train) + len(data.validation) == 4


def test_unlabelled_rows_and_splits(tmp_path):
    kinds = {"img": datasets.Value("binary"), "label": datasets.ClassLabel(names=["x", "y"])}
    parquet(tmp_path / "train-00000-of-00001.parquet", pngs(10), [0, 1] * 5, **kinds)
    parquet(tmp_path / "test-00000-of-00001.parquet", pngs(3), [-1, -1, -1], **kinds)
    data = load_images(str(tmp_path))  # a test split without labels is no validation
    assert (len(data.train), len(data.validation)) == (8, 2)
    name = parquet(tmp_path / "b.parquet", pngs(3), [0, 1, -1], **kinds)
    refused("1 rows", "2", name=name)


def test_splits_without_train(tmp_path):
    csv(tmp_path / "val.csv", "image,label", "a.png,x")
    csv(tmp_path / "test.csv", "image,label", "a.png,x")
    refused("'train'", "'val': 1", name=str(tmp_path))


LABELS = ["001", "1", "07", "7", "true", "True", "1.10", "1.1", "NA", "null", "1e3", "2020-01-01", "-0", "+5", "∞"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "hub"])
def test_labels_are_text_as_they_are_written(tmp_path, monkeypatch, kind):
    """Each is a class of its own; pandas takes most for numbers, booleans, dates or gaps."""
    rows = [(f"{i}.png", label) for i, label in enumerate(LABELS * 2)]
    for i, (name, _) in enumerate(rows):
        save(tmp_path / "owner" / "data" / name, (i, 0, 0))
    folder = tmp_path / "owner" / "data"
    if kind == "jsonl":
        lines = [json.dumps({"image": name, "label": label}) for name, label in rows]
        name = csv(folder / "a.jsonl", *lines)
    else:
        lines = ["image,label", *(",".join(row) for row in rows)]
        name = csv(folder / f"train.{kind.replace('hub', 'csv')}", *lines)
        if kind == "tsv":
            Path(name).write_text(Path(name).read_text(encoding="utf-8").replace(",", "\t"), encoding="utf-8")
    if kind == "hub":
        monkeypatch.chdir(tmp_path)
        assert hub_splits("owner/data", None, "")["train"]["label"][:] == [label for _, label in rows]
        return
    assert set(load_images(name).labels) == set(LABELS)


def test_names_of_one_word_in_two_unicode_forms_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != decomposed
    class_folders(tmp_path / "whole", **{composed: 3, "tea": 3})
    for i in range(3):
        save(tmp_path / "whole" / decomposed / f"d{i}.png", (0, 0, 9 + i))
    data = load_images(str(tmp_path / "whole"))
    assert data.labels == (composed, "tea") and len(data.train) + len(data.validation) == 9
    class_folders(tmp_path / "split" / "train", **{decomposed: 2, "tea": 2})
    class_folders(tmp_path / "split" / "val", **{composed: 1})
    assert load_images(str(tmp_path / "split")).labels == (composed, "tea")
    labels = [composed, decomposed] * 3 + ["tea"] * 3
    for i in range(9):
        save(tmp_path / f"{i}.png", (i, 0, 0))
    table = csv(tmp_path / "a.csv", "image,label", *(f"{i}.png,{label}" for i, label in enumerate(labels)))
    assert load_images(table).labels == (composed, "tea")
    lines = [json.dumps({"image": f"{i}.png", "label": label}) for i, label in enumerate(labels)]
    assert load_images(csv(tmp_path / "a.jsonl", *lines)).labels == (composed, "tea")
    # An adapter that was trained when both were two words, or on a Mac, knows the decomposed one.
    _, rows, _ = load_images_to_score(table, ["tea", decomposed], adapter="old")
    assert rows["label"][:] == [1] * 6 + [0] * 3


def test_semicolons_are_named(tmp_path):
    save(tmp_path / "0.png")
    refused("semicolons", "commas", name=csv(tmp_path / "a.csv", "image;label", "0.png;x"))


# Equal images


def pixels(rows):
    return {open_image(image).tobytes() for image in rows["image"]}


@pytest.mark.parametrize("suffixes", [("png", "png"), ("png", "bmp"), ("webp", "tiff"), ("gif", "png")])
def test_equal_images_stay_on_one_side(tmp_path, suffixes):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(20):
            image = Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8))
            for copy, suffix in enumerate(suffixes):
                options = {"lossless": True} if suffix == "webp" else {}
                image.save(tmp_path / name / f"{i:03}_{copy}.{suffix}", **options)
    data = load_images(str(tmp_path))
    assert not pixels(data.train) & pixels(data.validation)
    assert per_class(data, data.validation) == {"cat": 8, "dog": 8}  # 4 of 20, both copies
    rows = [load_images_to_score(str(tmp_path), data.labels, adapter="a", split=s)[1] for s in ("train", "validation")]
    assert [names(each) for each in rows] == [names(data.train), names(data.validation)]


def test_an_image_with_two_labels_stays_in_training(tmp_path, caplog):
    class_folders(tmp_path, a=6, b=6)
    save(tmp_path / "a" / "both.png", (9, 9, 9)), save(tmp_path / "b" / "both.png", (9, 9, 9))
    data = load_images(str(tmp_path), validation=0.8)
    assert names(data.train).count("both.png") == 2 and "1 image stands with more than one label" in caplog.text


def test_images_that_are_all_equal_are_split_with_a_warning(tmp_path, caplog):
    for name in "ab":
        for i in range(5):
            save(tmp_path / name / f"{i}.png")
    data = load_images(str(tmp_path))
    assert (len(data.train), len(data.validation)) == (8, 2) and "share equal images" in caplog.text


def test_equal_images_in_splits_of_the_data_are_counted(tmp_path, caplog):
    class_folders(tmp_path / "train", a=4, b=4)
    class_folders(tmp_path / "val", a=2, b=1)
    load_images(str(tmp_path))
    assert "3 of 3 images of validation are in training too" in caplog.text


# Test data


def test_test_data_never_choose_anything(tmp_path):
    class_folders(tmp_path / "train", a=10, b=10)
    for i in range(4):
        save(tmp_path / "test" / "ab"[i % 2] / f"t{i}.png", (0, 0, i))
    data = load_images(str(tmp_path))
    assert not [name for name in (*names(data.train), *names(data.validation)) if name.startswith("t")]
    assert per_class(data, data.validation) == {"a": 2, "b": 2}
    scored = {s: load_images_to_score(str(tmp_path), data.labels, adapter="x", split=s) for s in (None, *SPLITS)}
    assert {s: (found[0], len(found[1])) for s, found in scored.items()} == {
        None: ("test", 4), "test": ("test", 4), "validation": ("validation", 4), "train": ("train", 16),
        "all": ("all", 24),
    }  # fmt: skip
    assert names(scored["validation"][1]) == names(data.validation)
    assert "no validation split of its own" in scored["validation"][2][0] and scored["test"][2] == []


# Folders of other tasks


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (("images/0.png", "labels/0.png"), "recipes/lora_sam.py"),
        (("Images/0.jpg", "Masks/0_mask.png"), "recipes/lora_sam.py"),
        (("train/images/0.png", "train/labels/0.tif", "val/images/1.png", "val/labels/1.tif"), "recipes/lora_sam.py"),
        (("imagesTr/0.nii.gz", "labelsTr/0.nii.gz"), "recipes/spatial_sam.py"),
        (("images/train/0.jpg", "labels/train/0.txt"), "boxes"),
        (("JPEGImages/0.jpg", "SegmentationClass/0.png", "Annotations/0.xml"), "not two classes"),
    ],
)
def test_a_folder_of_images_and_maps_is_recognised(tmp_path, layout, said):
    for name in layout:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".png", ".jpg", ".tif")):
            save(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(b"")
    refused(said, "not two classes", "rename the folders", name=str(tmp_path))


def test_classes_that_only_sound_like_it_are_classes(tmp_path):
    assert load_images(str(class_folders(tmp_path / "a", labels=3, stickers=3))).labels == ("labels", "stickers")
    assert load_images(str(class_folders(tmp_path / "b", images=3, drawings=3))).labels == ("drawings", "images")


# Names and settings


def test_builtin_digits():
    data = load_images("builtin:digits")
    assert data.labels == tuple("0123456789")
    assert len(data.train) + len(data.validation) == 1797
    assert per_class(data, data.validation) == {"0": 36, "1": 36, "2": 35, "3": 37} | dict.fromkeys("456", 36) | {
        "7": 36,
        "8": 35,
        "9": 36,
    }
    from sklearn.datasets import load_digits

    first = np.asarray(open_image(data.train[0]["image"]))
    originals = (load_digits().images * 255 / 16).round()
    assert first.shape == (8, 8, 3)
    assert any((original == first[..., 0]).all() for original in originals[:10])


def test_builtin_shapes():
    pytest.importorskip("inlay.builtin.shapes")
    data = load_images("builtin:shapes")
    assert len(data.train) + len(data.validation) == 4000
    assert set(data.train["label"][:]) == set(range(len(data.labels)))
    assert open_image(data.train[0]["image"]).size == (32, 32)


def test_names_that_are_nothing(tmp_path):
    refused("builtin:digits", name="builtin:digit")
    for name in ("nobody/nothing", ""):
        refused("Hub", repr(name), name=name)
    for name in (str(tmp_path / "none"), "none.csv"):
        refused("no file or folder", repr(name), name=name)
    refused("Hub", name="nobody/nothing", revision="v1")


def test_hub_name_and_revision_go_to_datasets(monkeypatch):
    def load_dataset(name, revision):
        assert (name, revision) == ("owner/data", "v1")
        columns = {"image": [Image.new("RGB", (2, 2))] * 4, "label": ["a", "b"] * 2}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        return datasets.DatasetDict(full=datasets.Dataset.from_dict(columns, features=features))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_images("owner/data", revision="v1")
    assert (len(data.train), len(data.validation)) == (2, 2)


def test_settings_are_checked(tmp_path):
    for share in (0, 1, -0.5, float("nan")):
        refused("between 0 and 1", name="builtin:digits", validation=share)
    refused("corrupt must be refuse or skip", "'maybe'", name="builtin:digits", corrupt="maybe")
    refused("revision", name="builtin:digits", revision="main")
    refused("revision", name=str(tmp_path), revision="main")


def test_real_photos():
    if not FLOWERS.is_dir():
        pytest.skip("the flower photos are not beside the checkout (shared/data/flowers5)")
    data = load_images(str(FLOWERS))
    assert data.labels == ("daisy", "dandelion", "roses", "sunflowers", "tulips")
    assert set(per_class(data, data.train).values()) == {160}
    assert set(per_class(data, data.validation).values()) == {40}
    item = ImageView(data.validation, ViTImageProcessorPil())[199]
    assert item["pixel_values"].shape == (3, 224, 224) and item["labels"] == 4


# ImageView


@pytest.fixture
def gradient(tmp_path):
    """Two rows with a picture that no crop or mirror image of it equals."""
    x, y = np.meshgrid(np.arange(64, dtype=np.uint8), np.arange(48, dtype=np.uint8))
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(2):
            Image.fromarray(np.stack([x * 4, y * 5, 0 * x], -1)).save(tmp_path / label / f"{i}.png")
    return load_images(str(tmp_path)).train


def processor(size=32):
    return ViTImageProcessorPil(size={"height": size, "width": size})


def test_view_gives_the_processors_pixels(gradient):
    item = ImageView(gradient, processor())[1]
    expected = processor()(images=open_image(gradient[1]["image"]), return_tensors="pt")["pixel_values"][0]
    assert item["pixel_values"].dtype == torch.float32 and item["labels"] == 1
    assert torch.equal(item["pixel_values"], expected) and expected.shape == (3, 32, 32)
    assert torch.equal(ImageView(gradient, processor())[-1]["pixel_values"], expected)


def test_view_takes_pictures_of_any_size(tmp_path):
    for label, size in {"a": (1, 1), "b": (3, 1), "c": (1, 300), "d": (300, 2)}.items():
        save(tmp_path / label / "0.png", size=size), save(tmp_path / label / "1.png", size=size)
    view = ImageView(load_images(str(tmp_path)).train, processor(), "crop-flip")
    for item in view:
        assert item["pixel_values"].shape == (3, 32, 32)
        assert item["pixel_values"][:, 0, 0].tolist() == [1, -1, -1]


def test_augmentation_follows_pythons_seed_alone(gradient):
    view = ImageView(gradient, processor(), "crop-flip")

    def draw(seed):
        random.seed(seed)
        np.random.seed(random.Random(seed).randrange(9)), torch.manual_seed(seed % 3)  # noqa: NPY002
        return view[0]["pixel_values"]

    assert torch.equal(draw(1), draw(1))
    assert len({draw(seed).numpy().tobytes() for seed in range(8)}) == 8


def test_crop_keeps_area_and_ratio_and_flip_mirrors_half(gradient):
    seen = []

    def record(images, return_tensors):
        seen.append(np.asarray(images[0]))
        return {"pixel_values": torch.zeros(1, 3, 1, 1)}

    for augment in ("crop", "crop-flip"):
        random.seed(0)
        view = ImageView(gradient, record, augment)
        seen.clear()
        for _ in range(200):
            view[0]
        height, width = np.array([image.shape[:2] for image in seen]).T
        assert (height * width / (64 * 48) > 0.67).all() and len(set(height * width)) > 20
        assert (width / height > 0.72).all() and (width / height < 1.39).all()
        mirrored = np.mean([int(image[0, 0, 0]) > int(image[0, -1, 0]) for image in seen])
        assert mirrored == 0 if augment == "crop" else 0.4 < mirrored < 0.6


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_send_eight_bits_of_which_the_second_step_makes_the_same_floats(gradient, workers):
    own = processor()
    floats, view = ImageView(gradient, own, "crop-flip"), ImageView(gradient, own, "crop-flip").in_eight_bits()
    collate, order = NormalisedBatches(view.steps), SeededSampler(2, 2, 3, seed=1)
    batches = DataLoader(SeededDataset(view, 5), batch_sampler=order, num_workers=workers, collate_fn=collate.stack)
    for keys, batch in zip(order, batches, strict=True):
        expected = default_collate([SeededDataset(floats, 5)[key] for key in keys])
        assert batch["pixel_values"].dtype == torch.uint8 and torch.equal(batch["labels"], expected["labels"])
        assert torch.equal(collate.finish(batch)["pixel_values"], expected["pixel_values"])


def test_floats_of_a_processor_with_steps_of_its_own_stay(gradient):
    view = ImageView(gradient, ConvNextImageProcessorPil(size={"shortest_edge": 20})).in_eight_bits()
    item = view[0]
    assert item["pixel_values"].dtype == torch.float32
    assert torch.equal(NormalisedBatches(view.steps)([item])["pixel_values"][0], item["pixel_values"])


def test_bad_picture_after_the_check_is_named(gradient):
    Path(gradient[0]["image"]["path"]).unlink()
    with pytest.raises(InlayError, match="no such file"):
        ImageView(gradient, processor())[0]


def test_unknown_augmentation_is_refused(gradient):
    with pytest.raises(InlayError, match="crop-flip"):
        ImageView(gradient, processor(), "rotate")


def test_log_is_quiet_when_all_is_well(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load_images(str(class_folders(tmp_path, a=2, b=2)))
    assert not caplog.records


def test_a_recipe_trains_what_takes_patches_and_their_sizes(tmp_path):
    """SigLIP 2 NaFlex: its sizes are values, so its operations cannot be counted; all else is as for any base."""
    from peft import LoraConfig, get_peft_model
    from transformers import Siglip2Config, Siglip2ForImageClassification, Siglip2ImageProcessor

    from inlay import Bank, ImageTask, TrainConfig, head_modules, load_adapter, lora_targets, predict, save_adapter
    from inlay.tasks.images.processing import process_golden

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Siglip2Config(
        vision_config={"num_patches": 16, "patch_size": 8, **size},
        text_config={"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, **size},
    )
    Siglip2ForImageClassification(config).save_pretrained(tmp_path / "base")
    Siglip2ImageProcessor(max_num_patches=16, patch_size=8).save_pretrained(tmp_path / "base")
    task = ImageTask(model=str(tmp_path / "base"))
    data = task.load(0)
    model = task.base(data)
    lora = LoraConfig(r=2, target_modules=lora_targets(model), modules_to_save=head_modules(model))
    model = get_peft_model(model, lora)
    train = TrainConfig(output_dir=str(tmp_path / "run"), epochs=1, batch_size=512, workers=0, precision="no")
    report = task.report(model, data, task.fit(model, data, train, train))
    assert "mmacs" not in report.metrics["cost"] and report.metrics["cost"]["latency_ms"] > 0
    folder = save_adapter(model, tmp_path / "adapter", processor=data.processor, metrics=report.metrics)
    adapter = load_adapter(folder)
    wide, tall = (predict(adapter, [Image.new("RGB", size, RED)])[0] for size in ((40, 20), (20, 40)))
    assert wide.probabilities != tall.probabilities
    inputs = process_golden(adapter.processor)
    bank = Bank(str(tmp_path / "base"))
    bank.add(folder, name="a")
    with torch.no_grad():
        expected = adapter.model(**inputs).logits
    assert torch.allclose(bank(inputs, ["a"]).logits, expected, atol=1e-4)


def test_items_of_a_task_are_what_the_base_takes_and_its_batches_too():
    data = ImageTask().load(seed=0)
    items = [data.validation[i] for i in range(3)]
    expected = data.processor(
        images=[open_image(data.validation.rows[i]["image"]) for i in range(3)], return_tensors="pt"
    )["pixel_values"]
    assert torch.equal(torch.stack([item["pixel_values"] for item in items]), expected)
    assert torch.equal(data.collate(items)["pixel_values"], expected)
    small = data.collate.shrink_items(data.validation)
    assert small[0]["pixel_values"].dtype == torch.uint8
    assert torch.equal(data.collate([small[i] for i in range(3)])["pixel_values"], expected)

"""Shards: which files belong to which split, what is held out, and where class names come from."""

import json

import datasets
import pytest

from inlay.errors import BadInput, DamagedFile, Unreachable, Unsupported
from inlay.tasks.evaluation import Training
from inlay.tasks.shards import choose_scored, find_classes, is_held_out, is_streamed, open_shards, read_classes
from tar_shards import write_tar


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    for name in ("train-00", "train-01", "train-02", "val-00", "test-00", "other"):
        datasets.Dataset.from_dict({"text": [name], "label": ["b"]}).to_json(tmp_path / f"{name}.jsonl")
    return tmp_path


def names(splits):
    return {split: shards.names for split, shards in splits.items()}


def test_what_is_streamed(folder):
    assert (
        is_streamed("a/train-*.parquet", None) and is_streamed("a/{00..12}.jsonl", None) and is_streamed("a.tar", None)
    )
    assert is_streamed("ann/pets", True) and not is_streamed("ann/pets", None) and not is_streamed("ann/pets", False)
    (folder / "odd[1]").mkdir()
    assert not is_streamed(str(folder / "odd[1]"), None), "a folder of this name is there"


def test_shards_by_split(folder):
    train = [f"train-0{i}.jsonl" for i in range(3)]
    whole = {"train": train, "validation": ["val-00.jsonl"], "test": ["test-00.jsonl"]}
    assert names(open_shards(str(folder))) == whole
    assert names(open_shards(f"{folder}/train-*.jsonl")) == whole, "the shards next to those of training"
    assert names(open_shards(f"{folder}/train-{{01..02}}.jsonl")) == {**whole, "train": train[1:]}
    assert names(open_shards(f"{folder}/other.jsonl")) == {"train": ["other.jsonl"]}
    assert open_shards(str(folder))["train"].rows.num_shards == 3
    for wrong, message in (
        ("none-*.tar", "no shards .* are found by"),
        ("val-*.jsonl", "some to train on"),
        ("train-{01..05}.jsonl", r"there is no shard '.*train-03.jsonl'"),
    ):
        with pytest.raises(BadInput, match=message):
            open_shards(f"{folder}/{wrong}")
    with pytest.raises(BadInput, match="revision is for a Hub dataset"):
        open_shards(str(folder), "main")
    with pytest.raises(Unreachable, match="a folder or a glob of shards"):
        open_shards("ann/pets")
    (folder / "train-03.tar").write_bytes(b"")
    with pytest.raises(BadInput, match="shards of one kind"):
        open_shards(str(folder))
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DamagedFile, match=r"broken.parquet' cannot be read: "):
        open_shards(f"{folder}/broken*.parquet")


def test_held_out_depends_on_the_example_and_the_seed_only():
    keys = [f"example {i}".encode() for i in range(4000)]
    held = {key for key in keys if is_held_out(key, 0)}
    assert 150 < len(held) < 250
    assert held != {key for key in keys if is_held_out(key, 1)}
    more = [f"more {i}".encode() for i in range(4000)]
    assert {key for key in [*more, *reversed(keys)] if is_held_out(key, 0)} & set(keys) == held


def test_class_names(folder):
    shards = open_shards(str(folder))["train"]
    assert read_classes(shards, None) is None
    assert find_classes(shards, "label", "x") == ["b"]
    (folder / "labels.txt").write_text("cat\nd\N{LATIN SMALL LETTER O}g\n\n")
    assert read_classes(shards, None) == ["cat", "dog"]
    (folder / "mine.txt").write_text("cat\ncat")
    with pytest.raises(BadInput, match="two or more class names, one a line, none twice; it holds 2"):
        read_classes(shards, str(folder / "mine.txt"))
    with pytest.raises(BadInput, match=r"none\.txt' cannot be read: no such file"):
        read_classes(shards, str(folder / "none.txt"))


def test_labels_of_tar_and_parquet(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}", {"jpg": b"x", "cls": b"%d\n" % (i % 11)}) for i in range(30)])
    assert find_classes(open_shards(str(tmp_path / "a.tar"))["train"], "cls", "a") == [str(i) for i in range(11)]
    write_tar(
        tmp_path / "b.tar", [(f"{i}", {"jpg": b"x", "json": json.dumps({"label": i > 3}).encode()}) for i in range(9)]
    )
    assert find_classes(open_shards(str(tmp_path / "b.tar"))["train"], "json", "b", ["label"]) == ["false", "true"]
    datasets.Dataset.from_dict({"label": ["z", "y", "z"]}).to_parquet(tmp_path / "c.parquet")
    assert find_classes(open_shards(str(tmp_path / "c.parquet"))["train"], "label", "c") == ["y", "z"]


def test_what_is_scored(folder):
    splits = open_shards(str(folder))
    training = Training()
    assert choose_scored("x", splits, "test", training)[:2] == (splits["test"], False)
    assert choose_scored("x", {"train": splits["train"]}, "validation", training)[:2] == (splits["train"], True)
    for missing in ("train", "all"):
        with pytest.raises(Unsupported, match=f"but not '{missing}' of 'x'"):
            choose_scored("x", splits, missing, training)

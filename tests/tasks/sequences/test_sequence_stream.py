"""Labelled texts from shards: labels, pairs, what is held out, and a run."""

import datasets
import pytest

from inlay import SequenceTask
from inlay.errors import BadInput
from inlay.tasks.sequences.stream import load_sequence_stream, load_sequence_stream_to_score
from inlay.tasks.shards import is_held_out

COUNT = 100


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("sequences")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["odd", "even"])}
    )
    columns = {"text": [f"number {i}" for i in range(COUNT)], "label": [int(i % 2 == 0) for i in range(COUNT)]}
    rows = datasets.Dataset.from_dict(columns, features=features)
    for shard in range(2):
        rows.shard(2, shard).to_parquet(folder / f"train-{shard}.parquet")
    return folder


def test_what_is_held_out_and_the_items_of_a_stream(shards):
    data = load_sequence_stream(str(shards))
    assert data.labels == ("odd", "even") and not data.paired
    held = {f"number {i}" for i in range(COUNT) if is_held_out(str((f"number {i}", None)).encode(), 0)}
    assert set(data.validation["text"]) == held and held
    assert {row[0] for row in data.train.read_first(999)} == {f"number {i}" for i in range(COUNT)} - held
    chosen, rows, notes = load_sequence_stream_to_score(str(shards), ["even", "odd"])
    assert chosen == "validation" and set(rows["text"]) == held and "seed 0" in notes[0]
    assert all(label == int(text.split()[1]) % 2 for text, label in zip(rows["text"], rows["label"], strict=True))
    loaded = SequenceTask(dataset=str(shards), stream=True).load(0)
    item = loaded.train.read_first(1)[0]
    assert set(item) >= {"input_ids", "labels"} and loaded.collate([item, item])["labels"].shape == (2,)


def test_labels_of_words_pairs_and_unknown_labels(tmp_path):
    rows = [{"premise": f"{i}", "hypothesis": "h", "label": "yes" if i % 2 else "no"} for i in range(COUNT)]
    datasets.Dataset.from_list(rows).to_json(tmp_path / "train.jsonl")
    data = load_sequence_stream(str(tmp_path))
    assert data.labels == ("no", "yes") and data.paired
    (tmp_path / "labels.txt").write_text("no\nmaybe")
    with pytest.raises(BadInput, match="has the labels yes in validation only"):
        load_sequence_stream(str(tmp_path))

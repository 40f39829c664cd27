"""Texts from shards: prompts, chats and running text, what is held out, and the recipe as it stands."""

import json
import runpy
import sys
from pathlib import Path

import datasets
import pytest
import torch

from inlay import TextTask, load_adapter
from inlay.errors import BadInput
from inlay.tasks.evaluation import Request, Training
from inlay.tasks.shards import is_held_out
from inlay.tasks.text.evaluate import evaluate
from inlay.tasks.text.stream import load_text_stream
from inlay.tasks.text.view import TextView

ROOT = Path(__file__).parents[3]
COUNT = 120


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def pairs():
    """Two completions for each prompt."""
    return [{"prompt": f"name[n{i // 2}]", "completion": f"It is n{i // 2}" + "." * (i % 5)} for i in range(COUNT)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("texts")
    for shard in range(3):
        datasets.Dataset.from_list(pairs[shard::3]).to_json(folder / f"part-{shard}.jsonl")
    return folder


def read_pass(stream):
    return stream.read_first(10 * COUNT)


def test_prompts_are_held_out_with_all_their_completions(shards, pairs):
    data = load_text_stream(f"{shards}/*.jsonl")
    held = [(row["prompt"], row["completion"]) for row in data.validation]
    trained = [(row.prompt, row.completion) for row in read_pass(data.train)]
    expected = [tuple(pair.values()) for pair in pairs if is_held_out(pair["prompt"].encode(), 0)]
    assert sorted(held) == sorted(expected) and held
    assert sorted(held + trained) == sorted(tuple(pair.values()) for pair in pairs)
    assert not data.plain and not data.chat and data.test is None


def test_examples_are_those_of_the_view(shards):
    task = TextTask(dataset=f"{shards}/*.jsonl")
    data = task.load(0)
    rows = datasets.Dataset.from_list([row._asdict() for row in read_pass(data.source.train)])
    view = TextView(rows, data.processor)

    def texts(items):
        return sorted((item["input_ids"].tolist(), item["labels"].tolist()) for item in items)

    streamed = read_pass(data.train)
    assert texts(streamed) == texts([view[i] for i in range(len(view))])
    assert data.train.length(streamed[0]) == len(streamed[0]["input_ids"])
    short = TextTask(dataset=f"{shards}/*.jsonl", max_length=13, over_long="drop").load(0)
    assert {len(item["input_ids"]) for item in read_pass(short.train)} == {12, 13}


def test_short_texts_of_a_block_share_rows(shards):
    task = TextTask(dataset=f"{shards}/*.jsonl", pack=True, max_length=64)
    data = task.load(0)
    rows = read_pass(data.train)
    assert max(len(row["input_ids"]) for row in rows) <= 64 and len(rows) < COUNT / 3
    starts = sum(int((row["position_ids"] == 0).sum()) for row in rows)
    assert starts == len(read_pass(data.source.train)), "every text is in one row"
    assert set(data.collate(rows[:2])) == {"input_ids", "labels", "position_ids"}


def test_chats_and_running_text(tmp_path):
    documents = [{"text": f"Document {i} says that " + "so " * (i % 20)} for i in range(90)]
    datasets.Dataset.from_list(documents).to_parquet(tmp_path / "plain.parquet")
    data = TextTask(dataset=str(tmp_path / "plain.parquet"), stream=True, max_length=16).load(0)
    assert data.source.plain and {len(item["input_ids"]) for item in read_pass(data.train)} == {16}
    asked, answered = ([{"role": role, "content": f"{i}"} for i in range(90)] for role in ("user", "assistant"))
    chats = [{"messages": list(pair)} for pair in zip(asked, answered, strict=True)]
    with (tmp_path / "chats.jsonl").open("w") as file:
        file.writelines(json.dumps(chat) + "\n" for chat in chats)
    data = load_text_stream(str(tmp_path / "chats.jsonl"))
    assert data.chat and read_pass(data.train)[0].prompt[0]["role"] == "user"
    chats[40] = {"messages": [{"role": "user", "content": "40?"}, {"role": "user", "content": "what?"}]}
    with (tmp_path / "chats.jsonl").open("w") as file:
        file.writelines(json.dumps(chat) + "\n" for chat in chats)
    with pytest.raises(BadInput, match=r"row chats.jsonl:41\): the last message is not the assistant's"):
        load_text_stream(str(tmp_path / "chats.jsonl"))


def test_own_splits_and_groups(shards, tmp_path, pairs):
    datasets.Dataset.from_list([{**pair, "author": i % 30} for i, pair in enumerate(pairs)]).to_json(
        tmp_path / "train.jsonl"
    )
    grouped = load_text_stream(str(tmp_path), group="author")
    assert set(grouped.validation["group"]) == {str(i) for i in range(30) if is_held_out(str(i).encode(), 0)}
    assert not {row.group for row in read_pass(grouped.train)} & set(grouped.validation["group"])
    for split in ("dev", "test"):
        datasets.Dataset.from_list(pairs[:7]).to_json(tmp_path / f"{split}.jsonl")
    data = load_text_stream(str(tmp_path))
    assert (len(read_pass(data.train)), len(data.validation), len(data.test)) == (COUNT, 7, 7)
    with pytest.raises(BadInput, match="no column 'book' to keep together"):
        load_text_stream(str(tmp_path), group="book")


def test_the_recipe_trains_on_shards_and_the_adapter_is_scored(shards, tmp_path, monkeypatch):
    name = f"{shards}/*.jsonl"
    options = ["--dataset", name, "--steps", "12", "--batch_size", "8", "--max_new_tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["lora_gpt2.py", *options, "--output_dir", str(tmp_path)])
    runpy.run_path(str(ROOT / "recipes/lora_gpt2.py"), run_name="__main__")
    metrics = json.loads((tmp_path / "adapter/metrics.json").read_text())
    assert metrics["dataset"] == name and metrics["training"]["steps"] == 12
    losses = [row["train_loss"] for row in metrics["history"]]
    assert losses[-1] < losses[0] / 2
    adapter = load_adapter(tmp_path / "adapter")
    request = Request(compare=False, resamples=5, training=Training.from_metrics(metrics))
    found = evaluate(adapter, name, request)
    assert found.split == "validation"
    torch.testing.assert_close(found.scores["perplexity"].value, metrics["validation"]["perplexity"], rtol=1e-4, atol=0)

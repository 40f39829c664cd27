"""The recipes for language models as a user runs them, on a few dozen pairs, with few steps."""

import csv
import json
import math
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from inlay import load_adapter, load_tokenizer, read_adapter
from inlay.bases.load import resolve_base
from inlay.cli import app as cli

ROOT = Path(__file__).parents[2]
HUB = ROOT / "adapters_hub"
NAMES = ["The Oak", "The Elm", "Blue Gate", "Zizzi", "Cotto", "The Mill", "Fern", "The Vaults", "Giraffe", "Wildwood"]
FOODS = ["Thai", "French"]
SHORT = ["--epochs", 0.5, "--batch_size", 8, "--max_new_tokens", 8]
METHODS = {
    "lora": "LORA",
    "bottleneck": "INLAY_BOTTLENECK",
    "prefix": "INLAY_ATTENTION_PREFIX",
    "prompt": "PROMPT_TUNING",
    "partial": "INLAY_PARTIAL",
}


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes" / name), *map(str, arguments)])
    runpy.run_path(str(ROOT / "recipes" / name), run_name="__main__")


def refused(monkeypatch, capsys, *arguments, recipe="lora_gpt2.py"):
    """The one sentence with which a recipe ends."""
    with pytest.raises(SystemExit) as status:
        run(monkeypatch, recipe, *arguments)
    err = capsys.readouterr().err
    assert status.value.code == 2 and "Traceback" not in err
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return error


def write_csv(file, rows):
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([("mr", "ref"), *rows])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """40 pairs of E2E's form, 2 references for each meaning: 24 to train with, 8 to validate, 8 to test."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [
        (f"name[{name}], food[{food}]", said)
        for name in NAMES
        for food in FOODS
        for said in (f"{name} serves {food} food.", f"For {food} food go to {name}, which is well liked by many.")
    ]
    for split, part in (("train", rows[:24]), ("devset", rows[24:32]), ("test", rows[32:])):
        write_csv(folder / f"{split}.csv", part)
    return folder


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "lora_gpt2.py", "--dataset", pairs, "--output_dir", folder, *SHORT, "--epochs", 2)
    return folder / "adapter"


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("lora", ["--label_smoothing", 0.1]),
        ("lora", ["--quantize", "8bit"]),
        ("lora", ["--quantize", "4bit"]),
        ("bottleneck", []),
        ("bottleneck", ["--sites", "mlp", "--placement", "parallel"]),
        ("prefix", ["--label_smoothing", 0.1]),
        ("prefix", ["--projection", 16]),
        ("prompt", []),
        ("partial", []),
        ("partial", ["--train_what", "bias"]),
    ],
)
def test_each_recipe_trains_measures_and_saves(monkeypatch, capsys, tmp_path, pairs, method, arguments):
    if "--quantize" in arguments:
        pytest.importorskip("bitsandbytes")
    run(monkeypatch, f"{method}_gpt2.py", "--dataset", pairs, "--output_dir", tmp_path / "run", *SHORT, *arguments)
    out = capsys.readouterr().out
    assert re.search(r"^train: 24 examples, \d+ to \d+ tokens \([\d,]+ in all, [\d,]+ trained on\)$", out, re.M)
    assert re.search(r"^validation: 8 examples, ", out, re.M)
    assert re.search(r"^memory: base .* activations .* \(batch 8\) = [\d.]+ MB of .*: fits$", out, re.M)
    assert ("hold 1,179,648 weights in" in out) == ("--quantize" in arguments)  # 6 blocks of 12 * 128² weights
    check(tmp_path / "run" / "adapter", method, pairs, arguments[1] if "--quantize" in arguments else None)
    printed = re.search(r"^perplexity (\S+) at step 2, BLEU \S+, chrF \S+, ROUGE-L \S+; saved (.*)$", out, re.M)
    metrics = read_adapter(tmp_path / "run" / "adapter").metrics
    assert printed[1] == f"{metrics['validation']['perplexity']:.2f}"
    assert printed[2] == str(tmp_path / "run" / "adapter")


def check(folder, method, dataset, quantize=None):
    """That an adapter of 2 steps on the pairs is whole and tells what it is."""
    file = read_adapter(folder)
    assert file.config["peft_type"] == METHODS[method] and file.base_name == "builtin:gpt2-tiny"
    assert load_adapter(folder, quantize=quantize).deviation < 1e-4
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["dataset"] == str(dataset) and metrics["training"]["steps"] == 2
    validation, rows = metrics["validation"], metrics["by_prompt"]
    assert validation["perplexity"] == pytest.approx(math.exp(validation["loss"])) and validation["loss"] > 0
    assert {*metrics["test"]} == {"bleu", "chrf", "rouge_l"}
    assert [row["prompt"] for row in rows] == [f"name[{n}], food[{f}]" for n in NAMES[8:] for f in FOODS]
    assert metrics["test"]["rouge_l"] == pytest.approx(sum(row["rouge_l"] for row in rows) / 4)
    assert metrics["cost"]["trainable_parameters"] > 0 and metrics["cost"]["mmacs"] > 0
    assert metrics["decoding"]["max_new_tokens"] == 8


@pytest.mark.parametrize("init", ["text", "random"])
def test_a_prompt_starts_from_text_or_at_random_and_names_no_place(monkeypatch, tmp_path, pairs, init):
    arguments = ["--dataset", pairs, "--output_dir", tmp_path / "run", *SHORT, "--init", init]
    run(monkeypatch, "prompt_gpt2.py", *arguments)
    folder = tmp_path / "run" / "adapter"
    check(folder, "prompt", pairs)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["prompt_tuning_init"] == init.upper()
    assert config["tokenizer_name_or_path"] == {"text": "builtin:gpt2-tiny", "random": None}[init]
    assert str(ROOT) not in (folder / "adapter_config.json").read_text()
    assert not any(isinstance(value, str) and value.startswith("/") for value in config.values())


def test_running_text_has_a_perplexity_and_no_scores(monkeypatch, capsys, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("The oak stood by the river. Nobody knew who had planted it.\n\n" * 60)
    arguments = ["--dataset", book, "--output_dir", tmp_path / "run", *SHORT, "--max_length", 32]
    run(monkeypatch, "lora_gpt2.py", *arguments)
    metrics = json.loads((tmp_path / "run" / "adapter" / "metrics.json").read_text())
    perplexity = metrics["validation"]["perplexity"]
    assert perplexity == pytest.approx(math.exp(metrics["validation"]["loss"]))
    assert metrics["test"] is None and metrics["by_prompt"] is None
    out = capsys.readouterr().out
    assert re.search(r"^train: \d+ examples, 32 to 32 tokens", out, re.M), "blocks without padding"
    assert re.search(rf"^perplexity {perplexity:.2f} at step \d+; saved ", out, re.M)
    loaded = load_adapter(tmp_path / "run" / "adapter")
    assert loaded.deviation < 1e-4 and loaded.processor.separator == ""


def test_what_is_too_long_is_one_sentence(monkeypatch, capsys, tmp_path, pairs):
    arguments = ["--dataset", pairs, "--output_dir", tmp_path / "run", "--max_length", 24, "--over_long", "refuse"]
    error = refused(monkeypatch, capsys, *arguments)
    assert "18 of 24 examples have more than 24 tokens" in error and "raise max_length" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "arguments", "sentence"),
    [
        ("lora_gpt2.py", ["--rank", 0], "rank must be a whole number of at least 1, got 0"),
        (
            "lora_gpt2.py",
            ["--label_smoothing", 2],
            "label_smoothing must be a number from 0 to 1, got 2.0",
        ),
        (
            "lora_gpt2.py",
            ["--max_new_tokens", 256],
            "reads 256 tokens, which leaves no room for a prompt with max_new_tokens 256",
        ),
        (
            "lora_gpt2.py",
            ["--model", "builtin:vit-tiny"],
            "builtin:vit-tiny is a vit without a tokenizer; use a language model",
        ),
        ("prompt_gpt2.py", ["--length", 0], "length must be a whole number of at least 1, got 0"),
        ("prompt_gpt2.py", ["--length", 300], "half of the base's 256 positions, got a length of 300; lower it"),
        (
            "prompt_gpt2.py",
            ["--init", "text", "--init_text", " "],
            "init_text is empty, but init is text",
        ),
        (
            "prompt_gpt2.py",
            ["--max_new_tokens", 240],
            "no room for a prompt with max_new_tokens 240 and 20 virtual tokens",
        ),
    ],
)
def test_a_mistake_is_found_before_the_training(monkeypatch, capsys, tmp_path, pairs, recipe, arguments, sentence):
    arguments = ["--dataset", pairs, "--output_dir", tmp_path / "run", *arguments]
    assert sentence in refused(monkeypatch, capsys, *arguments, recipe=recipe)
    assert not (tmp_path / "run").exists()


def test_an_empty_completion_is_named_with_its_line(monkeypatch, capsys, tmp_path):
    rows = [("name[The Oak]", "The Oak is a pub."), ("name[The Elm]", " "), ("name[Fern]", "Fern is a cafe.")]
    write_csv(tmp_path / "pairs.csv", rows)
    arguments = ["--dataset", tmp_path / "pairs.csv", "--output_dir", tmp_path / "run"]
    error = refused(monkeypatch, capsys, *arguments)
    assert "the completion is empty" in error and "line 3" in error


def test_the_embedded_data_cut_to_be_fast(monkeypatch, capsys, tmp_path):
    arguments = ["--output_dir", tmp_path / "run", "--epochs", 0.002, "--max_length", 40, "--max_new_tokens", 2]
    run(monkeypatch, "lora_gpt2.py", *arguments)
    assert re.search(r"^train: 6,000 examples, .* longer than 40 were cut$", capsys.readouterr().out, re.M)
    file = read_adapter(tmp_path / "run" / "adapter")
    assert file.metrics["dataset"] == "builtin:restaurants" and len(file.metrics["by_prompt"]) == 150


def test_generate_writes_the_same_merged_or_not(trained, monkeypatch, capsys):
    prompts = ["name[The Blue Gate], food[Thai]", "name[Fern]"]
    arguments = ["--adapter", trained, "--prompts", *prompts, "--max_new_tokens", 8]
    run(monkeypatch, "generate.py", *arguments)
    written = capsys.readouterr().out
    assert [line for line in written.splitlines() if not line.startswith("    ")] == prompts
    run(monkeypatch, "generate.py", *arguments, "--merge")
    assert capsys.readouterr().out == written


def test_generate_scores_as_the_training_did(trained, pairs, monkeypatch, capsys, tmp_path):
    scores = tmp_path / "scores.json"
    run(monkeypatch, "generate.py", "--adapter", trained, "--dataset", pairs, "--scores", scores, "--max_new_tokens", 8)
    found, metrics = json.loads(scores.read_text()), read_adapter(trained).metrics
    assert found == {"total": metrics["test"], "by_prompt": metrics["by_prompt"]}
    said, signature = capsys.readouterr().out.splitlines()
    assert said.startswith("BLEU ") and signature.startswith("BLEU|nrefs:2|")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--adapter", HUB / "digits-lora-vit-tiny"],
            "ViTForImageClassification writes no text; use a causal language model, or an adapter",
        ),
        (
            ["--dataset", "builtin:restaurants", "--scores", "/no/folder/x.json"],
            "scores must be a file in an existing folder, got '/no/",
        ),
        (["--scores", "x.json"], "scores need a dataset to compare the texts with"),
    ],
)
def test_generate_finds_a_mistake_before_it_writes(monkeypatch, capsys, arguments, sentence):
    assert sentence in refused(monkeypatch, capsys, *arguments, recipe="generate.py")


def test_chats_are_asked_as_in_training_and_scored_by_what_was_held_out_there(monkeypatch, capsys, tmp_path):
    base, chats, scores = tmp_path / "base", tmp_path / "chats.jsonl", tmp_path / "scores.json"
    shutil.copytree(resolve_base("builtin:gpt2-tiny"), base)
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(base)
    asked = {f"name[{name}], food[{food}]": f"{name} serves {food} food." for name in NAMES for food in FOODS}
    lines = [
        {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]}
        for said, answer in asked.items()
    ]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ["--model", base, "--dataset", chats, "--output_dir", tmp_path / "run", "--seed", 1]
    run(monkeypatch, "lora_gpt2.py", *more, *SHORT)
    folder = tmp_path / "run" / "adapter"
    metrics = read_adapter(folder).metrics
    # Without a test split the validation's prompts are scored, which has chosen the best step too: so it is called.
    assert metrics["test"] is None and {"loss", "perplexity", "bleu", "chrf", "rouge_l"} == {*metrics["validation"]}
    card = (folder / "README.md").read_text()
    assert "| ROUGE-L |" in card and "| Test ROUGE-L |" not in card

    run(monkeypatch, "generate.py", "--adapter", folder, "--dataset", chats, "--scores", scores, "--max_new_tokens", 8)
    found = json.loads(scores.read_text())
    assert found["by_prompt"] == metrics["by_prompt"]  # not of the prompts that seed 0 would hold out
    assert found["total"].items() <= metrics["validation"].items()
    (message,) = found["by_prompt"][0]["prompt"]
    assert message["role"] == "user" and message["content"] in asked

    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["inlay", "predict", str(folder), message["content"], "--max-new-tokens", "8"])
    with pytest.raises(SystemExit):
        cli.main()
    out, err = capsys.readouterr()
    assert out.strip() == found["by_prompt"][0]["generated"] and err == ""

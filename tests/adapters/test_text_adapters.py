"""Adapters of language models: saved, checked against base and tokenizer, loaded and used."""

import json
import re

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from inlay import (
    Decoding,
    InlayError,
    TextProcessor,
    generate,
    load_adapter,
    load_base,
    load_tokenizer,
    read_adapter,
    save_adapter,
)
from inlay import predict as classify
from inlay.adapters.card import make_card
from inlay.adapters.file import CONFIG, WEIGHTS
from inlay.cli.app import main
from inlay.methods import METHODS

TEXT = ["name[The Oak], food[Thai]", "The Oak serves Thai food.", "The Elm is a pub, a cheap one by the river."]
PROMPTS = ["name[The Oak]", "The Elm, food[Thai]"]


def make_base(folder, seed=0, corpus=TEXT):
    words = ByteLevelBPETokenizer()
    words.train_from_iterator(corpus * 20, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    folder.mkdir()
    words.save_model(str(folder))
    tokenizer = GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(seed)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "initializer_range": 0.3}
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **ends)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("text") / "base")


@pytest.fixture(scope="module")
def make(base):
    def make(method, folder, **more):
        torch.manual_seed(1)
        model = METHODS[method].adapt(load_base(base), 4)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        processor = TextProcessor(load_tokenizer(base), max_length=64)
        save_adapter(model, folder, processor=processor, **more)
        return model.eval(), processor

    return make


@pytest.fixture(scope="module")
def lora(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    metrics = {"validation": {"loss": 1.5, "perplexity": 4.48}, "test": {"bleu": 31.25}, "dataset": "pairs.csv"}
    return folder, *make("lora", folder, metrics=metrics)


METHODS_OF_TEXT = [
    "lora", "dora", "ia3", "bottleneck", "bottleneck-linear", "attention-prefix", "prompt", "prefix", "partial", "bias",
    "mam",
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS_OF_TEXT)
def test_what_was_saved_writes_the_same_text(method, make, tmp_path):
    model, processor = make(method, tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter")
    assert loaded.verified and loaded.deviation < 1e-5 and loaded.labels == []
    ids = torch.tensor([processor.encode_prompt(PROMPTS[0])])
    with torch.no_grad():
        assert (loaded.model(input_ids=ids).logits - model(input_ids=ids).logits).abs().max() < 1e-5
    decoding = Decoding(max_new_tokens=8)
    texts = generate(loaded.model, loaded.processor, PROMPTS, decoding)
    assert texts == generate(model, processor, PROMPTS, decoding) and any(texts)
    assert texts != generate(load_base(loaded.file.base_name), processor, PROMPTS, decoding)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if method != "prefix":  # its file holds what the encoder gives
        assert sum(t.numel() for t in load_file(tmp_path / "adapter" / WEIGHTS).values()) == trained


def test_the_file_says_what_it_needs(lora, base):
    file = read_adapter(lora[0])
    assert file.record["task"] == "text-generation" and file.base_name == str(base)
    settings = file.record["preprocessing"]
    assert settings["separator"] == "\n" and settings["max_length"] == 64 and settings["size"] == 300
    card = (lora[0] / "README.md").read_text()
    assert "AutoModelForCausalLM" in card and "| Perplexity | 4.4800 |" in card and "| Test BLEU | 31.2500 |" in card
    assert "## Labels" not in card and "num_labels" not in card


def test_the_cards_two_ways_to_load_run(lora, capsys):
    folder, model, processor = lora
    ours, plain = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    found = {}
    exec(plain.replace("FOLDER", str(folder)), found)
    ids = torch.tensor([processor.encode_prompt(PROMPTS[0])])
    with torch.no_grad():
        assert (found["model"](input_ids=ids).logits - model(input_ids=ids).logits).abs().max() < 1e-5
    exec(ours.replace("FOLDER", str(folder)), {})
    assert capsys.readouterr().out.strip() == str(generate(model, processor, ["a prompt"]))


def test_another_tokenizer_is_refused(lora, base, tmp_path):
    other = make_base(tmp_path / "other", corpus=["quite another text, with zebras and quizzes"])
    weights = (base / "model.safetensors").read_bytes()
    (other / "model.safetensors").write_bytes(weights)
    (other / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(InlayError, match=r"the adapter was trained with the tokenizer .*, but this base has"):
        load_adapter(lora[0], other)


def test_other_weights_and_other_tasks_are_refused(lora, tmp_path):
    other = make_base(tmp_path / "other", seed=5)
    with pytest.raises(InlayError, match="other weights of the same shape"):
        load_adapter(lora[0], other)
    with pytest.raises(InlayError, match=r"model type gpt2\), but this base has vit"):
        load_adapter(lora[0], "builtin:vit-tiny")
    with pytest.raises(InlayError, match=r"is for text-generation.*use generate"):
        classify(load_adapter(lora[0]), ["image.png"])


def test_a_prompt_of_a_million_tokens_allocates_nothing(make, tmp_path):
    make("prompt", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    plain = tmp_path / "plain"
    plain.mkdir()
    from safetensors.torch import save_file

    save_file(load_file(tmp_path / "adapter" / WEIGHTS), plain / WEIGHTS)
    (plain / CONFIG).write_text(json.dumps({**config, "num_virtual_tokens": 10**12}))
    with pytest.raises(InlayError, match="expected one tensor prompt_embeddings of 1000000000000 virtual tokens"):
        load_adapter(plain)


def test_merging(lora, make, tmp_path):
    folder, model, processor = lora
    expected = generate(model, processor, PROMPTS, Decoding(max_new_tokens=8))
    merged = load_adapter(folder).merge()
    assert generate(merged.model, merged.processor, PROMPTS, Decoding(max_new_tokens=8)) == expected
    make("prompt", tmp_path / "prompt")
    with pytest.raises(InlayError, match="no weight can stand for"):
        load_adapter(tmp_path / "prompt").merge()


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_on_a_base_in_few_bits(method, quantize, make, base, tmp_path):
    pytest.importorskip("bitsandbytes")
    wide = tmp_path / "wide"
    wide.mkdir()
    for file in base.iterdir():
        (wide / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    config = GPT2Config.from_pretrained(base, n_embd=64, initializer_range=0.1)
    GPT2LMHeadModel(config).save_pretrained(wide)
    model = get_peft_model(load_base(wide, quantize=quantize), METHODS[method].config(load_base(wide), 4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    save_adapter(model, tmp_path / "adapter", processor=TextProcessor(load_tokenizer(wide)))
    for form in (quantize, None):
        if method == "dora" and form == "8bit":
            with pytest.raises(InlayError, match="8-bit"):
                load_adapter(tmp_path / "adapter", quantize=form)
            continue
        loaded = load_adapter(tmp_path / "adapter", quantize=form)
        assert loaded.verified and len(generate(loaded.model, loaded.processor, PROMPTS)) == 2


def test_an_adapter_of_plain_peft(lora, base, tmp_path):
    _, model, _ = lora
    model.save_pretrained(tmp_path / "plain")
    loaded = load_adapter(tmp_path / "plain", base)
    assert not loaded.verified and loaded.processor.separator == "\n"


def test_predict_on_the_command_line(lora, monkeypatch, capsys):
    folder, model, processor = lora
    arguments = ["inlay", "predict", str(folder), *PROMPTS, "--max-new-tokens", "8"]
    expected = generate(model, processor, PROMPTS, Decoding(max_new_tokens=8))
    for more, said in (
        ([], "\n".join(expected)),
        (["--json"], [{"prompt": p, "text": t} for p, t in zip(PROMPTS, expected, strict=True)]),
    ):
        monkeypatch.setattr("sys.argv", [*arguments, *more])
        with pytest.raises(SystemExit) as status:
            main()
        out = capsys.readouterr().out
        assert not status.value.code and (json.loads(out) if more else out.rstrip("\n")) == said


def test_the_card_of_a_chat_tells_of_the_template_and_not_of_a_separator(lora):
    file = read_adapter(lora[0])
    chat = {**file.record, "preprocessing": {**file.record["preprocessing"], "chat": True}}
    text, plain = make_card(chat, file.config, file.metrics), make_card(file.record, file.config, file.metrics)
    assert "chat template" in text and 'followed by `"\\n"`' not in text
    assert "chat template" not in plain and 'followed by `"\\n"`' in plain
    assert "at most 64 tokens" in text and "at most 64 tokens" in plain

"""Classifiers of texts: data, tokens, and small bases of each family through save and load."""

import csv
import json

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from inlay import (
    InlayError,
    SequenceProcessor,
    SequenceView,
    Unsupported,
    classify_texts,
    head_modules,
    load_adapter,
    load_base,
    load_sequences,
    load_tokenizer,
    lora_targets,
    save_adapter,
)
from inlay.builtin.families import families
from inlay.methods import METHODS
from inlay.tasks.metrics import Matthews

LABELS = ["good", "bad", "so-so"]
SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}


def bases():
    return {
        "bert": hf.BertForMaskedLM(hf.BertConfig(**SIZE, pad_token_id=0)),
        "bert with a pooler": hf.BertForPreTraining(hf.BertConfig(**SIZE, pad_token_id=0)),
        "roberta": hf.RobertaForMaskedLM(hf.RobertaConfig(**SIZE, pad_token_id=0)),
        "distilbert": hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=40, pad_token_id=0)
        ),
        "modernbert": hf.ModernBertForMaskedLM(hf.ModernBertConfig(**SIZE, **TOKENS)),
        "gpt2": hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, bos_token_id=3, eos_token_id=3)
        ),
    }


def save_tokenizer(folder, *, encoder=True):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", *(f"w{i}" for i in range(34))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]", "eos_token": "[SEP]", "model_max_length": 32}
    if encoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **names
    ).save_pretrained(folder)


@pytest.fixture(params=["bert", "bert with a pooler", "roberta", "distilbert", "modernbert", "gpt2"])
def base(request, tmp_path):
    torch.manual_seed(0)
    bases()[request.param].save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", encoder=request.param != "gpt2")
    return tmp_path / "base"


def randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def test_each_family_is_saved_and_loaded(base, tmp_path):
    torch.manual_seed(1)
    model = load_base(base, task="text-classification", labels=LABELS)
    heads = head_modules(model)
    assert model.new_head and ("bert.pooler" in heads) == (
        type(model).__name__ == "BertForSequenceClassification" and bool(model.new_poolers)
    )
    model = get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model), modules_to_save=heads))
    randomise(model)
    processor = SequenceProcessor(load_tokenizer(base))
    save_adapter(model, tmp_path / "adapter", processor=processor)
    torch.manual_seed(2)  # another new head, which the file's replaces
    loaded = load_adapter(tmp_path / "adapter")
    assert loaded.labels == LABELS and loaded.deviation < 1e-5
    rows, _ = processor.encode(["w1 w2 w3", "w4"])
    with torch.no_grad():
        both = loaded.model(**processor.pad_rows(rows)).logits
        single = torch.cat([loaded.model(**processor.pad_rows([row])).logits for row in rows])
    assert torch.allclose(both, single, atol=1e-5)  # padding changes nothing
    found = classify_texts(loaded, [("w1 w2", "w3"), ("w4", "w5")], top=2)
    assert [one.pair for one in found] == ["w3", "w5"] and len(found[0].labels) == 2
    assert found[0].label in LABELS


def test_a_new_pooler_is_trained_and_saved_with_the_head(tmp_path):
    bases()["bert"].save_pretrained(tmp_path)
    model = load_base(tmp_path, labels=LABELS)
    assert model.new_poolers == ["bert.pooler"] and head_modules(model) == ["classifier", "bert.pooler"]
    adapted = METHODS["lora"].adapt(model, 2)
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert any("pooler.modules_to_save" in name for name in trained)
    with pytest.raises(InlayError, match="Give the labels of your task for a new head"):
        load_base(tmp_path)


def test_a_decoder_gets_the_id_of_padding(tmp_path):
    bases()["gpt2"].save_pretrained(tmp_path)
    save_tokenizer(tmp_path, encoder=False)
    model = load_base(tmp_path, task="text-classification", labels=LABELS)
    assert model.config.pad_token_id == 3 and model.config.architectures == ["GPT2ForSequenceClassification"]


def write(path, header, rows, separator=","):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([header, *rows])
    return str(path)


def test_tables(tmp_path):
    rows = [[f"text {i}", "NA" if i % 3 else "None"] for i in range(30)]
    single = load_sequences(write(tmp_path / "a.csv", ["Sentence", "Label"], rows))
    assert single.labels == ("NA", "None") and not single.paired
    assert len(single.validation) == 6 and single.validation["label"][:].count(1) == 2
    pairs = [["p", "h", i % 2] for i in range(10)]
    paired = load_sequences(write(tmp_path / "b.tsv", ["premise", "hypothesis", "label"], pairs, "\t"))
    assert paired.paired and paired.labels == ("0", "1") and paired.train[0]["pair"] == "h"
    lines = [json.dumps({"question": "q", "sentence": "s", "target": "yn"[i % 2]}) for i in range(8)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    assert load_sequences(str(tmp_path / "c.jsonl")).labels == ("n", "y")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.csv", ["text", "class"], [["a", "x"], ["b", "y"]])
    write(folder / "dev.csv", ["text", "class"], [["c", "y"]])
    assert len(load_sequences(str(folder)).validation) == 1
    write(folder / "dev.csv", ["text", "class"], [["c", "z"]])
    for data, said in (
        (str(folder), "the labels z in validation only"),
        (write(tmp_path / "d.csv", ["text", "label"], [["a", "x"], ["b", "x"]]), "one class only"),
        (write(tmp_path / "e.csv", ["text", "label"], [["a", "x"], ["", "y"]]), "holds no text in 1 row .*line 3"),
        (write(tmp_path / "f.csv", ["text", "stars"], [["a", "x"]]), "label_column"),
    ):
        with pytest.raises(InlayError, match=said):
            load_sequences(data)


def test_pairs_and_cuts():
    tokenizer = load_tokenizer("builtin:gpt2-tiny")
    processor = SequenceProcessor(tokenizer, max_length=12)
    (row,), cut = processor.encode(["The Oak"], ["is cheap"])
    assert tokenizer.decode(row["input_ids"]) == "The Oak\nis cheap" and not cut
    long = "The Oak is a cheap Thai pub by the river near the Opera House in the old town"
    (row,), cut = processor.encode([long], ["is cheap"])
    assert cut == 1 and len(row["input_ids"]) <= 12 and tokenizer.decode(row["input_ids"]).endswith("is cheap")
    (row,), _ = processor.encode(["<|endoftext|>"])
    assert tokenizer.eos_token_id not in row["input_ids"]
    assert processor.encode([""])[0][0]["input_ids"] == [tokenizer.eos_token_id]
    again = SequenceProcessor.from_dict(processor.to_dict(), tokenizer)
    assert again.to_dict() == processor.to_dict()
    with pytest.raises(InlayError, match="trained with the tokenizer"):
        SequenceProcessor.from_dict({**processor.to_dict(), "vocabulary": "0" * 16}, tokenizer)


def test_batches_and_the_generated_texts():
    found = families(30, seed=3)
    assert found == families(30, seed=3) and len({text for text, _ in found}) == 30
    assert all(sum(label == own for _, label in found) == 10 for own in {label for _, label in found})
    data = load_sequences("builtin:families")
    assert (len(data.train), len(data.validation)) == (1500, 300)
    view = SequenceView(data.validation, SequenceProcessor(load_tokenizer("builtin:gpt2-tiny")))
    batch = view.collate([view[0], view[1]])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, max(view.lengths[:2]))
    assert batch["attention_mask"].sum(1).tolist() == view.lengths[:2] and "300 texts" in view.report


def test_matthews():
    metric = Matthews()
    metric.add_batch(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
    assert metric.compute()["matthews"] == pytest.approx(0.5773502)


def test_a_prompt_on_a_decoder_is_refused():
    base = load_base("builtin:gpt2-tiny", task="text-classification", labels=["a", "b"])
    with pytest.raises(Unsupported, match=r"classifies by the last token of a text.*Use another method"):
        METHODS["prompt"].adapt(base, 4)

"""Classifiers of texts: data, tokens, and small bases of each family through save and load."""

import csv
import json
import unicodedata
from dataclasses import dataclass
from functools import partial

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers as hf
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from inlay import (
    InlayError,
    SequenceProcessor,
    SequenceTask,
    SequenceView,
    TrainConfig,
    Unsupported,
    classify_texts,
    evaluate,
    head_modules,
    load_adapter,
    load_base,
    load_sequences,
    load_tokenizer,
    lora_targets,
    save_adapter,
)
from inlay.builtin.families import HELD_OUT_PHRASES, families
from inlay.methods import METHODS
from inlay.methods.prompt import check_prompt
from inlay.tasks.metrics import Matthews
from inlay.tasks.sequences.data import load_sequences_to_score
from inlay.tasks.sequences.loss import SequenceLoss
from places import SHARED

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
        "llama": hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, bos_token_id=2, eos_token_id=3)),
        "mistral": hf.MistralForCausalLM(
            hf.MistralConfig(**SIZE, num_key_value_heads=1, bos_token_id=2, eos_token_id=3)
        ),
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


@pytest.fixture(
    params=["bert", "bert with a pooler", "roberta", "distilbert", "modernbert", "llama", "mistral", "gpt2"]
)
def base(request, tmp_path):
    torch.manual_seed(0)
    bases()[request.param].save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", encoder=request.param not in ("llama", "mistral", "gpt2"))
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
    pairs = [[f"p{i}", "h", i % 2] for i in range(10)]
    paired = load_sequences(write(tmp_path / "b.tsv", ["premise", "hypothesis", "label"], pairs, "\t"))
    assert paired.paired and paired.labels == ("0", "1") and paired.train[0]["pair"] == "h"
    lines = [json.dumps({"question": "q", "sentence": f"s{i}", "target": "yn"[i % 2]}) for i in range(8)]
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


def sources(folder, rows):
    """The same table in every format: text and label of each row, as text."""
    lines = [dict(zip(("text", "label"), row, strict=True)) for row in rows]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "b.json").write_text(json.dumps(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), folder / "c.parquet")
    return [
        write(folder / "d.csv", ["text", "label"], rows),
        write(folder / "e.tsv", ["text", "label"], rows, "\t"),
        *(str(folder / name) for name in ("a.jsonl", "b.json", "c.parquet")),
    ]


@pytest.mark.parametrize(
    "words", [["001", "1"], ["07", "7", "7.0"], ["true", "True"], ["1.10", "1.1"], ["NA", "", "null"]]
)
def test_labels_are_text_as_written(tmp_path, words):
    words = [word for word in words if word]
    rows = [[f"text {i} {word}", word] for word in words for i in range(5)]
    for name in sources(tmp_path, rows):
        data = load_sequences(name)
        assert set(data.labels) == set(words)
        for row in (*data.train, *data.validation):
            assert row["text"].endswith(f" {data.labels[row['label']]}")


def test_labels_that_json_and_parquet_do_not_write_as_text(tmp_path):
    lines = [f'{{"text": "{i}", "label": {("true", "false", "1.10", "1.1", "7")[i % 5]}}}' for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert set(load_sequences(str(tmp_path / "a.jsonl")).labels) == {"true", "false", "1.10", "1.1", "7"}
    rows = [{"text": str(i), "label": i % 2 == 0} for i in range(20)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert load_sequences(str(tmp_path / "b.parquet")).labels == ("false", "true")


def test_labels_that_differ_in_unicode_form_are_one(tmp_path):
    """é as one letter, and as e with an accent (macOS): one word to every reader, in training and in scoring."""
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    rows = [[f"text {i}", forms[i % 2]] for i in range(10)] + [[f"other {i}", "tea"] for i in range(10)]
    name = write(tmp_path / "a.csv", ["text", "label"], rows)
    data = load_sequences(name)
    assert data.labels == (forms[0], "tea")
    for own in forms:  # an adapter whose labels were read from either
        _, scored, _ = load_sequences_to_score(name, [own, "tea"], adapter="a", split="all")
        assert scored["label"][:] == [0] * 10 + [1] * 10
    (tmp_path / "given").mkdir()
    write(tmp_path / "given/train.csv", ["text", "label"], [["a", forms[0]], ["b", "tea"]])
    write(tmp_path / "given/val.csv", ["text", "label"], [["c", forms[1]]])
    assert load_sequences(str(tmp_path / "given")).validation["label"][:] == [0]


def test_equal_texts_stay_on_one_side(tmp_path, caplog):
    rows = [[f"text {i % 20}", "ab"[i % 2]] for i in range(60)] + [["both", "a"], ["both", "b"]]
    data = load_sequences(write(tmp_path / "a.csv", ["text", "label"], rows))
    train, held = set(data.train["text"][:]), set(data.validation["text"][:])
    assert not train & held and len(held) == 4 and len(data.validation) == 12
    assert "both" in train and "1 text stands with more than one label" in caplog.text
    pairs = [[f"text {i % 2}", f"pair {i % 20}", "ab"[i % 2]] for i in range(60)]
    data = load_sequences(write(tmp_path / "b.csv", ["text1", "text2", "label"], pairs))
    assert not set(data.train["pair"][:]) & set(data.validation["pair"][:])
    with pytest.raises(InlayError, match="every text stands with more than one label"):
        load_sequences(write(tmp_path / "c.csv", ["text", "label"], [["x", "a"], ["x", "b"]]))


def test_what_is_held_out_does_not_change(tmp_path):
    """Adapters of before are scored on what they have not seen: written down here, not computed."""
    rows = [[f"text {i}", "ab"[i % 2]] for i in range(20)]
    data = load_sequences(write(tmp_path / "a.csv", ["text", "label"], rows))
    assert data.validation["text"][:] == ["text 4", "text 7", "text 15", "text 18"]


def test_test_data_choose_nothing(tmp_path, caplog):
    """Without a validation split it is held out of training; test is what `evaluate` scores by itself."""
    rows = [[f"text {i}", "ab"[i % 2]] for i in range(20)]
    write(tmp_path / "train.csv", ["text", "label", "id"], [[*row, "7"] for row in rows])
    write(tmp_path / "test.csv", ["text", "label"], [["new", "a"], ["text 3", "b"]])
    data = load_sequences(str(tmp_path))
    assert data.test["text"][:] == ["new", "text 3"] and set(data.validation["text"][:]) <= {row[0] for row in rows}
    assert (len(data.train), len(data.validation)) == (16, 4)
    assert "that are not used: id." in caplog.text and "1 of 2 texts of test are in training too" in caplog.text
    score = partial(load_sequences_to_score, str(tmp_path), ["a", "b"], adapter="a")
    chosen, rows, _ = score()
    assert chosen == "test" and rows["text"][:] == ["new", "text 3"]
    assert score(split="validation")[1]["text"][:] == data.validation["text"][:]
    assert score(split="train")[1]["text"][:] == data.train["text"][:]
    write(tmp_path / "test.csv", ["text"], [["new"]])
    assert load_sequences(str(tmp_path)).test is None and "split test of" in caplog.text


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


def test_a_pair_is_written_as_bert_writes_it(tmp_path):
    """[CLS] first [SEP] second [SEP] with types 0 and 1, as the tokenizer itself makes of two texts; cut alike."""
    save_tokenizer(tmp_path)
    tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    processor = SequenceProcessor(tokenizer, max_length=8)
    for first, second in (("w1 w2", "w3"), ("w1 w2 w3 w4 w5 w6", "w7"), ("w1", "w2 w3 w4 w5 w6 w7 w8")):
        (row,), _ = processor.encode([first], [second])
        assert row == dict(tokenizer(first, second, truncation="longest_first", max_length=8))
    (row,), _ = processor.encode(["w1 w2"], ["w3"])
    assert row["input_ids"] == [2, 7, 8, 3, 9, 3] and row["token_type_ids"] == [0, 0, 0, 0, 1, 1]


def test_batches_and_the_generated_texts():
    found = families(30, seed=3)
    assert found == families(30, seed=3) and len({text for text, _ in found}) == 30
    assert all(sum(label == own for _, label in found) == 10 for own in {label for _, label in found})
    data = load_sequences("builtin:families")
    assert (len(data.train), len(data.validation)) == (900, 300)
    train, held = (rows["text"][:] for rows in (data.train, data.validation))
    unseen = [text for text in held if any(phrase in text.lower() for phrase in HELD_OUT_PHRASES)]
    assert 30 < len(unseen) < 60 and not set(train) & set(held)
    assert not any(phrase in text.lower() for phrase in HELD_OUT_PHRASES for text in train)
    view = SequenceView(data.validation, SequenceProcessor(load_tokenizer("builtin:gpt2-tiny")))
    batch = view.collate([view[0], view[1]])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, max(view.lengths[:2]))
    assert batch["attention_mask"].sum(1).tolist() == view.lengths[:2] and "300 texts" in view.report


def test_matthews():
    metric = Matthews()
    metric.add_batch(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
    assert metric.compute()["matthews"] == pytest.approx(0.5773502)


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig])
def test_a_prompt_of_plain_peft_on_a_decoder_is_refused(config, tmp_path):
    """However it was built: in training, in saving and in use."""
    base = load_base("builtin:gpt2-tiny", task="text-classification", labels=["a", "b"])
    options = {"encoder_hidden_size": 8} if config is PromptEncoderConfig else {}
    model = get_peft_model(base, config(task_type="SEQ_CLS", num_virtual_tokens=2, **options))
    processor = SequenceProcessor(load_tokenizer("builtin:gpt2-tiny"))
    rows, _ = processor.encode(["a text"])
    said = r"classifies by the last token of a text.*Use another method"
    with pytest.raises(Unsupported, match=said):
        SequenceLoss()(model, {**processor.pad_rows(rows), "labels": torch.tensor([0])})
    with pytest.raises(Unsupported, match=said):
        save_adapter(model, tmp_path / "a", processor=processor)
    with pytest.raises(Unsupported, match=said):
        check_prompt(model)
    prefix = get_peft_model(
        load_base("builtin:gpt2-tiny", task="text-classification", labels=["a", "b"]),
        PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
    )
    rows = {**processor.pad_rows(rows), "labels": torch.tensor([0])}
    assert SequenceLoss()(prefix.get_base_model(), rows).loss > 0  # a head that is trained without a method
    check_prompt(prefix)  # keys and values, behind which the tokens are read


def test_a_decoder_reads_the_last_token_whatever_its_config_calls_padding(tmp_path):
    """The small Llama's config names <unk> as padding and its tokenizer none: batches are padded with the end token."""
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, pad_token_id=1, bos_token_id=2, eos_token_id=3)).save_pretrained(
        tmp_path
    )
    save_tokenizer(tmp_path, encoder=False)
    model = load_base(tmp_path, task="text-classification", labels=LABELS)
    processor = SequenceProcessor(load_tokenizer(tmp_path))
    rows, _ = processor.encode(["w1 w2 w3 w4 w5 w6", "w4", "w7 w8"])
    with torch.no_grad():
        both = model(**processor.pad_rows(rows)).logits
        single = torch.cat([model(input_ids=torch.tensor([row["input_ids"]])).logits for row in rows])
    torch.testing.assert_close(both, single, atol=1e-5, rtol=1e-5)


def test_padding_without_an_embedding_is_refused(tmp_path):
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, bos_token_id=2, eos_token_id=3)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, encoder=False)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[MORE]"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InlayError, match=r"makes the token 40, but the base has embeddings for 40 tokens only"):
        load_base(tmp_path, task="text-classification", labels=LABELS)


@pytest.mark.parametrize("task", [None, "text-generation", "text-classification"])
@pytest.mark.parametrize("kind", ["Marian", "Bart", "Pegasus", "Whisper", "T5"])
def test_encoder_decoders_are_refused(kind, task, tmp_path):
    getattr(hf, f"{kind}Config")().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(Unsupported, match=r"encoder-decoder|does not take it"):
        load_base(tmp_path, task=task, labels=None if task != "text-classification" else LABELS)


def test_the_small_llama_learns_from_parquet_on_an_8_bit_base(tmp_path):
    base = SHARED / "lm_stories260K_llama/hf"
    if not base.is_dir():
        pytest.skip("the small Llama is not beside the checkout (shared/data)")
    rows = [
        {"text": f"{name} was so {word}.", "label": label}
        for name in ("Lily", "Tom", "Mia", "Ben", "Sue", "Max", "Anna", "Tim", "Sam", "Zoe", "Leo", "Kim")
        for word, label in (("happy", "001"), ("glad", "001"), ("sad", "1"), ("angry", "1"))
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    task = SequenceTask(model=str(base), dataset=str(tmp_path / "a.parquet"), quantize="8bit", max_length=32)
    data = task.load(0)
    model = task.base(data)
    assert any(type(module).__name__ == "Linear8bitLt" for module in model.modules())
    config = LoraConfig(r=4, target_modules=lora_targets(model), modules_to_save=head_modules(model))
    model = get_peft_model(model, config)
    train = TrainConfig(output_dir=str(tmp_path / "run"), epochs=4, batch_size=8, learning_rate=1e-2, workers=0)
    result = task.fit(model, data, train, Lora())
    assert result.metrics["accuracy"] >= 0.9
    report = task.report(model, data, result)
    save_adapter(model, tmp_path / "adapter", processor=data.processor, metrics=report.metrics)
    adapter = load_adapter(tmp_path / "adapter")
    found = evaluate(adapter, str(tmp_path / "a.parquet"), split="validation")
    assert found.scores["accuracy"].value == pytest.approx(result.metrics["accuracy"]) and adapter.labels == [
        "001",
        "1",
    ]
    error = 0.0  # of calibration, by hand: 15 bins of equal width
    for k in range(15):
        inside = [row for row in found.rows if k / 15 < row["probability"] <= (k + 1) / 15]
        error += abs(sum(row["right"] - row["probability"] for row in inside)) / len(found.rows)
    assert found.scores["ece"].value == pytest.approx(error, abs=1e-4)
    both = classify_texts(adapter, ["Lily was so happy and sang all day.", "Tom was sad."])
    alone = classify_texts(adapter, ["Tom was sad."])
    assert both[1].label == alone[0].label and both[1].probabilities == pytest.approx(alone[0].probabilities, abs=0.02)


@dataclass
class Lora:
    rank: int = 4


def test_a_prompt_on_a_decoder_is_refused():
    base = load_base("builtin:gpt2-tiny", task="text-classification", labels=["a", "b"])
    with pytest.raises(Unsupported, match=r"classifies by the last token of a text.*Use another method"):
        METHODS["prompt"].adapt(base, 4)

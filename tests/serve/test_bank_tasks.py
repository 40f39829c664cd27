"""A bank whose base is given by its name: it is loaded for what its adapters are for."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from inlay import Bank, InlayError, SequenceProcessor, load_adapter, load_base, load_tokenizer, save_adapter
from inlay.methods import METHODS
from serve.banked import GPT2, save, tokens

LABELS = {"a": ["x", "y", "z"], "b": ["p", "q"]}


def classifier(base, folder, method, labels, seed):
    torch.manual_seed(seed)
    model = METHODS[method].adapt(load_base(base, task="text-classification", labels=labels), 4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return save_adapter(model.eval(), folder, processor=SequenceProcessor(load_tokenizer(base)))


def classifiers(base, folder):
    for seed, (name, method) in enumerate({"a": "lora", "b": "bottleneck"}.items()):
        classifier(base, folder / name, method, LABELS[name], seed)
    return folder


def bert(folder, kind, **more):
    tokenizer = load_tokenizer(GPT2)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id or 0, **sizes, **more)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def check_rows(bank, folder, adapters):
    found = bank(tokens(), adapters).logits
    models = {name: load_adapter(folder / name).model for name in set(adapters)}
    for i, name in enumerate(adapters):
        with torch.no_grad():
            expected = models[name](**tokens()).logits[i]
        torch.testing.assert_close(found[i, : len(expected)], expected, rtol=1e-5, atol=1e-5)
        assert (found[i, len(expected) :] == -torch.inf).all()


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_base_without_a_head_for_its_adapters(kind, tmp_path):
    base = GPT2 if kind == "gpt2" else bert(tmp_path / "base", BertForMaskedLM)
    folder = classifiers(base, tmp_path / "adapters")
    bank = Bank(base, folder)
    check_rows(bank, folder, ["a", "b", "b", "a", "a"])
    with pytest.raises(InlayError, match="has no head of its own for this task"):
        bank(tokens(), ["a", None, "b", "a", "a"])
    late = Bank(base, folder, budget_mb=10)  # which reads its adapters when rows ask for them
    check_rows(late, folder, ["b", "b", "b", "a", "a"])


def test_a_base_with_a_head_of_its_own(tmp_path):
    base = bert(tmp_path / "base", BertForSequenceClassification, num_labels=4)
    folder = classifiers(base, tmp_path / "adapters")
    bank = Bank(base, folder)
    check_rows(bank, folder, ["a", "b", "b", "a", "a"])
    with torch.no_grad():
        expected = load_base(base)(**tokens()).logits
    assert torch.equal(bank(tokens(), [None] * 5).logits, expected)


def test_adapters_of_two_tasks(tmp_path):
    folder = classifier(GPT2, tmp_path / "a", "lora", LABELS["a"], 0)
    writer = save(GPT2, ("lora", 4), tmp_path / "w")
    with pytest.raises(InlayError, match=r"load_base\(name, task='text-classification', labels="):
        Bank(GPT2, [writer, folder])
    bank = Bank(GPT2, [folder])
    before = bank(tokens(), ["a"] * 5).logits
    with pytest.raises(InlayError, match=r"brings no head .score., and neither does the base"):
        bank.add(writer)
    assert torch.equal(bank(tokens(), ["a"] * 5).logits, before)

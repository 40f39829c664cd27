"""Classifiers of texts combined: heads of one layer are stacked, others only averaged; fitted weights reach them."""

import csv

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from inlay import (
    InlayError,
    SequenceProcessor,
    classify_texts,
    combine,
    head_modules,
    load_adapter,
    load_base,
    load_tokenizer,
    lora_targets,
    save_adapter,
)
from inlay.combine.examples import load_examples
from tasks.sequences.test_sequences import bases, randomise, save_tokenizer

LABELS = {"a": ["good", "bad", "so-so"], "b": ["yes", "no"], "c": ["so-so", "good", "bad"]}
ONE_LAYER, MORE_LAYERS = ["bert with a pooler", "gpt2"], ["bert", "roberta", "distilbert", "modernbert"]
TEXTS = ["w1 w2 w3", "w4", "w5 w6"]


@pytest.fixture(scope="module")
def adapters(request, tmp_path_factory):
    """By name, of one base. They are not changed."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    bases()[request.param].save_pretrained(folder / "base")
    save_tokenizer(folder / "base", encoder=request.param != "gpt2")
    made = {}
    for seed, (name, labels) in enumerate(LABELS.items(), 1):
        torch.manual_seed(seed)
        model = load_base(folder / "base", task="text-classification", labels=labels)
        config = LoraConfig(r=2, target_modules=lora_targets(model, "attention"), modules_to_save=head_modules(model))
        model = get_peft_model(model, config)
        randomise(model)
        made[name] = save_adapter(
            model.eval(), folder / name, processor=SequenceProcessor(load_tokenizer(folder / "base"))
        )
    return made


def heads(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    return {key: value for key, value in weights.items() if "lora_" not in key}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("adapters", ONE_LAYER, indirect=True)
def test_a_group_of_stacked_heads_answers_as_its_adapter(adapters, dense, tmp_path):
    combine({adapters["a"]: 1.0, adapters["b"]: 0.0}, out=tmp_path / "out", dense=dense)
    together, alone = load_adapter(tmp_path / "out"), load_adapter(adapters["a"])
    assert together.labels == [*LABELS["a"], *LABELS["b"]] and together.groups == ["a", "b"]
    wanted, found = classify_texts(alone, TEXTS), classify_texts(together, TEXTS, group="a")
    for one, other in zip(wanted, found, strict=True):
        assert other.labels == one.labels and other.probabilities == pytest.approx(one.probabilities, abs=1e-5)


@pytest.mark.parametrize("adapters", ONE_LAYER + MORE_LAYERS, indirect=True)
def test_heads_of_any_layers_are_averaged_by_the_weights(adapters, tmp_path):
    combine({adapters["a"]: 3.0, adapters["c"]: 1.0}, out=tmp_path / "out")
    first, second, found = heads(adapters["a"]), heads(adapters["c"]), heads(tmp_path / "out")
    assert first.keys() == found.keys()
    order = [LABELS["c"].index(label) for label in LABELS["a"]]
    for key, value in found.items():
        other = second[key][order] if len(second[key]) == 3 else second[key]
        assert torch.allclose(value, 0.75 * first[key] + 0.25 * other, atol=1e-6), key
    combine({adapters["a"]: 1.0, adapters["c"]: 0.0}, out=tmp_path / "one")
    found, wanted = (classify_texts(load_adapter(f), TEXTS) for f in (tmp_path / "one", adapters["a"]))
    assert [one.probabilities for one in found] == [pytest.approx(one.probabilities, abs=1e-5) for one in wanted]


@pytest.mark.parametrize("adapters", MORE_LAYERS, indirect=True)
def test_heads_with_layers_before_cannot_be_stacked(adapters, tmp_path):
    with pytest.raises(InlayError, match=r"read layers of their own .*cannot be stacked; say whose is kept: heads='a'"):
        combine({adapters["a"]: 1.0, adapters["b"]: 1.0}, out=tmp_path / "out")
    combine({adapters["a"]: 1.0, adapters["b"]: 1.0}, heads="b", out=tmp_path / "out")
    assert load_adapter(tmp_path / "out").labels == LABELS["b"]


@pytest.mark.parametrize("rule", ["add", "average"])
@pytest.mark.parametrize("adapters", ["gpt2", "roberta"], indirect=True)
def test_fitted_weights_reach_averaged_heads(adapters, rule, tmp_path):
    """The loss that fitting says is that of the written combination, heads and all."""
    rows = [(f"w{i} w{i + 1} {'a' if i % 3 else 'b'}", LABELS["a"][i % 3]) for i in range(30)]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    data = str(tmp_path / "data.csv")
    made = combine({adapters["a"]: 1.0, adapters["c"]: 0.5}, rule, fit=data, examples=12, out=tmp_path / "out")
    assert made.fitted.after < made.fitted.before and made.weights == pytest.approx(made.fitted.weights)
    loaded = load_adapter(tmp_path / "out")
    with torch.no_grad():
        loss = load_examples(loaded, data, 12, 0).mean(loaded.model).item()
    assert loss == pytest.approx(made.fitted.after, rel=1e-4)
    first, second, found = heads(adapters["a"]), heads(adapters["c"]), heads(tmp_path / "out")
    a, c = made.weights["a"], made.weights["c"]
    for key, value in found.items():
        if len(value) != 3:
            assert torch.allclose(value, (a * first[key] + c * second[key]) / (a + c), atol=1e-5), key

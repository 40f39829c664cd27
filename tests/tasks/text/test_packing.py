"""Packed rows: the loss and gradients of the same texts one by one, and models that mix them are refused."""

import json

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from inlay import AttentionPrefixConfig, TextTask, TrainConfig, fit, load_base
from inlay.errors import BadInput, Unsupported
from inlay.measure.memory import measure_peak, plan_memory
from inlay.tasks.text import chunked_logits
from inlay.tasks.text import loss as loss_module
from inlay.tasks.text.loss import NextToken
from inlay.tasks.text.packing import PackedView, check_packing, fill_rows
from inlay.tasks.text.view import TextView

VOCABULARY = 40
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": VOCABULARY}
LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, **QUIET, **IDS},  # a row is longer than that
    "llama": {**LLAMA, "num_key_value_heads": 1, **IDS},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, **IDS},  # its positions are counted along the row
}


def language_model(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def texts():
    """Nine texts of 2 to 12 tokens with prompts of up to 4."""
    rng, view = np.random.default_rng(0), TextView.__new__(TextView)
    view.lengths, view.pad, view.report = rng.integers(2, 13, 9).tolist(), 0, "9 examples"
    view.ends = np.cumsum(view.lengths)
    view.tokens = rng.integers(1, VOCABULARY, sum(view.lengths)).astype(np.int32)
    view.prompts = np.minimum(rng.integers(0, 5, 9), np.array(view.lengths) - 1).astype(np.int32)
    return view


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_loss_and_gradients_are_those_of_single_texts(kind, lora, texts):
    model, packed = language_model(kind), PackedView(texts, 20)
    if lora:
        targets = "c_attn" if kind == "gpt2" else "q_proj"
        config = LoraConfig(target_modules=[targets], fan_in_fan_out=kind == "gpt2", init_lora_weights=False)
        model = get_peft_model(model, config)
    check_packing(model, kind)
    one_by_one, loss = texts.collate([texts[i] for i in range(len(texts))]), NextToken()
    rows = packed.collate([packed[i] for i in range(len(packed))])
    assert len(packed) < len(texts)
    assert loss.weight(rows) == loss.weight(one_by_one)
    ours, theirs = loss(model.train(), rows).loss, loss(model, one_by_one).loss
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    expected = gradients_of(model, theirs)
    for name, gradient in gradients_of(model, ours).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_an_end_that_is_the_padding_token_too_is_no_cause_for_a_warning(texts, monkeypatch):
    model, packed, warned = language_model("gpt2"), PackedView(texts, 20), []
    monkeypatch.setattr(transformers.modeling_utils.logger, "warning_once", lambda text, *more: warned.append(text))
    check_packing(model, "gpt2")
    batch = packed.collate([packed[0]])
    batch["input_ids"][0, -1] = model.config.pad_token_id
    NextToken()(model, batch)
    assert not warned


def test_rows_hold_every_text_once_and_little_space(texts):
    lengths = np.random.default_rng(1).integers(1, 100, 500).tolist()
    rows = fill_rows(lengths, 128)
    assert sorted(i for row in rows for i in row) == list(range(500))
    sizes = [sum(lengths[i] for i in row) for row in rows]
    assert max(sizes) <= 128
    assert sum(lengths) / (128 * len(rows)) > 0.98
    assert fill_rows([5, 300], 128) == [[1], [0]]
    assert PackedView(texts, 20)[0]["position_ids"][0] == 0


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("bloom", None, "leave pack out"),
        ("llama", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "in front of a row"),
        ("llama", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "in front of a row"),
    ],
)
def test_models_and_methods_that_mix_the_texts_of_a_row_are_refused(kind, config, words):
    model = language_model(kind)
    with pytest.raises(Unsupported, match=words):
        check_packing(get_peft_model(model, config) if config else model, kind)


def test_a_prefix_of_the_attention_is_one_of_each_text(texts):
    model = get_peft_model(load_base("builtin:gpt2-tiny"), AttentionPrefixConfig(length=3))
    for name, parameter in model.named_parameters():
        if "prefix" in name:
            torch.nn.init.normal_(parameter)
    check_packing(model, "builtin:gpt2-tiny")


def test_the_plan_knows_packed_rows(texts):
    packed = PackedView(texts, 20)
    batch = packed.collate([packed[i] for i in range(2)])
    model = get_peft_model(language_model("llama"), LoraConfig(target_modules=["q_proj"]))
    planned = plan_memory(model, batch, loss=NextToken()).peak
    assert planned == pytest.approx(measure_peak(model, batch, loss=NextToken()), rel=0.02)


class Interrupted(Exception):
    pass


def test_a_packed_run_with_chunked_logits_resumes_bitwise(texts, tmp_path, monkeypatch):
    for module in (chunked_logits, loss_module):
        monkeypatch.setattr(module, "CHUNK", 7 * VOCABULARY)
    packed = PackedView(texts, 20)

    def train(folder, stop=None):
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["q_proj", "lm_head"], lora_dropout=0.3)
        model = get_peft_model(language_model("llama"), config)
        backward_passes = []

        def count(gradient):
            backward_passes.append(1)
            if len(backward_passes) == stop:
                raise Interrupted

        next(p for p in model.parameters() if p.requires_grad).register_hook(count)
        settings = TrainConfig(
            str(tmp_path / folder), batch_size=2, epochs=3, save_every=2, learning_rate=0.05, workers=0
        )
        result = fit(model, packed, texts, settings, collate=packed.collate, loss=NextToken())
        return result, {name: p for name, p in model.named_parameters() if p.requires_grad}

    whole, expected = train("whole")
    with pytest.raises(Interrupted):
        train("resumed", stop=4)
    resumed, weights = train("resumed")
    assert resumed.resumed
    assert resumed.history == whole.history
    assert whole.history[-1]["loss"] < whole.history[0]["loss"]
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name


def test_the_option_packs_pairs_and_refuses_running_text(tmp_path):
    pairs, prose = tmp_path / "pairs.jsonl", tmp_path / "prose.txt"
    pairs.write_text(
        "\n".join(json.dumps({"prompt": f"name {i}", "completion": "word " * (1 + i % 5)}) for i in range(24))
    )
    prose.write_text("The river goes on. " * 40)
    data = TextTask(dataset=str(pairs), pack=True, max_length=64).load(0)
    batch = data.collate([data.train[0], data.train[1]])
    assert batch.keys() == {"input_ids", "position_ids", "labels"}
    assert data.collate([data.validation[0]]).keys() == {"input_ids", "attention_mask", "labels"}
    assert len(data.train) < len(data.source.train)
    assert max(data.train.lengths) <= 64
    with pytest.raises(BadInput, match="leave pack out"):
        TextTask(dataset=str(prose), pack=True).load(0)
    with pytest.raises(Unsupported, match="leave pack out"):
        TextTask(dataset=str(pairs), pack=True).load_parts(0)

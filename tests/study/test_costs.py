"""The costs of a trained trial: right where they can be told by hand, absent where they cannot; the model unharmed."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from inlay import METHODS, TrainConfig
from inlay.measure import Energy, Latency
from inlay.measure import costs as measured
from inlay.study import costs
from inlay.study.costs import measure_trial
from inlay.tasks.options import TaskData

CLASSES = 3


@pytest.fixture(autouse=True)
def few_passes(monkeypatch):
    monkeypatch.setattr(measured, "_TURNS", 2)
    monkeypatch.setattr(measured, "_PASSES", 1)


def small_vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    config.num_labels = CLASSES
    return ViTForImageClassification(config).requires_grad_(False).eval()


def images(count: int = 8) -> TaskData:
    items = [{"pixel_values": torch.randn(3, 16, 16), "labels": torch.tensor(i % CLASSES)} for i in range(count)]
    return TaskData(None, items, items, None, [], None, None, lambda: {"pixel_values": items[0]["pixel_values"][None]})


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "trained": [name for name, p in model.named_parameters() if p.requires_grad],
        "modes": [module.training for module in model.modules()],
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "gradients": [p.grad for p in model.parameters()],
    }


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["values"].keys() == other["values"].keys()
    assert all(torch.equal(value, other["values"][name]) for name, value in one["values"].items())
    assert {k: v for k, v in one.items() if k != "values"} == {k: v for k, v in other.items() if k != "values"}


@pytest.mark.parametrize("method", ["lora", "visual-prompt", "probe", "full"])
def test_what_is_measured_and_what_is_left_as_it_was(method: str, tmp_path: Path):
    model, data = METHODS[method].adapt(small_vit(), 2).eval(), images()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "classifier" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    before, generator = snapshot(model), torch.get_rng_state()
    found = measure_trial(model, data, TrainConfig(batch_size=4))

    assert_equal(before, snapshot(model))
    assert torch.equal(generator, torch.get_rng_state())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["trainable_parameters"] == trained
    # a file holds each of them in 4 bytes, and a header
    assert 4 * trained < found["file_bytes"] < 4 * trained + 300 * len(before["trained"]) + 1000
    if hasattr(model, "save_pretrained") and method not in ("probe", "full"):
        model.save_pretrained(tmp_path)
        assert found["file_bytes"] == pytest.approx((tmp_path / "adapter_model.safetensors").stat().st_size, abs=64)
        assert sum(value.numel() for value in load_file(tmp_path / "adapter_model.safetensors").values()) == trained
    # 4 patches and CLS of width 16: q, k, v, out, MLP, both products of attention; patches; head
    block = 5 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * 5 * 5 * 16
    assert found["base_mmacs"] == round((2 * block + 4 * 3 * 64 * 16 + 16 * CLASSES) / 1e6, 3)
    assert found["peak_bytes"] > sum(p.nbytes for p in model.parameters())
    assert found["latency_ms"] > 0 and found["base_latency_ms"] > 0
    merges = METHODS[method].merges
    assert ("merged_latency_ms" in found) == merges
    assert not merges or found["merged_mmacs"] == found["base_mmacs"]
    assert "energy_j" not in found or found["energy_j"] > 0
    json.dumps(found)


def test_full_fine_tuning_costs_what_its_base_costs_and_more_memory_to_train():
    data = images()
    full, probe = (measure_trial(METHODS[m].adapt(small_vit(), 2), data, TrainConfig()) for m in ("full", "probe"))
    for found in (full, probe):
        assert found["mmacs"] == found["base_mmacs"] == found["merged_mmacs"]
        assert found["latency_ms"] == found["base_latency_ms"] == found["merged_latency_ms"]
    assert full["peak_bytes"] > probe["peak_bytes"]
    assert full["trainable_parameters"] == sum(p.numel() for p in small_vit().parameters())


def test_what_cannot_be_measured_is_absent():
    model = METHODS["lora"].adapt(small_vit(), 2)
    broken = TaskData(None, [], [], None, [], None, None, lambda: {"pixel_values": torch.zeros(1, 3, 9, 9)})
    assert measure_trial(model, broken, TrainConfig()).keys() == {"trainable_parameters", "file_bytes"}
    frozen = small_vit()
    found = measure_trial(frozen, images(), TrainConfig())
    assert found["trainable_parameters"] == 0 and "peak_bytes" not in found and found["latency_ms"] > 0


def test_the_longest_texts_make_the_step():
    texts = [torch.arange(1, length) for length in (4, 30, 8, 20)]

    class View(list):
        lengths: ClassVar = [len(text) for text in texts]

    seen = []

    def collate(items):
        seen.append([len(item["input_ids"]) for item in items])
        ids = nn.utils.rnn.pad_sequence([item["input_ids"] for item in items], batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.zeros(len(ids), dtype=torch.long)}

    view = View({"input_ids": text} for text in texts)
    model = METHODS["prefix"].adapt(small_bert(), 2)
    data = TaskData(None, view, view, None, [], collate, None, lambda: {"input_ids": texts[0][None]})
    found = measure_trial(model, data, TrainConfig(batch_size=2))
    assert seen == [[29, 19]]
    assert found["peak_bytes"] > 0 and "merged_latency_ms" not in found
    assert found["base_latency_ms"] > 0 and found["mmacs"] >= found["base_mmacs"]


def small_bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, num_labels=CLASSES,
    )  # fmt: skip
    return BertForSequenceClassification(config).requires_grad_(False).eval()


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_a_learned_prompt_of_a_classifier_of_texts_is_switched_off(config: type):
    """peft's own disable_adapter raises UnboundLocalError there."""
    from inlay.methods._peft import adapter_disabled

    base, ids = small_bert(), {"input_ids": torch.arange(1, 9)[None]}
    expected = base(**ids).logits
    model = get_peft_model(base, config(task_type="SEQ_CLS", num_virtual_tokens=2)).eval()
    adapted = model(**ids).logits
    with adapter_disabled(model):
        off = model(**ids).logits
    assert torch.equal(off, expected) and not torch.equal(adapted, expected)
    assert torch.equal(model(**ids).logits, adapted)


def test_energy_of_every_state(monkeypatch):
    joules = iter([2.0, 1.0, 1.5])
    monkeypatch.setattr(costs, "measure_energy", lambda *_, **__: Energy(next(joules), "measured", "a counter", 1))
    found = measure_trial(METHODS["lora"].adapt(small_vit(), 2), images(), TrainConfig())
    assert (found["energy_j"], found["base_energy_j"], found["merged_energy_j"]) == (2.0, 1.0, 1.5)
    assert found["energy_source"] == "measured: a counter"


def test_latency_is_that_of_the_fastest_passes(monkeypatch):
    def turns(states, inputs):
        return {
            state: [Latency(90.0, low + turn, 99.0, "cpu", 1, 1, 5) for turn in (3, 0, 8)]
            for state, low in zip(states, (2.0, 1.0, 1.25), strict=True)
        }

    monkeypatch.setattr(costs, "time_by_turns", turns)
    found = measure_trial(METHODS["lora"].adapt(small_vit(), 2), images(), TrainConfig())
    assert [found[f"{state}latency_ms"] for state in ("", "base_", "merged_")] == [2.0, 1.0, 1.25]

"""What the adapter adds to its base, counted, and timed by turns."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from inlay.measure import Energy, cost, costs
from methods import volumes

INPUTS = {"input": torch.ones(1, 8)}
BASE = {"parameters": 8 * 16 + 16 + 16 * 4 + 4, "macs": 8 * 16 + 16 * 4}
LORA, HEAD = 2 * (8 + 16), 16 * 4 + 4


def adapted() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    return get_peft_model(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))


@pytest.fixture(autouse=True)
def no_energy(monkeypatch):
    """Which this machine may or may not count."""
    monkeypatch.setattr(costs, "measure_energy", lambda *_, **__: Energy(None, "unavailable", "no counter", 0))


def test_the_base_alone_beside_the_model_with_its_adapter():
    model = adapted()
    trains = [parameter.requires_grad for parameter in model.parameters()]
    row = cost(model, INPUTS)
    assert row["parameters"] == BASE["parameters"] + LORA + HEAD and row["base_parameters"] == BASE["parameters"]
    assert row["trainable_parameters"] == LORA + HEAD
    assert row["weights_mb"] - row["base_weights_mb"] == pytest.approx(4 * (LORA + HEAD) / 1e6, abs=2e-4)
    assert (row["mmacs"], row["base_mmacs"]) == (round((BASE["macs"] + LORA) / 1e6, 3), round(BASE["macs"] / 1e6, 3))
    assert row["latency_ms"] > 0 and row["base_latency_ms"] > 0
    assert "energy_j" not in row and row["energy_source"] == "unavailable: no counter"
    # and the model is what it was, unlike after peft's disable_adapter
    assert [parameter.requires_grad for parameter in model.parameters()] == trains
    assert model.get_model_status().enabled is True
    loaded = model.requires_grad_(False)
    cost(loaded, INPUTS)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_latencies_are_taken_by_turns_and_the_first_turn_warms_up(monkeypatch):
    seen: list[bool] = []
    times = iter([90.0, 80.0] + [4.0, 3.0, 5.0, 3.0] * 2 + [6.0, 3.0])

    def latency(model, inputs, **_):
        seen.append(isinstance(model, PeftModel))
        return SimpleNamespace(median_ms=next(times), device="cpu", threads=1)

    monkeypatch.setattr(costs, "latency", latency)
    monkeypatch.setattr(costs, "_BUDGET_S", 60.0)
    row = cost(adapted(), INPUTS)
    assert seen == [True, False] * 6
    assert (row["latency_ms"], row["base_latency_ms"], row["latency_spread_ms"]) == (5.0, 3.0, 2.0)


def test_a_slow_pass_is_taken_once_in_each_state(monkeypatch):
    passes: list[str] = []
    monkeypatch.setattr(costs, "_BUDGET_S", 0.0)
    model = adapted()
    model.get_base_model().register_forward_hook(lambda _, inputs, output: passes.append(output.device.type))
    row = cost(model, INPUTS)
    assert row["latency_ms"] > 0 and row["base_latency_ms"] > 0 and "latency_spread_ms" not in row
    assert passes.count("cpu") == 2


def test_energy_of_both(monkeypatch):
    def used(model, inputs, warmup):
        joules = 0.023456 if isinstance(model, PeftModel) else 0.0123456
        return Energy(joules, "measured", "RAPL, package-0", 9)

    monkeypatch.setattr(costs, "measure_energy", used)
    row = cost(adapted(), INPUTS)
    assert (row["energy_j"], row["base_energy_j"]) == (0.02346, 0.01235)
    assert row["energy_source"] == "measured: RAPL, package-0"


def test_models_without_an_acting_adapter_are_counted_as_they_are():
    plain, merged = nn.Linear(8, 4), adapted()
    merged.merge_adapter()
    for model in (plain, merged):
        row = cost(model, INPUTS)
        assert not any(key.startswith("base_") for key in row) and row["latency_ms"] > 0
    assert merged.base_model.model[0].merged


def test_prompts_are_what_the_adapter_adds():
    base = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    held = sum(parameter.numel() for parameter in base.parameters())
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    row = cost(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long)})
    assert (row["parameters"], row["base_parameters"]) == (held + 5 * 16, held)
    assert row["mmacs"] > row["base_mmacs"] > 0


def test_a_base_that_cannot_compute_these_inputs_is_only_counted():
    model = get_peft_model(volumes.build(), volumes.settings())
    row = cost(model, {"pixel_values": volumes.volumes(1, (16, 16, 16))})
    assert 0 < row["base_parameters"] < row["parameters"] and row["mmacs"] > 0 and row["latency_ms"] > 0
    assert "base_mmacs" not in row and "base_latency_ms" not in row

"""The choice of the code that computes attention: refused where it cannot work, and no part of an adapter."""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from inlay import load_adapter, load_base, save_adapter
from inlay.bases import attention
from inlay.bases.attention import check_precision, leave_flash_attention
from inlay.errors import BadInput, Unsupported
from inlay.tasks.text.options import TextTask
from inlay.tasks.text.processor import TextProcessor
from inlay.tasks.volumes.options import VolumeTask
from inlay.train.config import TrainConfig


@pytest.fixture(scope="module")
def gpt2():
    return load_base("builtin:gpt2-tiny", attention="sdpa")


@pytest.mark.parametrize(
    ("base", "layer"), [("builtin:gpt2-tiny", "GPT2Attention"), ("builtin:sam-tiny", "SamVisionAttention")]
)
def test_eager_attention_computes_what_sdpa_does(base, layer):
    fused, plain = load_base(base, attention="sdpa"), load_base(base, attention="eager")
    assert fused.config._attn_implementation == "sdpa"
    assert plain.config._attn_implementation == "eager"
    assert layer in {type(module).__name__ for module in plain.modules()}
    if base == "builtin:gpt2-tiny":
        ids = torch.arange(1, 13)[None]
        torch.testing.assert_close(fused(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_one_attention_loads_under_another(gpt2, tmp_path):
    from inlay.bases.processors import load_tokenizer

    model = get_peft_model(copy.deepcopy(gpt2), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    folder = save_adapter(model, tmp_path / "adapter", processor=TextProcessor(load_tokenizer("builtin:gpt2-tiny")))
    loaded = load_adapter(folder, base=load_base("builtin:gpt2-tiny", attention="eager"))
    assert loaded.model.get_base_model().config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("base", "kind", "error", "words"),
    [
        ("builtin:gpt2-tiny", "flash", Unsupported, "needs a CUDA GPU"),
        ("builtin:squeezenet-tiny", "sdpa", Unsupported, "squeezenet-tiny has no sdpa attention"),
        ("builtin:gpt2-tiny", "fast", BadInput, "choose one of sdpa, flash, eager"),
    ],
)
def test_what_model_or_machine_lacks_is_refused(base, kind, error, words):
    with pytest.raises(error, match=words):
        load_base(base, attention=kind)


def test_flash_attention_needs_its_package_and_a_model_that_has_it(monkeypatch):
    """As on a machine with a GPU; transformers would fetch the kernels from the Hub if it could."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(Unsupported, match="pip install flash-attn"):
        load_base("builtin:gpt2-tiny", attention="flash")
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    with pytest.raises(Unsupported, match="sam-tiny has no flash attention"):
        load_base("builtin:sam-tiny", attention="flash")


def test_flash_attention_trains_in_16_bits_and_is_left_after_training(gpt2, monkeypatch):
    model = get_peft_model(copy.deepcopy(gpt2), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    config = model.get_base_model().config
    config._attn_implementation_internal = "flash_attention_2"
    for precision in ("no", "auto"):
        with pytest.raises(Unsupported, match="add --precision bf16"):
            check_precision(model, precision)
    check_precision(model, "bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_precision(model, TrainConfig.precision)
    leave_flash_attention(model)
    assert config._attn_implementation == "sdpa"
    check_precision(model, "no")


def test_the_options_of_a_task_choose_it():
    view = SimpleNamespace(tokens=np.arange(3))
    data: Any = SimpleNamespace(train=view, validation=view)
    assert TextTask(attention="eager").base(data).config._attn_implementation == "eager"
    with pytest.raises(Unsupported, match="choose sdpa"):
        TextTask(attention="flash").load_parts(0)
    with pytest.raises(BadInput, match="leave attention out"):
        VolumeTask(attention="eager")

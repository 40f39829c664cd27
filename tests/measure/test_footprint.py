"""Counts that can be made by hand, and that the package loads without torch."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from inlay.measure import Footprint, footprint
from places import ROOT


def layers(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def test_plain():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2).bfloat16())
    model[0].requires_grad_(False)
    # 16 and 8 in float32, 10 in bfloat16; buffers: mean and variance in float32, one int64 counter.
    assert footprint(model) == Footprint(34, 18, 16 * 4 + 8 * 4 + 10 * 2 + 8 * 4 + 8, 8 * 4 + 10 * 2)


def test_tied_weight_counts_once():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    assert footprint(model) == Footprint(40, 40, 160, 160)


def test_meta_and_empty():
    assert footprint(nn.Linear(1000, 1000, bias=False, device="meta")).bytes_total == 4_000_000
    assert footprint(nn.ReLU()) == Footprint(0, 0, 0, 0)


def test_lora_and_both_copies_of_the_head():
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))  # 72 + 27
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    model.add_adapter("second", LoraConfig(r=1, target_modules=["0"]))
    # Active: 2 * (8 + 8) and the head's copy of 27; the second adapter of 16 is held, and does not train.
    assert footprint(model) == Footprint(72 + 27 + 27 + 32 + 16, 32 + 27, 174 * 4, 59 * 4)


@pytest.mark.parametrize("double", [False, True])
def test_four_bit(double: bool):
    nn4 = pytest.importorskip("bitsandbytes").nn
    model = nn.Sequential(nn4.Linear4bit(64, 64, quant_type="nf4", compress_statistics=double)).to("cpu")
    # 4,096 weights in 2,048 bytes, 64 biases, 16 levels; a scale for each 64 weights, of 4 bytes, or of one
    # byte with 256 levels, an offset and one scale of 4 bytes.
    scales = 64 + 256 * 4 + 4 + 4 if double else 64 * 4
    assert footprint(model) == Footprint(4160, 64, 2048 + 64 * 4 + 16 * 4 + scales, 64 * 4)
    if not double:
        model.eval()(torch.randn(2, 64))  # may repack the weight
        assert footprint(model).parameters == 4160


def test_eight_bit_before_and_after_a_forward():
    nn8 = pytest.importorskip("bitsandbytes").nn
    model = nn.Sequential(nn8.Linear8bitLt(64, 32, has_fp16_weights=False, bias=False)).to("cpu")
    expected = Footprint(2048, 0, 2048 + 32 * 4, 0)  # a byte per weight, a scale per output
    assert footprint(model) == expected
    model(torch.randn(2, 64))
    assert footprint(model) == expected
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules=["0"]))
    assert footprint(adapted) == Footprint(2048 + 96, 96, 2048 + 32 * 4 + 96 * 4, 96 * 4)


def test_the_package_loads_without_torch():
    script = """
import sys
import inlay.measure
assert not {"torch", "evaluate", "sklearn", "transformers"} & set(sys.modules)
import inlay.measure.footprint
assert callable(inlay.measure.footprint) and "cost" in dir(inlay.measure)
"""
    source = str(ROOT / "src")
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": source}, check=True, timeout=60)

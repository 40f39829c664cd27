"""Where a search for the learning rate starts: at what was best on the most similar base, scaled to this one."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from inlay.bases.learning_rate import scale_rate
from inlay.errors import BadInput
from inlay.methods import METHODS
from inlay.study import priors
from inlay.study.comparison import Comparison, Row
from inlay.study.priors import Prior, collect_priors, load_priors, start_rate
from inlay.tasks.base import load_skeleton

PRIOR = Prior(
    method="lora",
    base="builtin:vit-tiny",
    model_type="vit",
    transformer=True,
    base_width=96,
    parameters=462181,
    width=8,
    task="image-classification",
    data="builtin:digits",
    rate=4e-3,
    tried=[[1e-3, 0.8], [4e-3, 0.9]],
    source="a test",
)


def vit(width):
    with torch.device("meta"):
        return ViTForImageClassification(ViTConfig(hidden_size=width, intermediate_size=8, num_hidden_layers=1))


def test_the_records_of_the_package_are_whole():
    records = load_priors()
    assert len({record.key for record in records}) == len(records) > 40
    for record in records:
        assert record.method in METHODS and record.source
        assert not record.base.startswith("/") and not record.data.startswith("/")
        scores = {rate: score for rate, score in record.tried if score is not None}
        best = min if "loss" in record.source or "perplexity" in record.source else max
        assert scores[record.rate] == best(scores.values()), record


def test_a_base_that_was_measured_starts_at_its_best_rate():
    with torch.device("meta"):
        mobilenet = MobileNetV2ForImageClassification(MobileNetV2Config())
    assert start_rate("lora", mobilenet) == 9e-4  # a third of the rate on the embedded bases
    assert start_rate("ssf", mobilenet) == 3e-3
    assert start_rate("lora", load_skeleton("builtin:vit-tiny")) == 9.5e-3
    assert start_rate("lora", load_skeleton("builtin:squeezenet-tiny")) == 9e-3


def test_the_rate_falls_with_the_width_of_a_transformer():
    assert start_rate("lora", vit(768)) == pytest.approx(9.5e-3 * (96 / 768) ** 0.78, rel=1e-2)
    assert start_rate("lora", vit(48)) == 9.5e-3  # and never rises


@pytest.mark.parametrize(("method", "at_2000", "factor"), [("lora", 5e-4, 2), ("full", 5e-5, 6)])
def test_the_records_next_to_the_published_law(method, at_2000, factor):
    """LR = 5e-5 (LoRA: ten times that) x (2000 / hidden) ** 0.781, as the authors use it for Llama.

    All weights of a tiny base in 180 steps want six times as much; a search goes on from there.
    """
    for width in (96, 768, 4096):
        published = at_2000 * (2000 / width) ** 0.781
        assert 0.5 < start_rate(method, vit(width)) / published < factor


def test_the_nearest_records_count_and_their_mean_is_geometric():
    near = replace(PRIOR, base_width=512, rate=1e-3)
    records = [PRIOR, near, replace(near, data="other", rate=4e-3), replace(near, transformer=False, rate=9.0)]
    assert start_rate("lora", vit(512), priors=records) == pytest.approx(2e-3)
    assert start_rate("lora", vit(96), priors=records) == 4e-3
    wide = replace(near, width=64, rate=7e-3)
    assert start_rate("lora", vit(512), width=32, priors=[near, wide]) == 7e-3


def test_records_of_the_same_model_type_come_first_then_those_of_the_same_task():
    of_gpt2 = replace(PRIOR, model_type="gpt2", base_width=512, rate=1e-3, task="text-generation")
    of_classes = replace(of_gpt2, task="text-classification", rate=1e-4)
    records = [PRIOR, of_gpt2, of_classes]
    # A ViT goes by the ViT, although the GPT-2 is as wide as it is.
    assert start_rate("lora", vit(512), priors=records) == pytest.approx(4e-3 * (96 / 512) ** 0.78, rel=1e-2)
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=512, n_layer=1, n_head=2))
        dinov2 = Dinov2ForImageClassification(Dinov2Config(hidden_size=512, num_hidden_layers=1, num_attention_heads=2))
    assert start_rate("lora", gpt2, priors=records, task="text-generation") == 1e-3
    assert start_rate("lora", gpt2, priors=records, task="text-classification") == 1e-4
    assert start_rate("lora", gpt2, priors=records) == pytest.approx(3.16e-4)
    adapted = METHODS["lora"].attach(gpt2, METHODS["lora"].make_config(gpt2, 8))
    assert start_rate("lora", adapted, priors=records, task="text-generation") == 1e-3
    # Of a type without records: the same task, at any width, else the nearest in width.
    at_512 = start_rate("lora", dinov2, priors=records, task="image-classification")
    assert at_512 == start_rate("lora", vit(512), priors=records)
    assert start_rate("lora", dinov2, priors=records, task="image-segmentation") == pytest.approx(3.16e-4)


def test_the_records_of_one_gpt2_differ_by_task():
    """Ten times, so that one start for both would be wrong for each."""
    base = load_skeleton("builtin:gpt2-tiny", task="text-generation")
    assert start_rate("lora", base, task="text-generation") == 0.024
    assert start_rate("lora", base, task="text-classification") == 0.0024


def test_without_a_record_it_is_the_rate_of_the_table_scaled_for_the_base():
    base = vit(768)
    expected = scale_rate(METHODS["bias"].learning_rate, base)
    assert start_rate("bias", base, priors=[PRIOR]) == pytest.approx(expected, rel=1e-2)
    assert start_rate("bias", torch.nn.Linear(2, 2), priors=[PRIOR]) == METHODS["bias"].learning_rate


def comparison(data, curve):
    best = max((rate for rate in curve if math.isfinite(curve[rate])), key=curve.get, default=1.0)
    return Comparison(
        base="builtin:vit-tiny",
        data=str(data),
        task="image-classification",
        score="accuracy",
        larger_is_better=True,
        seeds=[0],
        counts={},
        budget={"steps": 30, "batch_size": 4},
        rows=[Row("lora", best, 8, curve, False, {"accuracy": [0.5]}, [0.5])],
    )


def test_comparisons_are_collected_and_newer_ones_replace_older(tmp_path):
    first, second = tmp_path / "a", tmp_path / "deep" / "b"
    for folder, curve in ((first, {1e-3: 0.5, 1e-2: 0.7, 0.1: math.nan}), (second, {1e-3: math.nan})):
        folder.mkdir(parents=True)
        comparison(tmp_path / folder.name, curve).write(folder / "comparison.json")
    records = collect_priors([tmp_path], [PRIOR])
    assert [(record.data, record.rate) for record in records] == [("a", 1e-2), ("builtin:digits", 4e-3)]
    found = records[0]
    assert found.tried == [[1e-3, 0.5], [1e-2, 0.7], [0.1, None]]
    assert (found.model_type, found.transformer, found.base_width) == ("vit", True, 96)
    assert found.parameters == sum(p.numel() for p in load_skeleton("builtin:vit-tiny").parameters())
    comparison(tmp_path / "a", {1e-3: 0.9, 1e-2: 0.7}).write(first / "comparison.json")
    assert [record.rate for record in collect_priors([tmp_path], records)] == [1e-3, 4e-3]


def test_the_command_writes_what_load_priors_reads(tmp_path, monkeypatch, capsys):
    comparison("builtin:other", {1e-3: 0.5}).write(tmp_path / "comparison.json")
    output = tmp_path / "priors.json"
    monkeypatch.setattr(sys, "argv", ["priors", str(tmp_path), "--output", str(output)])
    priors.main()
    assert f"{len(load_priors()) + 1} records" in capsys.readouterr().out
    stored = [Prior(**record) for record in json.loads(output.read_text())]
    assert {record.key for record in stored} >= {record.key for record in load_priors()}


def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["priors", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no comparison\.json"):
        priors.main()


def test_a_folder_without_a_comparison_is_named(tmp_path):
    with pytest.raises(BadInput, match=r"no comparison\.json"):
        collect_priors([tmp_path])

"""Will it fit: what is planned from a config alone, against the real weights and the real step."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from inlay import InlayError, NextToken, TextProcessor, TextView, TrainConfig, load_base, load_tokenizer
from inlay.cli import app as cli
from inlay.measure.memory import describe_memory, plan_memory
from inlay.methods import METHODS
from inlay.study.plan import plan_base

# Of builtin:gpt2-tiny: tokens, positions, 6 blocks of 12 matrices of 128² with 13 vectors, the last norm.
WEIGHTS = 2048 * 128 + 256 * 128 + 6 * (12 * 128**2 + 13 * 128) + 2 * 128
LORA = 6 * 8 * ((128 + 384) + (128 + 128) + (128 + 512) + (512 + 128))  # rank 8 on the four matrices of a block


def text(rows, length):
    ids = torch.arange(rows * length).view(rows, length) % 2048
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def pictures(rows, config):
    pixels = torch.zeros(rows, config.num_channels, config.image_size, config.image_size)
    return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long)}


def test_of_a_language_model_by_hand():
    plan, measured = plan_base("builtin:gpt2-tiny", "lora", batch_size=2, length=16)
    assert measured is None and plan.batch == 2
    assert plan.base == 4 * WEIGHTS
    assert plan.adapter == plan.gradients == 4 * LORA
    assert plan.optimizer == 8 * LORA + 6 * 4 * 2 * 4  # two moments, and a counter for each of A and B
    assert plan.peak == plan.base + plan.adapter + plan.gradients + plan.optimizer + plan.activations
    half, _ = plan_base("builtin:gpt2-tiny", "lora", batch_size=2, length=16, dtype="bfloat16")
    assert half.base == 2 * WEIGHTS


@pytest.mark.parametrize("method", ["lora", "prompt", "attention-prefix", "bottleneck"])
def test_a_language_model_with_its_weights_is_as_planned(method):
    plan, _ = plan_base("builtin:gpt2-tiny", method, width=4, batch_size=3, length=40)
    model = METHODS[method].adapt(load_base("builtin:gpt2-tiny"), 4)
    real = plan_memory(model, text(3, 40), loss=NextToken())
    assert (plan.adapter, plan.gradients, plan.optimizer) == (real.adapter, real.gradients, real.optimizer)
    assert plan.peak == pytest.approx(real.peak, rel=0.01) and plan.base == pytest.approx(real.base, rel=0.01)


@pytest.mark.parametrize("method", ["lora", "visual-prompt", "probe"])
def test_an_image_classifier_with_its_weights_is_as_planned(method):
    plan, _ = plan_base("builtin:vit-tiny", method, width=4, batch_size=3, labels=5)
    model = METHODS[method].adapt(load_base("builtin:vit-tiny", labels=list("abcde")), 4)
    real = plan_memory(model, pictures(3, model.config))
    assert (plan.adapter, plan.gradients, plan.optimizer) == (real.adapter, real.gradients, real.optimizer)
    assert plan.peak == pytest.approx(real.peak, rel=0.01) and plan.base == pytest.approx(real.base, rel=0.01)


@pytest.mark.parametrize(("quantize", "bits"), [("8bit", 8), ("4bit", 4)])
def test_a_base_in_few_bits_is_as_planned(quantize, bits):
    pytest.importorskip("bitsandbytes")
    plan, _ = plan_base("builtin:gpt2-tiny", "lora", batch_size=3, length=40, quantize=quantize)
    model = METHODS["lora"].adapt(load_base("builtin:gpt2-tiny", quantize=quantize), 8)
    real = plan_memory(model, text(3, 40), loss=NextToken())
    assert plan.peak == pytest.approx(real.peak, rel=0.01) and plan.base == pytest.approx(real.base, rel=0.01)
    projections = 6 * 12 * 128**2
    assert 4 * (WEIGHTS - projections) + projections * bits / 8 < plan.base < 4 * WEIGHTS - 2.5 * projections


def test_the_step_takes_what_is_planned():
    plan, measured = plan_base("builtin:gpt2-tiny", "lora", batch_size=8, length=64, measure=True)
    assert plan.peak == pytest.approx(measured, rel=0.15)
    plan, measured = plan_base("builtin:vit-tiny", "lora", batch_size=8, measure=True)
    assert plan.peak == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    "scans",
    [
        {"crop": (32, 40, 40)},  # of one row, torch's own convolution, which copies what it sees
        {"crop": (16, 24, 24), "channels": 2, "labels": 3, "batch_size": 2},
        {"crop": (8, 32, 32), "spacing_mm": (4.0, 1.0, 1.0), "gradient_checkpointing": True},
    ],
    ids=["one row", "channels and classes", "thick slices"],
)
def test_a_step_on_scans_takes_what_is_planned(scans):
    plan, measured = plan_base("builtin:sam-tiny", "spatial", **{"batch_size": 1, **scans}, measure=True)
    assert plan.peak == pytest.approx(measured, rel=0.03)


def test_the_size_of_scans_decides_what_is_planned():
    def planned(**scans):
        return plan_base("builtin:sam-tiny", "spatial", batch_size=2, **scans)[0]

    recipe = planned()
    assert recipe == planned(crop=(32, 40, 40), channels=1, labels=1)
    assert planned(crop=(64, 80, 80)).activations > 7 * recipe.activations
    assert planned(labels=9).adapter > recipe.adapter and planned(labels=9).activations > recipe.activations
    assert planned(channels=4).adapter > recipe.adapter
    assert planned(spacing_mm=(5.0, 1.0, 1.0)).activations > recipe.activations  # a token has fewer slices


def test_pissa_is_planned_without_the_weights_that_it_starts_from():
    plan, measured = plan_base("builtin:gpt2-tiny", "pissa", batch_size=2, length=16, measure=True)
    assert plan == plan_base("builtin:gpt2-tiny", "lora", batch_size=2, length=16)[0]
    assert plan.peak == pytest.approx(measured, rel=0.01)


def test_settings_count():
    least = {"batch_size": 8, "length": 64}
    plain, _ = plan_base("builtin:gpt2-tiny", "lora", **least)
    pieces, _ = plan_base("builtin:gpt2-tiny", "lora", accumulate=4, **least)
    again, _ = plan_base("builtin:gpt2-tiny", "lora", gradient_checkpointing=True, **least)
    small, _ = plan_base("builtin:gpt2-tiny", "lora", optimizer="adamw8bit", **least)
    assert pieces.batch == 2 and pieces.activations < 0.4 * plain.activations
    assert again.activations < plain.activations and small.optimizer < plain.optimizer
    assert again.adapter == small.adapter == plain.adapter
    averaged, _ = plan_base("builtin:gpt2-tiny", "lora", ema=0.99, **least)
    assert averaged.optimizer - plain.optimizer == averaged.peak - plain.peak == plain.adapter  # a copy of each weight


@pytest.mark.parametrize(
    ("name", "method", "settings", "sentence"),
    [
        ("builtin:gpt2-tiny", "nothing", {}, r"unknown method 'nothing'; choose one of probe, lora"),
        ("builtin:gpt2-tiny", "lora", {"ema": 1.0}, "ema must be above 0 and below 1, not 1"),
        ("builtin:none", "lora", {}, r"unknown embedded model 'builtin:none'"),
        ("builtin:gpt2-tiny", "lora", {"length": 257}, r"reads 256 tokens at most, but length is 257; lower it"),
        ("builtin:gpt2-tiny", "prompt", {"length": 249}, r"but length is 249, and the prompt takes 8; lower it"),
        ("builtin:gpt2-tiny", "lora", {"length": 0}, r"length must be at least 2, not 0"),
        ("builtin:gpt2-tiny", "lora", {"batch_size": 0}, r"batch_size must be at least 1, not 0"),
        ("builtin:gpt2-tiny", "lora", {"width": -1}, r"width must be at least 1, not -1"),
        ("builtin:vit-tiny", "lora", {"accumulate": 0}, r"accumulate must be at least 1, not 0"),
        ("builtin:gpt2-tiny", "lora", {"quantize": "2bit"}, r"quantize must be '8bit' or '4bit', got '2bit'"),
        ("builtin:gpt2-tiny", "lora", {"optimizer": "sgd"}, r"unknown optimizer 'sgd'; choose one of adamw, adamw8bit"),
        ("builtin:gpt2-tiny", "lora", {"precision": "fp8"}, r"unknown precision 'fp8'; choose one of no, bf16, fp16"),
        ("builtin:gpt2-tiny", "prefix", {"gradient_checkpointing": True}, r"use the attention prefix, or no checkp"),
        ("builtin:vit-tiny", "lora", {"labels": 1}, r"labels must be at least 2, not 1"),
        ("builtin:sam-tiny", "spatial", {"labels": 0}, r"labels must be at least 1, not 0"),
        ("builtin:sam-tiny", "spatial", {"channels": 0}, r"channels must be at least 1, not 0"),
        ("builtin:sam-tiny", "spatial", {"crop": (32, 0, 32)}, r"crop must be three numbers above 0.*, not 32 0 32"),
        ("builtin:sam-tiny", "spatial", {"crop": (32, 32)}, r"crop must be three numbers above 0.*, not 32 32"),
        (
            "builtin:sam-tiny",
            "spatial",
            {"spacing_mm": (1.0, float("nan"), 1.0)},
            r"spacing_mm must be .*, not 1 nan 1",
        ),
        (
            "builtin:sam-tiny",
            "lora",
            {"crop": (8, 8, 8)},
            r"crop can be given for scans only, but this is a plan for m",
        ),
        (
            "builtin:gpt2-tiny",
            "lora",
            {"crop": (8, 8, 8), "channels": 2},
            r"crop and channels can be given.*leave them",
        ),
    ],
)
def test_a_mistake_is_one_sentence(name, method, settings, sentence):
    with pytest.raises(InlayError, match=sentence):
        plan_base(name, method, **settings)


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["inlay", "plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as status:
        cli.main()
    return int(status.value.code or 0), *capsys.readouterr()


def test_the_command_says_it_as_text_and_as_json(monkeypatch, capsys):
    arguments = ["builtin:gpt2-tiny", "--method", "lora", "--width", 4, "--batch-size", 2, "--length", 24]
    arguments += ["--ema", 0.999]
    plan, _ = plan_base("builtin:gpt2-tiny", "lora", width=4, batch_size=2, length=24, ema=0.999)
    status, out, err = command(monkeypatch, capsys, *arguments)
    assert (status, err) == (0, "")
    assert out.startswith("memory: base 5.94 MB + adapter 197 kB + gradients 197 kB + AdamW 590 kB + activations ")
    assert "(batch 2)" in out and out.rstrip().endswith(": fits") and out.count("\n") == 1
    status, out, _ = command(monkeypatch, capsys, *arguments, "--json")
    said = json.loads(out)
    assert status == 0 and said["fits"] is True and said["measured"] is None
    assert [said[part] for part in ("base", "adapter", "peak")] == [plan.base, plan.adapter, plan.peak]
    status, out, _ = command(monkeypatch, capsys, *arguments, "--measure")
    assert status == 0 and out.splitlines()[1].startswith("measured: ") and "predicted / measured: " in out


def test_the_command_takes_the_size_of_scans(monkeypatch, capsys):
    size = ["--crop", 16, 24, 24, "--labels", 3, "--channels", 2, "--spacing-mm", 3, 1, 1]
    arguments = ["builtin:sam-tiny", "--method", "spatial", "--width", 8, "--batch-size", 2, *size, "--json"]
    status, out, _ = command(monkeypatch, capsys, *arguments)
    scans = {"crop": (16, 24, 24), "labels": 3, "channels": 2, "spacing_mm": (3.0, 1.0, 1.0)}
    plan, _ = plan_base("builtin:sam-tiny", "spatial", width=8, batch_size=2, **scans)
    assert status == 0 and json.loads(out)["peak"] == plan.peak


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["builtin:gpt2-tiny", "--method", "nothing"], "unknown method 'nothing'"),
        (["builtin:gpt2-tiny", "--length", 1000], "this base reads 256 tokens at most"),
        (["builtin:gpt2-tiny", "--dtype", "int3"], "dtype"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(monkeypatch, capsys, arguments, sentence):
    status, out, err = command(monkeypatch, capsys, *arguments)
    assert status == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and sentence in err


def test_one_line_on_the_longest_batch_of_a_run():
    pairs = [("name[The Oak]", "The Oak is a pub. " * n) for n in range(1, 13)]
    columns = dict(zip(("prompt", "completion"), map(list, zip(*pairs, strict=True)), strict=True))
    examples = TextView(Columns(columns), TextProcessor(load_tokenizer("builtin:gpt2-tiny")))
    model = METHODS["lora"].adapt(load_base("builtin:gpt2-tiny"), 8)
    config = TrainConfig(batch_size=4, accumulate=2)
    line = describe_memory(model, examples, config, collate=examples.collate, loss=NextToken())
    longest = examples.collate([examples[i] for i in (11, 10, 9, 8)])
    assert examples.lengths == sorted(examples.lengths)
    assert line == str(plan_memory(model, longest, accumulate=2, loss=NextToken()))
    assert line.startswith("memory: base 5.94 MB") and "(batch 2)" in line and "\n" not in line


class Columns:
    """Lists as a split of TextData gives them."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["prompt"])

    def __getitem__(self, part):
        return {name: values[part] for name, values in self.columns.items()}


class Asks(nn.Linear):
    """What its forward does with a value decides."""

    def __init__(self, ask):
        super().__init__(4, 1)
        self.ask = ask

    def forward(self, x):
        y = super().forward(x)
        self.ask(y)
        return SimpleNamespace(loss=y.sum())


@pytest.mark.parametrize(
    "ask",
    [
        lambda y: bool(y.sum() > 0),
        lambda y: y.detach().sum().item(),
        lambda y: y.detach().tolist(),
        lambda y: y.detach().numpy().sum(),
        lambda y: y[y > 0],
        lambda y: list(range(int(y.detach().sum().abs()))),
    ],
    ids=["bool", "item", "tolist", "numpy", "index", "int"],
)
def test_what_depends_on_values_is_not_known_before_training(ask):
    data = [{"x": torch.ones(4)} for _ in range(5)]
    line = describe_memory(Asks(ask), data, TrainConfig(batch_size=2))
    assert line.startswith("memory: not known before training (") and "\n" not in line


def test_a_run_that_cannot_train_is_told_so_and_not_stopped_here():
    data = [{"x": torch.ones(4)} for _ in range(5)]
    line = describe_memory(Asks(id).requires_grad_(False), data, TrainConfig(batch_size=2))
    assert line.startswith("memory: not known before training (nothing to train: no parameter requires a gradient")

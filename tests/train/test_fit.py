"""fit computes what a plain loop computes, however it cuts the steps, and tells what it did."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from points import different, log_of, same, train, wrap_forward
from torch.utils.data import default_collate
from train_job import CLASSES, Net, Points
from transformers import ViTConfig, ViTForImageClassification

from inlay.errors import InlayError
from inlay.tasks.metrics import Accuracy
from inlay.train.collate import TwoStepCollate
from inlay.train.config import TrainConfig
from inlay.train.loop import _Trainer, fit
from inlay.train.sampler import SeededSampler

# ----- the same as by hand


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_fit_equals_a_plain_loop(tmp_path, schedule):
    settings = {"weight_decay": 0.1, "clip_norm": 0.5, "warmup": 0.2, "learning_rate": 0.01}
    net, plain, data = Net(), Net(), Points(44, 1)
    train(tmp_path / "run", net, validation=None, schedule=schedule, **settings)

    steps, warm = 17, 3
    weights = [p for p in plain.parameters() if p.requires_grad]
    decay, other = [p for p in weights if p.ndim > 1], [p for p in weights if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}])
    rows, clipped = [], 0
    for step, batch in enumerate(SeededSampler(44, 8, steps, seed=0)):
        done = (step - warm) / (steps - warm)
        after = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]
        rate = 0.01 * (step / warm if step < warm else after)
        for group in optimizer.param_groups:
            group["lr"] = rate
        items = [data[i] for i, _ in batch]
        labels = torch.tensor([i["labels"] for i in items])
        loss = plain(torch.stack([i["pixel_values"] for i in items]), labels).loss
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 0.5)
        clipped += int(norm > 0.5)
        optimizer.step()
        rows.append({"step": step + 1, "loss": loss.item(), "learning_rate": rate, "gradient_norm": float(norm)})
    assert clipped > 3, "the test must clip"
    assert different(plain, Net())
    same(net, plain, atol=1e-6)
    for ours, theirs in zip(log_of(tmp_path / "run"), rows, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("accumulate", [3, 4, 8, 50])
def test_accumulation_changes_nothing(tmp_path, accumulate):
    one, cut = Net(), Net()
    a = train(tmp_path / "one", one)
    calls = wrap_forward(cut, lambda *_: None)
    b = train(tmp_path / "cut", cut, accumulate=accumulate)
    assert calls[: {3: 3, 4: 4, 8: 8, 50: 8}[accumulate]] == {3: [3, 3, 2], 4: [2] * 4}.get(accumulate, [1] * 8)
    same(one, cut, atol=1e-6)
    assert a.metrics == pytest.approx(b.metrics, abs=1e-6)


class Doubled(Points):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "pixel_values": 2 * item["pixel_values"]}


class Halves(TwoStepCollate):
    """Undoes `Doubled` in its second step, on whole batches in an evaluation and on pieces in a step."""

    def stack(self, items):
        return default_collate(items)

    def finish(self, batch):
        return {**batch, "pixel_values": batch["pixel_values"] / 2}


@pytest.mark.parametrize(("accumulate", "atol"), [(1, 0), (3, 1e-6)])  # pieces lie elsewhere in memory
def test_the_second_step_of_a_collate_function_is_done_once(tmp_path, accumulate, atol):
    plain, net = Net(), Net()
    a = train(tmp_path / "plain", plain, accumulate=accumulate)
    config = TrainConfig(str(tmp_path / "run"), batch_size=8, epochs=3, workers=0, accumulate=accumulate)
    b = fit(net, Doubled(44, 1), Doubled(13, 2), config, collate=Halves())
    same(net, plain, atol=atol)
    assert a.metrics == pytest.approx(b.metrics, abs=atol)


def lora_vit():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4,
        num_channels=1, num_labels=CLASSES, hidden_dropout_prob=0.1,
    )  # fmt: skip
    lora = LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return get_peft_model(ViTForImageClassification(config), lora)


class Pictures(Points):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        generator = torch.Generator().manual_seed(index)
        return {**item, "pixel_values": torch.randn(1, 8, 8, generator=generator) + item["labels"]}


def test_gradient_checkpointing_changes_nothing(tmp_path):
    nets = [lora_vit(), lora_vit()]
    for net, on in zip(nets, (False, True), strict=True):
        train(tmp_path / str(on), net, data=Pictures(20, 1), validation=None, epochs=1, gradient_checkpointing=on)
    assert nets[1].base_model.model.vit.layers[0].gradient_checkpointing
    assert different(nets[0], lora_vit())
    same(*nets, atol=1e-6)


def test_a_model_without_gradient_checkpointing_is_refused(tmp_path):
    with pytest.raises(InlayError, match="no gradient checkpointing"):
        train(tmp_path / "run", Net(), gradient_checkpointing=True)


def test_validation_is_the_mean_over_rows(tmp_path):
    net = Net(dropout=0.5)
    result = train(tmp_path / "run", net, metrics=[Accuracy()])
    data = Points(13, 2)
    with torch.no_grad():
        output = net(data.values, data.labels)
    assert not net.training, "fit must leave the model ready for use"
    assert result.metrics["loss"] == pytest.approx(output.loss.item(), abs=1e-6)
    assert result.metrics["accuracy"] == (output.logits.argmax(-1) == data.labels).double().mean().item()
    assert result.history[-1]["train_loss"] == pytest.approx(
        sum(r["loss"] for r in log_of(tmp_path / "run") if r["step"] > 12 and "gradient_norm" in r) / 5
    )


class Chance(Net):
    """Keeps what each training step draws by the three global generators."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def forward(self, pixel_values, labels=None):
        draw = random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002
        if self.training:
            self.drawn.append(draw)
        return super().forward(pixel_values, labels)


def test_chance_is_a_function_of_seed_and_step(tmp_path):
    nets = [Chance() for _ in range(3)]
    train(tmp_path / "often", nets[0], eval_every=2)
    train(tmp_path / "never", nets[1], validation=None)  # what an evaluation draws does not count
    train(tmp_path / "other", nets[2], seed=1)
    often, never, other = ([set(drawn) for drawn in zip(*net.drawn, strict=True)] for net in nets)
    assert nets[0].drawn == nets[1].drawn
    assert [len(drawn) for drawn in often] == [17] * 3, "every step must draw anew"
    assert not any(a & b for a, b in zip(never, other, strict=True))


def test_every_process_has_chances_of_its_own_at_every_step():
    seeds = []
    for process in range(4):
        trainer = object.__new__(_Trainer)
        trainer.config = SimpleNamespace(seed=3)
        trainer.accelerator = SimpleNamespace(num_processes=4, process_index=process)
        seeds += [trainer._seed_of_step(step) for step in range(100)]
    assert len(set(seeds)) == 400


# ----- precision


def test_fp16_on_a_cpu_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    with pytest.raises(InlayError, match="fp16 needs a GPU"):
        train(tmp_path / "run", Net(), precision="fp16")
    assert not (tmp_path / "run").exists()


def test_bf16_trains_and_leaves_the_model_as_it_was(tmp_path):
    net, seen = Net(), []
    net.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    train(tmp_path / "bf16", net, precision="bf16", epochs=2)
    assert set(seen) == {torch.bfloat16}
    assert json.loads((tmp_path / "bf16" / "run.json").read_text())["precision"] == "bf16"
    rows = [r["loss"] for r in log_of(tmp_path / "bf16") if "gradient_norm" in r]
    assert rows[-1] < rows[0]
    fresh = Net().eval()
    fresh.load_state_dict(net.state_dict())
    data = Points(13, 2)
    assert torch.equal(net(data.values).logits, fresh(data.values).logits), "autocast stays around the model"
    train(tmp_path / "fp32", Net(), precision="no", epochs=1)  # accelerate itself allows one precision a process


def test_a_half_precision_base_trains_in_its_own_dtype(tmp_path):
    net = Net()
    net.base.bfloat16()
    train(tmp_path / "run", net, epochs=0.5)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["precision"] == "bf16"


# ----- trackers


def test_trackers_that_are_unknown_or_missing_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InlayError, match=r"unknown tracker 'nonsense'; accelerate has .*tensorboard"):
        train(tmp_path / "run", Net(), tracker="nonsense")
    monkeypatch.setattr("inlay.train.launch.get_available_trackers", list)
    with pytest.raises(InlayError, match="the tracker 'wandb' is not installed: pip install wandb"):
        train(tmp_path / "run", Net(), tracker="wandb")
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "run", Net(), tracker="tensorboard", epochs=1)
    (file,) = (p for p in (tmp_path / "run" / "logs" / "inlay").iterdir() if "tfevents" in p.name)
    events = EventAccumulator(str(file))
    events.Reload()
    steps = [r["loss"] for r in log_of(tmp_path / "run") if "gradient_norm" in r]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(steps)
    assert [e.step for e in events.Scalars("validation_loss")] == [6]


def test_nothing_to_train_or_to_validate_on_is_refused(tmp_path):
    with pytest.raises(InlayError, match="no parameter requires a gradient"):
        train(tmp_path / "run", Net().requires_grad_(False))
    with pytest.raises(InlayError, match="nothing to train: the data is empty"):
        train(tmp_path / "run", Net(), rows=0)
    with pytest.raises(InlayError, match="validation data is empty"):
        train(tmp_path / "run", Net(), validation=0)
    with pytest.raises(InlayError, match=r"patience .* needs validation data"):
        train(tmp_path / "run", Net(), validation=None, patience=2)
    assert not (tmp_path / "run").exists()

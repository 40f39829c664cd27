"""Steps that are read late: the same log and weights, no update after a step that broke, and nothing read in a step."""

import math
from types import SimpleNamespace

import pytest
import torch
from points import Interrupted, log_of, same, stop_at, train
from test_breaks import gradient_bursts, loss_bursts, output_bursts
from torch import nn
from train_job import Net, Points

from host_reads import watch_steps
from inlay.errors import InlayError
from inlay.train import launch
from inlay.train.frozen_cache.frozen_blocks import FitData
from inlay.train.sampler import SeededSampler
from inlay.train.step_reader import StepReader


@pytest.fixture
def late(monkeypatch):
    """A CPU is read as a GPU is. Its fused AdamW heeds the same flag."""
    monkeypatch.setattr("inlay.train.step_reader.is_asynchronous", lambda device: True)


def test_steps_read_late_are_the_same_steps(tmp_path, monkeypatch):
    nets = [Net(0.3), Net(0.3)]
    now = train(tmp_path / "now", nets[0], save_every=7)
    monkeypatch.setattr("inlay.train.step_reader.is_asynchronous", lambda device: True)
    late = train(tmp_path / "late", nets[1], save_every=7, read_every=5)
    same(*nets)
    assert (tmp_path / "now" / "log.jsonl").read_bytes() == (tmp_path / "late" / "log.jsonl").read_bytes()
    assert now.history == late.history


@pytest.mark.parametrize(
    ("spoil", "culprit"),
    [
        (loss_bursts, "the loss is NaN or Inf"),
        (gradient_bursts, "the gradient of 'hidden.weight' is NaN or Inf"),
        (output_bursts, "the output of 'norm'"),
    ],
)
def test_a_step_that_broke_is_named_late_and_changes_no_weight(tmp_path, late, spoil, culprit):
    settings = {"save_every": 14, "eval_every": 17}
    broken, stopped, resumed, whole = Net(), Net(), Net(), Net()
    spoil(broken)
    with pytest.raises(InlayError, match=f"broke at step 9: .*{culprit}"):
        train(tmp_path / "run", broken, read_every=6, **settings)  # read after 6 and 12 steps
    assert [row["step"] for row in log_of(tmp_path / "run")] == list(range(1, 9))
    stop_at(stopped, 9)
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", stopped, **settings)
    same(broken, stopped)
    assert not train(tmp_path / "run", resumed, **settings).resumed, "weights of a broken run were saved"
    train(tmp_path / "whole", whole, **settings)
    same(resumed, whole)


def test_no_weights_are_saved_or_scored_of_a_step_that_was_not_read(tmp_path, late):
    for settings in ({"save_every": 10, "eval_every": 17}, {"eval_every": 10}):
        net = Net()
        loss_bursts(net)
        with pytest.raises(InlayError, match="broke at step 9"):
            train(tmp_path / str(settings["eval_every"]), net, read_every=16, **settings)
        folder = tmp_path / str(settings["eval_every"])
        assert not (folder / "last").exists() and not (folder / "best").exists()


def test_the_batch_of_a_step_is_read_again(tmp_path, late):
    data = Points(44, 1)
    data.values[5, 2] = math.nan
    (at,) = [(s, b.index(hit)) for s, b in enumerate(SeededSampler(44, 8, 6, seed=0)) for hit in b if hit[0] == 5][:1]
    message = rf"broke at step {at[0] + 1}: .*the input 'pixel_values' holds NaN or Inf \(rows \[{at[1]}\]"
    with pytest.raises(InlayError, match=message):
        train(tmp_path / "run", Net(), data=data, read_every=6)


def test_an_optimiser_without_the_flag_is_read_at_each_step(late):
    accelerator = launch.Accelerator(cpu=True)
    weights = [nn.Parameter(torch.ones(2))]
    every = {
        name: StepReader(accelerator, optimizer, 10).every
        for name, optimizer in {
            "fused": torch.optim.AdamW(weights, fused=True),
            "for each": torch.optim.AdamW(weights, foreach=True),
            "another": torch.optim.SGD(weights, fused=True),
        }.items()
    }
    assert every == {"fused": 10, "for each": 1, "another": 1}


def test_processes_agree_on_losses_and_on_the_signal_of_any_of_them():
    others = torch.tensor([[3.0, 5.0, 15.0]])  # loss after loss, and the signal
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=2, mixed_precision="no", gather=lambda mine: torch.cat([mine, others])
    )
    reader = StepReader(accelerator, torch.optim.SGD([nn.Parameter(torch.ones(2))]), 10)
    for step, loss in ((1, 1.0), (2, 4.0)):
        reader.add(step, 0.1, torch.tensor(loss), torch.tensor(2.0))
    values, signal = reader.read(0)
    assert [(each.step, each.loss, each.gradient_norm) for each in values] == [(1, 2.0, 2.0), (2, 4.5, 2.0)]
    assert signal == 15 and len(reader) == 0


class Reading(Net):
    """A model that asks its device for a number."""

    def forward(self, pixel_values, labels=None):
        output = super().forward(pixel_values, labels)
        assert output.loss.item() >= 0
        return output


def test_steps_read_nothing_and_a_model_that_does_is_found(tmp_path):
    with watch_steps() as reads:
        train(tmp_path / "run", Net(0.3), validation=None, epochs=1, accumulate=2)
    assert reads == []
    with watch_steps() as reads:
        train(tmp_path / "reading", Reading(), validation=None, epochs=1, accumulate=1)
    assert len(reads) == 6 and {operation for operation, *_ in reads} == {"aten._local_scalar_dense.default"}


def test_batches_are_pinned_for_a_gpu_and_stay_on_the_cpu(monkeypatch):
    made = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(launch, "DataLoader", lambda data, **options: made.append(options))

    class Accelerator:
        def prepare_data_loader(self, loader, device_placement):
            made[-1]["placed"] = device_placement

    data = FitData(Points(8, 1), Points(8, 1), None, 0)
    launch.build_loaders(data, SeededSampler(8, 4, 2, 0), 4, Accelerator())
    assert [(options["pin_memory"], options["placed"]) for options in made] == [(True, False), (True, True)]

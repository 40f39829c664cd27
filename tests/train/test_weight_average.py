"""The moving average of the weights: torch's own, evaluated and kept, and the same over a resumption."""

import pytest
import torch
from points import Interrupted, different, same, stop_at, train
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from train_job import Net, Points, trainable

from inlay.errors import InlayError
from inlay.train.config import TrainConfig


class Recording(Net):
    """Keeps its trained weights as each evaluation sees them."""

    def __init__(self):
        super().__init__(0.3)
        self.seen = []

    def forward(self, pixel_values, labels=None):
        if not self.training:
            self.seen.append(trainable(self))
        return super().forward(pixel_values, labels)


def weights_after_each_step(folder):
    net = Recording()
    train(folder, net, validation=Points(8, 2), eval_every=1)
    return net.seen


def averaged_by_torch(folder, decay):
    """The averages after each of the steps, by torch's AveragedModel and the decays of TensorFlow's average."""
    net, averages = Net(), []
    averaged = AveragedModel(net)
    averaged.n_averaged += 1  # the weights before the first step count
    for steps, weights in enumerate(weights_after_each_step(folder), 1):
        net.load_state_dict(weights, strict=False)
        averaged.multi_avg_fn = get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))
        averaged.update_parameters(net)
        averages.append(trainable(averaged.module))
    return averages


def test_the_average_is_evaluated_and_kept(tmp_path):
    expected = averaged_by_torch(tmp_path / "plain", 0.6)
    net = Recording()
    result = train(tmp_path / "ema", net, validation=Points(8, 2), eval_every=1, ema=0.6)
    assert len(net.seen) == len(expected) == 17
    for found, wanted in zip(net.seen, expected, strict=True):
        same(found, wanted, atol=1e-6)
    same(net, expected[result.best_step - 1], atol=1e-6)


def test_without_validation_the_last_average_is_kept(tmp_path):
    net = Net(0.3)
    train(tmp_path / "run", net, validation=None, ema=0.6)
    same(net, averaged_by_torch(tmp_path / "plain", 0.6)[-1], atol=1e-6)


@pytest.mark.parametrize("stop", [9, 15])
def test_a_resumed_run_has_the_same_average(tmp_path, stop):
    whole, first, second = Net(0.3), Net(0.3), Net(0.3)
    settings = {"ema": 0.9, "save_every": 4}
    a = train(tmp_path / "whole", whole, **settings)
    stop_at(first, stop)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", first, **settings)
    b = train(tmp_path / "run", second, **settings)
    assert b.resumed and a.history == b.history
    same(whole, second)
    plain = Net(0.3)
    train(tmp_path / "plain", plain, save_every=4)
    assert different(whole, plain)


def test_a_run_with_another_decay_is_not_resumed(tmp_path):
    train(tmp_path / "run", Net(), epochs=1, ema=0.9)
    with pytest.raises(InlayError, match=r"other settings \(ema 0.9 -> None\)"):
        train(tmp_path / "run", Net(), epochs=1)
    for decay in (0.0, 1.0):
        with pytest.raises(InlayError, match="ema"):
            TrainConfig(ema=decay)


def test_training_goes_on_with_the_weights_themselves(tmp_path):
    losses = []
    for ema in (None, 0.9):
        result = train(tmp_path / str(ema), Net(), validation=Points(8, 2), ema=ema)
        losses.append([row["train_loss"] for row in result.history])
    assert losses[0] == losses[1]
    assert torch.tensor(losses).isfinite().all()

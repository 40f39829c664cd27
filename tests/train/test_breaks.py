"""Numbers that stop being numbers, and memory that runs out."""

import math

import pytest
import torch
from points import Interrupted, log_of, same, stop_at, train, wrap_forward
from torch import nn
from train_job import Net, Points

from inlay.errors import InlayError
from inlay.train.sampler import SeededSampler

# ----- numbers that stop being numbers


class Burst(nn.Module):
    """Lets values through, and from one call on multiplies them."""

    def __init__(self, call, factor):
        super().__init__()
        self.call, self.factor, self.calls = call, factor, 0

    def forward(self, values):
        self.calls += self.training
        return values * self.factor if self.calls >= self.call else values


def loss_bursts(net):
    def act(count, batch, output):
        if count >= 9:
            output.loss = output.loss * math.inf
        return output

    wrap_forward(net, act)


def gradient_bursts(net):
    calls = []

    def hook(gradient):
        calls.append(1)
        return gradient * math.nan if len(calls) >= 9 else gradient

    net.hidden.weight.register_hook(hook)


def output_bursts(net):
    net.norm = Burst(9, math.inf)


@pytest.mark.parametrize(
    ("spoil", "culprit"),
    [
        (loss_bursts, r"loss inf.*the loss is NaN or Inf"),
        (gradient_bursts, r".*gradient norm nan; the gradient of 'hidden.weight'"),
        (output_bursts, r"loss nan.*output of 'norm'"),
    ],
)
def test_nan_names_step_and_culprit_and_keeps_the_checkpoint(tmp_path, spoil, culprit):
    broken, resumed, whole = Net(), Net(), Net()
    spoil(broken)
    with pytest.raises(InlayError, match=rf"broke at step 9: {culprit}"):
        train(tmp_path / "run", broken, save_every=4, accumulate=1)
    assert [r["step"] for r in log_of(tmp_path / "run") if "gradient_norm" in r] == list(range(1, 9))
    assert train(tmp_path / "run", resumed, save_every=4).resumed
    train(tmp_path / "whole", whole, save_every=4)
    same(resumed, whole)


def test_nan_in_an_input_is_named_with_its_row(tmp_path):
    data = Points(44, 1)
    data.values[5, 2] = math.nan
    (at,) = [(s, b.index(hit)) for s, b in enumerate(SeededSampler(44, 8, 6, seed=0)) for hit in b if hit[0] == 5][:1]
    message = rf"broke at step {at[0] + 1}: .*the input 'pixel_values' holds NaN or Inf \(rows \[{at[1]}\]"
    with pytest.raises(InlayError, match=message):
        train(tmp_path / "run", Net(), data=data, accumulate=4)


def test_nan_in_a_weight_and_in_the_validation_data_is_named(tmp_path):
    net = Net()
    with torch.no_grad():
        net.base.weight[0, 0] = math.nan
    with pytest.raises(InlayError, match=r"step 1: .*the weight 'base.weight' is already NaN"):
        train(tmp_path / "weight", net)
    validation = Points(13, 2)
    validation.values[3] = math.inf
    validation.values[4] = math.nan
    with pytest.raises(InlayError, match="validation loss at step 6 is nan"):
        train(tmp_path / "validation", Net(), validation=validation)


# ----- out of memory


def small_memory(net, most):
    """The model as on a device where more than `most` rows do not fit; also in evaluation."""
    inner, seen = net.forward, []

    def forward(pixel_values, labels=None):
        seen.append(len(pixel_values))
        if len(pixel_values) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total of ...")
        return inner(pixel_values, labels)

    net.forward = forward
    return seen


def test_out_of_memory_halves_the_pieces_with_the_same_result(tmp_path, capsys):
    settings = {"batch_size": 32, "rows": 100, "validation": 70}
    by_hand, small = Net(0.3), Net(0.3)
    a = train(tmp_path / "hand", by_hand, accumulate=4, **settings)
    seen = small_memory(small, 8)
    b = train(tmp_path / "small", small, **settings)
    assert seen[:3] == [32, 16, 8] and max(seen[3:]) == 8
    assert "in 4 pieces" in capsys.readouterr().out
    same(by_hand, small)
    assert a.history == b.history


def test_the_pieces_found_are_kept_over_a_resumption(tmp_path):
    settings = {"batch_size": 32, "rows": 100, "save_every": 2}
    first, second, whole = Net(0.3), Net(0.3), Net(0.3)
    small_memory(first, 8)
    stop_at(first, 4 * 5)  # 4 pieces a step; the calls that ran out of memory do not count
    with pytest.raises(Interrupted):
        train(tmp_path / "run", first, **settings)
    seen = small_memory(second, 8)
    assert train(tmp_path / "run", second, **settings).resumed
    assert max(seen) == 8
    small_memory(whole, 8)
    train(tmp_path / "whole", whole, **settings)
    same(second, whole)


def test_out_of_memory_with_one_example_is_an_error_and_other_errors_pass(tmp_path):
    net = Net()
    small_memory(net, 0)
    with pytest.raises(InlayError, match=r"single example .CUDA out of memory"):
        train(tmp_path / "run", net)
    net = Net()
    wrap_forward(net, lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(tmp_path / "other", net)

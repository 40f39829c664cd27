"""Settings that cannot be meant are refused by name."""

import math

import pytest

from inlay.errors import InlayError
from inlay.train.config import TrainConfig

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("batch_size", v) for v in (0, -1, 2.5)],
        *[("accumulate", v) for v in (0, -4, 1.0)],
        *[("workers", v) for v in (-1, 0.5)],
        *[("seed", v) for v in (-1, 2**32, 1.5)],
        *[("epochs", v) for v in (0, -1, NAN, INF)],
        *[("learning_rate", v) for v in (0.0, -1e-3, NAN, INF)],
        *[("clip_norm", v) for v in (0.0, -1.0, NAN, INF)],
        *[("weight_decay", v) for v in (-0.1, NAN, INF)],
        *[("warmup", v) for v in (-0.1, 1.1, NAN)],
        *[(name, v) for name in ("eval_every", "save_every", "patience") for v in (0, -1, 1.5)],
        ("schedule", "step"),
        ("optimizer", "sgd"),
        ("precision", "fp8"),
    ],
)
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(InlayError, match=f"^{name} .*{value}"):
        TrainConfig(**{name: value})


def test_steps_are_counted_up():
    assert TrainConfig(epochs=2, batch_size=8).count_steps(44) == 11
    assert TrainConfig(epochs=1, batch_size=8).count_steps(41) == 6
    assert TrainConfig(epochs=0.5, batch_size=8).count_steps(32) == 2
    assert TrainConfig(epochs=1, batch_size=32).count_steps(3) == 1


def test_only_what_decides_the_weights_identifies_a_run():
    one = TrainConfig(output_dir="a", overwrite=True, workers=0, tracker="wandb", save_every=3)
    assert one.identity() == TrainConfig().identity()
    assert one.identity() != TrainConfig(seed=1).identity()

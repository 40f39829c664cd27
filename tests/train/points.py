"""Runs of fit on the points of `train_job.py`, in this process, and what the tests look at."""

import json

import torch
from torch import nn
from train_job import Points, trainable

from inlay.train.config import TrainConfig
from inlay.train.loop import fit


class Interrupted(Exception):
    """Ends a run at a place where no signal would be exact."""


def train(folder, net, rows=44, validation=13, data=None, metrics=(), best_by=None, **config):
    config = {"batch_size": 8, "epochs": 3, "workers": 0, **config}
    validation = Points(validation, 2) if isinstance(validation, int) else validation
    data = data or Points(rows, 1)
    return fit(net, data, validation, TrainConfig(str(folder), **config), metrics=metrics, best_by=best_by)


def same(a, b, atol=0.0):
    a, b = (trainable(x) if isinstance(x, nn.Module) else x for x in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def different(a, b):
    return any(not torch.equal(x, y) for x, y in zip(trainable(a).values(), trainable(b).values(), strict=True))


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def wrap_forward(net, act):
    """Call `act(count, batch, output)` after each forward in train mode; what it returns is the output, unless None."""
    calls = []
    inner = net.forward

    def forward(pixel_values, labels=None):
        output = inner(pixel_values, labels)
        if not net.training:
            return output
        calls.append(len(pixel_values))
        changed = act(len(calls), pixel_values, output)
        return output if changed is None else changed

    net.forward = forward
    return calls


def stop_at(net, step):
    def act(count, batch, output):
        if count == step:
            raise Interrupted

    return wrap_forward(net, act)

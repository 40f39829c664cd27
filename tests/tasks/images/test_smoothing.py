"""Label smoothing of a classifier of images: in training as torch has it, in evaluation not at all."""

import pytest
import torch
from torch.nn.functional import log_softmax

from inlay import ImageTask, InlayError, load_base
from inlay.tasks.images.loss import SmoothedClasses


def test_the_loss_is_smoothed_in_training_only():
    torch.manual_seed(0)
    model, loss = load_base("builtin:vit-tiny", labels=list("abc")), SmoothedClasses(0.3)
    batch = {"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.tensor([0, 2, 1, 1])}
    output = loss(model.train(), batch)
    logs = log_softmax(output.logits, 1)  # 4 x 3
    hard, even = -logs[range(4), batch["labels"]].mean(), -logs.mean()
    assert output.loss.item() == pytest.approx((0.7 * hard + 0.3 * even).item(), abs=1e-6)
    assert loss.weight(batch) == 4
    output = loss(model.eval(), batch)
    logs = log_softmax(output.logits, 1)
    assert output.loss.item() == pytest.approx(-logs[range(4), batch["labels"]].mean().item(), abs=1e-6)


def test_without_smoothing_the_loss_is_the_models_own():
    assert ImageTask().load(0).loss is None
    assert ImageTask(label_smoothing=0.1).load(0).loss.smoothing == 0.1
    with pytest.raises(InlayError, match="label_smoothing must be a number from 0 to 1, got 1"):
        ImageTask(label_smoothing=1.5)

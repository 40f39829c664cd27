"""Trials on one base that is loaded once, each as if it were alone; and the file of what came of them."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from inlay import ImageTask, TrainConfig
from inlay.study.problem import Problem
from inlay.study.trial import Trial
from inlay.train.run import WEIGHTS

LORA = Trial("lora", 3e-3, width=2, steps=3, seed=1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder of 5 images for each of 3 digits: the smallest data with all parts."""
    from datasets import Image, load_dataset  # noqa: F401
    from PIL import Image as Pillow
    from sklearn.datasets import load_digits

    folder, found = tmp_path_factory.mktemp("digits"), load_digits()
    for digit in range(3):
        (folder / str(digit)).mkdir()
        for i in [i for i, label in enumerate(found.target) if label == digit][:15]:
            pixels = (found.images[i] * 15.9).astype("uint8")
            Pillow.fromarray(pixels).convert("RGB").save(folder / str(digit) / f"{i}.png")
    return folder


def problem(digits, folder, **changes):
    train = TrainConfig(batch_size=4, epochs=1, workers=0)
    return Problem(ImageTask("builtin:vit-tiny", str(digits)), replace(train, **changes), folder)


def weights(problem, trial):
    return load_file(problem.folder_of(trial) / "best" / WEIGHTS)


@pytest.fixture(scope="module")
def after_others(digits, tmp_path_factory):
    """A problem in which LORA is the last of several trials."""
    made = problem(digits, tmp_path_factory.mktemp("study") / "s")
    for trial in (Trial("full", 1e-3, steps=2), Trial("visual-prompt", 1e-2, width=2, steps=2, seed=1)):
        assert not made.run(trial).failed
    made.run(LORA, test=True)
    return made


def test_a_trial_after_others_is_bit_for_bit_that_trial_alone(digits, after_others, tmp_path):
    alone = problem(digits, tmp_path / "alone")
    outcome = alone.run(LORA, test=True)
    own, other = weights(alone, LORA), weights(after_others, LORA)
    assert own.keys() == other.keys() and any("lora_B" in name for name in own)
    assert all(torch.equal(own[name], other[name]) for name in own)
    shared = after_others.run(LORA, test=True)
    assert shared.validation == outcome.validation and shared.test == outcome.test


def test_a_trial_computes_what_a_recipe_computes(digits, after_others, tmp_path):
    """The recipe's steps by hand, without a Problem."""
    from accelerate.utils import set_seed

    from inlay import METHODS, fit

    task, data = after_others.task, after_others.task.load(0)
    set_seed(LORA.seed)
    model = METHODS["lora"].adapt(task.base(data), LORA.width)
    steps = TrainConfig(
        str(tmp_path / "run"), batch_size=4, epochs=2.5 * 4 / len(data.train), workers=0, learning_rate=3e-3, seed=1
    )
    found = fit(model, after_others.data.train, after_others.data.validation, steps, metrics=data.metrics)
    assert found.steps == 3
    own, other = load_file(tmp_path / "run" / "best" / WEIGHTS), weights(after_others, LORA)
    assert own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)

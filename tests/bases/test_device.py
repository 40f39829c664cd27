"""The device that computes. There is no GPU here: torch's meta device stands for one, which holds no values."""

import nibabel as nib
import numpy as np
import pytest
import torch

from command import run
from inlay import Bank, InlayError, VolumeSession, load_adapter, load_base, predict, segment
from inlay.bases.device import choose_device, move_model
from inlay.errors import BadInput, Unsupported
from places import ROOT

DIGITS = ROOT / "adapters_hub" / "digits-lora-vit-tiny"


@pytest.fixture
def accelerator(monkeypatch):
    """A machine with two accelerators of the type meta."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


@pytest.fixture
def plain_machine(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


def test_the_best_device_is_the_accelerator_where_there_is_one(accelerator):
    assert choose_device() == torch.device("meta")
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("meta:1") == torch.device("meta:1")


def test_without_one_it_is_the_cpu(plain_machine):
    assert choose_device() == choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ("gpu", BadInput, "unknown device 'gpu'; use cpu, cuda, cuda:1, mps or xpu."),
        (3.5, BadInput, "unknown device '3.5'; use cpu"),
        ("meta:2", Unsupported, "this machine has no device 'meta:2'; choose one of cpu, meta:0, meta:1."),
        ("xpu", Unsupported, "this machine has no device 'xpu'; choose one of cpu, meta:0, meta:1."),
    ],
)
def test_a_device_that_is_not_here_is_one_sentence(accelerator, asked, error, said):
    with pytest.raises(error) as raised:
        choose_device(asked)
    assert str(raised.value).startswith(said)


def test_an_adapter_and_a_bank_are_loaded_where_the_machine_computes_best(accelerator):
    with pytest.raises(NotImplementedError, match="meta tensor"):  # the base's sketch cannot be read
        load_adapter(DIGITS)
    assert load_adapter(DIGITS, device="cpu").model.device.type == "cpu"
    with pytest.raises(NotImplementedError, match="meta tensor"):  # the same
        Bank("builtin:vit-tiny", [DIGITS])
    assert Bank("builtin:vit-tiny", [DIGITS], device="cpu").model.device.type == "cpu"
    assert load_base("builtin:vit-tiny").device.type == "cpu", "accelerate moves what is trained"


def test_a_base_that_is_given_stays_where_it_is():
    base = load_base("builtin:vit-tiny")
    with pytest.raises(InlayError, match="the base is a model already: move it with"):
        load_adapter(DIGITS, base, device="cpu")
    with pytest.raises(InlayError, match="the base is a model already: move it with"):
        Bank(base, [DIGITS], device="cpu")
    assert load_adapter(DIGITS, base).model.device.type == "cpu"


def test_a_quantised_base_is_packed_on_its_device():
    pytest.importorskip("bitsandbytes")
    assert load_base("builtin:gpt2-tiny", quantize="8bit", device="cpu").device.type == "cpu"


def test_a_model_moves_when_that_is_asked_for(accelerator):
    model = torch.nn.Linear(2, 2)
    move_model(model, None)
    assert model.weight.device.type == "cpu"
    move_model(model, "meta")
    assert model.weight.is_meta


def test_what_uses_an_adapter_moves_it_when_that_is_asked_for(accelerator):
    adapter = load_adapter(DIGITS, device="cpu")
    assert predict(adapter, [ROOT / "docs/assets/lesions.png"], device="cpu")[0].label in adapter.labels
    with pytest.raises(NotImplementedError, match="meta tensor"):  # computed there, where no value can be read
        predict(adapter, [ROOT / "docs/assets/lesions.png"], device="meta:0")
    assert adapter.model.device.type == "meta"


@pytest.mark.parametrize("use", [segment, lambda *given, **options: VolumeSession(*given, **options).click((5, 5, 5))])
def test_a_scan_is_segmented_where_that_is_asked_for(accelerator, tmp_path, use):
    nib.Nifti1Image(np.random.default_rng(0).random((32, 32, 32), np.float32), np.eye(4)).to_filename(
        tmp_path / "s.nii"
    )
    adapter = load_adapter(ROOT / "adapters_hub" / "lesions-spatial-sam-tiny", device="cpu")
    with pytest.raises((NotImplementedError, RuntimeError), match="meta tensor"):
        use(adapter, tmp_path / "s.nii", device="meta:0")
    assert next(adapter.model.parameters()).is_meta


@pytest.mark.parametrize(
    "verb", [["predict", DIGITS, ROOT / "docs/assets/lesions.png"], ["evaluate", DIGITS, "builtin:digits"]]
)
def test_a_mistake_on_the_command_line_is_one_sentence(capsys, monkeypatch, plain_machine, verb):
    status, _, err = run(capsys, monkeypatch, *verb, "--device", "cuda:7")
    assert (status, err) == (2, "error: this machine has no device 'cuda:7'; choose one of cpu.\n")

"""The kinds of errors: one example of each, all of them InlayError."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import inlay
from inlay import errors
from inlay.adapters.file import CONFIG
from inlay.bases.load import explain_load_error
from places import ROOT

ADAPTER = "adapters_hub/digits-lora-vit-tiny"


def give_one_label(tmp_path):
    inlay.load_base("builtin:vit-tiny", labels=["cat"])


def load_on_another_base(tmp_path):
    inlay.load_adapter(ROOT / ADAPTER, base="builtin:gpt2-tiny")


def read_a_broken_config(tmp_path):
    (tmp_path / CONFIG).write_text("{")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    inlay.read_adapter(tmp_path)


def read_an_unknown_method(tmp_path):
    from inlay.adapters.config import check_config

    check_config({"peft_type": "XLORA"}, {}, tmp_path / CONFIG)


def ask_the_hub_offline(tmp_path):
    raise explain_load_error("user/name", OSError("We couldn't connect to the Hub"))


def save_nan(tmp_path):
    model = get_peft_model(inlay.load_base("builtin:vit-tiny"), LoraConfig(r=1, target_modules=["q_proj"]))
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(torch.nan)
    inlay.save_adapter(model, tmp_path / "nan", processor=inlay.load_processor("builtin:vit-tiny"))


KINDS = {
    "BadInput": give_one_label,
    "WrongBase": load_on_another_base,
    "DamagedFile": read_a_broken_config,
    "Unsupported": read_an_unknown_method,
    "Unreachable": ask_the_hub_offline,
    "ComputationFailed": save_nan,
}


@pytest.mark.parametrize("name", KINDS)
def test_an_example_of_each_kind(name, tmp_path):
    with pytest.raises(inlay.InlayError) as caught:
        KINDS[name](tmp_path)
    assert type(caught.value) is getattr(inlay, name) and isinstance(caught.value, ValueError)


def test_there_are_no_other_kinds_and_each_says_when():
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert kinds.keys() == {"InlayError", *KINDS} and kinds.keys() <= set(inlay.__all__)
    assert all(kind.__doc__ for kind in kinds.values())

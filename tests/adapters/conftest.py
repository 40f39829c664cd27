"""One small adapter, saved once; every test damages a copy of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save

from inlay.adapters.file import CONFIG, WEIGHTS, hash_config
from inlay.adapters.save import save_adapter
from inlay.bases.processors import load_processor
from inlay.bases.sites import head_modules, lora_targets
from inlay.files.tensor_header import sign
from inlay.tasks.base import load_base

BASE = "builtin:vit-tiny"
LABELS = ["cat", "dog", "emu", "fox", "gnu"]


@pytest.fixture(scope="session")
def make():
    """A function that gives a base with a LoRA adapter and a head as if trained."""

    def make(base=None, *, labels=LABELS, seed=0, **settings):
        torch.manual_seed(seed)
        base = load_base(BASE, labels=labels) if base is None else base
        options = {"r": 4, "lora_alpha": 8, "target_modules": lora_targets(base), "modules_to_save": head_modules(base)}
        model = get_peft_model(base, LoraConfig(**{**options, **settings}))
        with torch.no_grad():
            for key, value in model.named_parameters():
                if value.requires_grad:
                    value.copy_(torch.randn_like(value) * (0.05 if "lora_" in key else 0.2))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def processor():
    return load_processor(BASE)


@pytest.fixture(scope="session")
def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def outputs(pixels):
    def outputs(model):
        with torch.no_grad():
            weight = next(p for p in model.parameters() if p.is_floating_point())
            return model(pixel_values=pixels.to(weight.dtype)).logits.float()

    return outputs


@pytest.fixture(scope="session")
def original(make, processor, tmp_path_factory):
    """The model that was saved, and its folder: not to be changed."""
    model = make()
    metrics = {"validation": {"accuracy": 0.875, "loss": 0.5}, "dataset": "builtin:digits", "cost": {"parameters": 5}}
    return model, save_adapter(model, tmp_path_factory.mktemp("saved") / "zoo", processor=processor, metrics=metrics)


@pytest.fixture
def zoo(original, tmp_path):
    """A copy of the saved folder."""
    return Path(shutil.copytree(original[1], tmp_path / "zoo"))


@pytest.fixture
def rewrite():
    """A function that changes a saved adapter and signs it again: what a checksum cannot find."""

    def rewrite(folder, *, weights=None, record=None, config=None):
        data = (folder / WEIGHTS).read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        stored = json.loads(header["__metadata__"]["inlay"])
        settings = json.loads((folder / CONFIG).read_text())
        if config is not None:
            config(settings)
            (folder / CONFIG).write_text(json.dumps(settings))
            stored["config"] = hash_config(settings)
        if record is not None:
            record(stored)
        tensors = load_file(folder / WEIGHTS)
        if weights is not None:
            weights(tensors)
        (folder / WEIGHTS).write_bytes(sign(save(tensors, {"format": "pt", "inlay": json.dumps(stored)})))
        return folder

    return rewrite


@pytest.fixture
def plain():
    """A function that takes inlay's record out of a saved adapter: what plain peft would have written."""

    def plain(folder, change=lambda config: None):
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
        settings = json.loads((folder / CONFIG).read_text())
        change(settings)
        (folder / CONFIG).write_text(json.dumps(settings))
        return folder

    return plain


@pytest.fixture
def five():
    """The base with a new head for the five labels of the adapter."""
    return load_base(BASE, labels=LABELS)


@pytest.fixture
def swapped_base(five):
    """A base of the same shape with other weights."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for value in five.parameters():
            value.copy_(value[torch.randperm(len(value), generator=generator)])
            value += torch.randn(value.shape, generator=generator) * value.std().nan_to_num() * 2
    return five

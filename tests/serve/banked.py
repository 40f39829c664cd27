"""Adapters for the tests of a bank, and what each gives alone."""

from functools import cache

import torch
from peft import get_peft_model

from inlay import TextProcessor, load_adapter, load_base, load_processor, load_tokenizer, save_adapter
from inlay.bases.sites import head_modules
from inlay.methods import METHODS

VIT, GPT2, SAM = "builtin:vit-tiny", "builtin:gpt2-tiny", "builtin:sam-tiny"
LABELS = {"a": ["cat", "dog", "emu"], "b": ["x", "y", "z", "u", "v"]}
MIXED = ["a", "b", None, "a", "b"]


def pixels(side=32, rows=5):
    return {"pixel_values": torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(7))}


def tokens(pad=False):
    ids = torch.randint(1, 2000, (5, 9), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    if pad:
        mask[1, :3] = mask[2, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def save(base, config, folder, seed=1, labels=("cat", "dog", "emu"), std=0.1):
    """An adapter as if trained, by the name of a method or a config."""
    torch.manual_seed(seed)
    model = load_base(base, labels=labels) if base == VIT else load_base(base)
    if isinstance(config, tuple):
        model = METHODS[config[0]].adapt(model, config[1])
    else:
        config = config(model)
        config.modules_to_save = head_modules(model) if base == VIT else None
        model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    processor = TextProcessor(load_tokenizer(base), max_length=64) if base == GPT2 else load_processor(base)
    return save_adapter(model, folder, processor=processor)


def pair(base, method, folder):
    """Two adapters of one method, of different widths and labels."""
    for seed, name in enumerate("ab", 1):
        config = (method, 2 + 2 * seed) if isinstance(method, str) else method(2 + 2 * seed)
        save(base, config, folder / name, seed, LABELS[name])
    return folder


@cache
def loaded(base, folder, name):
    return load_base(base) if name is None else load_adapter(folder / name).model


def alone(base, folder, inputs, adapters, last=None):
    """Logits of each row by itself, under its adapter loaded alone."""
    found = []
    with torch.no_grad():
        for i, name in enumerate(adapters):
            row = {key: value[i : i + 1] for key, value in inputs.items()}
            if "attention_mask" in row:  # without its padding
                row = {key: value[:, row["attention_mask"][0].bool()] for key, value in row.items()}
            logits = loaded(base, folder, name)(**row).logits[0]
            found.append(logits if last is None else logits[-len(row["input_ids"][0]) :])
    return found


def compare(found, wanted):
    for got, want in zip(found, wanted, strict=True):
        if want.ndim == 1:  # labels that a row does not have are impossible
            assert (got[len(want) :] == -torch.inf).all()
            got = got[: len(want)]
        else:
            got = got[-len(want) :]  # behind the padding
        assert (got - want).abs().max() < 1e-5 * max(1.0, float(want.abs().max()))

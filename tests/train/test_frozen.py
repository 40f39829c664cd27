"""Frozen blocks that run once: the same losses and weights as the plain way, and a sentence where it cannot be."""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from points import Interrupted, log_of, same, train
from torch import nn
from train_job import CLASSES, Net, Points
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from forked_program import finish, two_ranks
from inlay import ConvPassConfig
from inlay.errors import InlayError
from inlay.train.config import TrainConfig
from inlay.train.frozen_cache.unread_tokens import _FirstRowOnly

KEPT = "blocks are frozen: their output for 57 examples is kept"
OFF = "cache_frozen is off, the frozen blocks run in every epoch: "
ROUNDING = 2e-6  # of losses of about 1: the unread rows of the last block are left out of sums


class Pictures(Points):
    """One-channel pictures of 8x8, none like another; `seen` counts how often each is made."""

    def __init__(self, rows, seed, noise=False, shift=0.0):
        super().__init__(rows, seed, noise)
        self.seen, self.shift = [0] * rows, shift

    def __getitem__(self, index):
        self.seen[index] += 1
        pixels = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(index)) + int(self.labels[index])
        return {"pixel_values": pixels + self.shift, "labels": int(self.labels[index])}


def vit(last=2, **config):
    """Four blocks; the last ones, the final norm and the head are trained."""
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    settings |= {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": CLASSES}
    model = ViTForImageClassification(ViTConfig(**settings | config)).requires_grad_(False)
    return trained(model, *model.vit.layers[4 - last :], model.vit.layernorm, model.classifier)


def trained(model, *parts):
    for part in (model.requires_grad_(False), *parts):
        part.requires_grad_(part is not model)
    return model


def lora(dropout=0.0):
    """LoRA in the last block alone."""
    config = LoraConfig(r=2, target_modules=["q_proj", "fc1"], layers_to_transform=[3], layers_pattern="layers")
    config.modules_to_save, config.lora_dropout = ["classifier"], dropout
    return get_peft_model(vit(), config)


def bypass():
    """ConvPass in the last block, which reads the grid of the images though their embeddings are stored."""
    config = ConvPassConfig(width=3, layers_to_transform=[3], modules_to_save=["classifier"])
    return get_peft_model(vit(), config)


def probe():
    return vit(last=0)


def dropping():
    """Dropout in the trained blocks."""
    model = vit()
    for block in model.vit.layers[2:]:
        block.dropout.p = 0.2
        # It moves all scores of a query alike, so its gradient is rounding alone, which Adam makes as large as any.
        block.attention.k_proj.bias.requires_grad_(False)
    return model


def run(folder, model, **config):
    data, validation = config.pop("data", None), config.pop("validation", None)
    return train(folder, model, data=data or Pictures(44, 1), validation=validation or Pictures(13, 2), **config)


def count_rows(module):
    """Rows that go through a module, one entry a call."""
    rows = []
    module.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    return rows


def alike(folder, atol):
    """Two runs in `plain` and `short` have the same log."""
    logs = log_of(folder / "plain"), log_of(folder / "short")
    assert len(logs[0]) == len(logs[1]) > 17
    for a, b in zip(*logs, strict=True):
        assert a == (b if not atol else pytest.approx(b, abs=atol))


# ----- equal results


@pytest.mark.parametrize(
    ("make", "atol"),
    [(vit, ROUNDING), (lora, ROUNDING), (lambda: lora(0.1), 0), (bypass, ROUNDING), (probe, 0), (dropping, ROUNDING)],
)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_losses_and_weights_equal_the_plain_way(tmp_path, capsys, make, atol, where):
    plain, short = make(), make()
    a = run(tmp_path / "plain", plain)
    b = run(tmp_path / "short", short, cache_frozen=where)
    assert KEPT in capsys.readouterr().out
    alike(tmp_path, atol)
    same(plain, short, atol=10 * atol)
    assert a.metrics == pytest.approx(b.metrics, abs=atol)
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in short.named_modules()]
    assert [type(m) for m in plain.modules()] == [type(m) for m in short.modules()]


@pytest.mark.parametrize("config", [{"accumulate": 3}, {"precision": "bf16"}, {"gradient_checkpointing": True}])
def test_with_the_settings_of_a_step(tmp_path, capsys, config):
    plain, short = vit(), vit()
    run(tmp_path / "plain", plain, **config)
    run(tmp_path / "short", short, cache_frozen="memory", **config)
    assert KEPT in capsys.readouterr().out
    alike(tmp_path, 2e-2 if "precision" in config else ROUNDING)


def swin():
    config = SwinConfig(image_size=8, patch_size=1, num_channels=1, embed_dim=8, depths=[2, 2], num_heads=[1, 2])
    config.window_size, config.num_labels, config.drop_path_rate = 4, CLASSES, 0.0
    torch.manual_seed(0)
    model = SwinForImageClassification(config)
    return trained(model, model.swin.encoder.layers[1].blocks[1], model.swin.layernorm, model.classifier)


def dinov2():
    torch.manual_seed(0)
    model = Dinov2ForImageClassification(
        Dinov2Config(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4,
                     num_channels=1, num_labels=CLASSES)
    )  # fmt: skip
    return trained(model, model.dinov2.encoder.layer[2], model.classifier)


@pytest.mark.parametrize(("make", "kept"), [(swin, "3 of 4"), (dinov2, "2 of 3")])
def test_other_architectures(tmp_path, capsys, make, kept):
    """Swin's frozen blocks differ in shape; DINOv2 reads all tokens of its last block."""
    plain, short = make(), make()
    run(tmp_path / "plain", plain)
    run(tmp_path / "short", short, cache_frozen="memory")
    assert f"{kept} {KEPT}" in capsys.readouterr().out
    alike(tmp_path, 0)


class Texts(Points):
    """Texts whose class is among their words, of one length or of two."""

    def __init__(self, rows, seed, lengths=(6,)):
        super().__init__(rows, seed)
        self.allowed = lengths

    def __getitem__(self, index):
        words = torch.randint(
            3, 20, (self.allowed[index % len(self.allowed)],), generator=torch.Generator().manual_seed(index)
        )
        words[1] = self.labels[index]
        mask = torch.ones_like(words)
        mask[4 + index % 3 :] = 0
        return {"input_ids": words, "attention_mask": mask, "labels": int(self.labels[index])}


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=3, n_head=2, num_labels=CLASSES)
    config.pad_token_id, config.resid_pdrop, config.embd_pdrop, config.attn_pdrop = 19, 0.0, 0.0, 0.0
    model = GPT2ForSequenceClassification(config)
    return trained(model, model.transformer.h[2], model.score)


def test_texts_of_one_length(tmp_path, capsys):
    plain, short = gpt2(), gpt2()
    run(tmp_path / "plain", plain, data=Texts(44, 1), validation=Texts(13, 2))
    run(tmp_path / "short", short, data=Texts(44, 1), validation=Texts(13, 2), cache_frozen="memory")
    assert f"2 of 3 {KEPT}" in capsys.readouterr().out
    alike(tmp_path, 0)


def test_frozen_blocks_and_items_run_once(tmp_path):
    model = vit()
    frozen, tail = count_rows(model.vit.layers[1]), count_rows(model.vit.layers[2])
    data, validation = Pictures(44, 1), Pictures(13, 2)
    run(tmp_path / "run", model, data=data, validation=validation, cache_frozen="memory", epochs=5)
    observed = 4 + 4  # two passes of four examples
    assert sum(frozen) == 44 + 13 + observed
    assert sum(tail) > 5 * (44 + 13)
    assert data.seen[4:] == [1] * 40 and validation.seen == [1] * 13


def test_only_the_first_row_of_the_last_block_is_computed(tmp_path):
    model = vit()
    shapes = {}
    for name in ("attention.q_proj", "attention.k_proj", "attention.o_proj", "layernorm_after", "mlp.fc1"):
        keep = lambda module, args, output, name=name: shapes.__setitem__(name, tuple(output.shape[:2]))  # noqa: E731
        model.vit.layers[3].get_submodule(name).register_forward_hook(keep)
    model.classifier.register_forward_hook(
        lambda module, args, output: shapes.setdefault("types", []).append(type(model.vit.layers[3].mlp))
    )
    run(tmp_path / "run", model, validation=Pictures(16, 2), cache_frozen="memory")
    assert shapes["types"][-1] is _FirstRowOnly
    del shapes["types"]
    assert shapes.pop("attention.k_proj") == (8, 5)
    assert set(shapes.values()) == {(8, 1)}


# ----- off, with a reason


def unfrozen():
    model = vit()
    model.vit.embeddings.position_embeddings.requires_grad_(True)
    return model


class Odd(nn.Module):
    """A ViT whose input also goes past the blocks: the short way has none."""

    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__()
        self.inner = vit()
        self.past = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values, labels=None):
        output = self.inner(pixel_values, labels)
        return type(output)(loss=output.loss + self.past * pixel_values.mean(), logits=output.logits)


class Noisy(Pictures):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "pixel_values": item["pixel_values"] + self.draw(index)}


class Global(Noisy):
    def draw(self, index):
        return random.random()


class Rare(Noisy):
    """Chance in one late item only, and without an effect most of the time."""

    def draw(self, index):
        return float(index == 40 and np.random.rand() < 0.01)  # noqa: NPY002


class Own(Noisy):
    generator = np.random.default_rng(0)

    def draw(self, index):
        return self.generator.random()


AUGMENTED = "augmented at random"


@pytest.mark.parametrize(
    ("make", "data", "config", "reason"),
    [
        (vit, Global, {}, AUGMENTED),
        (vit, Rare, {}, AUGMENTED),
        (vit, Rare, {"workers": 1}, AUGMENTED),
        (lambda: vit(hidden_dropout_prob=0.1), Pictures, {}, "dropout or drop path acts in the frozen blocks"),
        (lambda: vit(attention_probs_dropout_prob=0.1), Pictures, {}, "dropout or drop path acts"),
        (unfrozen, Pictures, {}, "the first block, or what comes before it, is trained"),
        (vit, Pictures, {"cache_gb": 1e-5}, r"57 examples take 1.82e-05 GB, more than cache_gb 1e-05; set --cache_gb"),
        (Odd, Pictures, {}, "of a first batch would change from"),
    ],
)
def test_off_with_a_reason_and_as_without(tmp_path, capsys, make, data, config, reason):
    plain, short = make(), make()
    run(tmp_path / "plain", plain, data=data(44, 1), **config)
    run(tmp_path / "short", short, data=data(44, 1), cache_frozen="memory", **config)
    said = capsys.readouterr().out
    assert OFF in said and reason in said and said.count(OFF) == 1
    alike(tmp_path, 0)
    same(plain, short)


@pytest.mark.parametrize(
    ("make", "data", "reason"),
    [
        (vit, Own(44, 1), AUGMENTED),
        (Net, Points(44, 1), "the blocks of Net are not known"),
        (gpt2, Texts(44, 1, lengths=(6,) * 7 + (7,)), "examples differ in shape"),
    ],
)
def test_off_for_other_data_and_models(tmp_path, capsys, make, data, reason):
    validation = (
        Points(8, 2) if isinstance(data, Points) and type(data) is Points else Texts(8, 2) if make is gpt2 else None
    )
    train(tmp_path / "run", make(), data=data, validation=validation, batch_size=1, epochs=0.1, cache_frozen="disk")
    said = capsys.readouterr().out
    assert OFF in said and reason in said
    assert not list((tmp_path / "frozen_states").glob("*")) if (tmp_path / "frozen_states").exists() else True


def test_bad_settings_are_refused():
    for name, value in (("cache_frozen", "ram"), ("cache_gb", 0), ("cache_gb", -1.0)):
        with pytest.raises(InlayError, match=f"^{name} .*{value}"):
            TrainConfig(**{name: value})


# ----- on disk


def files(folder):
    return sorted(p.name for p in (folder / "frozen_states").iterdir())


def disk_run(folder, name, model=None, data=None, **config):
    """Rows that the last frozen block saw in a run."""
    model = model or vit()
    rows = count_rows(model.vit.layers[1])
    run(folder / name, model, data=data, cache_frozen="disk", epochs=1, **config)
    return sum(rows)


def test_a_second_run_finds_the_file(tmp_path):
    sample = 4 + 4 + 4  # observed, compared, and hashed for the key
    assert disk_run(tmp_path, "one") == 44 + 13 + sample
    found = files(tmp_path)
    assert len(found) == 2 and all(name.endswith(".states") for name in found)
    assert disk_run(tmp_path, "two", seed=1, learning_rate=1e-2) == sample
    assert files(tmp_path) == found
    fresh = vit()
    run(tmp_path / "plain", fresh, seed=1, learning_rate=1e-2, epochs=1)
    (tmp_path / "two").rename(tmp_path / "short")
    for a, b in zip(log_of(tmp_path / "plain"), log_of(tmp_path / "short"), strict=True):
        assert a == pytest.approx(b, abs=ROUNDING)


def other_base():
    model = vit()
    with torch.no_grad():
        model.vit.layers[0].mlp.fc1.weight[0, 0] += 1e-3
    return model


@pytest.mark.parametrize(
    ("model", "data", "config"),
    [(other_base, None, {}), (lambda: vit(1), None, {}), (vit, 0.5, {}), (vit, None, {"precision": "bf16"})],
)
def test_another_base_cut_input_or_precision_has_another_file(tmp_path, model, data, config):
    disk_run(tmp_path, "one")
    before = files(tmp_path)
    rows = disk_run(tmp_path, "two", model(), data and Pictures(44, 1, shift=data), **config)
    assert rows >= 44 and set(files(tmp_path)) > set(before)


def test_one_changed_picture_is_noticed(tmp_path):
    class Changed(Pictures):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return {**item, "pixel_values": item["pixel_values"] + (index == 30)}

    disk_run(tmp_path, "one")
    assert disk_run(tmp_path, "two", data=Changed(44, 1)) == 44 + 12
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "longer"])
def test_a_damaged_file_is_replaced(tmp_path, damage):
    disk_run(tmp_path, "one")
    before = {name: (tmp_path / "frozen_states" / name).read_bytes() for name in files(tmp_path)}
    name = max(before, key=lambda name: len(before[name]))
    raw = before[name]
    broken = {"flip": raw[:99] + bytes([raw[99] ^ 1]) + raw[100:], "cut": raw[:-4], "longer": raw + b"0000"}[damage]
    (tmp_path / "frozen_states" / name).write_bytes(broken)
    assert disk_run(tmp_path, "two") == 44 + 12
    assert {name: (tmp_path / "frozen_states" / name).read_bytes() for name in files(tmp_path)} == before


def test_the_folder_is_bounded_and_what_a_kill_left_goes(tmp_path):
    folder = tmp_path / "frozen_states"
    folder.mkdir()
    for i, name in enumerate(("old-a.states", "old-b.states", ".key-1.part", ".key-2.part")):
        (folder / name).write_bytes(bytes(9_000))
        os.utime(folder / name, (1e9 + i, 1e9 + i) if name != ".key-2.part" else None)
    disk_run(tmp_path, "one", cache_gb=30_000 / 1e9)  # 18 kB of states leave room for one old file
    left = files(tmp_path)
    assert len(left) == 4 and "old-b.states" in left and ".key-2.part" in left


def test_a_folder_that_cannot_be_written_is_a_reason(tmp_path, capsys):
    (tmp_path / "frozen_states").write_text("in the way")
    disk_run(tmp_path, "one")
    assert "frozen_states cannot be written" in capsys.readouterr().out


# ----- interruptions


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_interrupted_run_ends_as_a_whole_one(tmp_path, where):
    whole, broken, resumed = dropping(), dropping(), dropping()
    settings = {"cache_frozen": where, "save_every": 3, "accumulate": 3, "workers": 1}
    a = run(tmp_path / "a" / "run", whole, **settings)
    steps = []

    def stop(module, args, output):
        steps.append(module.training)
        if len(steps) == 60:
            raise Interrupted

    handle = broken.classifier.register_forward_hook(stop)
    with pytest.raises(Interrupted):
        run(tmp_path / "b" / "run", broken, **settings)
    handle.remove()
    assert [type(m) for m in broken.modules()] == [type(m) for m in whole.modules()], "the model is left open"
    b = run(tmp_path / "b" / "run", resumed, **settings)
    assert b.resumed and b.history == a.history
    same(whole, resumed)
    assert log_of(tmp_path / "a" / "run") == log_of(tmp_path / "b" / "run")


def test_another_cache_is_another_run(tmp_path):
    run(tmp_path / "run", vit(), epochs=0.2)
    with pytest.raises(InlayError, match="cache_frozen 'no' -> 'memory'"):
        run(tmp_path / "run", vit(), epochs=0.2, cache_frozen="memory")


@pytest.mark.parametrize("block", [0, 3])
def test_out_of_memory_in_the_frozen_and_in_the_trained_part(tmp_path, capsys, block):
    plain, short = vit(), vit()

    def full(module, args):
        if len(args[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    short.vit.layers[block].register_forward_pre_hook(full)
    run(tmp_path / "plain", plain, batch_size=16)
    run(tmp_path / "short", short, batch_size=16, cache_frozen="memory")
    said = capsys.readouterr().out
    assert KEPT in said and ("in 4 pieces" in said) == (block == 3)
    for a, b in zip(log_of(tmp_path / "plain"), log_of(tmp_path / "short"), strict=True):
        assert a == pytest.approx(b, abs=ROUNDING)


# ----- two processes


@pytest.mark.launch
def test_two_processes(tmp_path, forked):
    processes = [forked(__file__, tmp_path, environment=rank) for rank in two_ranks()]
    said = "".join(finish(process) for process in processes)
    assert said.count(KEPT) == 3
    assert len(files(tmp_path)) == 2, "the third run finds the files of the second"
    run(tmp_path / "plain", vit())
    for name in ("memory", "disk", "again"):
        for a, b in zip(log_of(tmp_path / "plain"), log_of(tmp_path / name), strict=True):
            assert a == pytest.approx(b, abs=1e-5)


if __name__ == "__main__":
    for name, where in (("memory", "memory"), ("disk", "disk"), ("again", "disk")):
        run(Path(sys.argv[1]) / name, vit(), cache_frozen=where)

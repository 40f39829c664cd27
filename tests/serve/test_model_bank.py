"""Adapters in models of their own that share the weights of one base."""

import pytest
import torch

from inlay import InlayError, load_adapter, load_base
from inlay.adapters.checks import CHECKS
from inlay.serve.model_bank import ModelBank
from serve.banked import SAM, VIT, save
from serve.test_tasks import CROP, save_volumes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_volumes(tmp_path_factory.mktemp("volumes"))


def answer(adapter):
    with torch.inference_mode():
        generator = torch.Generator().manual_seed(0)
        return adapter.model(pixel_values=torch.randn(1, 1, *CROP, generator=generator)).logits


def count_own_bytes(adapter):
    own = [p for name, p in adapter.model.named_parameters() if "spatial3d" in name]
    return sum(p.nbytes for p in own)


def test_models_share_the_base_and_answer_as_alone(folder):
    base = load_base(SAM)
    bank = ModelBank(base, folder)
    assert bank.names == bank.resident == ["a", "b"] and bank.labels("b") == ["left", "right"]
    weights = {id(p) for p in base.parameters()}
    for name in "ab":
        own = bank.load(name)
        assert weights <= {id(p) for p in own.model.parameters()}
        assert torch.equal(answer(own), answer(load_adapter(folder / name)))
        assert bank.checks[name] == {check.name: "ok" for check in CHECKS}
    assert bank.bytes == pytest.approx(sum(count_own_bytes(bank.load(name)) for name in "ab"), rel=0.05)
    fresh = load_base(SAM)
    assert type(base) is type(fresh) and [n for n, _ in base.named_modules()] == [n for n, _ in fresh.named_modules()]
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), fresh.parameters(), strict=True))


def test_adapters_come_and_go(folder, tmp_path):
    bank = ModelBank(SAM, {"a": folder / "a"}, check_golden=False)
    held = bank.load("a")
    before = answer(held)
    assert bank.add(folder / "b", "a") == "a" and bank.read_file("a").digest != held.file.digest
    assert bank.load("a").labels == ["left", "right"] and torch.equal(answer(held), before)
    stranger = save(VIT, ("lora", 2), tmp_path / "vit")
    with pytest.raises(InlayError, match=r"was trained on builtin:vit-tiny"):
        bank.add(stranger, "a")
    with pytest.raises(InlayError, match=r"was trained on builtin:vit-tiny"):
        bank.add(stranger)
    assert bank.names == ["a"] and bank.load("a").labels == ["left", "right"]
    bank.remove("a")
    for ask in (bank.load, bank.remove, bank.read_file):
        with pytest.raises(InlayError, match="unknown adapter 'a'; this bank has none"):
            ask("a")


def test_a_budget_and_what_does_not_fit(folder, tmp_path):
    size = ModelBank(SAM, [folder / "a"], check_golden=False).bytes
    bank = ModelBank(SAM, folder, budget_mb=1.5 * size / 1e6, check_golden=False)
    assert bank.resident == [] and bank.read_file("b").labels == ["left", "right"]
    for name in "abba":
        loaded = bank.load(name)
        assert bank.resident == [name] and bank.checks[name]["golden"] == "left out"
        assert loaded.processor.crop == CROP
    with pytest.raises(InlayError, match="budget_mb must be positive"):
        ModelBank(SAM, folder, budget_mb=0)
    stranger = save(VIT, ("lora", 2), tmp_path / "vit")
    mixed = ModelBank(SAM, [folder / "a", stranger], skip_unfit=True, check_golden=False)
    assert mixed.names == ["a"] and "was trained on builtin:vit-tiny" in str(mixed.refused["vit"])
    with pytest.raises(InlayError, match="was trained on builtin:vit-tiny"):
        ModelBank(SAM, [stranger])

"""Rows under a held adapter keep its weights, whatever becomes of its name."""

import shutil

import pytest
import torch

from inlay import BadInput, Bank, InlayError
from inlay.adapters.file import WEIGHTS
from inlay.serve.bank import NoRoom
from serve.banked import GPT2, alone, compare, save, tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    for seed, (name, method) in enumerate({"a": "lora", "b": "lora", "c": "bottleneck", "p": "prefix"}.items(), 1):
        save(GPT2, (method, 2 + seed), folder / name, seed)
    return folder


def check_rows(bank, folder, rows, wanted):
    compare(bank(tokens(), rows).logits, alone(GPT2, folder, tokens(), wanted, last=True))


def test_a_held_adapter_stays_when_its_name_is_given_to_others(folder):
    bank = Bank(GPT2, {"a": folder / "a", "p": folder / "p"}, check_golden=False)
    first, behind = bank.hold("a"), bank.hold("p")
    bank.add(folder / "b", "a")
    second = bank.hold("a")
    bank.remove("a")
    bank.evict("p")
    bank.add(folder / "c", "c")
    assert first.digest != second.digest
    check_rows(bank, folder, [first, second, "c", behind, None], ["a", "b", "c", "p", None])
    with pytest.raises(BadInput, match="3 adapters of this bank are held"):
        bank.unload()
    for held in (first, second, behind):
        bank.release(held)
    before = bank._rows.capacity
    bank.add(folder / "a", "x")  # in a slot that was held
    assert bank._rows.capacity == before
    bank.unload()


def test_a_replacement_that_does_not_fit_leaves_the_held_adapter_its_name(folder, tmp_path):
    damaged = shutil.copytree(folder / "b", tmp_path / "b")
    content = (damaged / WEIGHTS).read_bytes()
    (damaged / WEIGHTS).write_bytes(content[:-50] + bytes(50))
    bank = Bank(GPT2, {"a": folder / "a"})
    held = bank.hold("a")
    with pytest.raises(InlayError):
        bank.add(damaged, "a")
    check_rows(bank, folder, [held, "a", "a", None, held], ["a", "a", "a", None, "a"])


def test_held_adapters_take_their_part_of_the_budget(folder):
    size = Bank(GPT2, [folder / "b"], check_golden=False).bytes / 2
    bank = Bank(GPT2, [folder / "a", folder / "b"], budget_mb=3.2 * size / 1e6, check_golden=False)
    held, other = bank.hold("a"), bank.hold("b")
    with pytest.raises(NoRoom, match="has room for 2 adapters"):
        bank.add(folder / "b", "a")
    bank.release(other)
    bank.add(folder / "b", "a")  # in the place of b
    assert bank.resident == ["a"]
    check_rows(bank, folder, [held, "a", None, "a", held], ["a", "b", None, "b", "a"])
    assert torch.equal(bank(tokens(), [None] * 5).logits, bank.model(**tokens()).logits)

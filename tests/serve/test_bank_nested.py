"""A bank in one thread: calls inside an open block of rows, and adapters that come and go meanwhile."""

from contextlib import ExitStack

import pytest
import torch

from inlay import Bank, InlayError
from serve.banked import GPT2, LABELS, VIT, pair, pixels, save, tokens


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    return pair(VIT, "lora", tmp_path_factory.mktemp("nested"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    save(GPT2, ("prefix", 3), folder / "a", 1)  # whose texts have other positions
    save(GPT2, ("lora", 4), folder / "b", 2)
    save(GPT2, ("prompt", 2), folder / "c", 3)
    return folder


def check_inside(bank, inputs, adapters, action):
    """What the block computes is the same before and after `action`, and what the bank computes outside of it."""
    expected = bank(inputs, adapters).logits
    with bank.rows(adapters) as model, torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
        action()
        assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(bank(inputs, adapters).logits, expected)


@pytest.mark.parametrize("inner", [["b"] * 5, [None] * 5, ["a", "b", None, "a", "b"]])
@pytest.mark.parametrize("outer", [["a"] * 5, ["b", "a", None, "b", "a"]])
def test_a_call_inside_a_block(outer, inner, loras, texts):
    bank = Bank(VIT, loras)
    check_inside(bank, pixels(), outer, lambda: bank(pixels(), inner))
    bank = Bank(GPT2, texts)
    alone = bank(tokens(), inner).logits
    check_inside(bank, tokens(), outer, lambda: bank(tokens(), inner))
    with bank.rows(outer):
        assert torch.equal(bank(tokens(), inner).logits, alone)
        bank(tokens(), ["c"] * 5)  # a prompt, which stands in front of the texts
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    check_inside(bank, tokens(), outer, lambda: bank.generate(tokens(), inner, **settings))


def test_a_block_inside_a_block_and_an_error_in_it(loras):
    bank = Bank(VIT, loras)

    def fail():
        with pytest.raises(ZeroDivisionError), bank.rows(["b"]):
            raise ZeroDivisionError

    check_inside(bank, pixels(), ["a", "b", None, "a", "b"], fail)
    plain = bank(pixels(), [None] * 5).logits
    with torch.no_grad():
        assert torch.equal(bank.model(**pixels()).logits, plain)


def test_blocks_that_end_in_another_order(loras):
    bank = Bank(VIT, loras)
    expected = bank(pixels(), ["b"] * 5).logits
    first, second = ExitStack(), ExitStack()
    first.enter_context(bank.rows(["a"] * 5))
    model = second.enter_context(bank.rows(["b"] * 5))
    first.close()
    with torch.no_grad():
        assert torch.equal(model(**pixels()).logits, expected)
    second.close()


def test_adapters_come_and_go_inside_a_block(loras, tmp_path):
    bank, rows = Bank(VIT, loras), ["b", None, "b", None, "b"]
    save(VIT, ("lora", 6), tmp_path / "c", 3, LABELS["a"])  # wider: all stacks grow
    save(VIT, ("bottleneck", 4), tmp_path / "d", 4, LABELS["b"])  # new layers

    def come_and_go():
        bank.evict("a")
        for name in "cd":
            bank.add(tmp_path / name)  # more slots than there were: those of the block move
        bank.remove("c")
        with pytest.raises(InlayError, match="does not exist"):
            bank.add(tmp_path / "none")

    check_inside(bank, pixels(), rows, come_and_go)
    assert bank.names == ["a", "b", "d"]


@pytest.mark.parametrize("action", ["evict", "remove", "add", "unload"])
def test_what_a_block_uses_stays(action, loras):
    bank = Bank(VIT, loras)
    arguments = {"evict": ["a"], "remove": ["a"], "add": [loras / "b", "a"], "unload": []}[action]

    def refuse():
        with pytest.raises(InlayError, match=r"open .*leave"):
            getattr(bank, action)(*arguments)
        with bank.rows(["b"]), pytest.raises(InlayError, match=r"open .*leave"):
            getattr(bank, action)(*arguments)

    check_inside(bank, pixels(), ["a", None, "a", "a", "a"], refuse)
    getattr(bank, action)(*arguments)


def test_what_a_block_uses_does_not_give_way(loras, tmp_path):
    for seed, name in enumerate("cdef", 3):
        save(VIT, ("lora", 4), tmp_path / name, seed, LABELS["a"])
    each = Bank(VIT, {"c": tmp_path / "c"}).bytes / 2e6  # of one slot, in MB
    bank = Bank(VIT, tmp_path, budget_mb=3.5 * each)  # the plain base's and two more

    def ask_for_others():
        for name in "def":
            bank(pixels(), [name] * 5)
        with pytest.raises(InlayError, match="has room for 2 adapters"):
            bank(pixels(), ["d", "e", "e", "e", "e"])

    check_inside(bank, pixels(), ["c"] * 5, ask_for_others)

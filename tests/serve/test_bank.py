"""A bank over its life: adapters that come, are replaced and go, what does not fit, budgets and threads."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from inlay import Bank, InlayError, load_adapter, load_base
from inlay.adapters import golden
from inlay.adapters.file import WEIGHTS
from inlay.files.tensor_header import sign
from inlay.methods import VisualPromptConfig
from serve.banked import GPT2, LABELS, MIXED, VIT, alone, compare, pair, pixels, save


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    return pair(VIT, "lora", tmp_path_factory.mktemp("bank"))


def test_a_base_in_eight_bits(loras):
    bank, adapters = Bank(load_base(VIT, quantize="8bit"), loras), ["a", "b", None, "b", "a"]
    found = bank(pixels(), adapters).logits
    for i, name in enumerate(adapters[:2]):
        model = load_adapter(loras / name, quantize="8bit").model
        with torch.no_grad():
            want = model(**pixels()).logits[i]
        assert (found[i, : len(want)] - want).abs().max() < 0.05 * want.abs().max()


def test_a_base_in_bfloat16_where_it_pays(loras, monkeypatch):
    monkeypatch.setattr("inlay.serve.bank.choose_dtype", lambda device: ("bfloat16", "it is fast here"))
    bank = Bank(VIT, loras, dtype="auto", device="cpu")
    assert next(bank.model.parameters()).dtype == torch.bfloat16
    expected = Bank(VIT, loras, device="cpu")(pixels(), MIXED).logits
    inputs = {"pixel_values": pixels()["pixel_values"].bfloat16()}
    found, known = bank(inputs, MIXED).logits.float(), expected.isfinite()
    assert torch.equal(found.isfinite(), known)
    assert (found - expected)[known].abs().max() < 0.1 * expected[known].abs().max()


def test_a_base_in_float32_where_an_adapter_does_not_hold_in_bfloat16(loras, monkeypatch):
    monkeypatch.setattr("inlay.serve.bank.choose_dtype", lambda device: ("bfloat16", "it is fast here"))
    monkeypatch.setitem(golden.TOLERANCE, "bfloat16", 1e-6)
    bank = Bank(VIT, loras, dtype="auto", device="cpu")
    assert next(bank.model.parameters()).dtype == torch.float32
    assert torch.equal(bank(pixels(), MIXED).logits, Bank(VIT, loras, device="cpu")(pixels(), MIXED).logits)
    with pytest.raises(InlayError, match="its output differs by"):
        Bank(VIT, loras, dtype="bfloat16", device="cpu")
    with pytest.raises(InlayError, match="leave device and dtype out"):
        Bank(load_base(VIT), loras, dtype="auto")


def test_adapters_come_are_replaced_and_go(loras, tmp_path):
    folder = Path(shutil.copytree(loras, tmp_path / "bank"))
    bank = Bank(VIT)
    assert bank.names == [] and torch.isfinite(bank(pixels(), [None] * 5).logits).all()
    assert bank.add(folder / "a") == "a" and bank.add(folder / "b", "other") == "other"
    wanted = alone(VIT, folder, pixels(), ["a", "b", "a", "b", "b"])
    compare(bank(pixels(), ["a", "other", "a", "other", "other"]).logits, wanted)
    bank.add(folder / "b", "a")  # in the place of the first
    assert bank.names == ["a", "other"] and bank.labels("a") == LABELS["b"]
    compare(bank(pixels(), ["a"] * 5).logits, alone(VIT, folder, pixels(), ["b"] * 5))
    bank.evict("a")
    assert bank.resident == ["other"] and bank.names == ["a", "other"]
    compare(bank(pixels(), ["a"] * 5).logits, alone(VIT, folder, pixels(), ["b"] * 5))  # read again
    bank.remove("a")
    with pytest.raises(InlayError, match="unknown adapter 'a'; this bank has other"):
        bank(pixels(), ["a"] * 5)
    for i in range(5):  # more than there was room for
        bank.add(folder / "ab"[i % 2], f"copy {i}")
    rows = [f"copy {i}" for i in range(5)]
    compare(bank(pixels(), rows).logits, alone(VIT, folder, pixels(), ["a", "b", "a", "b", "a"]))


def test_an_adapter_that_does_not_fit_changes_nothing(loras, tmp_path):
    bank = Bank(VIT, {"a": loras / "a"})
    before = bank(pixels(), ["a", None, "a", "a", None]).logits
    folder = Path(shutil.copytree(loras / "b", tmp_path / "b"))
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"!")
    save(GPT2, ("lora", 2), tmp_path / "text")
    save(VIT, ("dora", 2), tmp_path / "dora")
    save(VIT, ("partial", 2), tmp_path / "partial")
    save(VIT, ("lora-prompt", 2), tmp_path / "both")
    save(VIT, lambda model: LoraConfig(r=2, target_modules=["q_proj"], bias="all"), tmp_path / "biases")
    for path, reason in [
        (folder, "does not match the checksum"),
        (tmp_path / "text", "model type gpt2"),
        (tmp_path / "dora", "not DoRA and other variants"),
        (tmp_path / "partial", "holds biases and norms of partial fine-tuning, not whole weights"),
        (tmp_path / "both", "combined with another method"),
        (tmp_path / "biases", "replaces biases of the base itself"),
        (tmp_path / "none", "does not exist"),
    ]:
        for name in ("a", "new"):
            with pytest.raises(InlayError, match=reason):
                bank.add(path, name)
    assert bank.names == bank.resident == ["a"]
    assert torch.equal(bank(pixels(), ["a", None, "a", "a", None]).logits, before)


def sign_another_output(folder):
    """What the check of the golden output alone finds."""
    data = (folder / WEIGHTS).read_bytes()
    record = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["inlay"])
    record["golden"] = [value + 1 for value in record["golden"]]
    (folder / WEIGHTS).write_bytes(sign(to_bytes(load_file(folder / WEIGHTS), {"inlay": json.dumps(record)})))


@pytest.mark.parametrize("method", ["lora", "attention-prefix", "bottleneck", "visual-prompt", "mam"])
def test_an_adapter_of_another_output_changes_nothing(method, loras, tmp_path):
    """Its tensors are in the bank's stacks when the check of its output fails."""
    bank = Bank(VIT, {"a": loras / "a"})
    before = bank(pixels(), ["a", None, "a", "a", None]).logits
    modules, results = [name for name, _ in bank.model.named_modules()], dict(bank.checks)
    save(VIT, (method, 6), tmp_path / "c", 3, LABELS["b"])
    sign_another_output(tmp_path / "c")
    for name in ("a", "new"):
        with pytest.raises(InlayError, match=r"its output differs by .* from the one stored with it"):
            bank.add(tmp_path / "c", name)
    assert bank.names == bank.resident == list(bank.files) == ["a"] and bank.checks == results
    assert bank.files["a"].folder == loras / "a"
    assert torch.equal(bank(pixels(), ["a", None, "a", "a", None]).logits, before)
    assert [name for name, _ in bank.model.named_modules()] == modules
    trusting = Bank(VIT, {"c": tmp_path / "c"}, check_golden=False)
    assert trusting.checks["c"].pop("golden") == "left out" and set(trusting.checks["c"].values()) == {"ok"}


def test_a_failed_bottleneck_does_not_bind_the_next(tmp_path):
    bank = Bank(VIT)
    save(VIT, ("bottleneck", 2), tmp_path / "a")
    save(VIT, ("bottleneck-linear", 2), tmp_path / "b")
    sign_another_output(tmp_path / "a")
    with pytest.raises(InlayError, match="its output differs"):
        bank.add(tmp_path / "a")
    bank.add(tmp_path / "b")  # of another activation


def test_an_adapter_of_plain_peft_has_no_output_to_compare_with(loras, tmp_path):
    folder = Path(shutil.copytree(loras / "a", tmp_path / "a"))
    (folder / WEIGHTS).write_bytes(to_bytes(load_file(folder / WEIGHTS), {"format": "pt"}))
    bank = Bank(load_base(VIT, labels=LABELS["a"]), {"a": folder})
    unknown = {name for name, result in bank.checks["a"].items() if result == "not recorded"}
    assert unknown == {"header", "record", "base", "golden"}


def test_an_output_is_computed_once(loras, monkeypatch):
    computed = []
    output = golden.compute_output
    monkeypatch.setattr(golden, "compute_output", lambda *given: computed.append(given) or output(*given))
    bank = Bank(VIT, loras)
    assert len(computed) == 2
    bank.evict("a")
    bank(pixels(), MIXED)
    assert bank.resident == ["b", "a"] and bank.checks["a"]["golden"] == "ok" and len(computed) == 2


def test_bottlenecks_of_one_bank_are_alike(tmp_path):
    save(VIT, ("bottleneck", 2), tmp_path / "a")
    save(VIT, ("bottleneck-linear", 2), tmp_path / "b")
    bank = Bank(VIT, {"a": tmp_path / "a"})
    with pytest.raises(InlayError, match="alike in activation: here it is relu, this adapter has None"):
        bank.add(tmp_path / "b")
    save(VIT, lambda model: VisualPromptConfig(length=3, deep=False), tmp_path / "c")
    save(VIT, lambda model: VisualPromptConfig(length=3, deep=False, layers_to_transform=[1, 2]), tmp_path / "d")
    bank.add(tmp_path / "c")
    with pytest.raises(InlayError, match="through the same blocks"):
        bank.add(tmp_path / "d")


def test_another_base_is_refused(loras, tmp_path):
    base = load_base(VIT)
    with torch.no_grad():
        for value in base.vit.parameters():
            value.copy_(torch.randn_like(value) * 0.1)
    with pytest.raises(InlayError, match="other weights of the same shape"):
        Bank(base, loras)


def test_the_least_recently_used_give_way(loras, tmp_path):
    for name in "cdefg":
        shutil.copytree(loras / "a", tmp_path / name)
    each = Bank(VIT, {"c": tmp_path / "c"}).bytes / 2e6  # of one slot, in MB
    bank = Bank(VIT, tmp_path, budget_mb=4.5 * each)  # the plain base's and three more
    assert bank.names == list("cdefg") and bank.resident == [] and bank.labels("c") == LABELS["a"]
    want = alone(VIT, loras, pixels(), ["a", "a", None, "a", "a"])
    for rows, resident in [
        (["c", "d", None, "c", "d"], "cd"),
        (["e", "c", None, "e", "c"], "dec"),
        (["f", "c", None, "f", "f"], "ecf"),
        (["g", "d", None, "f", "g"], "fgd"),
    ]:
        compare(bank(pixels(), rows).logits, want)
        assert sorted(bank.resident) == sorted(resident) and bank.bytes <= 4.5e6 * each
    with pytest.raises(InlayError, match="has room for 3 adapters of this size"):
        bank(pixels(), ["c", "d", "e", "f", "g"])
    compare(bank(pixels(), ["g", "d", None, "f", "g"]).logits, want)


def test_the_last_use_counts_and_not_the_first(loras, tmp_path):
    """First in, first out would let the adapter go that every batch asks for."""
    for name in "cdefg":
        shutil.copytree(loras / "a", tmp_path / name)
    each = Bank(VIT, {"c": tmp_path / "c"}).bytes / 2e6
    bank = Bank(VIT, tmp_path, budget_mb=4.5 * each)  # the plain base's and three more
    for name in "cde":
        bank(pixels(), [name] * 5)
    bank(pixels(), ["c"] * 5)
    assert bank.resident == ["d", "e", "c"]
    bank(pixels(), ["f"] * 5)
    assert bank.resident == ["e", "c", "f"]
    bank(pixels(), ["e"] * 5)
    bank(pixels(), ["g"] * 5)
    assert bank.resident == ["f", "e", "g"]


def test_a_wider_adapter_takes_the_room_of_others(loras, tmp_path):
    for name in "cdef":
        shutil.copytree(loras / "a", tmp_path / name)
    save(VIT, ("lora", 12), tmp_path / "wide", 3, LABELS["a"])
    each = Bank(VIT, {"c": tmp_path / "c"}).bytes / 2e6
    bank = Bank(VIT, tmp_path, budget_mb=9.5 * each)
    bank(pixels(), ["c", "d", "e", "f", None])
    found = bank(pixels(), ["wide", "f", None, "wide", "f"]).logits
    assert bank.resident == ["f", "wide"] and bank.bytes <= 9.5e6 * each
    folders = {"wide": tmp_path / "wide", "f": loras / "a"}
    for i, name in enumerate(["wide", "f"]):
        with torch.no_grad():
            want = load_adapter(folders[name]).model(**pixels()).logits[i]
        assert (found[i, :3] - want).abs().max() < 1e-5


def test_threads_wait_for_each_other(loras):
    bank, failures = Bank(VIT, loras), []
    batch = {key: value[:2] for key, value in pixels().items()}
    wanted = {name: bank(batch, [name] * 2).logits for name in ("a", "b", None)}

    def serve(name):
        for _ in range(10):
            if not torch.equal(bank(batch, [name] * 2).logits, wanted[name]):
                failures.append(name)
            if name == "a":
                bank.evict("b")

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("a", "b", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_mistakes_of_a_caller(loras, tmp_path):
    bank = Bank(VIT, loras)
    with pytest.raises(InlayError, match="2 adapters for 5 rows; give a list with one adapter, or None"):
        bank(pixels(), ["a", "b"])
    with pytest.raises(InlayError, match="'a' for 5 rows; give a list"):
        bank(pixels(), "a")
    with pytest.raises(InlayError, match="unknown adapter 'zoo'; this bank has a, b"):
        bank(pixels(), ["a", "zoo", None, None, "a"])
    with pytest.raises(InlayError, match="holds no adapters; give a folder"):
        Bank(VIT, tmp_path)
    with pytest.raises(InlayError, match="two adapters are called 'a'"):
        Bank(VIT, [loras / "a", loras / "a"])
    with pytest.raises(InlayError, match="budget_mb must be positive"):
        Bank(VIT, loras, budget_mb=0)
    with pytest.raises(InlayError, match="carries an adapter already"):
        Bank(bank.model, loras)


@pytest.mark.parametrize("method", ["lora", "attention-prefix", "bottleneck-parallel"])
def test_the_base_comes_back(method, tmp_path):
    base = load_base(VIT)
    names = [name for name, _ in base.named_modules()]
    with torch.no_grad():
        before = base(**pixels()).logits
    bank = Bank(base, pair(VIT, method, tmp_path))
    bank(pixels(), MIXED)
    assert bank.unload() is base and [name for name, _ in base.named_modules()] == names
    with torch.no_grad():
        assert torch.equal(base(**pixels()).logits, before)
    assert load_adapter(tmp_path / "a", base).verified

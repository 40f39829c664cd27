"""A bank of adapters gives each row what its adapter, loaded alone, gives."""

import shutil
import threading
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, MobileNetV2ImageProcessor

from inlay import Bank, InlayError, TextProcessor, load_adapter, load_base, load_processor, load_tokenizer, save_adapter
from inlay.arch import head_modules, lora_targets
from inlay.methods import METHODS, AttentionPrefixConfig, BottleneckConfig, VisualPromptConfig
from inlay.store.file import WEIGHTS

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


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    return pair(VIT, "lora", tmp_path_factory.mktemp("bank"))


IMAGES = [
    "lora",
    "rslora",
    "bottleneck",
    "bottleneck-parallel",
    "bottleneck-linear",
    "visual-prompt",
    "visual-prompt-shallow",
    "attention-prefix",
    "mam",
]


@pytest.mark.parametrize("method", IMAGES)
def test_each_row_of_a_batch_of_pictures_has_its_adapter(method, tmp_path):
    bank = Bank(VIT, pair(VIT, method, tmp_path))
    assert bank.names == bank.resident == ["a", "b"] and bank.labels("b") == LABELS["b"]
    plain = load_base(VIT)
    for adapters in (MIXED, ["b"] * 5, ["a", None, None, None, None]):
        compare(bank(pixels(), adapters).logits, alone(VIT, tmp_path, pixels(), adapters))
    with torch.no_grad():
        assert torch.equal(bank(pixels(), [None] * 5).logits, plain(**pixels()).logits)
        assert torch.equal(bank.model(**pixels()).logits, plain(**pixels()).logits)  # outside of a call


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("method", ["lora", "bottleneck", "bottleneck-parallel", "attention-prefix", "prompt"])
def test_each_row_of_a_batch_of_texts_has_its_adapter(method, pad, tmp_path):
    """A row of texts of different lengths gets what it gets alone."""
    bank = Bank(GPT2, pair(GPT2, method, tmp_path))
    more = {}
    if pad and method != "prompt":
        more["position_ids"] = (tokens(pad)["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    found = bank(tokens(pad), MIXED, **more).logits
    assert found.shape[:2] == (5, 9)
    compare(found, alone(GPT2, tmp_path, tokens(pad), MIXED, last=True))


@pytest.mark.parametrize("method", ["lora", "bottleneck", "attention-prefix", "prompt"])
def test_texts_are_continued_as_one_by_one(method, tmp_path):
    folder = pair(GPT2, method, tmp_path)
    bank, batch = Bank(GPT2, folder), tokens()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = bank.generate(batch, MIXED, **settings)
    assert found.shape == (5, 17)
    models = {name: loaded(GPT2, folder, name) for name in MIXED}
    for i, name in enumerate(MIXED):
        row = {key: value[i : i + 1] for key, value in batch.items()}
        want = models[name].generate(**row, **settings)[0]
        assert found[i, -8:].tolist() == want[-8:].tolist() and found[i, :9].tolist() == batch["input_ids"][i].tolist()
    if method != "prompt":
        beams = bank.generate(batch, MIXED, num_beams=3, **settings)
        want = models["b"].generate(**{k: v[1:2] for k, v in batch.items()}, num_beams=3, **settings)[0]
        assert beams[1].tolist() == want.tolist()


def parallel_norms(width):
    return lambda model: BottleneckConfig(width=width, layer_norm="before", activation="gelu", scale=0.5)


def after_norms(width):
    return lambda model: BottleneckConfig(width=width, layer_norm="after", activation="tanh", learn_scale=True)


def parallel_attention(width):
    return lambda model: BottleneckConfig(width=width, placement="parallel", sites=["attention"], scale=2.0)


def patterns(width):
    def config(model):
        names = lora_targets(model)[:7]
        ranks = {"rank_pattern": {names[0]: width + 3}, "alpha_pattern": {names[1]: 31}}
        return LoraConfig(r=width, lora_alpha=3, target_modules=names[: 3 + width], **ranks)

    return config


def some_blocks(width):
    return lambda model: VisualPromptConfig(length=width, layers_to_transform=[0, width // 2 - 1])


@pytest.mark.parametrize("method", [parallel_norms, after_norms, parallel_attention, patterns, some_blocks])
def test_forms_of_methods_and_adapters_at_other_modules(method, tmp_path):
    bank = Bank(VIT, pair(VIT, method, tmp_path))
    compare(bank(pixels(), MIXED).logits, alone(VIT, tmp_path, pixels(), MIXED))


def test_methods_may_be_mixed(tmp_path):
    save(VIT, ("lora", 3), tmp_path / "a", 1, LABELS["a"])
    save(VIT, ("attention-prefix", 5), tmp_path / "b", 2, LABELS["b"])
    save(VIT, ("bottleneck", 4), tmp_path / "c", 3, LABELS["a"])
    save(VIT, ("visual-prompt", 6), tmp_path / "d", 4, LABELS["a"])
    adapters = ["d", "c", "b", "a", None]
    compare(Bank(VIT, tmp_path)(pixels(), adapters).logits, alone(VIT, tmp_path, pixels(), adapters))


@pytest.mark.parametrize("method", ["lora", "bottleneck", "attention-prefix", "visual-prompt"])
def test_windows_of_sam(method, tmp_path):
    """A window of SAM's attention is a row of its own; five prompts of a picture are not."""
    for seed, name in enumerate("ab", 1):
        torch.manual_seed(seed)
        base = load_base(SAM)
        config = METHODS[method].config(base, 2 + seed)
        model = get_peft_model(base, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        save_adapter(model, tmp_path / name, processor=load_processor(SAM))
    bank, adapters = Bank(SAM, tmp_path), ["a", None, "b"]
    batch = pixels(128, 3)
    batch["input_points"] = torch.rand(3, 2, 1, 2, generator=torch.Generator().manual_seed(1)) * 128
    found = bank(batch, adapters).pred_masks
    for i, name in enumerate(adapters):
        model = load_base(SAM) if name is None else load_adapter(tmp_path / name).model
        with torch.no_grad():
            want = model(**{key: value[i : i + 1] for key, value in batch.items()}).pred_masks[0]
        assert (found[i] - want).abs().max() < 1e-4 * float(want.abs().max())


def test_point_wise_convolutions(tmp_path):
    torch.manual_seed(0)
    config = MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=3, finegrained_output=False)
    MobileNetV2ForImageClassification(config).save_pretrained(tmp_path / "base")
    processor = MobileNetV2ImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    for seed, name in enumerate("ab", 1):
        torch.manual_seed(seed)
        model = load_base(base, labels=LABELS[name])
        model = get_peft_model(
            model, LoraConfig(r=1 + seed, target_modules=lora_targets(model), modules_to_save=head_modules(model))
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        save_adapter(model.eval(), tmp_path / "bank" / name, processor=load_processor(base))
    bank = Bank(base, tmp_path / "bank")
    compare(bank(pixels(), MIXED).logits, alone(base, tmp_path / "bank", pixels(), MIXED))


def test_a_base_in_eight_bits(loras):
    bank, adapters = Bank(load_base(VIT, quantize="8bit"), loras), ["a", "b", None, "b", "a"]
    found = bank(pixels(), adapters).logits
    for i, name in enumerate(adapters[:2]):
        model = load_adapter(loras / name, quantize="8bit").model
        with torch.no_grad():
            want = model(**pixels()).logits[i]
        assert (found[i, : len(want)] - want).abs().max() < 0.05 * want.abs().max()


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
    with pytest.raises(InlayError, match="has no adapter 'a', it has other"):
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
    for path, reason in [
        (folder, "does not match the checksum"),
        (tmp_path / "text", "model type gpt2"),
        (tmp_path / "dora", "not DoRA, biases"),
        (tmp_path / "partial", "what PartialLayer adds"),
        (tmp_path / "both", "another method beside them"),
        (tmp_path / "none", "does not exist"),
    ]:
        for name in ("a", "new"):
            with pytest.raises(InlayError, match=reason):
                bank.add(path, name)
    assert bank.names == bank.resident == ["a"]
    assert torch.equal(bank(pixels(), ["a", None, "a", "a", None]).logits, before)


def test_bottlenecks_of_one_bank_are_alike(tmp_path):
    save(VIT, ("bottleneck", 2), tmp_path / "a")
    save(VIT, ("bottleneck-linear", 2), tmp_path / "b")
    bank = Bank(VIT, {"a": tmp_path / "a"})
    with pytest.raises(InlayError, match="alike in activation: here it is relu, got None"):
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
    with pytest.raises(InlayError, match="a list of one adapter, or None, for each of 5 rows, got 2"):
        bank(pixels(), ["a", "b"])
    with pytest.raises(InlayError, match="for each of 5 rows, got 'a'"):
        bank(pixels(), "a")
    with pytest.raises(InlayError, match="has no adapter 'zoo', it has a, b"):
        bank(pixels(), ["a", "zoo", None, None, "a"])
    with pytest.raises(InlayError, match="holds none"):
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


def test_a_prefix_of_the_cache_is_refused(tmp_path):
    save(GPT2, ("prefix", 3), tmp_path / "a")
    with pytest.raises(InlayError, match=r"holds no PREFIX_TUNING .a.; load it with load_adapter"):
        Bank(GPT2, tmp_path)
    save(GPT2, lambda model: AttentionPrefixConfig(length=3), tmp_path / "b")
    assert Bank(GPT2, {"b": tmp_path / "b"}).resident == ["b"]

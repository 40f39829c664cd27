"""A row of a bank's batch gets what its adapter, loaded alone, gives, whatever the method and the other rows."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, MobileNetV2ImageProcessor

from inlay import (
    Bank,
    ConvAdapterConfig,
    ConvPassConfig,
    InlayError,
    load_adapter,
    load_base,
    load_processor,
    save_adapter,
)
from inlay.bases.sites import head_modules, lora_targets
from inlay.methods import METHODS, BottleneckConfig, VisualPromptConfig
from serve.banked import GPT2, LABELS, MIXED, SAM, VIT, alone, compare, loaded, pair, pixels, save, tokens

IMAGES = [
    "lora",
    "rslora",
    "bottleneck",
    "bottleneck-parallel",
    "bottleneck-linear",
    "adapter-plus",
    "visual-prompt",
    "visual-prompt-shallow",
    "attention-prefix",
    "mam",
    "ia3",
    "ssf",
    "convpass",
    "bias",
    "norm",
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
@pytest.mark.parametrize(
    "method", ["lora", "bottleneck", "bottleneck-parallel", "attention-prefix", "prompt", "ia3", "ssf", "bias", "norm"]
)
def test_each_row_of_a_batch_of_texts_has_its_adapter(method, pad, tmp_path):
    """A row of texts of different lengths gets what it gets alone."""
    bank = Bank(GPT2, pair(GPT2, method, tmp_path))
    more = {}
    if pad and method != "prompt":
        more["position_ids"] = (tokens(pad)["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    found = bank(tokens(pad), MIXED, **more).logits
    assert found.shape[:2] == (5, 9)
    compare(found, alone(GPT2, tmp_path, tokens(pad), MIXED, last=True))


@pytest.mark.parametrize("method", ["lora", "bottleneck", "attention-prefix", "prompt", "prefix"])
@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # peft of its prompts
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
    if method not in ("prompt", "prefix"):
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


def biased(width):
    return lambda model: LoraConfig(r=width, target_modules=lora_targets(model), lora_bias=width > 4)


def patches(width):
    return lambda model: LoraConfig(r=width, target_modules=["projection", "q_proj"], lora_bias=width > 4)


def some_blocks(width):
    return lambda model: VisualPromptConfig(length=width, layers_to_transform=[0, width // 2 - 1])


@pytest.mark.parametrize(
    "method", [parallel_norms, after_norms, parallel_attention, patterns, some_blocks, biased, patches]
)
def test_forms_of_methods_and_adapters_at_other_modules(method, tmp_path):
    bank = Bank(VIT, pair(VIT, method, tmp_path))
    compare(bank(pixels(), MIXED).logits, alone(VIT, tmp_path, pixels(), MIXED))


def test_embeddings_of_tokens_and_positions(tmp_path):
    def config(width):
        return lambda model: LoraConfig(r=width, target_modules=["wte", "wpe", "c_attn"][: 1 + width // 2])

    bank = Bank(GPT2, pair(GPT2, config, tmp_path))
    for adapters in (MIXED, ["b"] * 5):
        compare(bank(tokens(), adapters).logits, alone(GPT2, tmp_path, tokens(), adapters, last=True))


def test_a_prefix_of_the_cache_moves_the_positions_of_its_rows(tmp_path):
    """peft lets a text go on behind the prefix; rows without one start at 0."""
    save(GPT2, ("prefix", 3), tmp_path / "a", 1)
    save(GPT2, ("prefix", 5), tmp_path / "b", 2)
    save(GPT2, ("attention-prefix", 4), tmp_path / "c", 3)
    save(GPT2, ("prompt", 2), tmp_path / "d", 4)
    bank = Bank(GPT2, tmp_path)
    for adapters in (["a", "b", None, "c", "b"], ["b"] * 5, ["a", "b", None, "c", "d"]):
        compare(bank(tokens(), adapters).logits, alone(GPT2, tmp_path, tokens(), adapters, last=True))
    with torch.no_grad():
        assert torch.equal(bank.model(**tokens()).logits, load_base(GPT2)(**tokens()).logits)  # outside of a call


def test_methods_may_be_mixed(tmp_path):
    save(VIT, ("lora", 3), tmp_path / "a", 1, LABELS["a"])
    save(VIT, ("mam", 5), tmp_path / "b", 2, LABELS["b"])
    save(VIT, ("bottleneck", 4), tmp_path / "c", 3, LABELS["a"])
    save(VIT, ("visual-prompt", 6), tmp_path / "d", 4, LABELS["a"])
    save(VIT, ("ia3", 4), tmp_path / "e", 5, LABELS["a"])
    save(VIT, ("bias", 4), tmp_path / "f", 6, LABELS["b"])
    bank = Bank(VIT, tmp_path)
    for adapters in (["d", "c", "b", "a", None], ["f", "e", "b", "a", None]):
        compare(bank(pixels(), adapters).logits, alone(VIT, tmp_path, pixels(), adapters))


@pytest.mark.parametrize(
    "method",
    ["lora", "bottleneck", "attention-prefix", "visual-prompt", "ia3", "convpass", "bias", "norm"],
)
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


def everywhere(model, times):
    return LoraConfig(r=times, target_modules=lora_targets(model))


def in_groups(model, times):
    """Around the depth-wise convolutions of the first layers, whose A is a kernel over all channels."""
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1][:2]
    sizes = {n: times * model.get_submodule(n).groups for n in names}
    return LoraConfig(target_modules=names, rank_pattern=sizes, alpha_pattern=sizes)


def next_to_convolutions(model, times):
    """Of widths that differ in their groups."""
    return ConvAdapterConfig(width=2 + 3 * times)


@pytest.mark.parametrize("places", [everywhere, in_groups, next_to_convolutions])
def test_convolutions(places, tmp_path):
    torch.manual_seed(0)
    config = MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=3, finegrained_output=False)
    MobileNetV2ForImageClassification(config).save_pretrained(tmp_path / "base")
    processor = MobileNetV2ImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    for seed, name in enumerate("ab", 1):
        torch.manual_seed(seed)
        model = load_base(base, labels=LABELS[name])
        config = places(model, seed)
        config.modules_to_save = head_modules(model)
        model = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        save_adapter(model.eval(), tmp_path / "bank" / name, processor=load_processor(base))
    bank = Bank(base, tmp_path / "bank")
    for adapters in (MIXED, ["b"] * 5):
        compare(bank(pixels(), adapters).logits, alone(base, tmp_path / "bank", pixels(), adapters))


def test_what_the_rows_of_a_bank_share_must_be_alike(tmp_path):
    save(VIT, lambda model: ConvPassConfig(width=3), tmp_path / "a", 1, LABELS["a"])
    save(VIT, lambda model: ConvPassConfig(width=3, activation="gelu"), tmp_path / "b", 2, LABELS["b"])
    with pytest.raises(InlayError, match="bypasses of a bank are alike in activation"):
        Bank(VIT, tmp_path)
    bank = Bank(VIT, {"a": tmp_path / "a"})
    embeddings = bank.model.vit.embeddings
    assert len(embeddings._forward_hooks) == 1
    bank.unload()
    assert not embeddings._forward_hooks

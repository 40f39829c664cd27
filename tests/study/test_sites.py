"""Methods limited to some blocks and modules: they train there and nowhere else, and are saved so."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from inlay import InlayError, TextProcessor, load_adapter, load_base, load_processor, load_tokenizer, save_adapter
from inlay.bases.sites import sites
from inlay.methods import METHODS
from inlay.study.sites import narrow_sites
from methods.bases import KINDS, PROMPTS, batch, build, compute, randomise

PLACED = [name for name in METHODS if name not in ("probe", "full", "spatial", *PROMPTS)]


def blocks_that_train(model, base):
    """Numbers of the blocks in which a parameter trains; -1 for what is in none, but for the head."""
    found = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "modules_to_save" not in name:
            name = name.removeprefix("base_model.model.")
            found.add(next((i for i, b in enumerate(sites(base).blocks) if f"{name}.".startswith(f"{b}.")), -1))
    return found


def of_kinds(kinds):
    return [(m, b) for b in kinds for m in PLACED if KINDS[b] in METHODS[m].bases and (m, b) != ("bias", "llama")]


@pytest.mark.parametrize(
    ("method", "base"),
    [
        (m, b)
        for m, b in of_kinds(KINDS)
        if b in ("vit", "gpt2") or m in ("lora", "ia3", "bottleneck", "conv-adapter", "lora-conv")
    ],
)
def test_narrowed_it_trains_two_blocks_and_is_saved_and_loaded_so(method, base, tmp_path):
    model = build(base)
    config = narrow_sites(METHODS[method].config(model, 4), model, (0, 1))
    model = get_peft_model(model, config).eval()
    # The prompts of a shallow adapter enter at the first of its blocks, and are dropped behind the last.
    assert blocks_that_train(model, build(base)) == ({0} if method == "visual-prompt-shallow" else {0, 1})
    if base not in ("vit", "gpt2"):
        return
    randomise(model, "default")
    expected = compute(model, base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(base), tmp_path).eval()
    assert (compute(loaded, base) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("base", ["builtin:vit-tiny", "builtin:gpt2-tiny"])
@pytest.mark.parametrize("method", ["lora", "mam"])
def test_its_file_passes_every_check(method, base, tmp_path):
    labels = ["a", "b"] if "vit" in base else None
    model = load_base(base, labels=labels)
    config = narrow_sites(METHODS[method].config(model, 2), model, (1, 3))
    config.modules_to_save = ["classifier"] if labels else None
    model = get_peft_model(model, config)
    randomise(model, "default")
    processor = load_processor(base) if labels else TextProcessor(load_tokenizer(base), max_length=32)
    loaded = load_adapter(save_adapter(model, tmp_path / "adapter", processor=processor))
    assert loaded.verified and loaded.deviation < 1e-5
    assert blocks_that_train(model, load_base(base)) == {1, 3}


def test_every_block_and_all_modules_is_the_method_as_it_is():
    model = build("vit")
    config = METHODS["lora"].config(model, 4)
    assert narrow_sites(config, model) is config
    everywhere = narrow_sites(config, model, (0, 1, 2))
    assert set(everywhere.target_modules) == set(config.target_modules)


@pytest.mark.parametrize(
    ("method", "base", "modules", "layers"),
    [
        ("lora", "vit", "attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("lora", "vit", "mlp", {"fc1", "fc2"}),
        ("lora", "gpt2", "attention", {"attn.c_attn", "attn.c_proj"}),
        ("lora", "gpt2", "mlp", {"mlp.c_fc", "mlp.c_proj"}),
        ("lora", "bert", "attention", {"query", "key", "value", "attention.output.dense"}),
        ("lora", "bert", "mlp", {"intermediate.dense", "1.output.dense"}),
        ("lora", "llama", "mlp", {"gate_proj", "up_proj", "down_proj"}),
        ("lora", "sam", "attention", {"attn.qkv", "attn.proj"}),
        ("ia3", "vit", "attention", {"k_proj", "v_proj"}),
        ("bottleneck", "vit", "attention", {"o_proj"}),
        ("bottleneck", "vit", "mlp", {"mlp.fc2"}),
        ("convpass", "vit", "attention", {"attention"}),
        ("partial", "vit", "attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_attention_or_mlp_of_a_block(method, base, modules, layers):
    model = build(base)
    config = narrow_sites(METHODS[method].config(model, 4), model, (1,), modules)
    block = sites(model).blocks[1]
    assert all(name.startswith(f"{block}.") for name in config.target_modules)
    for name in config.target_modules:
        assert name.endswith(tuple(layers)), name
    assert len(config.target_modules) == len(layers)
    adapted = get_peft_model(build(base), config)
    assert blocks_that_train(adapted, build(base)) == {1}
    if method == "ia3":
        assert not config.feedforward_modules


def test_ia3_of_the_mlp_stays_in_front_of_it():
    model = build("vit")
    config = narrow_sites(METHODS["ia3"].config(model, 4), model, (0, 2), "mlp")
    assert config.feedforward_modules == config.target_modules
    compute(get_peft_model(model, config), "vit")


@pytest.mark.parametrize(
    ("method", "base", "blocks", "modules", "match"),
    [
        ("prompt", "gpt2", (0,), "all", "no blocks to choose"),
        ("prefix", "gpt2", None, "attention", "no blocks to choose"),
        ("visual-prompt", "vit", (0,), "attention", r"no attention layers in blocks \[0\]"),
        ("norm", "vit", None, "mlp", "no mlp layers in any block"),
        ("lora", "resnet", None, "attention", "no attention layers"),
        ("lora", "vit", (3,), "all", r"within 0 to 2, got \[3\]"),
        ("lora", "vit", (-1,), "all", "within 0 to 2"),
        ("lora", "vit", (), "all", r"got \[\]"),
        ("lora", "vit", (0,), "values", "all, attention or mlp"),
        ("visual-prompt-shallow", "vit", (0, 2), "all", "follow one another"),
    ],
)
def test_places_that_a_method_does_not_have_are_refused(method, base, blocks, modules, match):
    model = build(base)
    with pytest.raises(InlayError, match=match):
        get_peft_model(model, narrow_sites(METHODS[method].config(model, 4), model, blocks, modules))


def test_what_adds_nothing_or_replaces_the_encoder_has_no_places():
    with pytest.raises(InlayError, match="adds nothing"):
        narrow_sites(METHODS["full"].config(build("vit"), 4), build("vit"), (0,))
    base = load_base("builtin:sam-tiny")
    with pytest.raises(InlayError, match="attaches to vision_encoder, mask_decoder, not to blocks"):
        narrow_sites(METHODS["spatial"].config(base, 4), base, (0,))


def test_the_model_and_the_config_stay_as_they_were():
    model = build("vit")
    names, before = [n for n, _ in model.named_modules()], compute(model, "vit")
    config = METHODS["mam"].config(model, 4)
    narrow_sites(config, model, (0,))
    assert [n for n, _ in model.named_modules()] == names and torch.equal(compute(model, "vit"), before)
    assert config.parts[0].target_modules is None and batch("vit")

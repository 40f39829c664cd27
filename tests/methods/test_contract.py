"""The contract that every method passes on every kind of base: one row in METHODS, and a method has these tests."""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from forked_program import finish
from inlay import InlayError, load_adapter, load_base, load_processor, save_adapter
from inlay.bases.sites import sites
from inlay.methods import METHODS
from inlay.methods.base import AdapterLayer
from inlay.train.launch import enable_checkpointing
from methods.bases import KINDS, OURS, PEFTS, PROMPTS, adapted, batch, build, compute, pairs, randomise

EVERY = pytest.mark.parametrize(("method", "base"), pairs(OURS + PEFTS + PROMPTS))
OWN = pytest.mark.parametrize(("method", "base"), pairs(OURS))
TOKENS = {"visual-prompt", "visual-prompt-shallow", "attention-prefix", "mam", "lora-prompt", *PROMPTS}
NEAR = {"adapter-plus"}
NESTED = {("partial", "sam"), ("mam", None), ("lora-prompt", None)}  # what transformers itself cannot load


def off(a, b):
    return (a - b).abs().max().item()


@EVERY
def test_starts_as_the_base(method, base):
    model = build(base)
    before = compute(model, base)
    model = METHODS[method].adapt(model, 4).eval()
    if method in TOKENS:  # one more token shares the softmax
        assert 0 < off(compute(model, base), before) < 1
    elif method in NEAR:  # as published: W_up is small, not zero
        assert 0 < off(compute(model, base), before) < 0.01 * before.abs().max()
    else:
        assert off(compute(model, base), before) < 1e-5 * (1 + before.abs().max())


@EVERY
def test_the_adapter_alone_trains_and_all_of_it(method, base):
    model = build(base)
    names = {id(p): n for n, p in model.named_parameters()}
    model = adapted(method, base, 16)  # wide enough that not all units of a relu are off
    compute(model, base).square().sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(id(p) in names for p in trained.values())
    assert all(".default" in n for n in trained), [n for n in trained if ".default" not in n]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert all(p.grad is None for n, p in model.named_parameters() if not p.requires_grad)


@EVERY
def test_saved_and_loaded_it_computes_the_same(method, base, tmp_path):
    model = adapted(method, base)
    expected = compute(model, base)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    plain = {name for name, _ in build(base).named_modules()}
    for key in weights:
        module = key.removeprefix("base_model.model.").split(".inlay_")[0].split(".lora_")[0].split(".ia3_")[0]
        assert key == "prompt_embeddings" or module in plain or module.rpartition(".")[0] in plain, key
    size = sum(value.numel() * value.element_size() for value in weights.values())
    assert (tmp_path / "adapter_model.safetensors").stat().st_size <= size + 160 * len(weights) + 100
    loaded = PeftModel.from_pretrained(build(base), tmp_path).eval()
    assert off(compute(loaded, base), expected) < 1e-5
    if method in PROMPTS:
        return  # peft trains such an adapter no further
    again = PeftModel.from_pretrained(build(base), tmp_path, is_trainable=True).eval()
    assert off(compute(again, base), expected) < 1e-5
    assert any(p.requires_grad for p in again.parameters())


@EVERY
def test_disabled_it_is_the_base_bit_for_bit(method, base):
    before = compute(build(base), base)
    model = adapted(method, base)
    assert off(compute(model, base), before) > 1e-3
    with model.disable_adapter():
        if method == "pissa":  # it has moved a part of the base into the adapter
            assert off(compute(model, base), before) > 1e-3
        else:
            assert torch.equal(compute(model, base), before)


@OWN
@pytest.mark.filterwarnings("ignore:Adapter first was active which is now deleted")
def test_two_adapters_coexist_and_switch(method, base):
    model = adapted(method, base, 4, "first")
    first = compute(model, base)
    config = METHODS[method].config(build(base), 6)
    config.modules_to_save = ["classifier"] if base == "vit" else None
    model.add_adapter("second", config)
    assert torch.equal(compute(model, base), first)
    randomise(model, "second", 9)
    model.set_adapter("second")
    second = compute(model, base)
    assert off(first, second) > 1e-4
    model.set_adapter("first")
    assert torch.equal(compute(model, base), first)
    model.delete_adapter("first")
    assert model.active_adapters == ["second"] and torch.equal(compute(model, base), second)


@OWN
def test_another_adapter_changes_nothing_in_what_trains(method, base):
    model = adapted(method, base, 4, "first")
    module = sites(build(base)).blocks[0].split(".")[-2]  # an adapter may be called as a part of the base is
    for name, inference in (("second", True), ("third", False), (module, True)):
        before = {key: p.requires_grad for key, p in model.named_parameters()}
        assert any(before.values())
        config = METHODS[method].config(build(base), 6)
        config.inference_mode = inference
        model.add_adapter(name, config)
        assert all(p.requires_grad == before.get(key, False) for key, p in model.named_parameters())


@OWN
def test_unloaded_nothing_is_left(method, base):
    model = METHODS[method].config(build(base), 4)
    model = get_peft_model(build(base), model).eval()
    randomise(model, "default")
    left = model.unload()
    assert left.state_dict().keys() == build(base).state_dict().keys()
    assert not any(isinstance(module, AdapterLayer) for module in left.modules())
    assert torch.equal(compute(left, base), compute(build(base), base))
    assert "inlay" not in " ".join(str(vars(m).get("config")) for m in left.modules() if "config" in vars(m))


@EVERY
@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")  # peft of its own (IA)³
def test_merged_it_computes_the_same_or_refuses(method, base):
    model = adapted(method, base)
    expected, weights = compute(model, base), {k: v.clone() for k, v in model.state_dict().items()}
    if method in PROMPTS:
        assert not METHODS[method].merges and not hasattr(model, "merge_adapter")
        return
    if not METHODS[method].merges:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(InlayError, match=r"merged|fold"):
                merge()
        assert torch.equal(compute(model, base), expected)
        return
    model.merge_adapter()
    assert off(compute(model, base), expected) < 1e-4
    model.unmerge_adapter()
    if method in OURS:
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    merged = model.merge_and_unload()
    assert off(compute(merged, base), expected) < 1e-4
    assert merged.state_dict().keys() == build(base).state_dict().keys()


@pytest.mark.parametrize(("method", "base"), pairs([*OURS, "lora"]))
def test_a_mixed_batch_equals_one_by_one(method, base):
    if base in ("sam", "sam2") and "lora" in method:
        pytest.skip("peft's LoRA takes one row per example, SAM's attention makes a row of each window")
    model = adapted(method, base, 4, "first")
    config = METHODS[method].config(build(base), 6)
    config.modules_to_save = ["classifier"] if base == "vit" else None
    model.add_adapter("second", config)
    randomise(model, "second", 9)
    rows = len(next(iter(batch(base).values())))
    names = ["second", "first", "__base__", "first"][:rows]
    if method == "visual-prompt-shallow":
        with pytest.raises(InlayError, match="deep=True"):
            model(**batch(base), adapter_names=names)
        return

    def features(**more):
        output = model(**batch(base), **more)
        return output.logits if "logits" in output else output.last_hidden_state

    expected = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected.append(features()[i])
        else:
            model.set_adapter(name)
            expected.append(features()[i])
    assert off(features(adapter_names=names), torch.stack(expected)) < 1e-5
    with pytest.raises(ValueError, match="nothing"):
        model(**batch(base), adapter_names=["nothing"] * rows)


@OWN
def test_transformers_loads_and_switches_it(method, base, tmp_path):
    model = adapted(method, base)
    expected = compute(model, base)
    model.save_pretrained(tmp_path)
    plain = build(base)
    if (method, base) in NESTED or (method, None) in NESTED:
        with pytest.raises(InlayError, match=r"PeftModel\.from_pretrained"):
            plain.load_adapter(str(tmp_path))
        return
    plain.load_adapter(str(tmp_path))
    assert off(compute(plain, base), expected) < 1e-5
    if base != "vit":  # there the trained head stays
        plain.disable_adapters()
        assert torch.equal(compute(plain, base), compute(build(base), base))
        plain.enable_adapters()
        assert off(compute(plain, base), expected) < 1e-5


@OWN
def test_works_on_a_bf16_base(method, base, tmp_path):
    model = build(base).to(torch.bfloat16)
    model = get_peft_model(model, METHODS[method].config(model, 4)).eval()
    randomise(model, "default")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    inputs = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in batch(base).items()}

    def values(model):
        output = model(**inputs)
        return output.logits if "logits" in output else output.last_hidden_state

    expected = values(model)
    assert expected.dtype == torch.bfloat16 and torch.isfinite(expected).all()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(base).to(torch.bfloat16), tmp_path).eval()
    assert off(values(loaded), expected) < 0.05 * expected.abs().max()
    if method in ("partial", "bias", "norm"):  # what is merged is bit for bit what it computed with
        assert torch.equal(values(loaded), values(loaded.merge_and_unload()))


@pytest.mark.parametrize(("method", "base"), [pair for pair in pairs(OURS) if pair[1] != "resnet"])  # it has none
def test_gradient_checkpointing_changes_no_gradient(method, base):
    model = adapted(method, base).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients():
        model.zero_grad()
        compute(model, base).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    enable_checkpointing(model.get_base_model())
    for name, gradient in gradients().items():
        assert off(gradient, plain[name]) < 1e-5 * (1 + plain[name].abs().max())


@pytest.mark.parametrize(
    ("method", "base"),  # compiling takes long; SSF is one layer on all bases, and ConvPass reads the grid on all alike
    [
        (method, base)
        for method, base in pairs(OURS)
        if base == "vit" or (base in ("sam", "gpt2") and method not in ("ssf", "convpass"))
    ],
)
def test_compiles_without_a_graph_break(method, base):
    # Compiling takes as long for each further block: one is enough where all are alike.
    model = adapted(method, base, blocks=2 if method in TOKENS or base == "sam" else 1)
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert off(compute(compiled, base), compute(model, base)) < 1e-5


@OWN
def test_copies_and_pickles(method, base):
    model = adapted(method, base)
    expected = compute(model, base)
    assert torch.equal(compute(copy.deepcopy(model), base), expected)
    assert torch.equal(compute(pickle.loads(pickle.dumps(model)), base), expected)


@pytest.mark.parametrize(("method", "base"), [pair for pair in pairs(OURS) if pair[1] in ("vit", "gpt2")])
def test_hidden_states_and_attentions_keep_their_shape(method, base):
    plain, model = build(base), adapted(method, base)
    for each in (plain, model.get_base_model()):
        each.set_attn_implementation("eager")
    more = {"output_hidden_states": True, "output_attentions": True}
    ours, theirs = model(**batch(base), **more), plain(**batch(base), **more)
    assert [h.shape for h in ours.hidden_states] == [h.shape for h in theirs.hidden_states]
    assert [a.shape for a in ours.attentions] == [a.shape for a in theirs.attentions]
    assert off(ours.logits, model(**batch(base)).logits) < 1e-5


@pytest.mark.parametrize(("method", "base"), [pair for pair in pairs(OURS) if pair[1] in ("gpt2", "llama")])
def test_generates_the_same_with_and_without_a_cache(method, base):
    model = adapted(method, base)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**batch(base), **settings)
    assert torch.equal(cached, model.generate(**batch(base), **settings, use_cache=False))
    beams = model.generate(**batch(base), **settings, num_beams=2)
    assert torch.equal(beams, model.generate(**batch(base), **settings, num_beams=2, use_cache=False))


@pytest.mark.parametrize(("method", "base"), [pair for pair in pairs(OURS) if pair[1] in ("vit", "bert", "gpt2")])
def test_trainer_takes_three_steps(method, base, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = METHODS[method].adapt(build(base), 4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    if base == "vit":
        data = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 5} for i in range(12)]
    elif base == "bert":
        data = [{"input_ids": torch.randint(3, 100, (10,)), "labels": i % 2} for i in range(12)]
    else:
        data = [{"input_ids": (ids := torch.randint(3, 100, (10,))), "labels": ids} for _ in range(12)]
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    settings = TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=0.01, **quiet)
    Trainer(model, settings, train_dataset=data).train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", [m for m, base in pairs(OURS) if base == "vit"])
def test_works_on_an_8_bit_base(method):
    pytest.importorskip("bitsandbytes")
    from inlay import load_base

    model = load_base("builtin:vit-tiny", labels=["a", "b"], quantize="8bit")
    if method == "partial":
        with pytest.raises(InlayError, match='train="bias"'):
            METHODS[method].adapt(model, 4)
        return
    model = METHODS[method].adapt(model, 4)
    model(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)
    if method == "bottleneck-linear":
        with pytest.raises(InlayError, match="float32"):
            model.merge_adapter()


@pytest.mark.parametrize(("method", "base"), [pair for pair in pairs(OURS) if pair[1] not in ("vit", "resnet")])
def test_works_on_an_8_bit_text_model_and_on_sam(method, base, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    from inlay.bases.quantize import flatten_inputs

    flatten_inputs()  # as load_base does
    build(base).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "classifier"])
    model = type(build(base)).from_pretrained(tmp_path, quantization_config=config).eval()
    if method == "partial":
        with pytest.raises(InlayError, match='train="bias"'):
            METHODS[method].adapt(model, 4)
        return
    before = compute(model, base)
    model = METHODS[method].adapt(model, 4).eval()
    randomise(model, "default")
    after = compute(model, base)
    after.square().sum().backward()
    assert torch.isfinite(after).all() and off(after, before) > 1e-3
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(compute(model, base), before)


def test_two_processes_agree_with_one(forked, tmp_path):
    job = Path(__file__).with_name("two_processes.py")
    for process in [forked(job, rank, tmp_path) for rank in range(2)]:
        finish(process)


@pytest.mark.parametrize(("method", "name"), [("bottleneck", "INLAY_BOTTLENECK"), ("mam", "INLAY_COMPOSITE")])
def test_the_card_names_the_import_and_what_is_said_without_it(method, name, tmp_path):
    model = adapted(method, "vit")
    for _ in range(2):  # also where there is a card already
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import inlay") == card.count(f"without it: KeyError: {name!r}") == 1 and "PEFT" in card


def test_a_card_written_by_transformers_names_the_import_too(tmp_path):
    model = build("gpt2")
    model.add_adapter(METHODS["bottleneck"].config(model, 4))
    model.save_pretrained(tmp_path)
    assert "import inlay" in (tmp_path / "README.md").read_text()
    get_peft_model(build("gpt2"), METHODS["lora"].config(model, 4)).save_pretrained(tmp_path / "lora")
    assert "import inlay" not in (tmp_path / "lora" / "README.md").read_text()


@pytest.mark.parametrize(("method", "base"), [pair for pair in pairs(OURS) if pair[1] in ("bert", "gpt2")])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # as wanted here: the head alone
def test_a_head_is_trained_saved_and_loaded_with_it(method, base, tmp_path):
    model = build(base)
    config = METHODS[method].config(model, 4)
    config.modules_to_save = [head] = ["classifier" if base == "bert" else "lm_head"]
    model = get_peft_model(model, config).eval()
    assert any(head in n for n, p in model.named_parameters() if p.requires_grad)
    randomise(model, "default")
    expected = compute(model, base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(base), tmp_path).eval()
    assert off(compute(loaded, base), expected) < 1e-5
    with loaded.disable_adapter():
        assert torch.equal(compute(loaded, base), compute(build(base), base))


@pytest.mark.parametrize("method", [m for m, base in pairs(OURS + PEFTS) if base == "vit" and m != "pissa"])
def test_inlay_loads_it_on_its_base_alone(method, tmp_path):
    base = load_base("builtin:vit-tiny", labels=["a", "b"])
    model = METHODS[method].adapt(base, 4)
    randomise(model, "default")
    folder = save_adapter(model.eval(), tmp_path / "adapter", processor=load_processor("builtin:vit-tiny"))
    x = torch.randn(2, 3, 32, 32)
    assert off(load_adapter(folder).model(pixel_values=x).logits, model(pixel_values=x).logits) < 1e-4
    other = load_base("builtin:vit-tiny", labels=["a", "b"])
    torch.nn.init.normal_(other.vit.layers[0].mlp.fc1.weight)
    with pytest.raises(InlayError, match="other weights of the same shape"):
        load_adapter(folder, base=other)
    assert not any(isinstance(module, AdapterLayer) for module in other.modules())


def test_every_row_of_the_table_is_tested():
    others = {"probe", "full", "spatial"}  # nothing to attach; volumes have tests of their own
    assert set(METHODS) == {*OURS, *PEFTS, *PROMPTS, *others}
    elsewhere = {"volume", "diffusion"}  # test_spatial3d.py, test_diffusion.py
    assert set(KINDS.values()) | elsewhere == {kind for method in METHODS.values() for kind in method.bases}

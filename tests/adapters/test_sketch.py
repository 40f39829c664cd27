"""The fingerprint of a base, and the golden output: what rounding may do, and what other weights do."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from inlay import Bank, combine
from inlay.adapters import golden
from inlay.adapters.load import load_adapter
from inlay.adapters.save import save_adapter
from inlay.adapters.sketch import _weights, find_precision, sketch
from inlay.adapters.sketch_distance import TOLERANCE, explain_difference, measure_distance
from inlay.bases.processors import load_processor
from inlay.bases.sites import head_modules, lora_targets
from inlay.errors import InlayError, WrongBase
from inlay.tasks import TASKS
from inlay.tasks.base import load_base
from inlay.tasks.golden import golden_image
from places import SHARED

MOBILENET = SHARED / "mobilenet_imagenet/hf/mobilenet_v2_1.0_224"
FORMS = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "8bit"},
    "nf4": {"quantize": "4bit"},
    "nf4 with bfloat16": {"quantize": "4bit", "dtype": "bfloat16"},
}
LABELS = ["cat", "dog", "emu", "fox", "gnu"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base whose layers are all held in NF4, their sizes being multiples of 64."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8,
        num_labels=5, initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("wide")
    ViTForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["builtin:vit-tiny", "wide", "mobilenet"])
def name(request, wide):
    if request.param == "mobilenet" and not MOBILENET.is_dir():
        pytest.skip(f"no pre-trained MobileNetV2 at {MOBILENET}")
    return {"wide": str(wide), "mobilenet": str(MOBILENET)}.get(request.param, request.param)


@pytest.fixture(scope="module")
def stored(name):
    base = load_base(name)
    return base, sketch(base)


def changed(base, relative, seed):
    """A copy, each weight matrix moved by noise of that size; infinite: drawn anew."""
    generator, base = torch.Generator().manual_seed(seed), copy.deepcopy(base)
    with torch.no_grad():
        for _, module in _weights(base):
            weight = module.weight
            noise = torch.randn(weight.shape, generator=generator) * weight.norm() / weight.numel() ** 0.5
            weight.copy_(noise if relative == float("inf") else weight + relative * noise)
    return base


@pytest.mark.parametrize("form", FORMS)
def test_the_right_base_passes_in_every_form(form, name, stored):
    if "quantize" in FORMS[form]:
        pytest.importorskip("bitsandbytes")
        if name == str(MOBILENET):
            pytest.skip("a MobileNet has no linear layer to quantise")
    base = load_base(name, **FORMS[form])
    assert find_precision(base) == form.split()[0]
    for _ in range(2):  # before the first forward and after it: quantised layers may change their form
        assert measure_distance(stored[1], sketch(base)) < 0.5 * TOLERANCE[form.split()[0]]
        golden.compute_output(base, processor_of(name), TASKS["image-classification"])


def processor_of(name):
    return load_processor(name if name == str(MOBILENET) else "builtin:vit-tiny")


@pytest.mark.parametrize("relative", [0.02, float("inf")])
def test_other_weights_fail_in_fp32_and_bf16(relative, stored):
    for seed in range(4):
        other = changed(stored[0], relative, seed)
        for form in ("float32", "bfloat16"):
            assert measure_distance(stored[1], sketch(other.to(getattr(torch, form)))) > 1.5 * TOLERANCE[form]


def test_scaled_weights_fail(stored):
    scaled = copy.deepcopy(stored[0])
    with torch.no_grad():
        for _, module in _weights(scaled):
            module.weight *= 1.02
    assert measure_distance(stored[1], sketch(scaled)) == pytest.approx(0.02, abs=1e-3)


def test_a_base_drawn_anew_fails_in_every_form(stored):
    assert (
        min(measure_distance(stored[1], sketch(changed(stored[0], float("inf"), seed))) for seed in range(4)) > 4 * 0.25
    )


def test_the_adapter_and_the_head_do_not_count(make):
    base = load_base("builtin:vit-tiny")
    stored = {"precision": "float32", "sketch": sketch(base)}
    same = load_base("builtin:vit-tiny")
    for model in (make(), make(same, modules_to_save=None, target_modules=["fc1"]), make(bias="all")):
        found = sketch(model)
        assert measure_distance(stored["sketch"], found) == 0
        assert not explain_difference(stored, {"precision": "float32", "sketch": found})


def move_leaf(name):
    """A function that moves one tensor of a base by a tenth of its size, or by a tenth where it is zero."""

    def move(base):
        tensor = {**dict(base.named_parameters()), **dict(base.named_buffers())}[name]
        with torch.no_grad():
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)) / 10
            tensor += noise.to(tensor) * (tensor.abs().mean() or 1)

    return move


OUTSIDE_THE_MATRICES = [
    "vit.layers.2.mlp.fc1.bias",
    "vit.layers.0.layernorm_before.weight",
    "vit.embeddings.cls_token",
    "vit.embeddings.position_embeddings",
    "vit.layernorm.bias",
]


@pytest.mark.parametrize("leaf", OUTSIDE_THE_MATRICES)
@pytest.mark.parametrize("form", [{"dtype": "bfloat16"}, {"quantize": "8bit"}, {"quantize": "4bit"}])
def test_a_base_that_differs_outside_its_matrices_is_refused(leaf, form, original, tmp_path):
    if "quantize" in form:
        pytest.importorskip("bitsandbytes")
    other = load_base("builtin:vit-tiny", labels=LABELS)
    move_leaf(leaf)(other)
    other.save_pretrained(tmp_path / "other")
    load_processor("builtin:vit-tiny").save_pretrained(tmp_path / "other")
    with pytest.raises(WrongBase, match=r"1 of \d+ tensors next to the matrices differ"):
        load_adapter(original[1], tmp_path / "other", **form)
    bank = Bank(tmp_path / "other", check_golden=False)
    with pytest.raises(WrongBase, match="tensors next to the matrices differ"):
        bank.add(original[1])


def test_adapters_of_bases_that_differ_outside_their_matrices_are_not_combined(original, make, processor, tmp_path):
    other = load_base("builtin:vit-tiny", labels=LABELS)
    move_leaf("vit.layers.2.mlp.fc1.bias")(other)
    folder = save_adapter(make(other, seed=1), tmp_path / "b", processor=processor)
    with pytest.raises(WrongBase, match="which has other weights"):
        combine({original[1]: 1.0, folder: 1.0}, out=tmp_path / "c")


def test_running_statistics_count():
    torch.manual_seed(0)
    base = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).eval()
    stored = {"precision": "float32", "sketch": sketch(base)}
    for statistic in ("running_mean", "running_var"):
        moved = copy.deepcopy(base)
        move_leaf(f"resnet.encoder.stages.1.layers.0.layer.0.normalization.{statistic}")(moved)
        assert explain_difference(stored, {"precision": "bfloat16", "sketch": sketch(moved)}).startswith("1 of ")


def test_matrices_between_the_sketched_ones_and_their_far_rows_count():
    """70 matrices, of which 64 are among the values, and an embedding of 5,000 rows, of which 4,096 are."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=8, n_head=2, n_layer=17, vocab_size=5000, n_positions=8, bos_token_id=0, eos_token_id=0)
    base = GPT2LMHeadModel(config).eval()
    stored = {"precision": "float32", "sketch": sketch(base)}
    assert stored["sketch"]["weights"] == 70
    for _, module in _weights(base):
        weight, kept = module.weight, module.weight.detach().clone()
        with torch.no_grad():
            weight[-1] += 0.5 * weight.std()
        assert explain_difference(stored, {"precision": "float32", "sketch": sketch(base)})
        weight.data.copy_(kept)


def test_what_a_base_keeps_of_the_last_text_does_not_count():
    """A dynamic rotary embedding changes its frequencies with the length of a text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    before = sketch(base)
    with torch.no_grad():
        base(torch.arange(30)[None])
    assert sketch(base) == before


def test_a_file_without_the_rest_of_a_sketch_loads(zoo, rewrite):
    rewrite(zoo, record=lambda record: record["base"]["sketch"].pop("rest"))
    assert load_adapter(zoo).verified


def test_a_base_of_another_structure_is_far():
    base = load_base("builtin:vit-tiny")
    short = copy.deepcopy(base)
    del short.vit.layers[3:]
    assert measure_distance(sketch(base), sketch(short)) == float("inf")


def test_a_sketch_needs_weights_and_a_known_form():
    model = ViTForImageClassification(
        ViTConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    for _, module in list(_weights(model)):
        del module.weight
    with pytest.raises(InlayError, match="has no weight matrix to recognise it by"):
        sketch(model)
    strange = load_base("builtin:vit-tiny").to(torch.float8_e4m3fn)
    with pytest.raises(InlayError, match=r"is held in float8_e4m3fn; load it in one of float32, "):
        find_precision(strange)


# the golden output


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_loads_on_its_base_in_every_form(form, original, outputs):
    if "quantize" in FORMS[form]:
        pytest.importorskip("bitsandbytes")
    loaded = load_adapter(original[1], **FORMS[form])
    assert loaded.deviation < (1e-4 if form == "float32" else 0.7 * golden.TOLERANCE[form.split()[0]])
    torch.testing.assert_close(outputs(loaded.model), outputs(original[0]), rtol=0, atol=loaded.deviation * 10 + 1e-6)


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_an_adapter_of_a_quantised_base_loads_on_it_and_on_the_whole_one(quantize, make, processor, outputs, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = make(load_base("builtin:vit-tiny", labels=LABELS, quantize=quantize))
    outputs(model)
    folder = save_adapter(model, tmp_path / "zoo", processor=processor)
    loaded = load_adapter(folder, quantize=quantize)
    torch.testing.assert_close(outputs(loaded.model), outputs(model))
    assert loaded.file.record["base"]["precision"] == {"8bit": "int8", "4bit": "nf4"}[quantize]
    assert load_adapter(folder).deviation < 0.7 * golden.TOLERANCE[find_precision(model)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_of_a_base_in_half_precision(dtype, make, processor, outputs, tmp_path):
    model = make(load_base("builtin:vit-tiny", labels=LABELS, dtype=dtype))
    folder = save_adapter(model, tmp_path / "zoo", processor=processor)
    torch.testing.assert_close(outputs(load_adapter(folder, dtype=dtype).model), outputs(model))
    assert load_adapter(folder).verified


def test_a_norm_that_differs_is_found_by_the_sketch(original, five):
    with torch.no_grad():
        five.vit.layernorm.weight *= 1.05
    with pytest.raises(InlayError, match=r"1 of .* tensors next to the matrices differ"):
        load_adapter(original[1], base=five)


def test_a_changed_alpha_is_found_twice(zoo, rewrite):
    rewrite(zoo, config=lambda config: config.update(lora_alpha=9))
    with pytest.raises(InlayError, match=r"its output differs by .*: its config or its base was changed"):
        load_adapter(zoo)
    path = zoo / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 9', '"lora_alpha": 10'))
    with pytest.raises(InlayError, match="is not what was saved with the weights"):
        load_adapter(zoo, quantize="4bit")


def round_to_tf32(x):
    """Ten bits of mantissa, to the nearest even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def compute_in_tf32(model):
    """The model with its convolutions as a GPU computes them by default; but depth-wise ones, which it does not."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups == 1:
            module.forward = lambda x, m=module: m._conv_forward(round_to_tf32(x), round_to_tf32(m.weight), m.bias)
    return model


@pytest.mark.skipif(not MOBILENET.is_dir(), reason=f"no pre-trained MobileNets at {MOBILENET.parent}")
@pytest.mark.parametrize("kind", ["mobilenet_v1_0.25_128", "mobilenet_v2_1.0_224"])
@pytest.mark.parametrize("scale", [0.1, 0.3])
def test_a_convolutional_adapter_of_a_gpu_loads_on_a_cpu(kind, scale, tmp_path):
    base = str(MOBILENET.parent / kind)
    model = load_base(base, labels=LABELS)
    torch.manual_seed(1)
    settings = LoraConfig(
        r=4, target_modules=lora_targets(model), modules_to_save=head_modules(model), init_lora_weights=False
    )
    model = get_peft_model(model, settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(scale if "lora_" in name else 1)
    folder = save_adapter(compute_in_tf32(model), tmp_path / "a", processor=load_processor(base))
    assert 0.0005 < load_adapter(folder).deviation < 0.01


def test_a_transformer_keeps_its_sharp_tolerance():
    assert golden.allow_deviation(["float32"], 6) == golden.TOLERANCE["float32"]
    assert golden.allow_deviation(["float32"], 52) == 0.02
    assert golden.allow_deviation(["bfloat16", "float32"], 52) == golden.TOLERANCE["bfloat16"]


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_the_golden_output_is_computed_in_full_float32(allowed, stored, name):
    """Whatever a process allows: TF32 for convolutions is torch's default on a GPU."""
    seen, conv = [], next(m for m in stored[0].modules() if isinstance(m, torch.nn.Conv2d))
    switches = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.conv]
    hook = conv.register_forward_hook(lambda *_: seen.extend(switch.fp32_precision for switch in switches))
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision(allowed)
        golden.compute_output(stored[0], processor_of(name), TASKS["image-classification"])
        assert seen == ["ieee"] * 3
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (allowed, before[1])
    finally:
        hook.remove()
        torch.set_float32_matmul_precision(before[0])


def test_deviation_is_relative_and_never_trusts_nan():
    assert golden.measure_deviation([1.0, -4.0], [1.0, -4.2]) == pytest.approx(0.05)
    assert golden.measure_deviation([1.0], [1.0, 2.0]) == float("inf")
    assert (
        golden.measure_deviation([1.0], [float("nan")])
        == golden.measure_deviation([float("nan")], [1.0])
        == float("inf")
    )


def test_the_golden_image_has_structure():
    picture = golden_image()
    assert picture.size == (64, 64) and picture.mode == "RGB"
    assert all(low == 0 and high == 255 for low, high in picture.getextrema())


def test_head_modules_are_what_the_sketch_leaves_out():
    base = load_base("builtin:vit-tiny")
    assert head_modules(base) == ["classifier"]
    assert not any(name.startswith("classifier") for name, _ in _weights(base))

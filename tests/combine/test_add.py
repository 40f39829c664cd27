"""The exact sum, of every method: against a reference in float64, and against what the adapters do together."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from combine.cases import LINEAR, Convolutions, load, lora, off, partial, same_outputs, save, updates, wide
from inlay import (
    ConvAdapterConfig,
    ConvPassConfig,
    InlayError,
    PartialConfig,
    SsfConfig,
    TextProcessor,
    VisualPromptConfig,
    combine,
    load_adapter,
    load_base,
    load_tokenizer,
    merge,
    save_adapter,
)
from inlay.files.tensor_header import DIGEST, read_header, sign
from inlay.methods import METHODS
from methods.bases import KINDS, batch, build, randomise

WEIGHTS = [(1.0, 1.0), (0.7, -1.3), (1.0, 0.0)]


LORAS = {
    "plain": (lora(), lora(r=2, lora_alpha=3)),
    "rslora": (lora(use_rslora=True), lora(r=7, use_rslora=True, lora_alpha=5)),
    "mixed scales": (lora(use_rslora=True), lora(r=2)),
    "other modules": (lora(target_modules=["q_proj", "fc1"]), lora(target_modules=["q_proj", "o_proj"], r=3)),
    "patterns": (
        lora(rank_pattern={"layers.1.attention.q_proj": 9, "fc1": 2}, alpha_pattern={"layers.1.attention.q_proj": 5}),
        lora(rank_pattern={"layers.0.mlp.fc1": 1}, use_rslora=True),
    ),
    "lora_bias": (lora(lora_bias=True), lora(r=2)),
    "both biased": (lora(lora_bias=True), lora(lora_bias=True, use_rslora=True)),
    "some blocks": (
        lora(layers_to_transform=[0, 1], layers_pattern="layers"),
        lora(target_modules=r".*layers\.2.*q_proj"),
    ),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("case", LORAS)
def test_lora_adds_exactly_and_peft_loads_it(case, weights, tmp_path):
    a, b = (save(tmp_path / n, "vit", config, seed) for n, config, seed in zip("ab", LORAS[case], (3, 4), strict=True))
    made = combine({a: weights[0], b: weights[1]}, out=tmp_path / "out")
    wanted = {}
    for folder, weight in ((a, weights[0]), (b, weights[1])):
        for site, delta in updates(folder).items():
            wanted[site] = wanted.get(site, 0) + weight * delta
    assert off(updates(tmp_path / "out"), wanted) < 1e-6 and made.error == 0
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and not config["use_rslora"]
    # as peft computes with both, each scaled by its weight
    base, together = build("vit").double(), load("vit", tmp_path / "out").double()
    with torch.no_grad():
        for site, delta in wanted.items():
            module = base.get_submodule(site.removesuffix(".bias"))
            (module.bias if site.endswith(".bias") else module.weight).add_(
                delta.view_as(module.bias if site.endswith(".bias") else module.weight)
            )
        pixels = batch("vit")["pixel_values"].double()
        assert torch.allclose(together(pixel_values=pixels).logits, base(pixel_values=pixels).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_convolutions_groups_and_embeddings_add_exactly(weights, tmp_path):
    configs = [LoraConfig(r=r, lora_alpha=5, target_modules=["table", "conv", "grouped"]) for r in (2, 4)]
    a, b = (save(tmp_path / n, Convolutions, c, s) for n, c, s in zip("ab", configs, (3, 4), strict=True))
    combine({a: weights[0], b: weights[1]}, out=tmp_path / "out")
    first, second = updates(a), updates(b)
    assert len(first) == 3
    wanted = {site: weights[0] * first[site] + weights[1] * second[site] for site in first}
    assert off(updates(tmp_path / "out"), wanted) < 1e-6
    model = load(Convolutions, tmp_path / "out").double()
    base, ids = Convolutions().double(), torch.arange(2 * 5 * 4).view(2, 5, 4) % 20
    x = base.table(ids) + F.embedding(ids, wanted["table"].T.contiguous())
    x = x.movedim(-1, 1)
    x = base.conv(x) + F.conv2d(x, wanted["conv"].view(12, 8, 3, 3), padding=1)
    # peft's A of a convolution in groups sees all channels, its B the ranks of its group
    y = base.grouped(x) + F.conv2d(x, wanted["grouped"].view(6, 12, 3, 3), padding=1)
    assert torch.allclose(model(ids), y, atol=1e-5)


def together(base, folders):
    """A model with several adapters active at once, as inlay's methods add them."""
    model = PeftModel.from_pretrained(build(base), str(folders[0]), adapter_name="n0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), adapter_name=f"n{i}")
    model.base_model.set_adapter([f"n{i}" for i in range(len(folders))])
    return model.eval()


OTHERS = (
    *("bottleneck", "bottleneck-mlp", "bottleneck-parallel", "bottleneck-linear", "adapter-plus", "attention-prefix"),
    *("ssf", "convpass", "visual-prompt", "visual-prompt-shallow", "partial", "bias", "norm", "mam", "lora-prompt"),
)
# Of convolutional networks tests/methods/test_convolutions.py has all methods.
PAIRS = [(method, base) for method in OTHERS for base in ("vit", "gpt2", "sam") if KINDS[base] in METHODS[method].bases]


@pytest.mark.parametrize(("method", "base"), [*PAIRS, ("conv-adapter", "resnet")])
def test_other_methods_add_to_what_they_do_together(method, base, tmp_path):
    configs = [METHODS[method].config(build(base), width) for width in (4, 3)]
    a, b = (save(tmp_path / n, base, c, s) for n, c, s in zip("ab", configs, (3, 4), strict=True))
    made = combine({a: 1.0, b: 1.0}, out=tmp_path / "out")
    assert made.error == 0
    with torch.no_grad():
        assert same_outputs(base, load(base, tmp_path / "out"), together(base, [a, b]))
        alone = combine({a: 1.0}, out=tmp_path / "alone")
        assert alone.error == 0 and same_outputs(base, load(base, tmp_path / "alone"), load(base, a))
        combine({a: 1.0, b: 0.0}, out=tmp_path / "zero")
        assert same_outputs(base, load(base, tmp_path / "zero"), load(base, a))


def what_it_adds(model, base, site):
    """What the adapter at a module adds to its output, in a forward of the whole model."""
    seen = {}

    def note(module, args, kwargs, output):
        plain = module.base_layer(*args, **kwargs)
        first = [value[0] if isinstance(value, tuple) else value for value in (output, plain)]
        seen["added"] = first[0] - first[1]

    wrapped = model.double().get_base_model().get_submodule(site)
    handle = wrapped.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**{k: v.double() for k, v in batch(base).items()})
    handle.remove()
    return seen["added"]


@pytest.mark.parametrize(
    ("base", "site", "configs"),
    [
        ("vit", "vit.layers.0.attention", [ConvPassConfig(width=3, scale=0.5), ConvPassConfig(width=5)]),
        ("vit", "vit.layers.0.attention", [ConvPassConfig(width=3), ConvPassConfig(width=2, sites=["attention"])]),
        ("sam", "vision_encoder.layers.0.attn", [ConvPassConfig(width=3), ConvPassConfig(width=2, scale=-2.0)]),
        ("resnet", "resnet.encoder.stages.0.layers.0.layer.1.convolution", [
            ConvAdapterConfig(width=6), ConvAdapterConfig(width=4)]),
        ("resnet", "resnet.encoder.stages.1.layers.0.layer.1.convolution", [
            ConvAdapterConfig(width=8, groups=2, layers_to_transform=[1]),
            ConvAdapterConfig(width=3, layers_to_transform=[1, 2])]),
        ("resnet", "resnet.encoder.stages.0.layers.0", [
            ConvAdapterConfig(placement="residual_parallel"),
            ConvAdapterConfig(width=5, placement="residual_parallel")]),
    ],
)  # fmt: skip
def test_bypasses_and_conv_adapters_of_any_width_and_weight_add_exactly(base, site, configs, tmp_path):
    weights = (0.7, -1.3)
    a, b = (save(tmp_path / n, base, c, s) for n, c, s in zip("ab", configs, (3, 4), strict=True))
    made = combine({a: weights[0], b: weights[1]}, out=tmp_path / "out")
    assert made.error == 0 and load_file(tmp_path / "out/adapter_model.safetensors")
    # The module is the first that an adapter wraps, so that it reads the same in all three models.
    first, second, found = (what_it_adds(load(base, folder), base, site) for folder in (a, b, tmp_path / "out"))
    wanted = weights[0] * first + weights[1] * second
    assert first.norm() > 1e-3 and (found - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("base", ["vit", "resnet"])
def test_what_ssf_changes_in_weights_and_biases_adds(base, tmp_path):
    weights = (0.7, -1.3)
    a, b = (save(tmp_path / n, base, SsfConfig(), s) for n, s in zip("ab", (3, 4), strict=True))
    combine({a: weights[0], b: weights[1]}, out=tmp_path / "out")
    plain = dict(build(base).double().named_parameters())
    changes = []
    for folder in (a, b, tmp_path / "out"):
        merged = load(base, folder).double().merge_and_unload()
        changes.append({name: value - plain[name] for name, value in merged.named_parameters()})
    assert sum(bool(delta.any()) for delta in changes[0].values()) > 20
    for name, found in changes[2].items():
        wanted = weights[0] * changes[0][name] + weights[1] * changes[1][name]
        assert (found - wanted).abs().max() < 1e-6, name


def test_rules_work_on_ssf_as_a_difference(tmp_path):
    a, b = (save(tmp_path / n, "vit", SsfConfig(), s) for n, s in zip("ab", (3, 4), strict=True))
    combine({a: 1.0, b: 1.0}, "ties", density=0.3, out=tmp_path / "out")
    first, second, found = (load_file(f / "adapter_model.safetensors") for f in (a, b, tmp_path / "out"))
    for key, value in found.items():
        start = 1.0 if key.endswith("scale") else 0.0
        wanted = merge_utils.ties([first[key] - start, second[key] - start], torch.ones(2), density=0.3) + start
        assert torch.allclose(value, wanted, atol=1e-6)
    with pytest.raises(InlayError, match="works on the factors of low-rank updates; use ties for SSF"):
        combine({a: 1.0, b: 1.0}, "knots", out=tmp_path / "knots")


@pytest.mark.parametrize(
    ("base", "configs", "reason"),
    [
        ("vit", [ConvPassConfig(), ConvPassConfig(activation="gelu")], "bypasses with different settings"),
        (
            "resnet",
            [ConvAdapterConfig(), ConvAdapterConfig(activation="gelu")],
            "Conv-Adapters with different settings",
        ),
        ("resnet", [ConvAdapterConfig(), ConvAdapterConfig(placement="conv_sequential")], "read other maps"),
    ],
)
def test_bypasses_and_conv_adapters_that_do_not_add_are_refused(base, configs, reason, tmp_path):
    a, b = (save(tmp_path / n, base, c, s) for n, c, s in zip("ab", configs, (3, 4), strict=True))
    with pytest.raises(InlayError, match=reason):
        combine({a: 1.0, b: 1.0}, out=tmp_path / "out")
    with pytest.raises(InlayError, match="none can go; leave width out"):
        combine({a: 1.0}, width=2, out=tmp_path / "out")


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_prompts_of_peft_are_united(method, tmp_path):
    configs = [METHODS[method].config(build("gpt2"), width) for width in (4, 3)]
    a, b = (save(tmp_path / n, "gpt2", c, s) for n, c, s in zip("ab", configs, (3, 4), strict=True))
    made = combine({a: 1, b: 1}, out=tmp_path / "out")
    tables = [load_file(f / "adapter_model.safetensors")["prompt_embeddings"] for f in (a, b, tmp_path / "out")]
    assert torch.equal(tables[2], torch.cat(tables[:2])) and made.widths == {f"{method.upper()}_TUNING": 7}
    assert load("gpt2", tmp_path / "out")(**batch("gpt2")).logits.isfinite().all()
    with pytest.raises(InlayError, match="no multiple: the weight of 'b' must be 1 or 0"):
        combine({a: 1, b: 0.5}, out=tmp_path / "half")
    assert not (tmp_path / "half").exists()


BOTTLENECKS = {
    "scales": (wide(scale=3.0), wide(width=7, learn_scale=True, scale=0.3), (0.5, -2.0)),
    "norm before": (wide(layer_norm="before"), wide(width=2, layer_norm="before"), (1.5, -0.5)),
    "other sites": (wide(sites=["mlp"]), wide(width=6), (1.0, 1.0)),
    "gelu": (wide(activation="gelu"), wide(activation="gelu", width=1), (-1.0, 2.0)),
    "linear": (wide(activation=None), wide(activation=None, width=2), (0.3, 0.3)),
    "scales by channel": (wide(channel_scale=True, scale=0.7), wide(learn_scale=True, width=3), (0.5, -2.0)),
    "behind the block": (wide(placement="post", channel_scale=True), wide(placement="post", width=2), (1.5, -0.5)),
}


@pytest.mark.parametrize("case", BOTTLENECKS)
def test_weights_of_bottlenecks_go_into_their_way_out(case, tmp_path):
    *configs, weights = BOTTLENECKS[case]
    a, b = (save(tmp_path / n, "vit", c, s) for n, c, s in zip("ab", configs, (3, 4), strict=True))
    combine({a: weights[0], b: weights[1]}, out=tmp_path / "out")
    model, both = load("vit", tmp_path / "out"), together("vit", [a, b]).double()
    for module in both.modules():
        for i, weight in enumerate(weights):
            if hasattr(module, "inlay_bottleneck_weight") and f"n{i}" in module.options:
                own = copy.copy(module.options[f"n{i}"])
                own.scale, own.learn_scale = weight * own.scale, own.learn_scale
                module.options[f"n{i}"] = own
                if f"n{i}" in module.inlay_bottleneck_scale:
                    module.inlay_bottleneck_scale[f"n{i}"].data.mul_(weight)
    with torch.no_grad():
        assert same_outputs("vit", model, both)


def test_what_breaks_the_sum_is_refused_with_the_reason(tmp_path):
    def saved(name, config, base="vit"):
        return save(tmp_path / name, base, config, len(name))

    relu, gelu = saved("relu", wide()), saved("gelu", wide(activation="gelu"))
    after, other = (
        saved("after", wide(layer_norm="after", channel_scale=True)),
        saved("after2", wide(layer_norm="after")),
    )
    dora, plain = saved("dora", lora(use_dora=True)), saved("plain", lora())
    biases = saved("biases", lora(bias="lora_only"))
    loha = saved("loha", LoHaConfig(r=2, target_modules=LINEAR))
    text = saved("text", METHODS["bottleneck"].config(build("gpt2"), 4), "gpt2")
    prompt = saved("prompt", METHODS["prompt"].config(build("gpt2"), 4), "gpt2")
    for given, reason in [
        ([relu, gelu], "activation is 'relu' in relu, 'gelu' in gelu; the units would be one layer"),
        ([after, other], "the norm of a sum is no sum of norms"),
        ([dora], "a DoRA, whose magnitudes depend on the base's weights"),
        ([biases], "biases of the base"),
        ([loha, plain], "LOHA, which is no sum over a width"),
        ([prompt, text], "cannot be one adapter"),
    ]:
        with pytest.raises(InlayError, match=reason):
            combine(dict.fromkeys(given, 1.0), out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
    combine({after: -2.0}, out=tmp_path / "one")  # by itself it has a multiple
    model, alone = load("vit", tmp_path / "one"), load("vit", after)
    for module in alone.modules():
        for parameter in module.inlay_bottleneck_norm.parameters() if hasattr(module, "inlay_bottleneck_norm") else ():
            parameter.data.mul_(-2)
    with torch.no_grad():
        assert same_outputs("vit", model, alone)


def test_ia3_adds_as_differences_of_the_weights(tmp_path):
    configs = [METHODS["ia3"].config(build("vit"), 0) for _ in range(2)]
    a, b = (save(tmp_path / n, "vit", c, s) for n, c, s in zip("ab", configs, (3, 4), strict=True))
    combine({a: 2.0, b: -0.5}, out=tmp_path / "out")
    merged = [load("vit", folder).double().merge_and_unload() for folder in (a, b, tmp_path / "out")]
    base = build("vit").double().state_dict()
    for key, value in merged[2].state_dict().items():
        wanted = (
            base[key] + 2 * (merged[0].state_dict()[key] - base[key]) - 0.5 * (merged[1].state_dict()[key] - base[key])
        )
        assert torch.allclose(value, wanted, atol=1e-6)


def test_methods_stand_beside_one_another_in_a_composite(tmp_path):
    model = build("vit")
    a = save(tmp_path / "a", "vit", METHODS["mam"].config(model, 4), 3)
    b = save(tmp_path / "b", "vit", lora(), 4)
    c = save(tmp_path / "c", "vit", partial(train="bias"), 5)
    combine({b: 1.0, c: 1.0}, out=tmp_path / "out")
    base, loaded = load("vit", b).merge_and_unload(), load("vit", tmp_path / "out")
    for key, delta in load_file(c / "adapter_model.safetensors").items():
        site, leaf = key.removeprefix("base_model.model.").split(".inlay_partial_delta.")
        getattr(base.get_submodule(site), leaf).data.add_(delta)
    with torch.no_grad():
        assert same_outputs("vit", loaded, base, 1e-5)
    made = combine({a: 1.0, b: 1.0, c: 1.0}, out=tmp_path / "four")
    assert set(made.widths) == {"INLAY_ATTENTION_PREFIX", "INLAY_BOTTLENECK", "LORA"}
    assert load("vit", tmp_path / "four")(**batch("vit")).logits.isfinite().all()


def test_partial_deltas_add_with_their_weights(tmp_path):
    a, b = (save(tmp_path / n, "vit", partial(last=k), s) for n, k, s in (("a", 1, 3), ("b", 2, 4)))
    combine({a: -0.5, b: 3.0}, out=tmp_path / "out")
    first, second, found = (load_file(f / "adapter_model.safetensors") for f in (a, b, tmp_path / "out"))
    assert found.keys() == first.keys() | second.keys()
    for key, value in found.items():
        wanted = sum(w * d[key].double() for w, d in ((-0.5, first), (3.0, second)) if key in d)
        assert (value.double() - wanted).norm() <= 1e-6 * wanted.norm()
    assert load("vit", tmp_path / "out")(**batch("vit")).logits.isfinite().all()


def test_types_of_half_precision_are_read_as_they_are(tmp_path):
    a, b = (save(tmp_path / n, "vit", lora(), s) for n, s in (("a", 3), ("b", 4)))
    for folder, kind in ((a, torch.float16), (b, torch.bfloat16)):
        weights = {k: v.to(kind) for k, v in load_file(folder / "adapter_model.safetensors").items()}
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    combine({a: 1.0, b: -1.0}, out=tmp_path / "out")
    first, second = updates(a), updates(b)
    assert off(updates(tmp_path / "out"), {k: first[k] - second[k] for k in first}) < 1e-6


def test_nan_is_refused_and_the_old_result_stays(tmp_path):
    a, b = (save(tmp_path / n, "vit", lora(), s) for n, s in (("a", 3), ("b", 4)))
    combine({a: 1.0}, out=tmp_path / "out")
    before = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    weights = load_file(b / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, b / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(InlayError, match="NaN or Inf"):
        combine({a: 1.0, b: 1.0}, out=tmp_path / "out")
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "out"]
    with pytest.raises(InlayError, match="finite number, not nan"):
        combine({a: float("nan")}, out=tmp_path / "out")
    with pytest.raises(InlayError, match="one of the adapters"):
        combine({a: 1.0}, out=a)


@pytest.mark.parametrize("weight", [1.0, 0.0])  # of weight 0 no tensor is read
def test_a_damaged_adapter_is_refused_and_a_result_has_its_checksum(weight, tmp_path):
    a, b = (save(tmp_path / n, "vit", lora(), s) for n, s in (("a", 3), ("b", 4)))
    for folder in (a, b):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(sign(path.read_bytes()))
    combine({a: 1.0, b: weight}, out=tmp_path / "out")
    assert DIGEST in read_header(tmp_path / "out/adapter_model.safetensors")["__metadata__"]
    data = bytearray((b / "adapter_model.safetensors").read_bytes())
    data[-9] ^= 1
    (b / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(InlayError, match="does not match the checksum stored in it"):
        combine({a: 1.0, b: weight}, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_result_is_checked_before_it_is_written(tmp_path, monkeypatch):
    from inlay.combine import lora as module

    a, b = (save(tmp_path / n, "vit", lora(), s) for n, s in (("a", 3), ("b", 4)))
    right = module.LoraSum.check
    monkeypatch.setattr(
        module.LoraSum,
        "check",
        lambda self, site, found, wanted, scale=None: right(self, site, found * 1.01, wanted, scale),
    )
    with pytest.raises(InlayError, match="does not pass its check"):
        combine({a: 1.0, b: 1.0}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rule", ["add", "ties", "magnitude", "dare"])
def test_differences_that_are_no_numbers_are_refused(rule, tmp_path):
    a, b = (save(tmp_path / n, "vit", partial(), s) for n, s in (("a", 3), ("b", 4)))
    weights = load_file(b / "adapter_model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, b / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(InlayError, match=r"does not pass its check at .*NaN or Inf"):
        combine({a: 1.0, b: 1.0}, rule, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_sum_of_differences_is_checked_against_the_parts_and_not_against_itself(tmp_path, monkeypatch):
    from inlay.combine import partial as sums

    a, b = (save(tmp_path / n, "vit", partial(), s) for n, s in (("a", 3), ("b", 4)))
    seen, calls = sums._sum_entries, []

    def once_off(delta):
        """As it is for both parts; of their sum as if an entry had got lost."""
        calls.append(delta)
        return seen(delta) * (1.5 if len(calls) == 3 else 1.0)

    monkeypatch.setattr(sums, "_sum_entries", once_off)
    with pytest.raises(InlayError, match="does not pass its check"):
        combine({a: 1.0, b: 1.0}, out=tmp_path / "out")
    assert len(calls) == 3 and not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:overflow encountered")  # what the check must find
def test_a_sum_beyond_float32_is_refused(tmp_path):
    folders = [save(tmp_path / n, "vit", partial(), 3) for n in "ab"]
    for folder in folders:
        weights = load_file(folder / "adapter_model.safetensors")
        next(iter(weights.values())).view(-1)[0] = 3e38
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(InlayError, match="NaN or Inf"):
        combine(dict.fromkeys(folders, 1.0), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adding_is_the_same_verb_as_a_package_and_as_a_function():
    import inlay
    import inlay.combine.norms

    assert inlay.combine is not None and callable(inlay.combine) and np.isfinite(inlay.combine.norms.norm(np.ones(3)))


@pytest.mark.parametrize(
    ("config", "change", "reason"),
    [
        ({}, lambda w, k: w.pop(k), "lacks vit"),
        ({}, lambda w, k: w.update({k: torch.zeros(3)}), "which have no product"),
        ({}, lambda w, k: w.update({k: torch.zeros(0, 32)}), "which have no product"),
        ({}, lambda w, k: w.update({k: torch.zeros(4, 32, dtype=torch.int64)}), "only floating-point ones add"),
        ({}, lambda w, k: w.update({"base_model.model.vit.cls_token": torch.zeros(2)}), "neither to its method"),
        ({"lora_alpha": "much"}, None, "do not fit their tensors"),
        ({"lora_alpha": float("inf")}, None, "lora_alpha = inf, which is not a number"),
        ({"alpha_pattern": {"(": 3}}, None, "do not fit their tensors"),
        ({"alpha_pattern": [1]}, None, "do not fit their tensors"),
        ({"parts": [1]}, None, "parts or modules_to_save of a wrong kind"),
        ({"modules_to_save": 3}, None, "parts or modules_to_save of a wrong kind"),
        ({"init_lora_weights": "pissa"}, None, "changes the base"),
        ({"use_qalora": True}, None, r"kind of LoRA that does not add as B·A does \(use_qalora\)"),
    ],
)
def test_damaged_adapters_are_one_sentence(config, change, reason, tmp_path):
    folder = save(tmp_path / "a", "vit", lora(), 3)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    weights = load_file(folder / "adapter_model.safetensors")
    if change:
        change(weights, next(key for key in weights if "lora_A" in key))
        save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(InlayError, match=reason):
        combine({folder: 1.0}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Nested(nn.Module):
    """Modules whose names end the names of others, as `conv1` of a ResNet does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 3, padding=1)}) for _ in range(2)])
        self.fc, self.xfc = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        """(B, 3, H, W) -> (B, 4)."""
        x = self.conv1(x).relu()
        for layer in self.layer1:
            x = layer["conv1"](x).relu()
        return self.xfc(self.fc(x.mean((2, 3))).relu())


CONV = {"target_modules": ["conv1"]}  # all three
ENDINGS = {
    "pattern and pattern": (LoraConfig(r=2, target_modules="conv1"), LoraConfig(r=4, target_modules=r".*\.0\.conv1")),
    "pattern and list": (LoraConfig(r=2, target_modules="conv1"), LoraConfig(r=3, target_modules=["fc"])),
    "list and list": (LoraConfig(r=2, **CONV), LoraConfig(r=3, target_modules=["layer1.0.conv1"])),
    "exclusions": (LoraConfig(r=2, exclude_modules=["layer1.1.conv1"], **CONV), LoraConfig(r=3, target_modules=["fc"])),
    "rank of the shorter name": (
        LoraConfig(r=2, rank_pattern={"^conv1": 3}, alpha_pattern={"^conv1": 5}, **CONV),
        LoraConfig(r=2, target_modules="fc"),
    ),
    "partial": (PartialConfig(target_modules=["conv1"]), PartialConfig(target_modules=["layer1.0.conv1"])),
    "(IA)³": (
        IA3Config(target_modules="conv1", feedforward_modules=[]),
        IA3Config(target_modules=["layer1.0.conv1"], feedforward_modules=["layer1.0.conv1"]),
    ),
    "(IA)³, a feed-forward module of the shorter name": (
        IA3Config(target_modules="fc|xfc", feedforward_modules="fc"),
        IA3Config(target_modules="xfc", feedforward_modules=[]),
    ),
}


def changes(base, folder):
    """What an adapter changes of the base's weights, as peft merges it."""
    plain = base().state_dict()
    merged = load(base, folder).merge_and_unload().state_dict()
    return {key: value - plain[key] for key, value in merged.items()}


@pytest.mark.parametrize("case", ENDINGS)
def test_modules_whose_names_end_those_of_others_are_told_apart(case, tmp_path):
    a, b = (save(tmp_path / n, Nested, c, s) for n, c, s in zip("ab", ENDINGS[case], (3, 4), strict=True))
    combine({a: 1.0, b: -0.5}, out=tmp_path / "out")
    first, second, found = (changes(Nested, folder) for folder in (a, b, tmp_path / "out"))
    for key, delta in found.items():
        assert torch.allclose(delta, first[key] - 0.5 * second[key], atol=1e-6), key


def test_settings_that_name_the_same_modules_in_another_order_are_equal(tmp_path):
    config = VisualPromptConfig(length=2, deep=False, target_modules=["layers.0", "layers.1", "layers.2"])
    a, b = (save(tmp_path / n, "vit", config, s) for n, s in (("a", 3), ("b", 4)))
    saved = json.loads((b / "adapter_config.json").read_text())
    saved["target_modules"] = saved["target_modules"][::-1]
    (b / "adapter_config.json").write_text(json.dumps(saved))
    combine({a: 1.0, b: 1.0}, out=tmp_path / "out")


def tied_config(kind, targets):
    if kind == "ia3":
        return IA3Config(target_modules=targets, feedforward_modules=["lm_head"] if "lm_head" in targets else [])
    return LoraConfig(r=len(targets) + 1, target_modules=targets, lora_alpha=3)


TIED = [
    ("lora", ["c_attn"], ["c_attn", "lm_head"]),
    ("lora", ["wte"], ["lm_head"]),
    ("lora", ["wte", "c_fc"], ["wte", "lm_head"]),
    ("lora", ["lm_head"], ["lm_head"]),
    ("ia3", ["c_attn"], ["c_attn", "lm_head"]),
]


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word",
    "ignore:Model with `tie_word",
    "ignore:fan_in_fan_out is set to",  # of peft
)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0), (1.0, 0.0)])
@pytest.mark.parametrize("case", range(len(TIED)))
def test_adapters_of_tied_embeddings_add_each_to_its_own_module(case, weights, tmp_path):
    """GPT-2's token embedding and head are one weight: the sum changes each where its adapters do, also when merged."""
    kind, *targets = TIED[case]
    ids = torch.arange(5, 17)[None]
    base = load_base("builtin:gpt2-tiny").double()
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    folders = []
    for name, own, weight in zip("ab", targets, weights, strict=True):
        torch.manual_seed(ord(name))
        model = get_peft_model(load_base("builtin:gpt2-tiny"), tied_config(kind, own)).eval()
        randomise(model, "default", ord(name))
        folders.append(
            save_adapter(model, tmp_path / name, processor=TextProcessor(load_tokenizer("builtin:gpt2-tiny")))
        )
        for site, layer in model.base_model.model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                module = base.get_submodule(site)
                if kind == "lora":
                    delta = layer.get_delta_weight("default").double()
                else:
                    own_weight, scale = layer.get_base_layer().weight, layer.ia3_l["default"]
                    flat = scale if scale.shape[0] == 1 else scale.T if own_weight.shape[0] != len(scale) else scale
                    delta = (own_weight * (flat - 1)).double()
                module.weight.data += weight * delta.detach()
                if kind == "ia3" and getattr(module, "bias", None) is not None and scale.shape[0] != 1:
                    bias = layer.get_base_layer().bias.detach().double()
                    module.bias.data += weight * bias * (scale.detach().double().flatten() - 1)
    combine(dict(zip(folders, weights, strict=True)), out=tmp_path / "out")
    with torch.no_grad():
        wanted = base(input_ids=ids).logits
        found = load_adapter(tmp_path / "out").model.double()(input_ids=ids).logits
        merge(tmp_path / "out", tmp_path / "merged")
        merged = load_base(tmp_path / "merged").double()(input_ids=ids).logits
    plain = load_base("builtin:gpt2-tiny").double()(input_ids=ids).logits
    assert (found - wanted).norm() < 1e-5 * (wanted - plain).norm()
    assert (merged - wanted).norm() < 1e-4 * (wanted - plain).norm()


def tied_lora(folder, rank, tied):
    """LoRA on GPT-2's head and, with `ensure_weight_tying`, the same on its token embedding."""
    torch.manual_seed(rank)
    config = LoraConfig(r=rank, lora_alpha=8, target_modules=["lm_head"], ensure_weight_tying=tied)
    model = get_peft_model(load_base("builtin:gpt2-tiny"), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn_like(parameter))  # in place: the two share their memory
    return save_adapter(model, folder, processor=TextProcessor(load_tokenizer("builtin:gpt2-tiny")))


@pytest.mark.filterwarnings(
    "ignore:Model has `tie_word",
    "ignore:Model with `tie_word",
    "ignore:fan_in_fan_out is set to",  # of peft
)
@pytest.mark.parametrize("width", [None, 5])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0)])
def test_adapters_that_adapt_tied_modules_as_one_add_as_such(weights, width, tmp_path):
    folders = [tied_lora(tmp_path / name, rank, True) for name, rank in (("a", 2), ("b", 3))]
    ids = torch.arange(5, 17)[None]
    base = load_base("builtin:gpt2-tiny")
    plain = base(input_ids=ids).logits
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    for folder, weight, rank in zip(folders, weights, (2, 3), strict=True):
        file = load_file(folder / "adapter_model.safetensors")
        down, up = (file[f"base_model.model.transformer.wte.lora_embedding_{side}"] for side in "AB")
        base.transformer.wte.weight.data += weight * 8 / rank * (up @ down).T
        base.lm_head.weight.data += weight * 8 / rank * (up @ down).T
    combine(dict(zip(folders, weights, strict=True)), out=tmp_path / "out", width=width)
    merge(tmp_path / "out", tmp_path / "merged")
    with torch.no_grad():
        wanted = base(input_ids=ids).logits
        for model in (load_adapter(tmp_path / "out").model, load_base(tmp_path / "merged")):
            assert (model(input_ids=ids).logits - wanted).norm() < 1e-5 * (wanted - plain).norm()


@pytest.mark.filterwarnings("ignore:Model has `tie_word", "ignore:fan_in_fan_out is set to")
def test_one_that_adapts_tied_modules_as_one_does_not_add_to_one_that_does_not(tmp_path):
    a, b = tied_lora(tmp_path / "a", 2, True), tied_lora(tmp_path / "b", 3, False)
    with pytest.raises(InlayError, match="ensure_weight_tying is True in a, False in b; one adapts two tied modules"):
        combine({a: 1.0, b: 1.0}, out=tmp_path / "out")

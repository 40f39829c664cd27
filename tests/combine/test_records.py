"""What a combination carries beside its update: base, labels, heads, preprocessing; and volumes."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from combine.cases import BASE, classifier, load, lora, save
from inlay import (
    InlayError,
    TextProcessor,
    combine,
    load_adapter,
    load_base,
    load_processor,
    load_tokenizer,
    predict,
    read_adapter,
    save_adapter,
)
from inlay.cli import app as cli
from inlay.methods.spatial.encoder import Bottleneck3d, Patches3d
from methods import volumes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Adapters by name: `a`, with `b` of other labels, `c` of the same ones in another order, `d` of some."""
    folder = tmp_path_factory.mktemp("made")
    labels = {"a": ["cat", "dog", "emu"], "b": ["fox", "gnu"], "c": ["emu", "cat", "dog"], "d": ["dog", "yak"]}
    return {name: classifier(folder / name, own, i) for i, (name, own) in enumerate(labels.items(), 3)}


def head(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    return weights["base_model.model.classifier.weight"], weights["base_model.model.classifier.bias"]


def test_disjoint_labels_are_stacked(made, tmp_path):
    result = combine({made["a"]: 1.0, made["b"]: 0.0}, out=tmp_path / "out")
    assert result.labels == ["cat", "dog", "emu", "fox", "gnu"] and result.heads == "stacked 5 labels"
    loaded = load_adapter(tmp_path / "out")
    assert loaded.labels == result.labels and loaded.verified and loaded.deviation is None
    alone, pixels = load_adapter(made["a"]), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        both, one = loaded.model(pixel_values=pixels).logits, alone.model(pixel_values=pixels).logits
    assert torch.allclose(both[:, :3], one, atol=1e-5)
    for i in range(2):
        assert torch.equal(head(tmp_path / "out")[i], torch.cat([head(made["a"])[i], head(made["b"])[i]]))
    file = read_adapter(tmp_path / "out")
    assert file.record["combined"]["of"] == [{"name": "a", "weight": 1.0}, {"name": "b", "weight": 0.0}]
    card = (tmp_path / "out/README.md").read_text()
    assert "| b | 0 |" in card and "data of a + data of b" in card and "/tmp" not in card


def test_equal_labels_are_averaged_whatever_their_order(made, tmp_path):
    result = combine({made["a"]: 1.0, made["c"]: 1.0}, out=tmp_path / "out")
    assert result.labels == ["cat", "dog", "emu"] and result.heads == "averaged 3 labels"
    order = torch.tensor([1, 2, 0])  # of a's labels in c
    for i in range(2):
        mean = (head(made["a"])[i] + head(made["c"])[i][order]) / 2
        assert torch.allclose(head(tmp_path / "out")[i], mean, atol=1e-7)
    kept = combine({made["a"]: 1.0, made["c"]: 1.0}, heads="c", out=tmp_path / "kept")
    assert kept.labels == ["emu", "cat", "dog"] and torch.equal(head(tmp_path / "kept")[0], head(made["c"])[0])
    side = combine({made["a"]: 1.0, made["c"]: 1.0}, heads="stack", out=tmp_path / "side")
    assert side.labels[:3] == ["a/cat", "a/dog", "a/emu"] and side.labels[3] == "c/emu" and len(side.labels) == 6
    assert predict(load_adapter(tmp_path / "side"), [_picture(tmp_path)], top=1)[0].labels[0] in side.labels


def test_a_group_of_a_combination_is_chosen_among_its_own_classes(made, tmp_path, capsys, monkeypatch):
    picture = _picture(tmp_path)
    combine({made["a"]: 1.0, made["c"]: 0.0}, heads="stack", out=tmp_path / "two")  # a and c have equal labels
    twice = combine({tmp_path / "two": 1.0, made["b"]: 0.0}, out=tmp_path / "three")
    assert twice.groups == ["a", "c", "b"] and read_adapter(twice.folder).groups["c"] == {"emu": 3, "cat": 4, "dog": 5}
    alone, together = load_adapter(made["a"]), load_adapter(twice.folder)
    assert together.groups == ["a", "c", "b"] and together.route(None)[0] == twice.labels and len(twice.labels) == 8
    before = predict(alone, [picture])[0]
    after = predict(together, [picture], group="a")[0]
    assert after.labels == before.labels and set(after.labels) == {"cat", "dog", "emu"}
    assert after.probabilities == pytest.approx(before.probabilities, rel=1e-3)
    assert set(predict(together, [picture], group="b")[0].labels) == {"fox", "gnu"}
    with pytest.raises(InlayError, match="no group of labels 'd', it has the groups a, c, b"):
        predict(together, [picture], group="d")
    with pytest.raises(InlayError, match="it has no groups; leave group out"):
        predict(alone, [picture], group="a")
    assert combine({made["a"]: 1.0, made["c"]: 1.0}, out=tmp_path / "mean").groups == []
    dense = combine({made["a"]: 1.0, made["b"]: 1.0}, dense=True, out=tmp_path / "dense")
    assert load_adapter(dense.folder).groups == ["a", "b"]
    monkeypatch.setattr(sys, "argv", ["inlay", "predict", str(twice.folder), picture, "--group", "b", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    assert set(json.loads(capsys.readouterr().out)[0]["labels"]) == {"fox", "gnu"}


def _picture(folder):
    from inlay.tasks.golden import golden_image as picture

    picture().save(folder / "picture.png")
    return str(folder / "picture.png")


def test_labels_that_overlap_in_part_need_a_word(made, tmp_path):
    pair = {made["a"]: 1.0, made["d"]: 1.0}
    with pytest.raises(InlayError, match=r"labels in common \(dog\), but not all.*heads='stack'"):
        combine(pair, out=tmp_path / "out")
    averaged = combine(pair, heads="average", out=tmp_path / "out")
    assert averaged.labels == ["cat", "dog", "emu", "yak"]
    mean = (head(made["a"])[0][1] + head(made["d"])[0][0]) / 2
    assert torch.allclose(head(tmp_path / "out")[0][1], mean, atol=1e-7)
    assert combine(pair, heads="stack", out=tmp_path / "side").labels == ["cat", "a/dog", "emu", "d/dog", "yak"]
    with pytest.raises(
        InlayError, match="unknown heads 'nobody'; choose one of auto, stack, average, or an adapter: a, d"
    ):
        combine(pair, heads="nobody", out=tmp_path / "none")


def test_adapters_of_other_bases_are_refused(made, tmp_path):
    other = classifier(tmp_path / "other", ["x", "y"], 9, change=0.5)
    with pytest.raises(InlayError, match=r"'other' on builtin:vit-tiny, which has other weights; only adapters of one"):
        combine({made["a"]: 1.0, other: 1.0}, out=tmp_path / "out")
    plain = [save(tmp_path / n, "vit", lora(), 3) for n in "pq"]
    for folder, base in zip(plain, ("one/base", "other/base"), strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    with pytest.raises(InlayError, match="'p' was trained on one/base, 'q' on other/base"):
        combine(dict.fromkeys(plain, 1.0), out=tmp_path / "out")
    with pytest.raises(InlayError, match="named twice"):
        combine({plain[0]: 1.0, str(plain[0]): 1.0}, out=tmp_path / "out")


def test_other_preprocessing_needs_a_word(made, tmp_path):
    processor = load_processor(BASE)
    processor.image_mean = [0.1, 0.2, 0.3]
    other = classifier(tmp_path / "other", ["x", "y"], 9, processor=processor)
    with pytest.raises(InlayError, match=r"another preprocessing \(image_mean\).*heads='a' or 'other'"):
        combine({made["a"]: 1.0, other: 1.0}, out=tmp_path / "out")
    combine({made["a"]: 1.0, other: 1.0}, heads="other", out=tmp_path / "out")
    assert load_adapter(tmp_path / "out").processor.image_mean[2] == 0.3


def test_plain_adapters_with_heads_need_a_word_and_may_meet_ours(made, tmp_path):
    from safetensors.torch import save_file

    plain = tmp_path / "plain"
    plain.mkdir()
    save_file(load_file(made["a"] / "adapter_model.safetensors"), plain / "adapter_model.safetensors", {"format": "pt"})
    (plain / "adapter_config.json").write_text((made["a"] / "adapter_config.json").read_text())
    result = combine({made["b"]: 1.0, plain: 1.0}, out=tmp_path / "out")
    assert result.labels == ["fox", "gnu", "plain/0", "plain/1", "plain/2"]
    assert load_adapter(tmp_path / "out").labels == result.labels
    alone = combine({plain: 2.0}, out=tmp_path / "alone")
    assert alone.labels == [] and read_adapter(tmp_path / "alone").record == {}
    assert len(load_adapter(tmp_path / "alone", load_base(BASE, labels=["x", "y", "z"])).labels) == 3


def test_spatial_adapters_add_block_by_block_and_keep_one_decoder(tmp_path):
    configs = {"a": volumes.settings(), "b": volumes.settings(width=5, classes=["tumour"])}
    a, b = (save(tmp_path / n, volumes.build, c, s) for s, (n, c) in enumerate(configs.items(), 3))
    with pytest.raises(InlayError, match="a decoder of its own, a network that has no sum; say whose is kept"):
        combine({a: 1.0, b: 1.0}, out=tmp_path / "out")
    combine({a: 0.5, b: -2.0}, heads="b", out=tmp_path / "out")
    first, second, found = (load_file(f / "adapter_model.safetensors") for f in (a, b, tmp_path / "out"))
    x = torch.randn(2, 3, 4, 5, 48, dtype=torch.float64)
    start = "base_model.model.vision_encoder.inlay_spatial3d_encoder."
    for block in range(4):
        added = []
        for weights, width in ((first, 8), (second, 5), (found, 13)):
            module = Bottleneck3d(48, width, 3, "gelu", False).double()
            own = f"{start}blocks.{block}.adapter."
            module.load_state_dict({k.removeprefix(own): v for k, v in weights.items() if k.startswith(own)})
            added.append(module(x).detach())
        sums = 0.5 * added[0] - 2 * added[1]
        assert (added[2] - sums).norm() < 1e-6 * sums.norm()
    for leaf in ("patches.depth", "patches.positions", "blocks.1.norms", "blocks.2.positions"):
        key = start + leaf
        assert torch.allclose(found[key], 0.5 * first[key] - 2 * second[key], atol=1e-6)
    for key in found:
        if "decoder" in key or ".necks." in key:
            assert torch.equal(found[key], second[key])
    model, given = load(volumes.build, tmp_path / "out"), volumes.volumes(1, (16, 16, 16))
    assert model.active_peft_config.classes == ["tumour"] and model(pixel_values=given).logits.shape[1] == 2
    alone = combine({a: 1.0}, out=tmp_path / "alone")
    assert alone.error == 0 and torch.allclose(
        load(volumes.build, tmp_path / "alone")(pixel_values=given).logits,
        load(volumes.build, a)(pixel_values=given).logits,
        atol=1e-4,
    )
    small = combine({a: 0.5, b: -2.0}, heads="b", width=6, out=tmp_path / "small")
    assert small.widths == {"INLAY_SPATIAL3D": 6} and 0 < small.error < 1
    auto = combine({a: 0.5, b: -2.0}, heads="b", width="auto", error=small.error + 1e-6, out=tmp_path / "auto")
    assert auto.widths == small.widths and auto.error == small.error
    assert load(volumes.build, tmp_path / "small")(pixel_values=given).logits.isfinite().all()
    reference = save(tmp_path / "reference", volumes.build, volumes.settings(reference=True), 7)
    with pytest.raises(InlayError, match="different settings"):
        combine({a: 1.0, reference: 1.0}, heads="a", out=tmp_path / "none")


def test_spatial_adapters_of_several_channels_add_and_others_are_refused(tmp_path):
    """What the sum changes of the patches is the sum of the changes, for any scan."""
    two, turned = ["t1", "t2"], ["t2", "t1"]
    configs = {"a": two, "b": two, "turned": turned, "one": None}
    made = {
        n: save(tmp_path / n, volumes.build, volumes.settings(channels=c), s)
        for s, (n, c) in enumerate(configs.items())
    }
    made["out"] = tmp_path / "out"
    combine({made["a"]: 0.5, made["b"]: -2.0}, heads="b", out=made["out"])
    encoder = volumes.build().vision_encoder
    scan, start = torch.randn(1, 2, 16, 16, 8), "base_model.model.vision_encoder.inlay_spatial3d_encoder.patches."
    patches = Patches3d(48, 8, 8, channels=2)
    before, changes = patches(scan, encoder, (2, 2)), {}
    for name in ("a", "b", "out"):
        weights = load_file(made[name] / "adapter_model.safetensors")
        patches.load_state_dict({k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)})
        changes[name] = patches(scan, encoder, (2, 2)) - before
    assert torch.allclose(changes["out"], 0.5 * changes["a"] - 2 * changes["b"], atol=1e-4)
    for other, said in (("turned", "t1, t2 in 'a', t2, t1 in 'turned'"), ("one", "t1, t2 in 'a', one in 'one'")):
        with pytest.raises(InlayError, match=f"different channels.*{said}"):
            combine({made["a"]: 1.0, made[other]: 1.0}, heads="a", out=tmp_path / "none")


@pytest.mark.parametrize(
    ("rule", "weights", "shares"),
    [
        ("add", (1.0, 0.0), (1, 0)),
        ("add", (1.0, 1.0), (0.5, 0.5)),
        ("add", (1.0, 1e-9), (1, 0)),
        ("add", (2.0, -0.5), (4 / 3, -1 / 3)),
        ("average", (3.0, 1.0), (0.75, 0.25)),
        ("average", (3.0, -1.0), (1.5, -0.5)),
        ("task_arithmetic", (0.4, 0.6), (0.4, 0.6)),
        ("ties", (3.0, 1.0), (0.75, 0.25)),
        ("add", (0.0, 0.0), (0.5, 0.5)),
    ],
)
def test_heads_of_equal_labels_are_averaged_by_the_weights(rule, weights, shares, made, tmp_path):
    combine(dict(zip((made["a"], made["c"]), weights, strict=True)), rule, width=4, out=tmp_path / "out")
    order = torch.tensor([1, 2, 0])  # of a's labels in c
    for i in range(2):
        wanted = shares[0] * head(made["a"])[i] + shares[1] * head(made["c"])[i][order]
        assert torch.allclose(head(tmp_path / "out")[i], wanted, atol=1e-6)


def test_a_row_of_one_adapter_is_whole_whatever_its_weight(made, tmp_path):
    combine({made["a"]: 0.3, made["d"]: 0.1}, heads="average", out=tmp_path / "out")
    weight = head(tmp_path / "out")[0]
    assert torch.equal(weight[0], head(made["a"])[0][0]) and torch.equal(weight[3], head(made["d"])[0][1])
    assert torch.allclose(weight[1], 0.75 * head(made["a"])[0][1] + 0.25 * head(made["d"])[0][0], atol=1e-6)
    combine({made["a"]: -0.3, made["b"]: 0.0}, out=tmp_path / "stack")
    assert torch.equal(head(tmp_path / "stack")[0], torch.cat([head(made["a"])[0], head(made["b"])[0]]))


@pytest.mark.parametrize("weights", [(1.0, -1.0), (1.0, -2.0), (-1.0, 0.0)])
def test_heads_have_no_mean_by_weights_that_add_up_to_nothing(weights, made, tmp_path):
    pair = dict(zip((made["a"], made["c"]), weights, strict=True))
    with pytest.raises(InlayError, match=r"add up to 0 or less \(a .*\); name the adapter .* heads='a' or 'c'"):
        combine(pair, out=tmp_path / "out")
    assert combine(pair, heads="a", out=tmp_path / "out").heads == "that of a"


def test_plain_heads_are_averaged_row_by_row(made, tmp_path):
    from shutil import copytree

    from safetensors.torch import save_file

    for name in "ac":
        copytree(made[name], tmp_path / name)
        weights = load_file(made[name] / "adapter_model.safetensors")
        save_file(weights, tmp_path / name / "adapter_model.safetensors", {"format": "pt"})  # without the record
    combine({tmp_path / "a": 3.0, tmp_path / "c": 1.0}, heads="average", out=tmp_path / "out")
    for i in range(2):
        wanted = 0.75 * head(made["a"])[i] + 0.25 * head(made["c"])[i]
        assert torch.allclose(head(tmp_path / "out")[i], wanted, atol=1e-6)
    with pytest.raises(InlayError, match="names no labels, by which"):
        combine({made["a"]: 1.0, tmp_path / "c": 1.0}, heads="average", out=tmp_path / "out")


def whole(folder, base, modules, seed, record=True):
    """A LoRA on q or c_attn, with whole copies of other modules."""
    torch.manual_seed(seed)
    targets = ["c_attn"] if "gpt2" in base else ["q_proj"]
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=modules, init_lora_weights=False)
    model = get_peft_model(load_base(base), config)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    if not record:
        model.save_pretrained(folder, save_embedding_layers=False)
        return folder
    processor = TextProcessor(load_tokenizer(base)) if "gpt2" in base else load_processor(base)
    return save_adapter(model.eval(), folder, processor=processor)


COPIES = [
    ("builtin:gpt2-tiny", ["lm_head"], True),
    ("builtin:gpt2-tiny", ["lm_head"], False),
    ("builtin:gpt2-tiny", ["wte"], False),
    ("builtin:gpt2-tiny", ["ln_f"], True),
    ("builtin:gpt2-tiny", ["h.1.mlp.c_fc", "ln_f"], False),
    (BASE, ["layernorm"], False),
    (BASE, ["layers.1.mlp.fc1"], True),
]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(("base", "modules", "record"), COPIES)
def test_whole_copies_of_modules_are_no_heads_of_classes(base, modules, record, tmp_path):
    """What both change together is W + Σ w (W_i - W): known without the base where the weights add up to 1."""
    a, b = (whole(tmp_path / name, base, modules, seed, record) for name, seed in (("a", 3), ("b", 4)))
    with pytest.raises(InlayError, match=r"is a whole copy in 'a' and 'b'.*rule='average'.*heads='a' or 'b'"):
        combine({a: 1.0, b: 1.0}, out=tmp_path / "out")
    with pytest.raises(InlayError, match="no head of classes and cannot be stacked"):
        combine({a: 1.0, b: 1.0}, heads="stack", out=tmp_path / "out")
    files = [load_file(folder / "adapter_model.safetensors") for folder in (a, b)]
    copies = [key for key in files[0] if "lora_" not in key]
    assert copies
    for rule, heads, weights, shares in (
        ("average", "auto", (3.0, 1.0), (0.75, 0.25)),
        ("add", "auto", (1.5, -0.5), (1.5, -0.5)),
        ("add", "auto", (1.0, 0.0), (1.0, 0.0)),
        ("add", "average", (2.0, 2.0), (0.5, 0.5)),
        ("add", "b", (2.0, 2.0), (0, 1)),
    ):
        combine({a: weights[0], b: weights[1]}, rule, heads=heads, out=tmp_path / "out")
        found = load_file(tmp_path / "out/adapter_model.safetensors")
        assert {key for key in found if "lora_" not in key} == set(copies)
        for key in copies:
            assert torch.allclose(found[key], shares[0] * files[0][key] + shares[1] * files[1][key], atol=1e-6)
    load_adapter(tmp_path / "out", base)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_copy_that_one_adapter_has_keeps_its_weight(tmp_path):
    a = whole(tmp_path / "a", "builtin:gpt2-tiny", ["lm_head"], 3)
    b = whole(tmp_path / "b", "builtin:gpt2-tiny", None, 4)
    combine({a: 1.0, b: 0.5}, out=tmp_path / "out")
    key = "base_model.model.lm_head.weight"
    found, own = (load_file(folder / "adapter_model.safetensors")[key] for folder in (tmp_path / "out", a))
    assert torch.equal(found, own)
    with pytest.raises(InlayError, match=r"weights that add up to 1, not 0\.5"):
        combine({a: 0.5, b: 1.0}, out=tmp_path / "out")

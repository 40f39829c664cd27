"""Pruning from a model or an adapter to a folder: targets met by counting, healing, masks, carried adapters, scans."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from torch.utils.data import default_collate
from transformers import AutoModelForImageClassification, ViTImageProcessor

from command import run
from inlay import (
    METHODS,
    PruneReport,
    carry_adapter,
    heal,
    load_adapter,
    load_base,
    load_processor,
    load_trained,
    lora_targets,
    mask_weights,
    merge,
    prune,
    save_adapter,
    save_pruned,
    scan_sensitivity,
)
from inlay.bases.widths import find_groups, narrowed
from inlay.compress.prune.carry import cut_tensors, prune_under_adapter
from inlay.compress.prune.heal import largest_rank, set_statistics
from inlay.compress.prune.run import Pruning, prune_to_folder
from inlay.compress.prune.target import Counter, Target, choose_units
from inlay.errors import BadInput, Unsupported, WrongBase
from inlay.measure import count_macs, footprint
from inlay.methods._peft import merge_keeping_weights
from inlay.tasks.task import LabelledBatches
from inlay.train.losses import ModelLoss
from prunable_models import batch_for, build, every_other_unit

DATA = "builtin:digits"
FEW = {"examples": 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny ViT for images of 8 pixels, in a folder."""
    folder = tmp_path_factory.mktemp("base") / "vit"
    build("vit").save_pretrained(folder)
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size).save_pretrained(folder)
    return folder


def adapt(base, method, folder, labels):
    """A saved adapter, not trained but not the identity either."""
    torch.manual_seed(0)
    model = METHODS[method].adapt(load_base(base, labels=labels), 2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "classifier" not in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    metrics = {"dataset": DATA, "training": {"seed": 0}}
    return save_adapter(model, folder, processor=load_processor(base), metrics=metrics)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return adapt(base, "lora", tmp_path_factory.mktemp("dense") / "digits", [str(i) for i in range(10)])


@pytest.fixture(scope="module")
def trained(adapter):
    return load_trained(adapter)


@torch.no_grad()
def outputs(trained, model=None):
    return (model or trained.model)(**trained.task.random_inputs(trained.model, trained.processor)).logits


@pytest.mark.parametrize(
    ("family", "quantity", "scope"),
    [
        ("vit", "macs", "global"),
        ("vit", "params", "local"),
        ("gpt2", "params", "global"),  # its head is its token embedding
        ("squeezenet", "macs", "global"),  # what a channel costs depends on the others
    ],
)
def test_a_target_is_met_as_near_as_units_allow(family, quantity, scope):
    model = build(family)
    groups = find_groups(model)
    inputs = {key: value[:1] for key, value in batch_for(model).items() if key != "labels"}
    counter = Counter(model, inputs)
    generator = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.units, generator=generator, dtype=torch.float64) for group in groups}
    share = 0.93 if family == "squeezenet" else 0.7  # its stem takes most
    allowed = share * counter.count({}, quantity)
    keep = choose_units(model, groups, scores, Target(quantity, share), scope, counter, allowed, priced=False)
    made = narrowed(model, keep)
    count = count_macs(made, inputs) if quantity == "macs" else footprint(made).parameters
    assert count == counter.count(keep, quantity) <= allowed
    if scope == "global":  # one more unit of any group would be too much
        for group in groups:
            out = [unit for unit in range(group.units) if unit not in keep[group.name].tolist()]
            more = torch.tensor([*keep[group.name].tolist(), *out[:1]]).sort().values
            assert not out or counter.count({**keep, group.name: more}, quantity) > allowed or family == "squeezenet"


def test_prune_counts_what_the_loaded_model_has(trained, tmp_path):
    before = {key: value.clone() for key, value in trained.model.state_dict().items()}
    made = prune(trained, DATA, target="macs=0.6", compensate=True, steps=2, **FEW)
    assert all(torch.equal(value, before[key]) for key, value in trained.model.state_dict().items())
    folder = save_pruned(made.trained, tmp_path / "pruned", PruneReport(made.facts, made.kept))
    loaded = load_trained(folder)
    inputs = {key: value[:1] for key, value in made.trained.task.random_inputs(loaded.model, loaded.processor).items()}
    dense = count_macs(trained.model, inputs)
    assert made.facts["before"]["macs"] == dense
    assert made.facts["after"]["macs"] == count_macs(loaded.model, inputs) <= 0.6 * dense
    assert made.facts["after"]["params"] == footprint(loaded.model).parameters
    assert made.facts["after"]["macs"] > 0.57 * dense
    torch.testing.assert_close(outputs(loaded), outputs(made.trained), rtol=0, atol=0)
    record = json.loads((folder / "pruning.json").read_text())
    assert {name: len(units) for name, units in record["kept"].items()} == {
        group.name: group.units for group in find_groups(loaded.model)
    }
    assert loaded.labels == trained.labels and "Molchanov et al. 2019" in (folder / "README.md").read_text()


def test_local_pruning_loads_with_transformers_only(trained, tmp_path):
    made = prune(trained, DATA, target="params=0.5", criterion="l1", scope="local")
    folder = save_pruned(made.trained, tmp_path / "even", PruneReport(made.facts, made.kept))
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "vit" and config["architectures"] == ["ViTForImageClassification"]
    loaded = AutoModelForImageClassification.from_pretrained(folder).eval()
    torch.testing.assert_close(outputs(trained, loaded), outputs(made.trained), rtol=0, atol=0)
    assert ViTImageProcessor.from_pretrained(folder).size["height"] == 8
    assert 0.47 < footprint(loaded).parameters / footprint(trained.model).parameters <= 0.5


def test_a_latency_is_measured(trained, monkeypatch):
    from inlay.compress.prune import pruning, target

    taken = []

    def fake(model, inputs):
        taken.append(footprint(model).parameters)
        return taken[-1] / 1000

    monkeypatch.setattr(target, "measure_latency", fake)
    monkeypatch.setattr(pruning, "measure_latency", fake)
    made = prune(trained, DATA, target="latency=0.6", criterion="l2")
    assert made.facts["after"]["latency"] <= 0.6 * made.facts["before"]["latency"] and len(taken) > 5


def test_an_adapter_trained_on_a_pruned_base_is_saved_and_loaded(trained, tmp_path):
    made = prune(trained, DATA, target="macs=0.8", criterion="random", kinds=["mlp"])
    folder = save_pruned(made.trained, tmp_path / "base", PruneReport(made.facts, made.kept))
    assert type(load_base(folder)).__name__ == "PrunedViTForImageClassification"
    loaded = load_adapter(
        adapt(folder, "lora", tmp_path / "adapter", ["a", "b"])
    )  # checks the sketch, the golden output
    assert loaded.verified and loaded.file.record["base"]["model_type"] == "vit_pruned"


@pytest.mark.parametrize("way", ["lora", "full", "scratch"])
def test_healing_trains_another_model_of_the_same_size(trained, way):
    made = prune(trained, DATA, target="macs=0.5", criterion="l1")
    before = {key: value.clone() for key, value in made.trained.model.state_dict().items()}
    healed = heal(made.trained, DATA, way=way, share=0.4, steps=2, batch_size=4)
    after = healed.trained.model.state_dict()
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    assert any(not torch.equal(value, before[key]) for key, value in after.items())
    assert all(torch.equal(value, before[key]) for key, value in made.trained.model.state_dict().items())
    assert type(healed.trained.model) is type(made.trained.model)
    size = footprint(made.trained.model).parameters
    assert (healed.facts["trained_parameters"] <= 0.4 * size) == (way == "lora")
    if way == "lora":
        assert torch.equal(after["classifier.weight"], before["classifier.weight"])


def test_a_network_from_scratch_normalises_by_what_it_is_shown():
    model = build("shufflenet_v2")
    items = [{key: value[0] for key, value in batch_for(model, 1).items()} for _ in range(1)] * 3
    labelled = LabelledBatches(items, default_collate, ModelLoss(), rows=2)
    norm = model.shufflenet.blocks[0].first_1x1.normalization
    seen = []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    set_statistics(model, labelled, batches=2, size=2)
    means = torch.stack([x.mean((0, 2, 3)) for x in seen])
    assert [len(x) for x in seen] == [2, 1] and norm.momentum == 0.1 and not model.training
    torch.testing.assert_close(norm.running_mean, means.mean(0))


@pytest.mark.parametrize("family", ["vit", "gpt2", "squeezenet", "mobilenet_v2"])
def test_the_rank_is_the_largest_that_fits(family):
    model = build(family)
    allowed = 0.5 * footprint(model).parameters
    rank = largest_rank(model, 0.5)
    sizes = [
        footprint(get_peft_model(copy.deepcopy(model), METHODS["lora"].config(model, r))).trainable
        for r in (rank, rank + 1)
    ]
    assert sizes[0] <= allowed < sizes[1]


def test_a_share_below_rank_1_is_refused():
    # q, k, v, o: 16 + 16 each; fc1, fc2: 16 + 24 each; two blocks
    model = build("vit")
    with pytest.raises(Unsupported, match="a LoRA of rank 1 has 416 parameters"):
        largest_rank(model, 0.01)


@pytest.mark.parametrize("compensate", [False, True])
def test_a_carried_adapter_on_the_pruned_base_is_the_pruned_merged_model(adapter, compensate, tmp_path):
    how = {"target": "macs=0.5", "compensate": compensate, **FEW}
    bare, merged = prune_under_adapter(adapter, DATA, **how)
    assert bare.trained.labels != merged.trained.labels  # the base's own head
    folder = save_pruned(bare.trained, tmp_path / "base", PruneReport(bare.facts, bare.kept))
    carried = load_adapter(carry_adapter(adapter, folder, tmp_path / "adapter"))
    torch.testing.assert_close(outputs(merged.trained, carried.model), outputs(merged.trained), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def pruned_base(adapter, tmp_path_factory):
    """The adapter's base, pruned, and the folder that it is in."""
    bare, _ = prune_under_adapter(adapter, DATA, target="macs=0.5", criterion="l2")
    folder = tmp_path_factory.mktemp("pruned") / "base"
    return bare, save_pruned(bare.trained, folder, PruneReport(bare.facts, bare.kept))


@pytest.mark.parametrize("method", ["ia3", "partial", "ssf", "bottleneck", "dora"])
def test_adapters_of_other_methods_are_carried_too_or_refused(method, base, pruned_base, tmp_path):
    saved = adapt(base, method, tmp_path / method, ["a", "b", "c", "d"])
    bare, folder = pruned_base
    if method == "dora":
        with pytest.raises(Unsupported, match="changes the norms that a DoRA scales"):
            carry_adapter(saved, folder, tmp_path / "carried")
        return
    carried = load_adapter(carry_adapter(saved, folder, tmp_path / "carried"))
    loaded = load_adapter(saved)
    batch = loaded.task.random_inputs(loaded.model, loaded.processor)
    keep = {name: torch.tensor(units) for name, units in bare.kept.items()}
    with torch.no_grad():
        found = carried.model(**batch).logits
        if method == "bottleneck":  # no weight can stand for it: instead nothing reads the units that are gone
            whole = loaded.model.get_base_model()
            for group in find_groups(load_base(base)):
                gone = torch.ones(group.units, dtype=torch.bool)
                gone[keep[group.name]] = False
                for part in group.read:
                    reader = whole.get_submodule(part.module)
                    reader = getattr(reader, "base_layer", reader)
                    reader.weight.index_fill_(1, part.places[gone].flatten(), 0)
            expected = loaded.model(**batch).logits
        else:
            expected = narrowed(merge_keeping_weights(loaded.model)[0], keep)(**batch).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama", "mobilenet_v2", "squeezenet", "shufflenet_v2"])
def test_a_lora_of_every_family_is_cut_as_its_base_is(family):
    model = build(family)
    keep = every_other_unit(model)
    config = LoraConfig(r=2, target_modules=lora_targets(model), init_lora_weights=False)
    whole = get_peft_model(copy.deepcopy(model), config).eval()
    cut = cut_tensors(get_peft_model_state_dict(whole), model, keep)
    narrow_base = get_peft_model(narrowed(model, keep), config).eval()
    set_peft_model_state_dict(narrow_base, cut)
    batch = batch_for(model)
    with torch.no_grad():
        expected = narrowed(merge_keeping_weights(whole)[0], keep)(**batch).logits
        torch.testing.assert_close(narrow_base(**batch).logits, expected, rtol=1e-3, atol=1e-4)


def test_an_adapter_is_not_carried_onto_a_base_of_other_weights(adapter, trained, tmp_path):
    made = prune(trained, DATA, target="macs=0.5", criterion="l1")  # the adapter is merged into it
    folder = save_pruned(made.trained, tmp_path / "merged", PruneReport(made.facts, made.kept))
    with pytest.raises(WrongBase, match="was pruned from other weights than the adapter's base"):
        carry_adapter(adapter, folder, tmp_path / "carried")
    with pytest.raises(BadInput, match=r"is no model that inlay pruned: it has no pruning\.json"):
        carry_adapter(adapter, adapter, tmp_path / "carried")


def test_masks_have_the_sparsity_that_was_asked_for(trained, tmp_path):
    local = mask_weights(trained, sparsity=0.37)
    for name, module in local.trained.model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name != "classifier":
            magnitudes = trained.model.get_submodule(name).weight.abs()
            assert int((module.weight == 0).sum()) == int(0.37 * module.weight.numel())
            kept = module.weight != 0
            assert magnitudes[kept].min() >= magnitudes[~kept].max()
    assert torch.equal(local.trained.model.classifier.weight, trained.model.classifier.weight)
    total = local.facts["masked_weights"]
    everywhere = mask_weights(trained, sparsity=0.37, scope="global")
    assert everywhere.facts["zeros"] == int(0.37 * total) == total - everywhere.facts["after"]["nonzero"]

    wanda = mask_weights(trained, DATA, sparsity=0.5, criterion="wanda", **FEW)
    module = wanda.trained.model.vit.layers[1].mlp.fc2
    assert bool(((module.weight == 0).sum(1) == 12).all())  # in each row
    folder = save_pruned(wanda.trained, tmp_path / "sparse", PruneReport(wanda.facts))
    assert torch.equal(load_base(folder).vit.layers[1].mlp.fc2.weight, module.weight)
    assert "set to zero by wanda" in (folder / "README.md").read_text()


def test_wanda_weighs_weights_by_what_they_see():
    from inlay.combine.examples import Examples
    from inlay.compress.prune.masks import _input_norms, find_layers

    model = build("shufflenet_v1 of 2 groups")
    batch = batch_for(model)
    layers = find_layers(model)
    norms = _input_norms(model, layers, Examples([batch], ModelLoss(), 4))
    seen = []
    name = "shufflenet.blocks.1.expand_1x1.convolution"
    layers[name].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(**batch)
    channels = seen[0].square().sum((0, 2, 3)).sqrt()
    half = len(channels) // 2
    torch.testing.assert_close(norms[name][0], channels[:half])
    torch.testing.assert_close(norms[name][-1], channels[half:])


def test_a_scan_scores_each_layer_by_itself(trained, tmp_path):
    found = scan_sensitivity(trained, DATA, criterion="l1", kinds=["heads"], shares=[0.5], limit=8)
    assert list(found.layers) == ["vit.layers.0.heads", "vit.layers.1.heads"]
    assert found.metric == "accuracy" and found.count == 8 and found.units["vit.layers.0.heads"] == 4
    with Image.open(found.write(tmp_path / "scan.png")) as image:
        assert image.width >= 400
    assert json.loads(found.write(tmp_path / "scan.json").read_text())["dense"] == found.dense
    with pytest.raises(BadInput, match=r"as \.png or \.json, not as"):
        found.write(tmp_path / "scan.txt")


def test_the_command_prunes_heals_and_compares(adapter, tmp_path):
    how = Pruning(
        target="macs=0.5", compensate=True, heal_steps=1, heal_batch=4, heal_share=0.4, compare=True, limit=8, **FEW
    )
    report = prune_to_folder(adapter, DATA, tmp_path / "out", how)
    assert list(report.scores) == ["dense", "pruned", "healed", "random", "random, healed", "from scratch, 1 steps"]
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["healing"]["share"] <= 0.4 and record["latency"]["after"]["least_ms"] > 0
    assert "| healed |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("way", ["pruned", "merged"])
def test_the_verbs_take_a_model_that_was_made_of_an_adapter(
    way, trained, adapter, pictures, tmp_path, capsys, monkeypatch
):
    if way == "pruned":
        pruned = prune(trained, DATA, criterion="l1")
        folder = save_pruned(pruned.trained, tmp_path / "model", PruneReport(pruned.facts, pruned.kept))
    else:
        folder = merge(adapter, tmp_path / "model").folder
    status, out, _ = run(capsys, monkeypatch, "evaluate", folder, DATA, "--limit", 8, "--json")
    assert status == 0 and json.loads(out)["split"] == "validation", "nothing is scored that the adapter was trained on"
    status, out, _ = run(capsys, monkeypatch, "predict", folder, pictures, "--top", 1, "--json")
    assert status == 0 and len(json.loads(out)) == 5
    status, out, err = run(capsys, monkeypatch, "predict", folder, pictures, "--merge")
    assert status == 2 and out == "" and f"{folder} is a model" in err and err.endswith("leave --merge out.\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", DATA, "--target", "flops=0.5"], "target 'flops=0.5' must be macs=SHARE, params=SHARE or latency"),
        (["--data", DATA, "--target", "macs=1.5"], "with a share over 0 and below 1"),
        (["--data", DATA, "--criterion", "size"], "criterion must be one of taylor, activation"),
        (["--data", DATA, "--units", "channels", "--criterion", "l1"], "has no units of the kind channels"),
        (["--data", DATA, "--target", "macs=0.01", "--criterion", "l1"], "cannot be met: with one unit in each layer"),
        (["--data", DATA, "--sparsity", "1.5"], "sparsity must be a number over 0 and below 1"),
        (["--data", DATA, "--sparsity", "0.5", "--criterion", "l1"], "unknown criterion 'l1' for single weights"),
        (["--data", DATA, "--sparsity", "0.5", "--heal", "9"], "--heal would fill them again"),
        ([], "--data is missing"),
        (["--data", DATA, "--scan", "scan.txt"], "a scan is written as .png or .json, not as 'scan.txt'"),
        (["--data", DATA, "--onto", "pruned"], "--onto only cuts an adapter to fit"),
        (["--data", DATA, "--carry", "new", "--compare"], "leave carry out, or heal_steps and compare"),
        (["--data", DATA, "--carry", "."], "exists and is not an adapter; give another folder"),
    ],
)
def test_mistakes_are_one_sentence(options, words, adapter, tmp_path, capsys, monkeypatch):
    status, _, err = run(capsys, monkeypatch, "prune", adapter, "-o", tmp_path / "out", "--limit", "4", *options)
    assert status == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()

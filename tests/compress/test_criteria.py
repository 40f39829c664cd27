"""What criteria compute is what their papers say, and the least squares are those of torch.linalg.lstsq."""

import pytest
import torch
from torch.nn import functional

from inlay.bases.widths import find_groups, narrowed
from inlay.compress.prune.compensate import compensate
from inlay.compress.prune.criteria import CRITERIA, Material, score_units
from inlay.compress.prune.statistics import feature_places, observe, weight_matrix
from inlay.errors import BadInput, Unsupported
from inlay.train.losses import ModelLoss
from prunable_models import MODELS, batch_for, build

NEEDS = {"activations", "gradients"}


def watch(family, rows=4):
    """A model, its groups, a batch, and what is seen of it in two pieces."""
    model = build(family)
    batch = batch_for(model, rows)
    pieces = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 1), slice(1, None))]
    groups = find_groups(model)
    return model, groups, batch, observe(model, groups, pieces, ModelLoss(), NEEDS)


@pytest.fixture(scope="module")
def vit():
    return watch("vit")


@torch.no_grad()
def inputs_of(model, name, batch):
    """What a module is called with."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(**batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", MODELS)
def test_every_criterion_judges_every_family(family):
    model, groups, _, evidence = watch(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    normed = any("BatchNorm" in type(module).__name__ for module in model.modules())
    for name in CRITERIA:
        if name == "batchnorm" and not normed:
            with pytest.raises(Unsupported, match="have no BatchNorm"):
                score_units(name, model, groups, evidence, torch.Generator())
            continue
        scores = score_units(name, model, groups, evidence, torch.Generator().manual_seed(0))
        for group in groups:
            values = scores[group.name]
            assert values.shape == (group.units,) and values.dtype == torch.float64
            assert bool(torch.isfinite(values).all()) and (
                group.units == 1 or values.unique().numel() > 1 or name == "apoz"
            )
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


def score(name, vit, number):
    model, groups, _, evidence = vit
    return CRITERIA[name].score(Material(model, groups[number], evidence, torch.Generator()))


def test_norms_of_filters(vit):
    model = vit[0]
    weight = model.vit.layers[0].mlp.fc1.weight.double()
    torch.testing.assert_close(score("l1", vit, 1), weight.abs().sum(1))
    torch.testing.assert_close(score("l2", vit, 1), weight.square().sum(1).sqrt())
    attention = model.vit.layers[0].attention
    heads = torch.cat(
        [layer.weight.double().view(4, -1) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)], 1
    )
    torch.testing.assert_close(score("l1", vit, 0), heads.abs().sum(1))


def test_activations_of_units(vit):
    model, _, batch, _ = vit
    x, reader = inputs_of(model, "vit.layers.0.mlp.fc2", batch), model.vit.layers[0].mlp.fc2
    torch.testing.assert_close(score("apoz", vit, 1), (x > 0).double().mean((0, 1)))
    wanda = reader.weight.double().abs().sum(0) * x.double().square().sum((0, 1)).sqrt()
    torch.testing.assert_close(score("activation", vit, 1), wanda, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_taylor_is_the_square_of_the_gradient_of_a_gate(vit, number):
    model, groups, batch, _ = vit
    group = groups[number]
    reader = model.get_submodule(group.read[0].module)
    total = torch.zeros(group.units, dtype=torch.float64)
    for i in range(4):
        gate = torch.ones(group.units, requires_grad=True)

        def close(module, inputs, gate=gate):
            return inputs[0] * gate.repeat_interleave(group.read[0].places.shape[1])

        handle = reader.register_forward_pre_hook(close)
        model(**{key: value[i : i + 1] for key, value in batch.items()}).loss.backward()
        handle.remove()
        total += gate.grad.double().square()
    torch.testing.assert_close(score("taylor", vit, number), total / 4, rtol=1e-3, atol=1e-9)


def test_thinet_leaves_out_what_the_reader_misses_least(vit):
    model, _, batch, _ = vit
    x = inputs_of(model, "vit.layers.0.mlp.fc2", batch).flatten(0, 1).double()
    weight = model.vit.layers[0].mlp.fc2.weight.double()
    left, order = list(range(24)), []
    while left:  # the paper's greedy search, on the outputs themselves
        errors = [((x[:, [*order, unit]] @ weight[:, [*order, unit]].T) ** 2).sum() for unit in left]
        order.append(left.pop(int(torch.stack(errors).argmin())))
    scores = score("thinet", vit, 1)
    assert [int(scores[unit] >= scores[order[i - 1]]) for i, unit in enumerate(order)][1:] == [1] * 23
    assert set(scores.argsort()[:8].tolist()) == set(order[:8])


def test_batchnorm_reads_the_last_scale():
    model, groups, _, evidence = watch("mobilenet_v2")
    norm = model.get_submodule(groups[0].name.replace(".expansion", ".conv_3x3.normalization"))
    found = CRITERIA["batchnorm"].score(Material(model, groups[0], evidence, torch.Generator()))
    torch.testing.assert_close(found, norm.weight.double().abs())


@pytest.mark.parametrize(
    ("family", "number", "reader"),
    [
        ("vit", 1, "vit.layers.0.mlp.fc2"),
        ("vit", 0, "vit.layers.0.attention.o_proj"),
        ("gpt2", 3, "transformer.h.1.mlp.c_proj"),
        ("llama", 1, "model.layers.0.mlp.down_proj"),  # without a bias
        ("squeezenet", 0, "squeezenet.blocks.0.expand3x3"),  # patches of a kernel
        ("shufflenet_v1 of 2 groups", 2, "shufflenet.blocks.2.expand_1x1.convolution"),  # grouped
    ],
)
def test_compensation_is_least_squares(family, number, reader):
    model, groups, batch, evidence = watch(family, rows=16)
    group = groups[number]
    keep = {group.name: torch.arange(0, group.units, 2)}
    part = next(part for part in group.read if part.module == reader)
    module = model.get_submodule(reader)
    x = inputs_of(model, reader, batch)
    if isinstance(module, torch.nn.Conv2d):
        rows = functional.unfold(x, module.kernel_size, 1, module.padding, module.stride).transpose(1, 2).flatten(0, 1)
        rows = rows.unflatten(1, (module.groups, -1)).transpose(0, 1).double()
    else:
        rows = x.flatten(0, -2).double()[None]
    weight, bias = weight_matrix(module).double().clone(), getattr(module, "bias", None)
    kept = feature_places(module, part.places[keep[group.name]]).flatten()
    compensate(model, groups, evidence.seen, keep, ridge=1e-12)
    after = weight_matrix(module).double()
    for g in range(len(rows)):
        design = torch.cat([rows[g][:, kept], torch.ones(len(rows[g]), 1)], 1) if bias is not None else rows[g][:, kept]
        outputs = rows[g] @ weight[g].T
        best = design @ torch.linalg.lstsq(design, outputs, driver="gelsd").solution
        shift = (module.bias.double() - before_bias(family, reader)) if bias is not None else 0
        found = rows[g][:, kept] @ after[g][:, kept].T + shift
        torch.testing.assert_close(
            (found - outputs).square().sum(), (best - outputs).square().sum(), rtol=1e-3, atol=1e-8
        )
    untouched = [name for name, _ in build(family).named_parameters() if not name.startswith(reader)]
    readers = {part.module for part in group.read}
    fresh = build(family).state_dict()
    for name in untouched:
        if name.rpartition(".")[0] not in readers:
            assert torch.equal(model.state_dict()[name], fresh[name]), name


def before_bias(family, reader):
    return build(family).get_submodule(reader).bias.double()


def test_compensation_without_anything_left_out_changes_nothing(vit):
    model, groups, _, evidence = vit
    before = {key: value.clone() for key, value in model.state_dict().items()}
    compensate(model, groups, evidence.seen, {group.name: torch.arange(group.units) for group in groups})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_compensation_of_a_copied_unit_is_exact():
    model = build("vit")
    mlp = model.vit.layers[0].mlp
    with torch.no_grad():  # units 0 and 1 compute the same
        mlp.fc1.weight[1], mlp.fc1.bias[1] = mlp.fc1.weight[0], mlp.fc1.bias[0]
    batch, groups = batch_for(model), find_groups(model)
    evidence = observe(model, groups, [batch], ModelLoss(), {"activations"})
    before = model(**batch).logits
    keep = {"vit.layers.0.mlp": torch.tensor([0, *range(2, 24)])}
    compensate(model, groups, evidence.seen, keep, ridge=1e-9)
    torch.testing.assert_close(narrowed(model, keep)(**batch).logits, before, rtol=1e-3, atol=1e-4)


def test_padding_is_not_seen():
    model = build("bert")
    batch = batch_for(model)
    groups = find_groups(model)
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 4:] = 0
    padded = observe(model, groups, [{**batch, "attention_mask": mask}], ModelLoss(), {"activations"})
    assert {seen.rows for seen in padded.seen.values()} == {int(mask.sum())}


def test_an_unknown_criterion_is_named(vit):
    model, groups, _, evidence = vit
    with pytest.raises(BadInput, match="unknown criterion 'x'; choose one of random, l1"):
        score_units("x", model, groups, evidence, torch.Generator())

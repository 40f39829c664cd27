"""Smaller widths, and the rules that are no sums."""

import json
import shutil
from itertools import combinations

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file

from combine.cases import Convolutions, load, lora, off, partial, same_outputs, save, updates, wide, write_lora
from inlay import InlayError, PartialConfig, combine
from inlay.combine import blocks, low_rank
from inlay.combine.blocks import multiply_factors, split_rows
from inlay.combine.low_rank import choose_ranks, decompose_factors, fit_factors
from inlay.combine.rules import RULES, Settings, dare, magnitude, merge_in_blocks, ties, trim
from methods.bases import batch


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two LoRAs of the same modules, rank 4 and 6."""
    folder = tmp_path_factory.mktemp("pair")
    return save(folder / "a", "vit", lora(), 3), save(folder / "b", "vit", lora(r=6, use_rslora=True), 4)


def wanted(pair, weights=(1.0, 1.0)):
    first, second = map(updates, pair)
    return {site: weights[0] * first[site] + weights[1] * second[site] for site in first}


@pytest.mark.parametrize("width", [1, 4, 9, 10, 50])
def test_compressed_is_the_best_of_its_rank_and_says_its_error(pair, width, tmp_path):
    made = combine({pair[0]: 1.0, pair[1]: -0.5}, width=width, out=tmp_path / "out")
    found, exact = updates(tmp_path / "out"), wanted(pair, (1.0, -0.5))
    lost = whole = 0.0
    for site, delta in exact.items():
        values = torch.linalg.svdvals(delta)
        best = values[width:].square().sum().sqrt() / values.square().sum().sqrt()
        error = (found[site] - delta).norm() / delta.norm()
        assert abs(error - best) < 1e-6 and abs(made.errors[site] - best) < 1e-6
        lost, whole = lost + (error * delta.norm()) ** 2, whole + delta.norm() ** 2
    assert abs(made.error - (lost / whole) ** 0.5) < 1e-6
    assert made.widths == {"LORA": min(width, 10)}
    assert load("vit", tmp_path / "out")(**batch("vit")).logits.isfinite().all()


@pytest.mark.parametrize("error", [0.3, 0.05, 1e-4])
def test_auto_is_the_narrowest_within_the_error(pair, error, tmp_path):
    made = combine(dict.fromkeys(pair, 1.0), width="auto", error=error, out=tmp_path / "out")
    exact, found = wanted(pair), updates(tmp_path / "out")
    lost = sum((found[s] - d).square().sum() for s, d in exact.items())
    whole = sum(d.square().sum() for d in exact.values())
    assert (lost / whole) ** 0.5 <= error * 1.001 and abs((lost / whole) ** 0.5 - made.error) < 1e-6
    values = torch.cat([torch.linalg.svdvals(d)[:10] for d in exact.values()]).sort().values
    fewest = int((values.square().cumsum(0) > error**2 * whole).sum())
    shapes = load_file(tmp_path / "out/adapter_model.safetensors")
    assert sum(len(v) for k, v in shapes.items() if "lora_A" in k) in (fewest, fewest + 1)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert error < 0.01 or config["rank_pattern"] == config["alpha_pattern"] != {}
    assert load("vit", tmp_path / "out")(**batch("vit")).logits.isfinite().all()


def test_convolutions_in_groups_are_compressed_group_by_group(tmp_path):
    """Each group's rows of ΔW have a rank of their own."""
    configs = [LoraConfig(r=r, lora_alpha=5, target_modules=["conv", "grouped"]) for r in (2, 4)]
    a, b = (save(tmp_path / n, Convolutions, c, s) for n, c, s in zip("ab", configs, (3, 4), strict=True))
    first, second = updates(a), updates(b)
    exact = first["grouped"] + second["grouped"]  # 6 x 12 9, the first three rows of one group
    for rule, width in (("add", 2), ("add", "auto"), ("ties", 4), ("knots", None)):
        made = combine({a: 1.0, b: 1.0}, rule, width=width, error=0.3, density=1.0, out=tmp_path / "out")
        found = updates(tmp_path / "out")["grouped"]
        if rule in ("ties", "knots"):
            assert load(Convolutions, tmp_path / "out")(torch.zeros(1, 2, 2, dtype=torch.long)).isfinite().all()
            continue
        rank = len(load_file(tmp_path / "out/adapter_model.safetensors")["base_model.model.grouped.lora_A.weight"]) // 2
        lost = torch.cat([torch.linalg.svdvals(rows)[rank:] for rows in exact.chunk(2)]).norm() / exact.norm()
        assert abs((found - exact).norm() / exact.norm() - lost) < 1e-6 and abs(made.errors["grouped"] - lost) < 1e-6
        assert made.error <= 0.3 or width == 2
    with pytest.raises(InlayError, match="convolution in 2 groups, each with units of its own"):
        combine({a: 1.0, b: 1.0}, width=1, out=tmp_path / "none")


def test_linear_bottlenecks_have_the_narrowest_width_that_their_rank_allows(tmp_path):
    a, b = (save(tmp_path / n, "vit", wide(activation=None, sites=["mlp"]), s) for n, s in (("a", 3), ("b", 4)))
    made = combine({a: 1.0, b: 1.0}, width="auto", error=0.3, out=tmp_path / "out")
    width = made.widths["INLAY_BOTTLENECK"]
    less = combine({a: 1.0, b: 1.0}, width=width - 1, out=tmp_path / "less")
    assert made.error <= 0.3 < less.error and width < 8


def test_updates_of_zeros_and_of_one_entry_have_a_spectrum():
    zero = decompose_factors(np.zeros((5, 3), np.float32), np.zeros((3, 4), np.float32))
    assert zero.error(1) == 0 and not np.any(zero.cut(2)[0]) and zero.cut(7)[0].shape == (5, 7)
    two = fit_factors(split_rows(np.array([[2.0]], np.float32)), 3)
    assert two.up.shape == (1, 3) and np.allclose(two.up @ two.down, 2) and two.error < 1e-7
    none = fit_factors(split_rows(np.zeros((4, 2), np.float32)), 1)
    assert none.error == 0 and np.isfinite(none.up).all() and np.isfinite(none.down).all()
    assert choose_ranks({"a": [np.zeros(3, np.float32)]}, 0.1) == {"a": 1}


def relative_error(matrix, width):
    """Of the best matrix of that rank (Eckart & Young 1936)."""
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    return np.sqrt((values[width:] ** 2).sum() / (values**2).sum())


@pytest.mark.parametrize("block", [1 << 18, 50])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_dense_updates_are_cut_as_by_their_svd(shape, block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    monkeypatch.setattr(blocks, "HELD", block)  # 50: made again for each pass
    dense = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    fit = fit_factors(split_rows(dense), 5)
    assert abs(fit.error - relative_error(dense, 5)) < 1e-6 and fit.norm == pytest.approx(np.linalg.norm(dense))
    assert abs(np.linalg.norm(dense - fit.up @ fit.down) / np.linalg.norm(dense) - fit.error) < 1e-6
    assert fit.slope < 1e-5 * fit.norm


@pytest.mark.parametrize("falls", [0.0, 0.5, 2.0])
def test_directions_of_wide_updates_are_as_good_as_those_of_the_svd(falls, monkeypatch):
    """Spectra that do not fall at all, that fall as those of updates do, and fast; and a rank below the width."""
    monkeypatch.setattr(low_rank, "EXACT", 0)
    rng = np.random.default_rng(0)
    (u, _), (v, _) = (np.linalg.qr(rng.standard_normal((n, 96))) for n in (120, 96))
    dense = ((u * np.arange(1, 97) ** -falls) @ v.T).astype(np.float32)
    fit = fit_factors(split_rows(dense), 6)
    assert fit.error == pytest.approx(relative_error(dense, 6), rel=2e-3) and fit.slope < 1e-5 * fit.norm
    assert fit.error == pytest.approx(np.linalg.norm(dense - fit.up @ fit.down) / np.linalg.norm(dense), rel=1e-5)
    exact = (u[:, :4] @ v[:, :4].T).astype(np.float32)
    assert fit_factors(split_rows(exact), 6).error < 1e-6


@pytest.mark.parametrize("kind", [np.float32, np.float16])  # in half precision many entries are equal
@pytest.mark.parametrize("density", [1e-6, 0.2, 0.9])
def test_the_largest_entries_are_found_block_by_block(density, kind, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 64)
    rng = np.random.default_rng(0)
    delta = rng.standard_normal((40, 23)).astype(kind).astype(np.float32)
    delta[3] = 0
    kept = trim(delta, Settings(density))
    wanted = merge_utils.magnitude_based_pruning(torch.from_numpy(delta), max(density, 1.1 / delta.size)).numpy()
    assert np.count_nonzero(kept) == np.count_nonzero(wanted) and set(kept[kept != 0]) <= set(delta.ravel())
    assert np.array_equal(np.sort(np.abs(kept), axis=None), np.sort(np.abs(wanted), axis=None))
    delta[5, 6] = np.nan
    assert np.isnan(trim(delta, Settings(density))[5, 6]), "the check finds it"


@pytest.mark.parametrize("rule", ["ties", "magnitude"])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_rules_in_blocks_give_what_they_give_as_a_whole(rule, density, monkeypatch):
    rng = np.random.default_rng(0)
    factors = [[rng.standard_normal(shape).astype(np.float32) for shape in ((40, 3), (3, 23))] for _ in range(3)]
    weights, settings = (1.0, -0.4, 2.0), Settings(density)
    whole = RULES[rule].merge([up @ down for up, down in factors], weights, settings, "here")
    monkeypatch.setattr(blocks, "BLOCK", 64)
    monkeypatch.setattr(blocks, "HELD", 0)
    found = merge_in_blocks(RULES[rule], [multiply_factors(*own) for own in factors], weights, settings)
    assert max(len(block) for block in found) == 2, "rows of 23 entries"
    assert np.concatenate([*found]) == pytest.approx(whole, abs=1e-6)
    assert np.array_equal(np.concatenate([*found]), np.concatenate([*found])), "as often as it is asked for"


def test_bottlenecks_keep_their_important_units(tmp_path):
    a, b = (save(tmp_path / n, "vit", wide(width=w, sites=["mlp"]), s) for n, w, s in (("a", 6, 3), ("b", 2, 4)))
    weights = load_file(a / "adapter_model.safetensors")
    for key in weights:
        if key.endswith("weight"):
            weights[key][:, 4:] *= 1e-4  # two units that do next to nothing
    save_file(weights, a / "adapter_model.safetensors", {"format": "pt"})
    combine({a: 1.0, b: 1.0}, out=tmp_path / "whole")
    made = combine({a: 1.0, b: 1.0}, width=6, out=tmp_path / "out")
    assert made.widths == {"INLAY_BOTTLENECK": 6} and 0 < made.error < 1e-3
    with torch.no_grad():
        assert same_outputs("vit", load("vit", tmp_path / "out"), load("vit", tmp_path / "whole"), 1e-3)
    rng = np.random.default_rng(0)
    inputs = {f"vit.layers.{i}.mlp.fc2": rng.standard_normal((200, 32)).astype(np.float32) for i in range(3)}
    rough = combine({a: 1.0, b: 1.0}, width=3, out=tmp_path / "rough")
    combine({a: 1.0, b: 1.0}, width=3, activations=inputs, out=tmp_path / "fitted")
    assert _error_on(tmp_path / "fitted", tmp_path / "whole", inputs) < _error_on(
        tmp_path / "rough", tmp_path / "whole", inputs
    )
    assert rough.error > 0.1
    auto = combine({a: 1.0, b: 1.0}, width="auto", error=1e-3, out=tmp_path / "auto")
    assert auto.widths == {"INLAY_BOTTLENECK": 6} and 0 < auto.error < 1e-3
    for error in (0.4, 0.1):
        made = combine({a: 1.0, b: 1.0}, width="auto", error=error, activations=inputs, out=tmp_path / "auto")
        width = made.widths["INLAY_BOTTLENECK"]
        less = combine({a: 1.0, b: 1.0}, width=width - 1, activations=inputs, out=tmp_path / "less")
        assert made.error <= error < less.error and width < 8


def _error_on(folder, whole, inputs):
    """Relative error of what the bottlenecks add to these hidden states."""
    lost = size = 0.0
    for site, x in inputs.items():
        added = []
        for f in (folder, whole):
            weights = load_file(f / "adapter_model.safetensors")
            weight = weights[f"base_model.model.{site}.inlay_bottleneck_weight"]
            bias = weights[f"base_model.model.{site}.inlay_bottleneck_bias"]
            down, up = bias.split([weight.shape[1], 32])
            added.append(torch.relu(torch.from_numpy(x) @ weight[0].T + down) @ weight[1] + up)
        lost, size = lost + (added[0] - added[1]).square().sum(), size + added[1].square().sum()
    return (lost / size) ** 0.5


def test_linear_bottlenecks_are_compressed_as_updates(tmp_path):
    config = {"activation": None, "sites": ["mlp"]}
    a, b = (save(tmp_path / n, "vit", wide(width=3, **config), s) for n, s in (("a", 3), ("b", 4)))
    made = combine({a: 1.0, b: 1e-3}, width=3, out=tmp_path / "out")
    combine({a: 1.0, b: 1e-3}, out=tmp_path / "whole")
    assert 0 < made.error < 0.01
    with torch.no_grad():
        assert same_outputs("vit", load("vit", tmp_path / "out"), load("vit", tmp_path / "whole"), 0.01)


@pytest.mark.parametrize("rule", ["ties", "dare", "magnitude", "knots"])
def test_rules_work_on_the_true_updates(rule, pair, tmp_path):
    weights = (1.0, 0.5)
    made = combine(dict(zip(pair, weights, strict=True)), rule, density=0.3, seed=7, out=tmp_path / "out")
    found, first, second = updates(tmp_path / "out"), *map(updates, pair)
    for site in found:
        deltas = [first[site].float(), second[site].float()]
        if rule == "knots":
            _, s, v = torch.linalg.svd(torch.cat([d.double() for d in deltas], 1), full_matrices=False)
            assert found[site].norm() > 0 and made.errors[site] < 1e-5 and s[10:].max() < 1e-5 * s[0] and len(v)
            continue
        if rule == "dare":
            reference = torch.from_numpy(dare([d.numpy() for d in deltas], weights, Settings(0.3, 7), site))
        else:
            function = {"ties": merge_utils.ties, "magnitude": merge_utils.magnitude_prune}[rule]
            scaled = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
            reference = function(scaled, torch.ones(2), density=0.3)
        values = torch.linalg.svdvals(reference.double())
        best = (values[10:].square().sum() / values.square().sum()).sqrt()
        error = (found[site] - reference).norm() / reference.norm()
        assert abs(error - best) < 1e-5 and abs(made.errors[site] - best) < 1e-5
    again = combine(dict(zip(pair, weights, strict=True)), rule, density=0.3, seed=7, out=tmp_path / "again")
    same = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("out", "again")]
    assert same[0] == same[1] and again.errors == made.errors
    assert load("vit", tmp_path / "out")(**batch("vit")).logits.isfinite().all()


@pytest.mark.parametrize("rule", ["average", "ties", "dare", "magnitude", "knots"])
def test_rules_work_on_convolutions_next_to_linear_layers(rule, tmp_path):
    """Kernels are flat there, one column for each input channel and place."""
    weights, density, rank = (1.0, 0.5), 0.3, 2
    a, b = (write_lora(tmp_path / name, seed, rank) for name, seed in (("a", 3), ("b", 4)))
    made = combine({a: weights[0], b: weights[1]}, rule, density=density, seed=7, out=tmp_path / "out")
    found, first, second = map(updates, (tmp_path / "out", a, b))
    assert {site: own.shape for site, own in found.items()} == {site: own.shape for site, own in first.items()}
    for site, own in found.items():
        deltas = [first[site].float(), second[site].float()]
        scaled = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
        if rule == "average":
            assert (own - (deltas[0] + 0.5 * deltas[1]) / 1.5).norm() < 1e-6 * own.norm()
            continue
        if rule == "knots":
            u, s, v = torch.linalg.svd(torch.cat([delta.double() for delta in deltas], 1), full_matrices=False)
            real = int((s > 1e-5 * s[0]).sum())
            each = [part.numpy() for part in v[:real].chunk(2, dim=1)]
            whole = (u[:, :real] * s[:real]) @ torch.from_numpy(ties_of_the_paper(each, weights, density))
        elif rule == "dare":
            whole = torch.from_numpy(dare([d.numpy() for d in deltas], weights, Settings(density, 7), site)).double()
        else:
            function = {"ties": merge_utils.ties, "magnitude": merge_utils.magnitude_prune}[rule]
            whole = function(scaled, torch.ones(2), density=density).double()
        u, s, v = torch.linalg.svd(whole, full_matrices=False)
        cut = (u[:, : 2 * rank] * s[: 2 * rank]) @ v[: 2 * rank]
        assert (own - cut).norm() < 1e-4 * cut.norm()
        assert made.errors[site] == pytest.approx(((whole - cut).norm() / whole.norm()).item(), abs=1e-4)


def test_knots_of_one_adapter_at_full_density_is_that_adapter(pair, tmp_path):
    made = combine({pair[0]: 1.0}, "knots", density=1.0, out=tmp_path / "out")
    assert off(updates(tmp_path / "out"), updates(pair[0])) < 1e-5 and made.error < 1e-5


def test_averages_divide_by_the_weights(pair, tmp_path):
    made = combine({pair[0]: 3.0, pair[1]: 1.0}, "average", out=tmp_path / "out")
    assert off(updates(tmp_path / "out"), wanted(pair, (0.75, 0.25))) < 1e-6
    assert made.weights == {"a": 0.75, "b": 0.25} and made.error == 0
    combine({pair[0]: 3.0, pair[1]: -1.0}, "task_arithmetic", out=tmp_path / "forget")
    assert off(updates(tmp_path / "forget"), wanted(pair, (3.0, -1.0))) < 1e-6
    with pytest.raises(InlayError, match="add up to 0"):
        combine({pair[0]: 1.0, pair[1]: -1.0}, "average", out=tmp_path / "none")


@pytest.mark.parametrize("function", [ties, dare, magnitude])
@pytest.mark.parametrize("density", [1e-6, 0.5, 1.0])
def test_rules_are_safe_on_tiny_and_empty_updates(function, density):
    for shape in ((1,), (1, 1), (3, 2), (0, 4)):
        zeros = [np.zeros(shape, np.float32)] * 3
        found = function(zeros, [1.0, 2.0, -1.0], Settings(density), "here")
        assert found.shape == shape and not np.any(found)
    one = function([np.array([2.0], np.float32)], [1.0], Settings(density), "here")
    assert np.isfinite(one).all() and (function is dare or one[0] == 2)


def ties_of_the_paper(deltas, weights, density):
    """Yadav et al. 2023, algorithm 1, on the task vectors w·τ: trim, elect sgn(Σ w τ), mean of those that have it."""
    scaled = []
    for weight, delta in zip(weights, deltas, strict=True):
        own = weight * delta.astype(float)
        count = max(int(density * own.size), 1)
        least = np.sort(np.abs(own), axis=None)[-count]
        scaled.append(np.where(np.abs(own) >= least, own, 0))
    sign = np.sign(sum(scaled))
    agree = [(np.sign(own) == sign) & (own != 0) for own in scaled]
    return sum(own * a for own, a in zip(scaled, agree, strict=True)) / np.maximum(sum(agree), 1)


WEIGHTS = [(1, 1, 1), (1, 0.2, 3), (1, -1, 0.5), (-2, -0.5, -1), (1, 1e-9, 1e-9), (0.3, 0, -0.7), (5, -4.9, 1e-3)]


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_rules_with_any_weights_equal_their_formulas(weights, density):
    rng = np.random.default_rng(0)
    deltas = [rng.standard_normal((20, 31)).astype(np.float32) for _ in weights]
    settings = Settings(density, 5)
    assert ties(deltas, weights, settings, "here") == pytest.approx(
        ties_of_the_paper(deltas, weights, density), abs=1e-6
    )
    # Both others are linear in the weights: the sum of what each update becomes with the weight 1 by itself.
    pruned = [merge_utils.magnitude_based_pruning(torch.from_numpy(delta), density).numpy() for delta in deltas]
    wanted = sum(weight * own for weight, own in zip(weights, pruned, strict=True))
    assert magnitude(deltas, weights, settings, "here") == pytest.approx(wanted, abs=1e-5)
    each = [dare(deltas, [float(i == k) for i in range(3)], settings, "here") for k in range(3)]
    wanted = sum(weight * own for weight, own in zip(weights, each, strict=True))
    assert dare(deltas, weights, settings, "here") == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("function", [ties, dare, magnitude])
def test_a_tiny_weight_takes_nothing_away(function):
    rng = np.random.default_rng(0)
    deltas = [rng.standard_normal((20, 31)).astype(np.float32) for _ in range(2)]
    found = function(deltas, (1.0, 1e-9), Settings(1.0), "here")
    # The mean of two that have one sign is half the first; no entry vanishes or turns round.
    assert (found * deltas[0] >= (0.5 if function is ties else 1) * deltas[0] ** 2 - 1e-6).all()


def test_ties_of_an_update_and_its_opposite_is_nothing():
    delta = np.array([[1.0, -2.0, 0.0]], np.float32)
    assert not ties([delta, delta], (1.0, -1.0), Settings(1.0), "here").any()


def test_knots_of_adapters_that_share_a_space_leaves_out_the_directions_of_rounding(pair, tmp_path):
    """Of an adapter and itself: [ΔW ΔW] has the rank of ΔW, and ties of two equal V keeps the largest entries of V."""
    copy = tmp_path / "copy"
    shutil.copytree(pair[0], copy)
    combine({pair[0]: 1.0, copy: 1.0}, "knots", density=0.5, out=tmp_path / "out")
    found, own = updates(tmp_path / "out"), updates(pair[0])
    for site, delta in own.items():
        u, s, v = torch.linalg.svd(torch.cat([delta, delta], 1), full_matrices=False)
        rank = int((s > 1e-5 * s[0]).sum())
        kept = merge_utils.magnitude_based_pruning(v[:rank, : delta.shape[1]], 0.5)
        wanted = (u[:, :rank] * s[:rank]) @ kept
        assert (found[site] - wanted).norm() < 1e-4 * wanted.norm()


def test_dare_draws_by_site_seed_and_adapter():
    ones = [np.ones((8, 9), np.float32)] * 2
    first = dare(ones, [1.0, 100.0], Settings(0.5, 7), "layers.0.q_proj")
    assert set(np.unique(first)) == {0, 2, 200, 202}, "each adapter has entries of its own"
    state = torch.get_rng_state()
    assert np.array_equal(first, dare(ones, [1.0, 100.0], Settings(0.5, 7), "layers.0.q_proj"))
    assert torch.equal(torch.get_rng_state(), state)
    for seed, site in ((7, "layers.0.k_proj"), (7, "layers.1.q_proj"), (8, "layers.0.q_proj")):
        assert not np.array_equal(first, dare(ones, [1.0, 100.0], Settings(0.5, seed), site))


def test_dare_drops_other_entries_at_modules_of_the_same_shape(tmp_path):
    """Also through combine, of differences and of a LoRA."""
    names = ["q_proj", "k_proj"]
    dense = save(tmp_path / "dense", "vit", PartialConfig(target_modules=names), 3)
    combine({dense: 1.0}, "dare", density=0.5, out=tmp_path / "dropped")
    dropped = load_file(tmp_path / "dropped/adapter_model.safetensors")
    kept = [value != 0 for key, value in dropped.items() if key.endswith("delta.weight")]
    assert len(kept) > 2 and {tuple(k.shape) for k in kept} == {(32, 32)}
    assert all(0.4 < k.double().mean() < 0.6 for k in kept)
    assert not any(torch.equal(a, b) for a, b in combinations(kept, 2))

    low = save(tmp_path / "low", "vit", lora(r=32, target_modules=names), 3)  # as wide as any update
    combine({low: 1.0}, "dare", density=0.5, out=tmp_path / "full")
    kept = [value.abs() > 1e-4 * value.abs().max() for value in updates(tmp_path / "full").values()]
    assert len(kept) > 2 and all(0.4 < k.double().mean() < 0.6 for k in kept)
    assert not any(torch.equal(a, b) for a, b in combinations(kept, 2))


def test_rules_work_on_differences_and_refuse_what_has_none(tmp_path):
    a, b = (save(tmp_path / n, "vit", partial(), s) for n, s in (("a", 3), ("b", 4)))
    combine({a: 1.0, b: 1.0}, "ties", density=0.2, out=tmp_path / "out")
    first, second, found = (load_file(f / "adapter_model.safetensors") for f in (a, b, tmp_path / "out"))
    for key, value in found.items():
        density = max(0.2, 1 / value.numel() * (1 + 1e-9))
        assert torch.equal(value, merge_utils.ties([first[key], second[key]], torch.ones(2), density=density))
    c = save(tmp_path / "c", "vit", wide(), 5)
    for given, rule, more, reason in [
        ({c: 1.0}, "ties", {}, "updates of weights, which a bottleneck does not have; use add"),
        ({a: 1.0}, "knots", {}, "factors of low-rank updates"),
        ({a: 1.0}, "add", {"width": 4}, "partial fine-tuning has no width; leave width out"),
        ({a: 1.0}, "best", {}, f"unknown rule 'best'; choose one of {', '.join(RULES)}"),
        ({a: 1.0}, "ties", {"density": 0}, "density must be above 0"),
        ({a: 1.0}, "add", {"width": 0}, "width must be a whole number of at least 1"),
        ({}, "add", {}, "no adapters to combine"),
    ]:
        with pytest.raises(InlayError, match=reason):
            combine(given, rule, out=tmp_path / "refused", **more)
        assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("rule", ["add", "ties", "knots"])
def test_nan_below_a_width_is_refused(rule, pair, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(pair[0], broken)
    weights = load_file(broken / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, broken / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(InlayError, match="NaN or Inf"):
        combine({broken: 1.0, pair[1]: 1.0}, rule, width=3, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()

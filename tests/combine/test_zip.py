"""The rule zip: columns scaled so that the updates interfere least, against dense least squares in float64."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from combine.cases import LAYERS, Convolutions, load, off, partial, save, updates, write_lora
from inlay import InlayError, combine
from inlay.combine.rules import RIDGE, zip_columns

KERNELS = {site: int(np.prod(sizes[1][1:])) for site, sizes in LAYERS.items()}  # places of an input channel


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zip")
    return [write_lora(folder / name, seed, rank) for name, seed, rank in (("a", 3, 3), ("b", 4, 2), ("c", 5, 4))]


def split_columns(delta, places):
    """(channels, d_out times places): what each input channel adds to the output."""
    rows = delta.numpy().reshape(len(delta), -1, places)
    return rows.swapaxes(0, 1).reshape(rows.shape[1], -1)


def fit_column(columns):
    """Σ m_i c_i with the m that minimise the objective, by least squares on the columns themselves (d, k)."""
    sizes = (columns**2).sum(0)
    root = np.sqrt(RIDGE * sizes.sum())
    matrix = np.concatenate([columns.T @ columns, root * columns])
    return columns @ np.linalg.lstsq(matrix, np.concatenate([sizes, root * columns.sum(1)]), rcond=None)[0]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -1.3), (1.0, 1.0, 1.0), (2.0, 0.1, -1.0)])
def test_the_columns_minimise_the_objective(weights, trio, tmp_path):
    folders = trio[: len(weights)]
    made = combine(dict(zip(folders, weights, strict=True)), "zip", out=tmp_path / "out")
    found, deltas = updates(tmp_path / "out"), [updates(folder) for folder in folders]
    for site, places in KERNELS.items():
        each = [weight * split_columns(own[site], places) for weight, own in zip(weights, deltas, strict=True)]
        wanted = np.stack([fit_column(np.stack(columns, 1)) for columns in zip(*each, strict=True)])
        added = sum(each)
        assert np.abs(split_columns(found[site], places) - wanted).max() < 1e-5 * np.abs(wanted).max()
        assert np.linalg.norm(wanted - added) > 0.02 * np.linalg.norm(added)  # it is no plain sum
    assert made.error == 0 and made.widths == {"LORA": sum((3, 2, 4)[: len(weights)])}


def test_one_adapter_stays_as_it_is(trio, tmp_path):
    files = []
    for rule in ("zip", "add"):
        combine({trio[0]: 0.7}, rule, out=tmp_path / rule)
        files.append(load_file(tmp_path / rule / "adapter_model.safetensors"))
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[1])


def test_columns_that_do_not_meet_are_added(tmp_path):
    """One adapter writes the first outputs, the other the rest."""

    def keep(rows):
        def change(weights):
            for key in weights:
                if "lora_B" in key:
                    weights[key][rows] = 0

        return change

    a = write_lora(tmp_path / "a", 3, change=keep(slice(3, None)))
    b = write_lora(tmp_path / "b", 4, change=keep(slice(0, 3)))
    for rule in ("zip", "add"):
        combine({a: 1.0, b: -0.5}, rule, out=tmp_path / rule)
    assert off(updates(tmp_path / "zip"), updates(tmp_path / "add")) < 1e-6


def test_an_adapter_and_its_copy_are_little_more_than_one(trio, tmp_path):
    copy = write_lora(tmp_path / "copy", 3, 3)
    combine({trio[0]: 1.0, copy: 1.0}, "zip", out=tmp_path / "out")
    share = (2 + 4 * RIDGE) / (2 + 2 * RIDGE)
    assert off(updates(tmp_path / "out"), {site: share * d for site, d in updates(trio[0]).items()}) < 1e-6
    assert share == pytest.approx(1.09, abs=0.001)  # as the docs say


def test_weights_near_zero_leave_the_others_alone(trio, tmp_path):
    a, b, _ = trio
    combine({a: 1.0, b: 1e-6}, "zip", out=tmp_path / "near")
    combine({a: 1.0, b: 0.0}, "zip", out=tmp_path / "zero")
    assert off(updates(tmp_path / "near"), updates(a)) < 1e-5
    assert off(updates(tmp_path / "zero"), updates(a)) < 1e-6


def test_the_order_of_the_adapters_does_not_count(trio, tmp_path):
    a, b, c = trio
    combine({a: 1.0, b: 0.5, c: 2.0}, "zip", out=tmp_path / "one")
    combine({c: 2.0, a: 1.0, b: 0.5}, "zip", out=tmp_path / "other")
    assert off(updates(tmp_path / "one"), updates(tmp_path / "other")) < 1e-6


@pytest.mark.parametrize("width", [2, "auto"])
def test_a_smaller_width_is_the_best_of_what_the_rule_gives(width, trio, tmp_path):
    pair = dict.fromkeys(trio[:2], 1.0)
    whole = combine(pair, "zip", out=tmp_path / "whole").folder
    first = combine(pair, "zip", width=width, error=0.4, out=tmp_path / "at once")
    then = combine({whole: 1.0}, width=width, error=0.4, out=tmp_path / "then")
    assert off(updates(first.folder), updates(then.folder)) < 1e-4
    assert first.error == pytest.approx(then.error, rel=1e-4) and first.error > 0.05
    assert first.widths == then.widths


def test_groups_embeddings_and_biases(tmp_path):
    """Of a convolution in groups A sees all channels, of an embedding the tokens are the inputs."""
    configs = [LoraConfig(r=r, lora_alpha=5, target_modules=["table", "conv", "grouped"]) for r in (2, 4)]
    a, b = (save(tmp_path / n, Convolutions, c, s) for n, c, s in zip("ab", configs, (3, 4), strict=True))
    combine({a: 1.0, b: -0.5}, "zip", out=tmp_path / "out")
    found, first, second = updates(tmp_path / "out"), updates(a), updates(b)
    for site, places in (("table", 1), ("conv", 9), ("grouped", 9)):
        each = [split_columns(first[site], places), -0.5 * split_columns(second[site], places)]
        wanted = np.stack([fit_column(np.stack(columns, 1)) for columns in zip(*each, strict=True)])
        assert np.abs(split_columns(found[site], places) - wanted).max() < 1e-5 * np.abs(wanted).max()
    ids = torch.arange(2 * 5 * 4).view(2, 5, 4) % 20
    assert load(Convolutions, tmp_path / "out")(ids).isfinite().all()


def test_a_bias_is_the_column_of_an_input_that_is_always_one(tmp_path):
    folders = []
    for name, seed in (("a", 3), ("b", 4)):

        def add_bias(weights, seed=seed):
            bias = torch.randn(6, generator=torch.Generator().manual_seed(seed))
            weights["base_model.model.text.fc.lora_B.bias"] = bias

        folder = write_lora(tmp_path / name, seed, layers={"text.fc": ((6,), (8,))}, change=add_bias)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_bias": True}))
        folders.append(folder)
    combine(dict.fromkeys(folders, 1.0), "zip", out=tmp_path / "out")
    each = [updates(folder)["text.fc.bias"][0].numpy() for folder in folders]
    found = updates(tmp_path / "out")["text.fc.bias"][0].numpy()
    assert found == pytest.approx(fit_column(np.stack(each, 1)), abs=1e-5)


def test_columns_of_zeros_and_of_any_size_have_coefficients():
    assert (zip_columns(np.zeros((2, 3, 3))) == 1).all()
    for size in (1e-30, 1e30):
        columns = np.random.default_rng(0).standard_normal((4, 5, 2)) * np.sqrt(size)
        grams = columns.swapaxes(1, 2) @ columns
        assert zip_columns(grams) == pytest.approx(zip_columns(grams / size), rel=1e-6)


def test_what_has_no_factors_is_refused(trio, tmp_path):
    whole = save(tmp_path / "whole", "vit", partial(), 3)
    for adapters, more, reason in [
        ({whole: 1.0}, {}, "zip works on the factors of low-rank updates; use ties for differences of weights"),
        (
            {trio[0]: 1.0},
            {"dense": True, "base": "x"},
            "zip works on the factors .*leave dense out",
        ),
        ({trio[0]: 1.0}, {"fit": "builtin:digits"}, "fitted for add, average and task_arithmetic, which are linear"),
    ]:
        with pytest.raises(InlayError, match=reason):
            combine(adapters, "zip", out=tmp_path / "out", **more)
        assert not (tmp_path / "out").exists()


def test_what_is_no_number_is_refused(trio, tmp_path):
    def spoil(weights):
        next(iter(weights.values()))[0, 0] = float("nan")

    spoilt = write_lora(tmp_path / "spoilt", 4, change=spoil)
    with pytest.raises(InlayError, match="NaN or Inf"):
        combine({trio[0]: 1.0, spoilt: 1.0}, "zip", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()

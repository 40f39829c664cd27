"""What a search says about places, from trials whose places are known."""

import math

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ttest_ind

from inlay import METHODS
from inlay.study.tune.placement import Cell, Placement, compare_places, find_adapted_places
from methods.bases import build


def adapted_places(method, base, **narrow):
    from inlay import narrow_sites

    model, row = build(base), METHODS[method]
    return find_adapted_places(row.attach(model, narrow_sites(row.make_config(model, 2), model, **narrow)))


@pytest.mark.parametrize(
    ("method", "base", "narrow", "expected"),
    [
        ("lora", "vit", {}, {(b, kind) for b in range(3) for kind in ("attention", "mlp")}),
        ("lora", "vit", {"blocks": (0, 2), "modules": "mlp"}, {(0, "mlp"), (2, "mlp")}),
        ("bottleneck", "bert", {"blocks": (1,)}, {(1, "attention"), (1, "mlp")}),
        ("bottleneck-parallel", "gpt2", {}, {(b, "mlp") for b in range(3)}),
        ("attention-prefix", "llama", {"blocks": (2,)}, {(2, "attention")}),
        ("adapter-plus", "vit", {"blocks": (1,)}, {(1, "rest")}),
        ("visual-prompt", "vit", {}, {(b, "rest") for b in range(3)}),
        ("ssf", "vit", {"blocks": (0,)}, {(0, "attention"), (0, "mlp"), (0, "rest")}),
        ("prompt", "gpt2", {}, set()),
        ("lora-prompt", "vit", {"blocks": (0,)}, {(0, "attention"), (0, "mlp"), (0, "rest")}),
    ],
)
def test_where_an_adapter_trains(method, base, narrow, expected):
    assert adapted_places(method, base, **narrow) == expected


def test_differences_and_their_errors_are_those_of_welch():
    random = np.random.default_rng(0)
    places = {i: {(b, "mlp") for b in range(3) if random.random() < 0.5} for i in range(12)}
    scores = {i: float(random.normal()) + 2.0 * ((1, "mlp") in places[i]) for i in places}
    cells = {cell.block: cell for cell in compare_places(scores, places)}
    for block, cell in cells.items():
        adapting = [scores[i] for i in places if (block, "mlp") in places[i]]
        others = [scores[i] for i in places if (block, "mlp") not in places[i]]
        welch = ttest_ind(adapting, others, equal_var=False)
        assert cell.difference == pytest.approx(np.mean(adapting) - np.mean(others))
        assert cell.difference / cell.error == pytest.approx(welch.statistic)
        assert (cell.adapting, cell.others) == (len(adapting), len(others))
    assert cells[1].clear and not cells[0].clear


def test_a_place_that_all_or_none_adapt_has_no_cell_and_a_single_trial_no_error():
    cells = compare_places({0: 1.0, 1: 2.0, 2: 4.0}, {0: {(0, "mlp")}, 1: {(0, "mlp")}, 2: {(0, "mlp"), (1, "mlp")}})
    assert [(cell.block, cell.difference) for cell in cells] == [(1, 2.5)] and math.isnan(cells[0].error)
    assert not cells[0].clear
    assert "too few, or too alike" in str(Placement("digits", "accuracy", 3, 10, cells))


def test_the_image_has_a_cell_for_each_place(tmp_path):
    cells = [
        Cell(0, "attention", 0.2, 0.05, 3, 9),
        Cell(1, "attention", -0.2, math.nan, 1, 11),
        Cell(1, "mlp", 0.0, 0.05, 4, 8),
    ]
    found = Placement("digits", "accuracy", 12, 10, cells)
    text = str(found)
    assert "attention of block 0 +0.200 ± 0.050 (3 of 12)" in text and "1 of 2 places differ" in text
    image = np.asarray(Image.open(found.draw(tmp_path / "p.png")).convert("RGB")).astype(int)
    reds, blues = (image == (202, 80, 32)).all(-1), (image == (201, 215, 234)).all(-1)  # a quarter of (40, 96, 170)
    assert reds.sum() > 1500 and blues.sum() > 1500  # one cell each, and an end of the legend
    assert reds[:, : np.where(blues)[1].max()].any()
    ys, xs = np.where(reds[:130])
    assert np.ptp(xs) > 80 and np.ptp(ys) > 30

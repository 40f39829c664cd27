"""What a search may try: places of a base, widths and costs that keep to a budget."""

from dataclasses import replace
from itertools import islice

import pytest

from convolutional_networks import build_network
from inlay import METHODS, BadInput, ImageTask, Problem, TrainConfig, Trial, parse_budget
from inlay.bases.sites import linear_shape
from inlay.measure import count_macs
from inlay.study.tune import limits as limits_module
from inlay.study.tune.limits import Limits
from inlay.study.tune.space import Space, find_widest, list_places
from methods.bases import build

METHODS_HERE = ["bottleneck-parallel", "ssf"]


@pytest.fixture(scope="module")
def problem(digits, tmp_path_factory):
    train = TrainConfig(batch_size=4, epochs=1, workers=0)
    return Problem(ImageTask("builtin:vit-tiny", str(digits)), train, tmp_path_factory.mktemp("space") / "s")


@pytest.fixture(scope="module")
def base(problem):
    return problem.load_base_skeleton()


def space(problem, budget, methods=METHODS_HERE, **options):
    places, limits = list_places(problem.load_base_skeleton()), Limits(problem, parse_budget(budget))
    return Space(methods, places, limits, lambda trial: METHODS[trial.method].learning_rate, **options)


def lora_parameters(base, rank, block=None):
    """r (in + out) of every linear layer in the blocks."""
    within = "layers." if block is None else f"layers.{block}."
    layers = [m for n, m in base.named_modules() if type(m).__name__ == "Linear" and within in n]
    return sum(rank * sum(linear_shape(layer)) for layer in layers)


@pytest.mark.parametrize(
    "count",
    [lambda w: 7 * w + 3, lambda w: 2 * w + 9 * w * w, lambda w: 100 * ((w + 7) // 8), lambda w: 50, lambda w: w**0.5],
)
@pytest.mark.parametrize("most", [0, 3, 50, 99, 1000, 10**9])
def test_the_widest_that_fits_is_found_with_few_counts(count, most):
    asked = []
    found = find_widest(lambda width: asked.append(width) or count(width), most, 100)
    assert found == max((width for width in range(1, 101) if count(width) <= most), default=0)
    assert len(asked) <= 4 + 7  # and a bisection of 100


def test_few_counts_are_enough_where_each_unit_costs_the_same():
    asked = []
    assert find_widest(lambda width: asked.append(width) or 13 * width + 5, 1000, 500) == 76
    assert len(asked) <= 4


def test_places_of_a_transformer_and_of_a_network_in_stages():
    found = {place.name: place for place in list_places(build("vit"))}  # 3 blocks
    assert [name for name in found if "," not in name] == [
        "all blocks", "first half", "last half", "every second block", "last third",
    ]  # fmt: skip
    assert found["first half"].blocks == (0,) and found["last half, mlp"].blocks == (1, 2)
    assert found["last third, attention"].modules == "attention"
    stages = list_places(build_network("ResNet"))  # stages of 1 and 2 blocks
    assert {place.blocks for place in stages if place.name.startswith("stage")} <= {(0,), (1, 2)}
    assert {place.modules for place in stages} == {"all"}


def test_widths_are_the_widest_and_powers_of_two(problem, base):
    here = space(problem, "params=20k", widest=64)
    first_half = next(place for place in here.places if place.name == "first half")
    each = lora_parameters(base, 1) // 2  # a unit of rank in two of four blocks
    assert here.find_widths("lora", here.places[0]) == [20_000 // (2 * each), 1][: 20_000 // (2 * each)]
    assert here.find_widths("lora", first_half) == [20_000 // each, *[w for w in (4, 2, 1) if w < 20_000 // each]]
    assert here.limits.count_params(Trial("lora", 0.0, 3, (0, 1))) == 3 * each
    assert here.find_widths("ssf", first_half) == [1]
    assert space(problem, "trials=2", widest=48).find_widths("lora", first_half) == [48, 32, 16, 8]


def test_all_that_is_drawn_keeps_to_the_budget_and_methods_take_turns(problem):
    budget = "params=6k,macs=+0.6%"
    drawn = list(islice(space(problem, budget, widest=48).draw(), 6))
    base_macs = count_macs(problem.load_base_skeleton(), problem.data.example())
    for trial in drawn:
        model = problem.skeleton(trial)
        trained = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n)
        assert 0 < trained <= 6000
        if not METHODS[trial.method].merges:
            assert count_macs(model, problem.data.example()) <= 1.006 * base_macs
        start = METHODS[trial.method].learning_rate
        assert start / 10**0.76 < trial.learning_rate < start * 10**0.76
    turns = [trial.method for trial in drawn]
    assert turns[:2] * 3 == turns and set(turns) == set(METHODS_HERE)
    assert any(trial.blocks is None for trial in drawn) and any(trial.blocks is not None for trial in drawn)


def test_what_is_drawn_depends_on_the_seed_only(problem):
    def draw(seed):
        return list(islice(space(problem, "trials=2", ["ssf"], seed=seed).draw(), 3))

    assert draw(0) == draw(0) and draw(0) != draw(1)


def test_where_nothing_fits_the_reason_is_said(problem):
    with pytest.raises(BadInput, match=r"lora: .* parameters at least, 5 allowed"):
        next(space(problem, "params=5", methods=["lora"]).draw())


def test_merged_a_lora_adds_no_work_and_unmerged_its_own(problem, base):
    trial, tokens = Trial("lora", 0.0, 2, (1,)), 17  # 16 patches and the class token
    budget = parse_budget("macs=+0.001%")
    assert Limits(problem, budget).explain_excess(trial) is None
    unmerged = Limits(problem, budget, merged=False)
    adapted, before = unmerged.find_costs(trial).macs
    image = base.config.image_size // base.config.patch_size
    tokens = image**2 + 1
    assert adapted - before == tokens * lora_parameters(base, 2, block=1)
    assert "macs" in unmerged.explain_excess(trial)


def test_latency_is_measured_once_and_kept(problem, monkeypatch):
    calls = []

    class Turn:
        def __init__(self, ms):
            self.median_ms = ms

    def by_turns(states, inputs):
        calls.append(1)
        return {"adapted": [Turn(11), Turn(24), Turn(33)], "base": [Turn(10), Turn(20), Turn(30)]}  # load grows

    monkeypatch.setattr(limits_module, "time_by_turns", by_turns)
    trial = Trial("bottleneck", 0.0, 2)
    limits = Limits(problem, parse_budget("latency=+9%"))
    assert limits.find_costs(trial).latency_ms == pytest.approx((22, 20))  # 10 % more in the median turn
    assert limits.explain_excess(trial) == "latency 22, 21.8 allowed"
    assert Limits(problem, parse_budget("latency=+11%")).explain_excess(trial) is None
    assert Limits(problem, parse_budget("latency=22.5ms")).explain_excess(trial) is None
    assert len(calls) == 1  # in the records since then
    assert Limits(problem, parse_budget("latency=+1%")).find_costs(Trial("lora", 0.0, 2)).latency_ms is None  # merged


def test_file_and_memory(problem):
    trial = Trial("lora", 0.0, 2)
    limits = Limits(problem, parse_budget("file=1kB,memory=1GB"))
    costs = limits.find_costs(trial)
    assert 4 * costs.params < costs.file < 4 * costs.params + 60_000  # head, names and what a file says of itself
    assert limits.explain_excess(trial) == f"file {costs.file:,} bytes, 1,000 allowed"
    for budget, reason in (("file=1MB,memory=1kB", "memory"), ("file=1MB,memory=1GB", "None")):
        assert reason in str(replace(limits, budget=parse_budget(budget)).explain_excess(trial))

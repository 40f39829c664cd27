"""A budget as it is written on a command line."""

import pytest

from inlay import BadInput, parse_budget
from inlay.study.tune.budget import Budget, Limit


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("params=200k", Budget(params=200_000)),
        ("params=1.5M,trials=4", Budget(params=1_500_000, trials=4)),
        ("params=4096", Budget(params=4096)),
        (" latency=+5% , minutes=20 ", Budget(latency=Limit(0.05, True), seconds=1200)),
        ("latency=12.5ms", Budget(latency=Limit(12.5))),
        ("latency=2s,seconds=90", Budget(latency=Limit(2000), seconds=90)),
        ("macs=+1%", Budget(macs=Limit(0.01, True))),
        ("macs=20M", Budget(macs=Limit(20e6))),
        ("file=500kB,memory=2GB", Budget(file=500_000, memory=2_000_000_000)),
    ],
)
def test_values_and_units(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "names no limit"),
        ("parameters=3", "unknown limit 'parameters=3'"),
        ("params", "unknown limit 'params'"),
        ("params=", "params= is no limit; write it as params=200k"),
        ("params=-3", "params=-3"),
        ("params=0", "params=0"),
        ("params=+5%", "params=200k"),
        ("params=1e5", "params=1e5"),
        ("params=2kB", "params=2kB"),
        ("macs=1%", "macs=20M or macs=.1%"),
        ("latency=5", "latency=12ms or"),
        ("latency=+12ms", "latency=12ms or"),
        ("memory=2", "memory=2GB"),
        ("trials=0.5", "trials=16"),
        ("minutes=nan", "minutes=20"),
        ("params=1k,params=2k", "params again"),
        ("minutes=1,seconds=4", "seconds again"),
        ("minutes=3,trials=4", "give one of them"),
    ],
)
def test_a_mistake_is_one_sentence(text, match):
    with pytest.raises(BadInput, match=match) as caught:
        parse_budget(text)
    assert str(caught.value).count("\n") == 0


def test_a_share_is_of_what_the_base_has():
    assert Limit(0.05, True).of(200) == 210 and Limit(12).of(200) == 12

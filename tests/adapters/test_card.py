"""What a card says of costs, measured by this inlay, by an earlier one or not at all; what the Hub would not read."""

import pytest

from inlay import InlayError
from inlay.adapters.card import address_card, make_card
from inlay.adapters.file import read_adapter

MEASURED = {
    "parameters": 150,
    "trainable_parameters": 40,
    "weights_mb": 0.0006,
    "base_parameters": 100,
    "base_weights_mb": 0.0004,
    "mmacs": 12.5,
    "latency_ms": 3.0,
    "energy_j": 0.0123,
    "energy_source": "measured: RAPL, package-0 with idle power and other processes",
    "base_mmacs": 10.0,
    "base_latency_ms": 2.5,
    "base_energy_j": 0.0100,
    "latency_spread_ms": 0.25,
    "device": "cpu",
    "threads": 1,
}


@pytest.fixture(scope="module")
def costs_of(original):
    """A function that gives the section on costs of a card with these."""
    file = read_adapter(original[1])

    def costs_of(cost):
        text = make_card(file.record, file.config, {"cost": cost})
        return text.split("## Cost\n")[1].split("\n## ")[0].strip()

    return costs_of


def test_costs_stand_beside_those_of_the_base_alone(costs_of):
    said = costs_of(MEASURED)
    assert "| measure | base only | with the adapter | the adapter adds |" in said
    assert "| parameters | 100 | 150 | 50 (+50.0%) |" in said
    assert "| parameters that were trained, head included |  | 40 |  |" in said
    assert "| multiply-accumulates of one input, millions | 10.000 | 12.500 | 2.500 (+25.0%) |" in said
    assert "| latency of one input, ms, median | 2.500 | 3.000 | 0.5 (+20.0%) |" in said
    assert "| energy of one input, J | 0.01 | 0.0123 | 0.0023 (+23.0%) |" in said
    assert (
        "Measured on cpu, threads: 1. Latencies were taken by turns, between which a median varied by 0.25 ms." in said
    )
    assert said.endswith("Energy measured: RAPL, package-0 with idle power and other processes.")
    assert "energy source" not in said and "spread" not in said


def test_energy_that_is_unavailable_and_a_base_that_has_no_use_for_the_input(costs_of):
    lacking = {k: v for k, v in MEASURED.items() if k not in ("base_mmacs", "base_latency_ms") and "energy_j" not in k}
    said = costs_of({**lacking, "energy_source": "unavailable: the machine shows no RAPL counter"})
    assert "| latency of one input, ms, median |  | 3.000 |  |" in said
    assert "energy of one input" not in said and "turns" not in said
    assert "The base itself has no use for this input. Energy unavailable: the machine shows no RAPL counter." in said


def test_costs_of_an_earlier_inlay_and_none(costs_of):
    said = costs_of({"parameters": 5, "latency_ms": 2.0, "device": "cpu"})
    assert "| parameters | 5 |" in said and "base only" not in said
    assert said.endswith("Measured on cpu, threads: unknown. Energy was not measured.")
    assert costs_of({}) == "Not measured."


def test_settings_of_any_kind_keep_the_table_a_table(original):
    file = read_adapter(original[1])
    text = make_card(file.record, file.config, {"training": {"dataset": "a|b", "separator": "x\ny"}})
    assert "| dataset | `a\\|b` |" in text and "| separator | `x y` |" in text


@pytest.mark.parametrize("header", ["---\nfoo: [\n---\n", "---\n- a\n- b\n---\n"])
def test_a_header_that_the_hub_cannot_read_is_one_sentence(header):
    with pytest.raises(InlayError, match=r"the header of the card is not as the Hub reads it: .* Correct it"):
        address_card(header + "# Text", "ann/zoo")


def test_a_licence_is_a_name_that_the_hub_could_know():
    for text in ("# Text", "", "---\ntags:\n- a\n---\n# Text"):
        assert "license: cc-by-4.0" in address_card(text, "ann/zoo", licence="cc-by-4.0")
    for wrong in ("Apache 2.0", "mit\nx: y", "\udcff"):
        with pytest.raises(InlayError, match=r"unknown form of a licence: .* such as apache-2\.0"):
            address_card("# Text", "ann/zoo", licence=wrong)


def test_a_card_names_who_trained_it(zoo):
    file = read_adapter(zoo)
    assert "Trained by" not in make_card(file.record, file.config, file.metrics)
    assert "Trained by A. Author. Versions: python" in make_card(
        file.record, file.config, {**file.metrics, "trained_by": "A. Author"}
    )

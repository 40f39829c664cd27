"""Tables of a comparison: the numbers are those of scipy and of hand calculation, and every form shows the same."""

import csv
import io
import math
from dataclasses import replace

import pytest
from scipy import stats

from inlay.study.report.standing import find_best, find_standings
from inlay.study.report.table import (
    list_overview,
    write_csv_table,
    write_markdown_table,
    write_overview_table,
    write_terminal_table,
)
from study.report.examples import make_comparison

COMPARISON = make_comparison()


def standing(method, comparison=COMPARISON):
    return next(each for each in find_standings(comparison) if each.method == method)


def scores(method):
    return next(row for row in COMPARISON.rows if row.method == method).scores["accuracy"]


@pytest.mark.parametrize("method", ["full", "lora", "probe"])
def test_intervals_are_those_of_a_t_test(method):
    found = standing(method).scores["accuracy"]
    expected = stats.ttest_1samp(scores(method), 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("method", ["lora", "convpass", "probe"])
def test_the_difference_to_the_best_is_that_of_a_paired_t_test(method):
    found = standing(method)
    expected = stats.ttest_rel(scores(method), scores("full"))
    interval = expected.confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))
    assert found.ties == (expected.pvalue > 0.05)


def test_a_seed_that_failed_is_left_out_of_means_and_pairs():
    pairs = [(a, b) for a, b in zip(scores("attention-prefix"), scores("full"), strict=True) if not math.isnan(a)]
    assert len(pairs) == 4
    found = standing("attention-prefix")
    assert found.scores["accuracy"].mean == pytest.approx(sum(a for a, _ in pairs) / 4)
    interval = stats.ttest_rel(*zip(*pairs, strict=True)).confidence_interval(0.95)
    assert found.difference.low == pytest.approx(interval.low)


def test_one_seed_has_neither_intervals_nor_ties():
    one = make_comparison(seeds=1)
    lora = standing("lora", one)
    assert lora.ties is None and math.isnan(lora.difference.low)
    text = write_terminal_table(one)
    assert "±" not in text.splitlines()[1] and " tie" not in text.splitlines()[2]
    assert "One seed gives no intervals" in text


def test_costs_are_percent_of_the_base():
    lora = next(row for row in COMPARISON.rows if row.method == "lora")
    found = standing("lora")
    assert found.added_macs == pytest.approx((lora.costs["mmacs"] - 30) / 30 * 100)
    assert found.added_latency == pytest.approx((lora.costs["latency_ms"] - 6) / 6 * 100)
    assert found.merged_latency == 0 and standing("bottleneck").merged_latency is None
    assert (found.peak_mb, found.file_kb) == pytest.approx((40 + 56266 * 12e-6, 233.064))


def test_a_smaller_score_can_be_the_better_one():
    row = COMPARISON.rows[0]
    rows = [replace(row, method=name, scores={"perplexity": [v, v]}) for name, v in (("lora", 3.0), ("full", 2.0))]
    comparison = replace(COMPARISON, score="perplexity", larger_is_better=False, rows=rows)
    assert find_best(comparison).method == "full"
    assert standing("lora", comparison).difference.mean == 1.0


def test_the_terminal_table_fits_and_names_every_method():
    lines = write_terminal_table(COMPARISON).splitlines()
    assert max(map(len, lines)) <= 120
    assert [line.split()[0] for line in lines[1:16]] == [row.method for row in COMPARISON.rows]
    assert len({len(line) for line in lines[:16]}) == 1
    assert "Not compared: lora-conv: ViT has no grouped convolutions; use lora." in lines
    assert "The search for the learning rates took 21 min of 41 min in all." in lines


def test_wide_cells_push_out_what_is_least_needed():
    wide = [replace(row, costs={**row.costs, "trainable_parameters": 10**24}) for row in COMPARISON.rows]
    lines = write_terminal_table(replace(COMPARISON, rows=wide)).splitlines()
    assert max(map(len, lines)) <= 120
    assert "accuracy" in lines[0] and "ECE" not in lines[0]


def test_the_markdown_table_has_every_column():
    lines = write_markdown_table(COMPARISON).splitlines()
    heads = [head.strip() for head in lines[0].strip("|").split("|")]
    assert lines[1] == "|---|" + "---:|" * (len(heads) - 1)
    assert {"Accuracy", "ECE", "difference to the best", "lost on its own task", "drift of features"} <= set(heads)
    assert {"trained parameters", "added MACs", "added latency", "latency merged", "file, kB"} <= set(heads)
    assert "energy, mJ" not in heads  # was not measured
    cells = next(line for line in lines if line.startswith("| partial")).strip("| ").split(" | ")
    partial = dict(zip(heads, cells, strict=True))
    assert (partial["learning rate"], partial["trained parameters"]) == ("0.003 edge", "113,002")
    assert (partial["added MACs"], partial["added latency"], partial["latency merged"]) == ("+0.0 %", "+0 %", "+0 %")


def test_latencies_of_a_busy_machine_are_marked():
    lora = COMPARISON.rows[1]
    quiet, busy = (replace(lora, costs={**lora.costs, "latency_spread_ms": spread}) for spread in (1.0, 3.0))
    assert "~" not in write_markdown_table(replace(COMPARISON, rows=[quiet]))
    text = write_markdown_table(replace(COMPARISON, rows=[busy]))
    percent = 100 * (lora.costs["latency_ms"] / 6 - 1)
    assert f"| ~+{percent:.0f} % | ~+0 % |" in text and "the machine was busy" in text


def test_energy_is_shown_with_its_source():
    costs = {"energy_j": 0.0123, "energy_source": "measured: RAPL, package-0"}
    rows = [replace(COMPARISON.rows[0], costs=costs)]
    text = write_markdown_table(replace(COMPARISON, rows=rows))
    assert "| 12.3 |" in text and "Energy is measured: RAPL, package-0." in text


def test_steps_are_shown_where_they_differ():
    rows = [replace(row, steps=steps) for row, steps in zip(COMPARISON.rows, (1000, 2000), strict=False)]
    assert "| 1,000 |" in write_markdown_table(replace(COMPARISON, rows=rows))
    assert "steps |" not in write_markdown_table(COMPARISON)


def test_names_of_users_break_no_table():
    evil = make_comparison(data="a|b <script>\x1b[31m\nnew line")
    markdown = write_markdown_table(evil)
    assert "<script>" not in markdown and "\x1b" not in markdown and "a\\|b &lt;script>" in markdown
    assert "\x1b" not in write_terminal_table(evil)
    assert len(write_overview_table([evil]).splitlines()[0].replace("\\|", "").split("|")) == 4


def test_csv_has_the_numbers_in_full():
    rows = list(csv.DictReader(io.StringIO(write_csv_table(COMPARISON))))
    assert [row["method"] for row in rows] == [row.method for row in COMPARISON.rows]
    lora = next(row for row in rows if row["method"] == "lora")
    assert float(lora["accuracy"]) == standing("lora").scores["accuracy"].mean
    assert float(lora["accuracy_low"]) == standing("lora").scores["accuracy"].low
    assert (lora["trainable_parameters"], lora["energy_mj"]) == ("56266", "")
    assert rows[0]["difference"] == "" and "NaN" in rows[13]["failed"]


def test_the_overview_has_a_column_for_each_comparison():
    few = replace(COMPARISON, data="other", rows=COMPARISON.rows[1:3])
    heads, lines = list_overview([COMPARISON, few])
    assert len(heads) == 3 and len(lines) == 15
    cells = dict(lines)
    assert cells["full"][0][1] and cells["full"][1] == ("-", False)
    best = find_best(few).method
    assert [name for name in cells if cells[name][1][1]] == [best]
    other = "dora" if best == "lora" else "lora"
    assert cells[other][1][0].endswith(" tie") == standing(other, few).ties

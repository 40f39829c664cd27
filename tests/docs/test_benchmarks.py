"""The benchmarks, their pages and `make bench` name each other, and say on which machine a figure was measured.

A part of gpu.py is followed as a process: its rows are kept whatever becomes of it.
"""

import json
import re
import sys

import pytest
import torch

from benchmarks import gpu, machine
from docs.blocks import PAGES
from places import ROOT

SCRIPTS = {
    path.name: path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "tests" / "benchmarks").glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
NAMED = re.compile(r"tests/benchmarks/(\w+\.py)")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_stands_on_a_page_and_is_run_by_make(script):
    assert script in NAMED.findall(MAKEFILE), "add it to a target of `make bench`"
    assert any(script in NAMED.findall(text) for text in TEXTS.values()), "no page of docs names its command"


def test_pages_and_make_name_scripts_and_results_that_exist():
    for text in (MAKEFILE, *TEXTS.values()):
        assert set(NAMED.findall(text)) <= set(SCRIPTS)
        for result in re.findall(r"tests/benchmarks/results/[\w./-]*\.(?:md|json)\b", text):
            assert (ROOT / result).is_file(), result


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_on_which_machine_it_measured(script):
    assert "describe_machine(" in SCRIPTS[script]


def test_a_machine_is_described_with_its_cpu_its_threads_and_its_versions():
    found = machine.describe_machine("numpy", "no-such-package")
    assert found["threads"] == torch.get_num_threads() and found["device"] == "cpu"
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["no-such-package"] is None
    assert found["cpu"] in machine.tell_machine(found) and f"torch {torch.__version__}" in machine.tell_machine(found)
    assert json.loads(json.dumps(found)) == found


# ---- the parts of gpu.py


@pytest.mark.parametrize(
    ("end", "limit", "state"),
    [
        ("", 60, "whole"),
        ("raise MemoryError('too little')", 60, "failed: MemoryError: too little"),
        ("import time; time.sleep(60)", 2, "stopped after 2 s"),
    ],
)
def test_the_rows_of_a_part_are_kept_however_it_ends(end, limit, state):
    rows = [{"cores": 2}, {"ms": 1.5}, {"ms": 2.5}]
    program = "".join(f"print({gpu.MARK + json.dumps(row)!r}, flush=True)\n" for row in rows) + end
    stored = []
    gpu.follow_part("fit", [sys.executable, "-S", "-c", program], limit, lambda _, found: stored.append(dict(found)))
    assert stored[-1]["state"] == state
    assert (stored[-1]["machine"], stored[-1]["rows"]) == (rows[0], rows[1:])
    assert stored[0]["state"] == "broken off", "what is there if the program itself is killed"


def test_a_row_that_fails_holds_the_reason():
    def fail():
        raise ValueError("no kernel\nmore")

    assert gpu.measure({"way": "a"}, fail) == {"way": "a", "failed": "ValueError: no kernel"}


def test_the_clock_counts_the_steps_of_every_optimiser_and_stops_with_its_block():
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([weight])
    with gpu.StepClock("cpu") as clock:
        for _ in range(3):
            optimizer.step()
    optimizer.step()
    assert len(clock.marks) == 3
    assert clock.steps_per_second(1) == pytest.approx(2 / (clock.marks[2] - clock.marks[0]))


def test_the_limits_of_the_parts_of_a_call_fit_in_ten_minutes():
    assert gpu.SECONDS < 600
    assert [name for half in gpu.HALVES.values() for name in half] == list(gpu.PARTS)
    for half in gpu.HALVES.values():
        assert sum(gpu.PARTS[name][1] for name in half) <= gpu.SECONDS

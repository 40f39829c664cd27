"""Several trials at a time give what one after the other gives."""

import pytest

from inlay import ImageTask, Problem, TrainConfig, Trial
from inlay.study import parallel
from inlay.study.parallel import run_trials

TRIALS = [Trial("probe", 1e-2, width=2, steps=2, seed=4), Trial("lora", 1e-2, width=2, steps=2, seed=4)]


@pytest.mark.parametrize(
    ("backend", "trials"),
    [
        ("multiprocessing", TRIALS),  # processes that are forked, so that nothing is imported again
        ("threading", TRIALS[:1]),  # gives each outcome as it comes, as the backend of the default engine does
    ],
)
def test_several_at_a_time_are_one_after_the_other(digits, tmp_path, monkeypatch, backend, trials):
    monkeypatch.setitem(parallel._BACKENDS, "processes", backend)
    train = TrainConfig(batch_size=4, workers=0)
    alone, workers = (Problem(ImageTask("builtin:vit-tiny", str(digits)), train, tmp_path / name) for name in "ab")
    told = []
    found = run_trials(workers, trials, measured=frozenset({"test"}), jobs=2, done=told.append)
    wanted = run_trials(alone, trials, measured=frozenset({"test"}))
    assert [(o.trial, o.validation, o.test, o.failed) for o in found] == [
        (o.trial, o.validation, o.test, o.failed) for o in wanted
    ]
    assert {outcome.trial for outcome in told} == {*trials} and workers.records.outcomes == told
    again = Problem(workers.task, train, tmp_path / "b")  # the records of this process, and of no worker
    assert run_trials(again, trials, measured=frozenset({"test"}), jobs=2) == found

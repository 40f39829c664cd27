"""Mutated adapters never hang or load wrong, and fail with one sentence; benchmarks/fuzz.py tries 1,000."""

import resource
from collections import Counter

import pytest

from adapters.mutations import run
from inlay import load_base


@pytest.mark.parametrize("part", range(3))
@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of whatever setting was changed
def test_mutated_folders(part, original, outputs, tmp_path):
    model, saved = original
    expected, labels = outputs(model), list(model.config.id2label.values())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdicts = Counter(
        run(seed, saved, tmp_path, expected, outputs, lambda: load_base("builtin:vit-tiny", labels=labels))[1]
        for seed in range(50 * part, 50 * part + 50)
    )
    assert verdicts["refused"] > 25 and verdicts.total() == 50
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB

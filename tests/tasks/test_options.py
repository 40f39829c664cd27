"""A base that cannot be reached is answered with an embedded one of the same task."""

import pytest

from inlay import ImageTask, InlayError, MaskTask, SequenceTask, TextTask


@pytest.mark.parametrize(
    ("task", "embedded"),
    [
        (ImageTask, "builtin:vit-tiny"),
        (MaskTask, "builtin:sam-tiny"),
        (TextTask, "builtin:gpt2-tiny"),
        (SequenceTask, "builtin:gpt2-tiny"),
    ],
)
def test_an_unreachable_base_is_answered_with_one_of_its_task(task, embedded):
    with pytest.raises(InlayError) as caught:
        task(model="someone/something").load(0)
    said = str(caught.value)
    assert said.startswith("someone/something is not in the cache") and said.endswith(f", or use --model {embedded}.")
    assert said.count("builtin:") == 1

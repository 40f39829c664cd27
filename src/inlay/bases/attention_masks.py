"""Attention masks that transformers makes without a look at their values.

To leave out a mask that masks nothing, transformers asks in every forward whether it does. The answer comes from the
device, so the host waits until all work given to it is done. Who made the batch knows the answer without asking.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils


@contextmanager
def make_masks_unread(masked: bool) -> Iterator[None]:
    """Within the block masks of texts are made as if they had been read.

    Args:
        masked: True if some token is padding, or a row holds several texts. A mask is then made in any case, as while a
            graph is traced; it is also right where it masks nothing, but costs the faster attention without a mask.
            False leaves out the mask of a decoder.
    """
    answers = {"is_tracing": _say_yes} if masked else {"fast_all": _say_yes, "find_packed_sequence_indices": _say_none}
    before = {name: getattr(masking_utils, name) for name in answers}
    vars(masking_utils).update(answers)
    try:
        yield
    finally:
        vars(masking_utils).update(before)


def _say_yes(tensor: Any = None) -> bool:
    return True


def _say_none(position_ids: Any) -> None:
    return None

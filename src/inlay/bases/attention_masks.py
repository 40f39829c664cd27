"""Attention masks that transformers makes without a look at their values.

To leave out a mask that masks nothing, transformers asks in every forward whether it does. The answer comes from the
device, so the host waits until all work given to it is done. Who made the batch knows the answer without asking.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import masking_utils

from inlay.bases.device import is_asynchronous


@contextmanager
def make_masks_unread(masked: bool, device: torch.device) -> Iterator[None]:
    """Within the block masks of texts on this device are made as if they had been read; on a CPU they are read.

    These functions are transformers' own and no interface: a version without one of them reads the mask.

    Args:
        masked: True if some token is padding, or a row holds several texts. A mask is then made in any case, as while a
            graph is traced; it is also right where it masks nothing, but costs the faster attention without a mask.
            False leaves out the mask of a decoder.
        device: That of the batch.
    """
    if not is_asynchronous(device):
        yield
        return
    answers = {"is_tracing": _say_yes} if masked else {"fast_all": _say_yes, "find_packed_sequence_indices": _say_none}
    before = {name: getattr(masking_utils, name) for name in answers if hasattr(masking_utils, name)}
    vars(masking_utils).update({name: answers[name] for name in before})
    try:
        yield
    finally:
        vars(masking_utils).update(before)


def _say_yes(tensor: Any = None) -> bool:
    return True


def _say_none(position_ids: Any) -> None:
    return None

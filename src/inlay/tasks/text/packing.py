"""Several short texts in one row, each read as if it stood there by itself: block-diagonal attention."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel

from inlay.bases.attention import uses_flash
from inlay.errors import Unsupported
from inlay.methods._peft import count_virtual_tokens
from inlay.tasks.text.chunked_logits import IGNORED, read_logits, unwrap
from inlay.tasks.text.view import TextView
from inlay.tasks.text.vocabulary import vocabulary_of


class PackedView(torch.utils.data.Dataset):
    """A view whose item i is a row of several texts: {"input_ids": (T,), "labels": (T,), "position_ids": (T,)}.

    Positions start from 0 with each text, by which transformers tells the texts apart where it is given no attention
    mask. The first token of a text is not learned, as what stands before it is another text.

    Args:
        view: The texts.
        capacity: Tokens of a row at most; a text of more has a row to itself.

    Attributes:
        lengths: Tokens of each row.
        report: That of the view, with the number of rows.
        tokens: Those of the view.

    Source: best-fit decreasing, Ding et al. 2024, arXiv:2404.10830, section 3.
    """

    def __init__(self, view: TextView, capacity: int) -> None:
        self.view, self.tokens = view, view.tokens
        self.rows = fill_rows(view.lengths, capacity)
        self.lengths = [sum(view.lengths[i] for i in row) for row in self.rows]
        filled = len(view.tokens) / (len(self.rows) * max(self.lengths))
        self.report = f"{view.report}, packed into {len(self.rows):,} rows that are {filled:.1%} full"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        texts = [self.view[i] for i in self.rows[index]]
        for text in texts:
            text["labels"][:1] = IGNORED
        return {
            "input_ids": torch.cat([text["input_ids"] for text in texts]),
            "labels": torch.cat([text["labels"] for text in texts]),
            "position_ids": torch.cat([torch.arange(len(text["input_ids"])) for text in texts]),
        }

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """As `TextView.collate`, which knows both kinds of items."""
        return self.view.collate(items)


def fill_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which texts stand together in a row: the longest first, each in the fullest row that has space for it.

    Texts of one length come in an order of chance, always the same, as neighbours in a file are often alike.
    """
    order = np.random.default_rng(0).permutation(len(lengths))
    order = order[np.argsort(-np.asarray(lengths)[order], kind="stable")]
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for i in order.tolist():
        at = bisect_left(spaces, (lengths[i], -1))
        if at == len(spaces):
            free, row = capacity, len(rows)
            rows.append([])
        else:
            free, row = spaces.pop(at)
        rows[row].append(i)
        if free > lengths[i]:
            insort(spaces, (free - lengths[i], row))
    return rows


def flatten_rows(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A packed batch as one row, where FlashAttention reads it: transformers looks for texts in a single row only."""
    if "position_ids" not in batch or not uses_flash(model):
        return batch
    return {key: value.reshape(1, -1) for key, value in batch.items() if key != "learned"}  # which is of rows


def check_packing(model: nn.Module, name: str) -> None:
    """Refuse a model that does not read the texts of a packed row as it reads each by itself.

    Args:
        model: The base with its adapter; under FlashAttention it moves to the GPU, where it is trained. Its search for
            padding where it is given no mask is switched off: it warns of eos, and lets the host wait for the device.
        name: Of the base.

    Raises:
        InlayError: Packed and separate logits differ, or the method adds tokens to a row.
    """
    if any(count_virtual_tokens(config) for config in getattr(model, "peft_config", {}).values()):
        raise Unsupported("a learned prompt or prefix stands once in front of a row, not of each text; leave pack out.")
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.warn_if_padding_and_no_attention_mask = _accept_no_mask
    flash = uses_flash(model)
    if flash:
        model.to(PartialState().device)
    device, training = next(model.parameters()).device, model.training
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(vocabulary_of(unwrap(model)), (n,), generator=generator).to(device) for n in (5, 8, 6, 7)]
    alone = [{"input_ids": text[None], "labels": _labels(text)[None]} for text in texts]
    pairs = (texts[:2], texts[2:])
    packed = {
        "input_ids": torch.stack([torch.cat(pair) for pair in pairs]),
        "labels": torch.stack([torch.cat([_labels(text) for text in pair]) for pair in pairs]),
        "position_ids": torch.stack([torch.cat([torch.arange(len(t), device=device) for t in pair]) for pair in pairs]),
    }
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16) if flash else nullcontext():
            together = torch.cat(read_logits(model, flatten_rows(model, packed), _first))
            apart = torch.cat([logits for batch in alone for logits in read_logits(model, batch, _first)])
    except (TypeError, ValueError) as error:  # a forward that takes no position_ids
        raise Unsupported(f"{name} cannot read several texts in one row ({error}); leave pack out.") from error
    finally:
        model.train(training)
    exact = not flash and apart.dtype == next(model.parameters()).dtype == torch.float32
    if not torch.allclose(together, apart, rtol=0, atol=float(apart.abs().max()) * (1e-4 if exact else 0.03)):
        raise Unsupported(
            f"{name} with this method reads a text in a packed row otherwise than by itself (logits differ by up to "
            f"{float((together - apart).abs().max()):.2g}); leave pack out."
        )


def _accept_no_mask(input_ids: Any, attention_mask: Any) -> None:
    return None


def _labels(text: Tensor) -> Tensor:
    labels = text.clone()
    labels[0] = IGNORED
    return labels


def _first(logits: Tensor, labels: Any) -> Tensor:
    return logits

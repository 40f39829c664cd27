"""A split of labelled texts as a model wants it."""

from collections.abc import Sequence
from typing import Any

import torch

from inlay.tasks.sequences.processor import SequenceProcessor
from inlay.tasks.text.view import read_rows


class SequenceView(torch.utils.data.Dataset):
    """One split: item i is {"input_ids": list, "attention_mask": list, "labels": int}, tokenised once, here.

    Args:
        rows: A split of `SequenceData`.
        processor: Makes the tokens, and says how many are too many.

    Attributes:
        lengths: Tokens of each example, to make batches of like ones.
        report: How many examples and tokens there are, and how many were cut.
    """

    def __init__(self, rows: Any, processor: SequenceProcessor) -> None:
        self.processor, self.items = processor, list[dict[str, Any]]()
        cut, pairs = 0, "pair" in rows.column_names
        for part in read_rows(rows, ("text", "pair") if pairs else ("text",)):
            encoded, more = processor.encode(part["text"], part["pair"] if pairs else None)
            cut += more
            self.items += [{**row, "labels": y} for row, y in zip(encoded, part["label"], strict=True)]
        self.lengths = [len(item["input_ids"]) for item in self.items]
        least, most = min(self.lengths, default=0), max(self.lengths, default=0)
        changes = f"; {cut:,} longer than {processor.max_length:,} {'was' if cut == 1 else 'were'} cut" if cut else ""
        noun = "pair" if pairs else "text"
        self.report = f"{len(self):,} {noun}{'' if len(self) == 1 else 's'}, {least:,} to {most:,} tokens{changes}"

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """A batch, padded on the right to its longest item."""
        return {**self.processor.pad_rows(items), "labels": torch.tensor([item["labels"] for item in items])}

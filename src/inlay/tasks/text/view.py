"""Prompts and completions as rows of tokens, and as batches for a causal language model."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from inlay.errors import BadInput
from inlay.tasks.text.processor import TextProcessor

IGNORED = -100  # a label without a loss, in transformers and torch
AT_ONCE = 2048  # rows that are tokenised together
CHARACTERS = 2**20  # the same of long ones


class TextView(torch.utils.data.Dataset):
    """One split as a model wants it: item i is {"input_ids": int (T,), "labels": int (T,)}.

    The loss is on the completion and its eos; labels of the prompt are -100. A prompt and a completion that are
    together longer than the processor's max_length are cut: first the prompt at its start (bos stays), while a
    quarter of max_length is left for it, then the completion at its end. That has no eos any more, so that no model
    learns to stop there.

    Everything is tokenised once, here, and kept as three arrays, which go to the workers of a DataLoader.

    Args:
        rows: A split of `TextData`, a datasets.Dataset with columns `prompt` and `completion`.
        processor: Makes the tokens, and says how many are too many.
        over_long: What becomes of examples of more tokens than that: cut, dropped, or the cause of an error.
        block: For running text: all of it in blocks of max_length, each text followed by eos, without padding. A
            rest that fills no block is left out, unless it is all there is.

    Attributes:
        lengths: Tokens of each example, to make batches of like ones.
        report: How many examples and tokens there are, and what was cut, dropped or left out.

    Raises:
        InlayError: No example is left, `refuse` met one that is too long, or blocks are asked of rows with prompts.
    """

    lengths: list[int]
    report: str

    def __init__(
        self,
        rows: Any,
        processor: TextProcessor,
        *,
        over_long: Literal["cut", "drop", "refuse"] = "cut",
        block: bool = False,
    ) -> None:
        if over_long not in ("cut", "drop", "refuse"):
            raise BadInput(f"over_long must be cut, drop or refuse, got {over_long!r}.")
        if not len(rows):
            raise BadInput("this split has no rows; pass another.")
        self.pad = processor.pad
        self.tokens, self.ends, self.prompts, changes = (
            _make_blocks(rows, processor) if block else _make_examples(rows, processor, over_long)
        )
        self.lengths = np.diff(self.ends, prepend=0).tolist()
        if not self.lengths:
            raise BadInput(f"no examples are left{changes}; raise max_length, or cut them.")
        # No token says what the first one of an example should have been.
        trained = len(self.tokens) - int(np.maximum(self.prompts, 1).sum())
        least, most = min(self.lengths), max(self.lengths)
        self.report = (
            f"{len(self):,} example{'s' * (len(self) > 1)}, {least:,} to {most:,} tokens "
            f"({len(self.tokens):,} in all, {trained:,} trained on){changes}"
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        index = range(len(self))[index]
        end = int(self.ends[index])
        ids = torch.from_numpy(self.tokens[end - self.lengths[index] : end].astype(np.int64))
        labels = ids.clone()
        labels[: int(self.prompts[index])] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def collate(self, items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """A batch of input_ids, attention_mask and labels, each (B, T), padded on the right to its longest item.

        So every text is read as it would be without the others: on the left, padding would move the positions that
        GPT-2 learned. Packed rows have position_ids instead of the mask; their padding is a text that is not learned.
        """
        shape = len(items), max(len(item["input_ids"]) for item in items)
        packed = "position_ids" in items[0]
        batch = {
            "input_ids": torch.full(shape, self.pad),
            "position_ids" if packed else "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
        }
        for row, item in enumerate(items):
            count = len(item["input_ids"])
            batch["input_ids"][row, :count] = item["input_ids"]
            batch["labels"][row, :count] = item["labels"]
            if packed:
                batch["position_ids"][row, :count] = item["position_ids"]
                batch["position_ids"][row, count:] = torch.arange(shape[1] - count)
            else:
                batch["attention_mask"][row, :count] = 1
        return batch


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, str]


def _make_examples(rows: Any, processor: TextProcessor, over_long: str) -> Arrays:
    """All tokens in a row, where each example ends, how long its prompt is, and what was changed, in words."""
    limit, kept, lengths, prompts = processor.max_length, [], [], []
    long: list[int] = []
    for row, (prompt, completion) in enumerate(_encode_rows(rows, processor)):
        if len(prompt) + len(completion) > limit:
            long.append(row)
            if over_long != "cut":
                continue
            prompt, completion = _cut_example(prompt, completion, processor)
        kept.append(np.array(prompt + completion, np.int32))
        lengths.append(len(prompt) + len(completion))
        prompts.append(len(prompt))
    if long and over_long == "refuse":
        raise BadInput(
            f"{len(long):,} of {len(rows):,} examples have more than {limit:,} tokens (the first is row "
            f"{long[0] + 1}); raise max_length, or cut or drop them."
        )
    done = "was" if len(long) == 1 else "were"
    done += " cut" if over_long == "cut" else " dropped"
    changes = f"; {len(long):,} longer than {limit:,} {done}" if long else ""
    tokens = np.concatenate(kept) if kept else np.empty(0, np.int32)
    return tokens, np.cumsum(lengths, dtype=np.int64), np.array(prompts, np.int32), changes


def _encode_rows(rows: Any, processor: TextProcessor) -> Iterator[tuple[list[int], list[int]]]:
    with _progress(len(rows), "example") as bar:
        for part in read_rows(rows, ("prompt", "completion")):
            prompts = processor.encode_prompts(part["prompt"])
            yield from zip(prompts, processor.encode_completions(part["completion"], part["prompt"]), strict=True)
            bar.update(len(prompts))


def read_rows(rows: Any, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """Rows in parts of at most 2,048 and of about a million characters: what tokens take while they are made."""
    for begin in range(0, len(rows), AT_ONCE):
        part = rows[begin : begin + AT_ONCE]
        sizes = [sum(len(str(part[column][i])) for column in columns) for i in range(len(part[columns[0]]))]
        first, size = 0, 0
        for i, more in enumerate(sizes):
            if size and size + more > CHARACTERS:
                yield {key: values[first:i] for key, values in part.items()}
                first, size = i, 0
            size += more
        yield {key: values[first:] for key, values in part.items()}


def _progress(total: int, unit: str) -> tqdm:
    """A bar on the first process of a machine; none where the output is no terminal, or where there is little to do."""
    hidden = os.environ.get("LOCAL_RANK", "0") != "0"
    return tqdm(total=total, desc="tokenize", unit=unit, unit_scale=True, delay=1, disable=True if hidden else None)


def _cut_example(prompt: list[int], completion: list[int], processor: TextProcessor) -> tuple[list[int], list[int]]:
    """Both within max_length, with one token of each at least."""
    limit, start = processor.max_length, processor.start
    left = max(limit // 4, len(start), 1, limit - len(completion))
    if len(prompt) > left:
        first = _count_start_tokens(prompt, start or [processor.tokenizer.bos_token_id])
        prompt = prompt[:first] + prompt[len(prompt) - left + first :]
    return prompt, completion[: limit - len(prompt)]


def _count_start_tokens(ids: list[int], start: list[int]) -> int:
    """How many special tokens of `start` these ids begin with; a chat template may write them, or others."""
    return len(start) if ids[: len(start)] == start else 0


def _make_blocks(rows: Any, processor: TextProcessor) -> Arrays:
    """As `_make_examples`, of running text."""
    if any(prompt != "" for prompt in rows["prompt"]):
        raise BadInput("only running text can be cut into blocks, and these rows have prompts; pass block=False.")
    found = list[np.ndarray]()
    with _progress(sum(map(len, rows["completion"])), "character") as bar:
        for part in read_rows(rows, ("completion",)):
            texts = part["completion"]
            if len(texts) == 1:
                found += processor.encode_document(texts[0], bar.update)
            else:
                found += [np.array(ids, np.int32) for ids in processor.encode_completions(texts, part["prompt"])]
                bar.update(sum(map(len, texts)))
    tokens, size = np.concatenate(found), processor.max_length
    rest = len(tokens) % size if len(tokens) > size else 0
    tokens = tokens[: len(tokens) - rest]
    ends = np.append(np.arange(size, len(tokens), size), len(tokens))
    changes = f"; the last {rest:,} tokens fill no block and were left out" if rest else ""
    return tokens, ends, np.zeros(len(ends), np.int32), changes

"""Texts, or pairs of them, as the tokens that a classifier reads."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from inlay.errors import BadInput, DamagedFile, WrongBase
from inlay.tasks.text.processor import LONGEST, hash_vocabulary

SEPARATOR = "\n"  # between the texts of a pair, where the tokenizer has no token for that


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that fills up shorter texts; that of the end where a tokenizer, such as GPT-2's, has none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class SequenceProcessor:
    """How texts become tokens; saved with an adapter.

    What looks like a special token in a text is text. A pair is written as the tokenizer writes one, and with a line
    break between its texts where the tokenizer has nothing of its own for that.

    Args:
        tokenizer: The base model's own.
        max_length: Most tokens of an example; None: what the tokenizer names, at most 1,024. What is longer is cut at
            its end, of a pair the longer text first.

    Raises:
        InlayError: A tokenizer with neither padding nor end, or max_length that is too small or more than is read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None) -> None:
        pad = pad_token_id(tokenizer)
        if pad is None:
            raise BadInput(f"{type(tokenizer).__name__} has neither a pad nor an eos token; set its pad_token.")
        self.tokenizer, self.pad = tokenizer, pad
        self.max_length = min(tokenizer.model_max_length, LONGEST) if max_length is None else max_length
        self._special = tokenizer.num_special_tokens_to_add(pair=True)
        self._joins = self._special <= tokenizer.num_special_tokens_to_add(pair=False)
        least = self._special + 2
        if not least <= self.max_length <= tokenizer.model_max_length:
            raise BadInput(
                f"max_length must be {least} to {tokenizer.model_max_length}, as the base reads no more, got "
                f"{max_length}."
            )

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> tuple[list[dict[str, Any]], int]:
        """The model's inputs for each text, as lists without padding, and how many were cut."""
        if not texts:
            return [], 0
        options: dict[str, Any] = {"split_special_tokens": True, "verbose": False}
        if pairs is not None and self._joins:
            firsts, seconds = self._cut_pairs(texts, pairs)
            whole = [f"{a}{SEPARATOR}{b}" for a, b in zip(texts, pairs, strict=True)]
            encoded = self.tokenizer(whole, **options)
            lengths = [len(ids) for ids in encoded["input_ids"]]
            cut = [i for i, length in enumerate(lengths) if length > self.max_length]
            if cut:
                shorter = [f"{firsts[i]}{SEPARATOR}{seconds[i]}" for i in cut]
                again = self.tokenizer(shorter, truncation=True, max_length=self.max_length, **options)
                for key, rows in again.items():
                    for i, row in zip(cut, rows, strict=True):
                        encoded[key][i] = row
        else:
            second = None if pairs is None else list(pairs)
            encoded = self.tokenizer(list(texts), second, **options)
            lengths = [len(ids) for ids in encoded["input_ids"]]
            cut = [i for i, length in enumerate(lengths) if length > self.max_length]
            if cut:
                encoded = self.tokenizer(
                    list(texts), second, truncation="longest_first", max_length=self.max_length, **options
                )
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
        rows = [{name: list(encoded[name][i]) for name in names} for i in range(len(texts))]
        for row in rows:
            if not row["input_ids"]:  # an empty text; a model needs one token at least
                row |= {name: {"input_ids": [self.pad], "attention_mask": [1]}.get(name, [0]) for name in names}
        return rows, len(cut)

    def pad_rows(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch of tensors (B, T), padded on the right to its longest row."""
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad}
        return {
            name: torch.tensor([[*row[name], *[fill.get(name, 0)] * (longest - len(row[name]))] for row in rows])
            for name in ("input_ids", "attention_mask", "token_type_ids")
            if name in rows[0]
        }

    def to_dict(self) -> dict[str, Any]:
        """What another machine needs to do the same: settings, and a hash of the tokenizer that must be there."""
        return {
            "tokenizer": type(self.tokenizer).__name__,
            "vocabulary": hash_vocabulary(self.tokenizer, self.pad, self._joins),
            "size": len(self.tokenizer),
            "max_length": self.max_length,
        }

    @classmethod
    def from_dict(cls, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> "SequenceProcessor":
        """A processor with the settings of `to_dict`, for the tokenizer of the base at hand.

        Raises:
            InlayError: The settings are none, or the tokenizer makes other tokens.
        """
        kinds = {"tokenizer": str, "vocabulary": str, "size": int, "max_length": int}
        wrong = [k for k, kind in kinds.items() if not isinstance(settings, dict) or type(settings.get(k)) is not kind]
        if wrong:
            raise DamagedFile(f"the settings of the text processor lack {', '.join(wrong)}; save the adapter again.")
        processor = cls(tokenizer, max_length=settings["max_length"])
        found = processor.to_dict()
        if found["vocabulary"] != settings["vocabulary"]:
            raise WrongBase(
                f"the adapter was trained with the tokenizer {settings['tokenizer'][:60]!r} of {settings['size']:,} "
                f"tokens ({settings['vocabulary'][:16]!r}), but this base has {found['tokenizer']!r} of "
                f"{found['size']:,} ({found['vocabulary']!r}). Load the base it was made for."
            )
        return processor

    def _cut_pairs(self, texts: Sequence[str], pairs: Sequence[str]) -> tuple[list[str], list[str]]:
        """Both texts of each pair, the longer one cut until both fit, as text again."""
        room = self.max_length - self._special - 2
        sides = [self.tokenizer(list(s), add_special_tokens=False, verbose=False)["input_ids"] for s in (texts, pairs)]
        firsts, seconds = list(texts), list(pairs)
        for i, (a, b) in enumerate(zip(*sides, strict=True)):
            if len(a) + len(b) > room:
                least = min(len(a), len(b), room // 2)
                keep = (room - least, least) if len(a) >= len(b) else (least, room - least)
                firsts[i], seconds[i] = (self.tokenizer.decode(s[:n]) for s, n in zip((a, b), keep, strict=True))
        return firsts, seconds

"""Text of tokens, as they come one by one."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from inlay.tasks.serving import Writer

CONTEXT = 6  # tokens of the prompt that are decoded with the first ones: a tokenizer drops a space at a beginning
UNFINISHED = "\ufffd"  # of a character whose last bytes are in the next token


class TextWriter(Writer):
    """Text behind a prompt, without special tokens, up to the first of the strings that end it.

    What could be the beginning of such a string waits until it is certain.

    Args:
        tokenizer: Of the base.
        prompt: The tokens that are continued.
        stop: Strings that end the text; they are not part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self._tokens = list(prompt[-CONTEXT:])
        self._begin, self._read = 0, len(self._tokens)  # tokens [begin, read) are those that were decoded last
        self._waiting = ""

    @override
    def add(self, token: int) -> str:
        self._tokens.append(token)
        return "" if self.stopped else self._release(self._decode_new(whole=False))

    @override
    def finish(self) -> str:
        if self.stopped:
            return ""
        text = self._release(self._decode_new(whole=True))
        rest, self._waiting = self._waiting, ""
        return text + rest

    @override
    def name(self, token: int) -> str:
        return self.tokenizer.decode([token], clean_up_tokenization_spaces=False)

    def _decode_new(self, whole: bool) -> str:
        """Text of the tokens that have not been decoded; nothing where they end within a character."""
        known = self._decode(self._tokens[self._begin : self._read])
        text = self._decode(self._tokens[self._begin :])
        if len(text) <= len(known) or (text.endswith(UNFINISHED) and not whole):
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        return text[len(known) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _release(self, new: str) -> str:
        """What is certain of the waiting text and a new one."""
        text = self._waiting + new
        found = [place for string in self.stop if (place := text.find(string)) >= 0]
        if found:
            self.stopped, self._waiting = True, ""
            return text[: min(found)]
        begun = max((_overlap(text, string) for string in self.stop), default=0)
        certain = len(text) - begun
        self._waiting = text[certain:]
        return text[:certain]


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of a text begin a string."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)

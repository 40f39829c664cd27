"""Prompts and completions as tokens, the same for training and for generation."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from inlay.errors import BadInput, DamagedFile, Unsupported, WrongBase

logger = logging.getLogger(__name__)

LONGEST = 1024
WINDOW = 2**16  # characters of a long text that are tokenised together: a tokenizer takes 150 bytes for each
MARGIN = 256  # characters read on both sides of a window, as a token depends on what surrounds it
WINDOWS = 4  # in one call, each in a thread of the tokenizer
Prompt: TypeAlias = str | Sequence[Any]


class TextProcessor:
    """How prompts and completions become tokens and back; saved with an adapter.

    A prompt stands in front of the separator and is tokenised apart from its completion, so that in training a model
    sees the very tokens that it will be asked with. What looks like a special token in a text is text: `<|endoftext|>`
    in a prompt ends nothing.

    Args:
        tokenizer: The base model's own. It is set to pad on the left.
        separator: Follows every prompt but an empty one and a chat.
        chat: Prompts are conversations, and one that is a text is what a user says to begin one.
        max_length: Longest example in tokens, prompt and completion; None: what the tokenizer names, at most 1,024.

    Raises:
        InlayError: The tokenizer has no eos, or max_length leaves no room or is more than the base reads.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        separator: str = "\n",
        chat: bool = False,
        max_length: int | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise BadInput(
                f"{type(tokenizer).__name__} has no eos token, with which completions end; set its eos_token."
            )
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # Padding is masked and never learned. A [PAD] that was added to a tokenizer may lack an embedding; eos has one.
        self.pad = tokenizer.eos_token_id
        self.tokenizer, self.separator, self.chat = tokenizer, separator, chat
        self.start = self._find_start()
        self.special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special |= set(tokenizer.all_special_ids)
        names = sorted(map(re.escape, tokenizer.convert_ids_to_tokens(sorted(self.special))), key=len, reverse=True)
        self._special_names = re.compile("|".join(names))
        self.max_length = min(tokenizer.model_max_length, LONGEST) if max_length is None else max_length
        if self.max_length > tokenizer.model_max_length:
            raise BadInput(
                f"max_length is {max_length}, but the base reads {tokenizer.model_max_length} tokens at most; lower it."
            )
        if self.max_length < len(self.start) + 2:
            raise BadInput(f"max_length must be at least {len(self.start) + 2}, got {max_length}.")

    def conversation(self, prompt: Prompt) -> Prompt:
        """A prompt as the model was trained to be asked: where it is to chat, a text as a user's first message."""
        return [{"role": "user", "content": prompt}] if self.chat and isinstance(prompt, str) else prompt

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt, as in `encode_prompts`."""
        return self.encode_prompts([prompt])[0]

    def encode_completion(self, completion: str, prompt: Prompt = "") -> list[int]:
        """Tokens of a completion, as in `encode_completions`."""
        return self.encode_completions([completion], [prompt])[0]

    def encode_prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Tokens of prompts with the tokenizer's special tokens at the start (Llama's bos) and none at the end.

        An empty prompt is the start of a text: bos, or eos where there is none. A list of messages {"role",
        "content"}, or such a key of `group_by_prompt`, goes through the tokenizer's chat template, up to where the
        assistant is to speak.

        Raises:
            InlayError: A chat without a template for it, or one that the template refuses; a special token in one of
                its messages, which would pass for the template's own.
        """
        prompts = [self.conversation(prompt) for prompt in prompts]
        texts = [
            (prompt and prompt + self.separator) if isinstance(prompt, str) else self._render(prompt)
            for prompt in prompts
        ]
        none = self.start or [self._start_of_text()]
        encoded = []
        for prompt, ids in zip(
            prompts, self._tokenize_each(texts, [not isinstance(p, str) for p in prompts]), strict=True
        ):
            front = (self.start if prompt else none) if isinstance(prompt, str) else []
            encoded.append([*front, *ids])
        return encoded

    def encode_completions(self, completions: Sequence[str], prompts: Sequence[Prompt]) -> list[list[int]]:
        """Tokens of completions and eos, to stand behind the tokens of their prompts.

        Behind a chat it is what the template adds when the assistant has spoken, so with its own end of a turn; eos
        follows only where the template ends with none of the tokenizer's special tokens. Behind an empty prompt it is
        running text, whose documents may be parted by the text of eos.

        Raises:
            InlayError: As for prompts, or a template that writes the conversation before the answer in another way
                once the answer is there.
        """
        eos = self.tokenizer.eos_token_id
        prompts = [self.conversation(prompt) for prompt in prompts]
        pairs = [(c.removesuffix(self.tokenizer.eos_token), p) for c, p in zip(completions, prompts, strict=True)]
        texts = [completion if isinstance(prompt, str) else "" for completion, prompt in pairs]
        encoded = []
        for (completion, prompt), plain in zip(
            pairs, self._tokenize_each(texts, [not p for p in prompts]), strict=True
        ):
            ids = plain if isinstance(prompt, str) else self._tokenize_answer(completion, prompt)
            ended = not isinstance(prompt, str) and not self.special.isdisjoint(ids)
            encoded.append(ids if ended else [*ids, eos])
        return encoded

    def encode_document(self, text: str, progress: Callable[[int], Any] = lambda _: None) -> Iterator[np.ndarray]:
        """Tokens of running text and eos, in parts (N,): what a tokenizer needs for a text does not grow with it.

        These are the tokens of the whole text, and those of `encode_completions` behind an empty prompt. Only where
        nothing divides more than 256 characters, as a single word of that length, can those at the border of two parts
        be others. A tokenizer in Python does not say where its tokens stand, and takes the text as a whole.

        Args:
            text: Of any length.
            progress: Called with the number of characters of each part.
        """
        for tokens, characters in self._tokenize_windows(text.removesuffix(self.tokenizer.eos_token), special=True):
            yield tokens
            progress(characters)
        yield np.array([self.tokenizer.eos_token_id], np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a completion's tokens, without special tokens and spaces around it."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def to_dict(self) -> dict[str, Any]:
        """What another machine needs to do the same: settings, and hashes of the tokenizer that must be there."""
        template = self.tokenizer.chat_template
        return {
            "tokenizer": type(self.tokenizer).__name__,
            "vocabulary": self._vocabulary(),
            "size": len(self.tokenizer),
            "separator": self.separator,
            "chat": self.chat,
            "max_length": self.max_length,
            "chat_template": None if template is None else _hash(template),
        }

    @classmethod
    def from_dict(cls, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> "TextProcessor":
        """A processor with the settings of `to_dict`, for the tokenizer of the base at hand.

        A chat template that differs is said in a warning: it matters to chats only.

        Raises:
            InlayError: The settings are none, or the tokenizer has another vocabulary or splits text differently.
        """
        kinds = {"tokenizer": str, "vocabulary": str, "size": int, "separator": str, "chat": bool, "max_length": int}
        if isinstance(settings, dict):  # of adapters from before there was this one
            settings = {"chat": False, **settings}
        wrong = [
            key for key, kind in kinds.items() if not isinstance(settings, dict) or type(settings.get(key)) is not kind
        ]
        if wrong:
            raise DamagedFile(
                f"the settings of the text processor are wrong for {', '.join(wrong)}; save the adapter again."
            )
        options = {key: settings[key] for key in ("separator", "chat", "max_length")}
        processor = cls(tokenizer, **options)
        found = processor.to_dict()
        if found["vocabulary"] != settings["vocabulary"]:
            wanted = (
                f"{settings['tokenizer'][:60]!r} with {settings['size']:,} tokens ({settings['vocabulary'][:16]!r})"
            )
            got = f"{found['tokenizer']!r} with {found['size']:,} ({found['vocabulary']!r})"
            raise WrongBase(
                f"the adapter was trained with the tokenizer {wanted}, but this base has {got}; load the base that "
                "it was made for."
            )
        if found["chat_template"] != settings.get("chat_template"):
            logger.warning(
                "the tokenizer's chat template is not the one of training: chats may be written differently."
            )
        return processor

    def _find_start(self) -> list[int]:
        """The special tokens that the tokenizer puts in front of a text."""
        whole, bare = self.tokenizer("a")["input_ids"], self._tokenize(["a"])[0]
        return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])

    def _start_of_text(self) -> int:
        tokenizer = self.tokenizer
        return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def _tokenize_each(self, texts: Sequence[str], special: Sequence[bool]) -> list[list[int]]:
        """Tokens of each text, special ones among them or as the text that they are."""
        found: list[list[int]] = [[]] * len(texts)
        for kind in set(special):
            rows = [i for i, own in enumerate(special) if own is kind]
            for row, ids in zip(rows, self._tokenize([texts[i] for i in rows], kind), strict=True):
                found[row] = ids
        return found

    def _tokenize(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        found: list[list[int]] = [[]] * len(texts)
        short = [i for i, text in enumerate(texts) if len(text) <= WINDOW]
        if short:
            encoded = self._call_tokenizer([texts[i] for i in short], special)["input_ids"]
            for i, ids in zip(short, encoded, strict=True):
                found[i] = ids
        for i in set(range(len(texts))) - set(short):
            found[i] = [token for tokens, _ in self._tokenize_windows(texts[i], special) for token in tokens.tolist()]
        return found

    def _call_tokenizer(self, texts: Sequence[str], special: bool, **options: Any) -> Any:
        # Not verbose: length is looked at later, and the tokenizer would warn of it.
        options |= {"return_attention_mask": False, "verbose": False, "split_special_tokens": not special}
        return self.tokenizer(list(texts), add_special_tokens=False, **options)

    def _tokenize_windows(self, text: str, special: bool) -> Iterator[tuple[np.ndarray, int]]:
        """Tokens (N,) of each window of a text, and how many characters that has.

        A window is read with what stands around it, and the tokens that begin in it are taken.
        """
        if not self.tokenizer.is_fast:
            yield np.array(self._call_tokenizer([text], special)["input_ids"][0], np.int32), len(text)
            return
        windows = list(_windows(text))
        for i in range(0, len(windows), WINDOWS):
            some = windows[i : i + WINDOWS]
            read = [text[max(0, begin - MARGIN) : end + MARGIN] for begin, end in some]
            encoded = self._call_tokenizer(read, special, return_offsets_mapping=True)
            rows = zip(some, encoded["input_ids"], encoded["offset_mapping"], strict=True)
            for (begin, end), ids, offsets in rows:
                starts = np.fromiter((start for start, _ in offsets), np.int64, len(ids)) + max(0, begin - MARGIN)
                # The last token may be said to begin at the end: white space that a tokenizer does not count.
                own = (starts >= begin) & ((starts < end) | (end == len(text)))
                yield np.array(ids, np.int32)[own], end - begin

    def _tokenize_answer(self, completion: str, prompt: Prompt) -> list[int]:
        """What the chat template adds to a conversation when it is answered."""
        asked = self._render(prompt)
        whole = self._render([*prompt, {"role": "assistant", "content": completion}], asked=False)
        if not whole.startswith(asked) or len(whole) == len(asked):
            raise Unsupported(
                f"the chat template of {type(self.tokenizer).__name__} rewrites a conversation when it adds the "
                "answer; use a template that only adds it, or prompts of plain text."
            )
        before, ids, added = self._tokenize([asked, whole, whole[len(asked) :]], special=True)
        # Characters on both sides of the border may have made one token.
        return ids[len(before) :] if ids[: len(before)] == before else added

    def _render(self, chat: Sequence[Any], asked: bool = True) -> str:
        """A conversation as its template writes it, when `asked` up to where the assistant is to speak."""
        if self.tokenizer.chat_template is None:
            raise BadInput(
                f"{type(self.tokenizer).__name__} has no chat template; use a chat model's tokenizer, or plain prompts."
            )
        messages = [dict(message) for message in chat]
        found = next(
            filter(None, (self._special_names.search(str(message.get("content"))) for message in messages)), None
        )
        if found:
            raise BadInput(
                f"a message holds {found[0]!r}, a special token of {type(self.tokenizer).__name__}; remove it, or "
                "write it with spaces."
            )
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)
        except Exception as error:  # a template is a program in the tokenizer's files, and refuses what it likes
            got = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise BadInput(f"the chat template refuses this conversation ({got}); change the messages.") from error

    def _vocabulary(self) -> str:
        """A hash that differs where a text would get other tokens, or another start or end."""
        return hash_vocabulary(self.tokenizer, self.start, self.tokenizer.eos_token_id)


def _windows(text: str) -> Iterator[tuple[int, int]]:
    """Where each window begins and ends: behind a line, or else in front of a word, if there is one near."""
    begin = 0
    while begin < len(text):
        end = begin + WINDOW
        if end < len(text):
            near = range(end - WINDOW // 4, end)
            line, word = text.rfind("\n", near.start, near.stop), text.rfind(" ", near.start, near.stop)
            end = line + 1 if line >= 0 else word if word >= 0 else end
        yield begin, min(end, len(text))
        begin = end


def hash_vocabulary(tokenizer: PreTrainedTokenizerBase, *more: Any) -> str:
    """A hash of what makes tokens of a text, and of what else is said of it."""
    kept: Any = sorted(tokenizer.get_vocab().items())
    if tokenizer.is_fast:
        kept = json.loads(tokenizer.backend_tokenizer.to_str())
        kept = _without_defaults({k: v for k, v in kept.items() if k not in ("truncation", "padding")})
    return _hash([kept, *more])


def _without_defaults(node: Any) -> Any:
    """A tokenizer's JSON without what is off: a later version of the library writes further such switches."""
    if isinstance(node, dict):
        return {k: _without_defaults(v) for k, v in node.items() if v is not None and v is not False}
    return [_without_defaults(v) for v in node] if isinstance(node, list) else node


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

"""Text made token by token: its pieces make what the tokenizer makes of all tokens."""

import pytest

from inlay import load_tokenizer
from inlay.tasks.text.writer import TextWriter

TEXT = "naïve: 🦅 eats 早餐, twice"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("builtin:gpt2-tiny")


def write(tokenizer, ids, stop=(), prompt=()):
    writer = TextWriter(tokenizer, prompt, stop)
    pieces = []
    for token in ids:
        pieces.append(writer.add(token))
        if writer.stopped:
            return pieces, writer
    return [*pieces, writer.finish()], writer


def test_pieces_have_whole_characters(tokenizer):
    ids = tokenizer(TEXT)["input_ids"]
    pieces, writer = write(tokenizer, ids)
    assert "".join(pieces) == TEXT and not any("\ufffd" in piece for piece in pieces)
    assert not writer.stopped and len([piece for piece in pieces if piece]) > 5


def test_a_text_that_ends_within_a_character_says_so(tokenizer):
    ids = tokenizer("a🦅")["input_ids"]
    assert "".join(write(tokenizer, ids[:-1])[0]) == tokenizer.decode(ids[:-1]) != "a"


def test_special_tokens_are_no_text(tokenizer):
    ids = [*tokenizer("one")["input_ids"], tokenizer.eos_token_id, *tokenizer(" two")["input_ids"]]
    assert "".join(write(tokenizer, ids, prompt=[tokenizer.eos_token_id])[0]) == "one two"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (["eats"], "naïve: 🦅 "),
        (["ts 早餐, tw", "餐"], "naïve: 🦅 eats 早"),
        (["twice!"], TEXT),
        (["eats eats", "twice"], "naïve: 🦅 eats 早餐, "),
        (["n"], ""),
    ],
)
def test_strings_end_the_text(tokenizer, stop, text):
    pieces, writer = write(tokenizer, tokenizer(TEXT)["input_ids"], stop)
    assert "".join(pieces) == text and writer.stopped == (text != TEXT)
    assert not any(string in "".join(pieces) for string in stop)

"""JSON that anyone may have written: what would break whoever prints it or stores it again is refused at once."""

import json
from typing import Any

_MAX_LEVELS = 50  # of lists and objects within each other
_MAX_DIGITS = 20  # 64 bits


def parse_json(text: str, *, exact: bool = False) -> Any:
    """What the text holds.

    Args:
        text: JSON.
        exact: Refuse an object that names something twice, which readers take in different ways.

    Raises:
        ValueError: It is no JSON, nested without end, or holds integers beyond 64 bits or halves of characters.
    """
    content = json.loads(text, parse_int=_integer, object_pairs_hook=refuse_duplicates if exact else None)
    if not is_text(json.dumps(content, ensure_ascii=False)):
        raise ValueError("half of a character")
    levels, layer = 0, [content]
    while layer := [x for c in layer if isinstance(c, dict | list) for x in (c.values() if isinstance(c, dict) else c)]:
        levels += 1
        if levels > _MAX_LEVELS:
            raise ValueError(f"nested deeper than {_MAX_LEVELS} levels")
    return content


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON reader; ValueError for a name that stands twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("it names a tensor or a setting twice")
    return content


def is_text(text: str) -> bool:
    """False for surrogates: what JSON and file names can hold, and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

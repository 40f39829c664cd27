"""JSON from untrusted sources: content that would break printing or saving it again is refused."""

import json
from typing import Any

_MAX_LEVELS = 50  # of nested lists and objects
_MAX_DIGITS = 20  # 64 bits


def parse_json(text: str, *, exact: bool = False) -> Any:
    """Parse JSON within bounds.

    Args:
        text: JSON.
        exact: Refuse objects with a repeated name, which readers interpret differently.

    Raises:
        ValueError: The text is not JSON, is nested too deeply, or contains integers beyond 64 bits or lone surrogates.
    """
    content = json.loads(text, parse_int=_parse_integer, object_pairs_hook=refuse_duplicates if exact else None)
    if not is_text(json.dumps(content, ensure_ascii=False)):
        raise ValueError("half of a character")
    levels, items = 0, _list_children([content])
    while items:
        levels += 1
        if levels > _MAX_LEVELS:
            raise ValueError(f"nested deeper than {_MAX_LEVELS} levels")
        items = _list_children(items)
    return content


def _list_children(items: list[Any]) -> list[Any]:
    """The members of all lists and objects among the items."""
    children: list[Any] = []
    for item in items:
        if isinstance(item, dict):
            children += item.values()
        elif isinstance(item, list):
            children += item
    return children


def _parse_integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make the object of a JSON reader; raises ValueError for a repeated name."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("it names a tensor or a setting twice")
    return content


def is_text(text: str) -> bool:
    """False if the text has lone surrogates, which JSON and file names can hold but UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

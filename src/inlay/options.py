"""Options: fields of a dataclass that a recipe's command line offers, each with its help and the values it may have."""

import math
from collections.abc import Mapping
from dataclasses import field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from inlay.errors import BadInput


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with its default and its help; a list is copied for each instance.

    The bounds hold for the number, or for each number of a list: from `least` to `most`, both included, or over `above`
    and under `below`. None is always allowed where the type says so. `check_options` holds values against them.
    """
    bounds = {"least": least, "most": most, "above": above, "below": below}
    metadata = {"help": help, **{name: bound for name, bound in bounds.items() if bound is not None}}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_options(settings: Any) -> None:
    """Hold every field of a dataclass instance against its type and its bounds.

    Raises:
        BadInput: A number out of its bounds, infinite or NaN; a fraction where a whole number is due; an unknown
            choice.
    """
    hints = get_type_hints(type(settings))
    for each in fields(settings):
        if each.init and "help" in each.metadata:
            _check_value(each.name, getattr(settings, each.name), hints[each.name], each.metadata)


def plain_type(hint: Any) -> tuple[Any, bool]:
    """What an option holds, without its `| None`, and whether it had one."""
    parts = get_args(hint)
    if type(None) not in parts:
        return hint, False
    (inner,) = (part for part in parts if part is not type(None))
    return inner, True


def _check_value(name: str, value: Any, hint: Any, bounds: Mapping[str, Any]) -> None:
    kind, optional = plain_type(hint)
    if value is None and optional:
        return
    if get_origin(kind) is list:
        for item in value:
            _check_value(name, item, get_args(kind)[0], bounds)
    elif get_origin(kind) is Literal and value not in get_args(kind):
        raise BadInput(f"{name} must be one of {', '.join(map(str, get_args(kind)))}, got {value!r}.")
    elif kind in (int, float):
        _check_number(name, value, kind, bounds)


def _check_number(name: str, value: Any, kind: type, bounds: Mapping[str, Any]) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    number = number and (kind is float or isinstance(value, int))
    least, most, above, below = (bounds.get(bound) for bound in ("least", "most", "above", "below"))
    if number and not (
        (least is not None and value < least)
        or (most is not None and value > most)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    ):
        return
    what = "a whole number" if kind is int else "a number"
    raise BadInput(f"{name} must be {what}{_in_words(least, most, above, below)}, got {value!r}.")


def _in_words(least: float | None, most: float | None, above: float | None, below: float | None) -> str:
    """Such as ` from 0 to 1`, ` over 0`, ` of at least 0 and below 1`."""
    if least is not None and most is not None:
        return f" from {least} to {most}"
    low = f"of at least {least}" if least is not None else f"over {above}" if above is not None else ""
    high = f"at most {most}" if most is not None else f"below {below}" if below is not None else ""
    return "".join(f" {part}" for part in (low, "and" if low and high else "", high) if part)

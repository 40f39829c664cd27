"""Options: dataclass fields that a recipe offers on its command line, with their help texts and allowed values."""

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
    """A dataclass field with a default and a help text. A default list is copied for each instance.

    The bounds apply to the number, or to each number of a list. `least` and `most` are included, `above` and `below`
    are not. None is allowed where the type allows it. `check_options` compares the values with the bounds.
    """
    bounds = {"least": least, "most": most, "above": above, "below": below}
    metadata = {"help": help, **{name: bound for name, bound in bounds.items() if bound is not None}}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_options(settings: Any) -> None:
    """Check every option of a dataclass instance against its type and its bounds.

    Raises:
        BadInput: A number is out of its bounds, infinite or NaN; a fraction is given for a whole number; a choice is
            unknown.
    """
    hints = get_type_hints(type(settings))
    for each in fields(settings):
        if each.init and "help" in each.metadata:
            _check_value(each.name, getattr(settings, each.name), hints[each.name], each.metadata)


def plain_type(hint: Any) -> tuple[Any, bool]:
    """The type of an option without `| None`, and whether None is allowed."""
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
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    is_of_kind = is_number and (kind is float or isinstance(value, int))
    least, most, above, below = (bounds.get(bound) for bound in ("least", "most", "above", "below"))
    if is_of_kind and not (
        (least is not None and value < least)
        or (most is not None and value > most)
        or (above is not None and value <= above)
        or (below is not None and value >= below)
    ):
        return
    what = "a whole number" if kind is int else "a number"
    raise BadInput(f"{name} must be {what}{_describe_bounds(least, most, above, below)}, got {value!r}.")


def _describe_bounds(least: float | None, most: float | None, above: float | None, below: float | None) -> str:
    """The bounds in words, such as ` from 0 to 1`, ` over 0` or ` of at least 0 and below 1`."""
    if least is not None and most is not None:
        return f" from {least} to {most}"
    low = high = ""
    if least is not None:
        low = f"of at least {least}"
    elif above is not None:
        low = f"over {above}"
    if most is not None:
        high = f"at most {most}"
    elif below is not None:
        high = f"below {below}"
    words = " and ".join(part for part in (low, high) if part)
    return f" {words}" if words else ""

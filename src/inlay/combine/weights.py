"""The weight of an adapter in a combination: one number, or one for each part of the base that it changes.

A part is a module at the top of the base, by its name: `unet` and `text_encoder` of a pipeline of diffusers,
`vision_encoder` and `mask_decoder` of SAM.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from inlay.errors import BadInput

Weight = float | dict[str, float]


def find_part(name: str) -> str:
    """The part that a module or a tensor belongs to."""
    return name.partition(".")[0]


def weight_at(weight: Weight, name: str) -> float:
    """What counts at a module or a tensor."""
    return weight[find_part(name)] if isinstance(weight, dict) else weight


def check_weight(adapter: Any, weight: Any) -> Weight:
    """A weight as the user gave it, in floats.

    Raises:
        InlayError: It is, or holds, something that is no finite number; or it names no part.
    """
    if not isinstance(weight, Mapping):
        return _check_number(f"the weight of {adapter}", weight)
    if not weight:
        raise BadInput(
            f"the weights of {adapter} name no part of its base; give a number, or one for each part, such as "
            "{'unet': 1.0, 'text_encoder': 0.5}."
        )
    return {str(part): _check_number(f"the weight of {part} in {adapter}", own) for part, own in weight.items()}


def _check_number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadInput(f"{what} must be a finite number, not {value!r}.")
    return float(value)


def check_parts(adapter: str, weight: Weight, names: Iterable[str]) -> None:
    """Raise InlayError unless weights by part name the very parts that an adapter changes, by its modules' names."""
    if not isinstance(weight, dict):
        return
    parts = sorted({find_part(name) for name in names})
    if "" in parts:
        raise BadInput(f"adapter {adapter!r} changes no module of its base, so that it has no parts; give one number.")
    if unknown := [part for part in weight if part not in parts]:
        raise BadInput(f"adapter {adapter!r} has no part {unknown[0]!r}; its parts are {', '.join(parts)}.")
    if missing := [part for part in parts if part not in weight]:
        raise BadInput(
            f"adapter {adapter!r} also changes {', '.join(missing)}; give the weight there too (0 leaves it out)."
        )


def spread_weights(weights: Sequence[Weight], names: Sequence[Iterable[str]]) -> list[Weight]:
    """All weights by part, each over the parts of its adapter, if one of them is; else as they are."""
    if not any(isinstance(weight, dict) for weight in weights):
        return list(weights)
    return [
        weight if isinstance(weight, dict) else dict.fromkeys(sorted(set(map(find_part, own))), weight)
        for weight, own in zip(weights, names, strict=True)
    ]


def divide_by_sum(weights: Sequence[Weight]) -> list[Weight]:
    """Weights that add up to 1; those by part in each part.

    Raises:
        InlayError: They add up to 0.
    """
    by_part = [weight if isinstance(weight, dict) else {"": weight} for weight in weights]
    totals: dict[str, float] = {}
    for own in by_part:
        for part, number in own.items():
            totals[part] = totals.get(part, 0.0) + number
    for part, total in totals.items():
        if abs(total) < 1e-12:
            numbers = [own[part] for own in by_part if part in own]
            where = f" of {part}" if part else ""
            raise BadInput(f"an average divides by the sum of the weights, but {numbers}{where} add up to 0; use add.")
    divided = [{part: number / totals[part] for part, number in own.items()} for own in by_part]
    return [own.get("", own) for own in divided]


def list_numbers(weights: Sequence[Weight]) -> list[tuple[str, float]]:
    """All numbers in weights, in order, each with the part that it is for; "" is the whole adapter."""
    return [item for weight in weights for item in (weight.items() if isinstance(weight, dict) else [("", weight)])]


def replace_numbers(weights: Sequence[Weight], numbers: Iterable[float]) -> list[Weight]:
    """The same weights with other numbers, in the order of `list_numbers`."""
    left = iter(numbers)
    return [{part: next(left) for part in weight} if isinstance(weight, dict) else next(left) for weight in weights]


def describe_weight(weight: Weight) -> str:
    """As it stands in messages and on the card: `0.5`, or `unet 1, text_encoder 0.5`."""
    if isinstance(weight, dict):
        return ", ".join(f"{part} {own:g}" for part, own in weight.items())
    return f"{weight:g}"

"""What a search may use, and what its winner may cost: `params=200k,latency=+5%,minutes=20`."""

import re
from dataclasses import dataclass

from inlay.errors import BadInput

# What stands behind a number, and by what it is multiplied.
_COUNT = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9}
_UNITS: dict[str, dict[str, float]] = {
    "params": _COUNT,
    "macs": {**_COUNT, "%": 0.01},
    "latency": {"ms": 1.0, "s": 1e3, "%": 0.01},
    "file": _BYTES,
    "memory": _BYTES,
    "minutes": {"": 60.0},
    "seconds": {"": 1.0},
    "trials": {"": 1.0},
}
_EXAMPLES = {
    "params": "params=200k",
    "macs": "macs=20M or macs=+1%",
    "latency": "latency=12ms or latency=+5%",
    "file": "file=500kB",
    "memory": "memory=2GB",
    "minutes": "minutes=20",
    "seconds": "seconds=90",
    "trials": "trials=16",
}


@dataclass(frozen=True)
class Limit:
    """The largest value that is allowed.

    Attributes:
        value: In the unit of what it limits; of a relative one the share that may be added to the base's, 0.05 for +5%.
        relative: Whether it is such a share.
    """

    value: float
    relative: bool = False

    def of(self, base: float) -> float:
        """The largest value where the base alone has this one."""
        return base * (1 + self.value) if self.relative else self.value


@dataclass(frozen=True)
class Budget:
    """Limits of an adapter and of the search for it; None: no limit.

    Attributes:
        params: Parameters that are trained, without those of the head, which all adapters of a task have.
        macs: Multiply-accumulates of one input.
        latency: Milliseconds of one input.
        file: Bytes of the adapter's weights as they are saved, with the head.
        memory: Bytes of a training step.
        seconds: Of the search and of the final training together.
        trials: Of full length, whose steps the search may take; the final training is not among them.
    """

    params: int | None = None
    macs: Limit | None = None
    latency: Limit | None = None
    file: int | None = None
    memory: int | None = None
    seconds: float | None = None
    trials: int | None = None


def parse_budget(text: str) -> Budget:
    """Read a budget as it is written on a command line.

    Args:
        text: Names and values with commas between them; k, M and G stand for thousands, millions and 10^9.

    Raises:
        BadInput: An unknown name, one that is there twice, a value that is none; seconds and trials, which both say how
            long the search is.
    """
    values: dict[str, Limit] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        name = name.lower()
        if not equals or name not in _UNITS:
            raise BadInput(f"unknown limit {part!r} in the budget; choose among {', '.join(_EXAMPLES.values())}.")
        key = "seconds" if name == "minutes" else name
        if key in values:
            raise BadInput(f"the budget names {name} again: {text!r}; give each limit once.")
        values[key] = _parse_value(name, value)
    if not values:
        raise BadInput(f"the budget {text!r} names no limit; write for example params=200k,minutes=20.")
    if "seconds" in values and "trials" in values:
        raise BadInput("minutes and trials both say how long the search is; give one of them.")
    plain = {key: values[key].value for key in values.keys() - {"macs", "latency"}}
    whole = {key: value if key == "seconds" else int(value) for key, value in plain.items()}
    return Budget(**whole, macs=values.get("macs"), latency=values.get("latency"))  # type: ignore[arg-type]


def _parse_value(name: str, text: str) -> Limit:
    """A positive value in the unit of its name; seconds for minutes."""
    found = re.fullmatch(r"(\+?)(\d+\.?\d*|\.\d+)([a-zA-Z%]*)", text)
    plus, number, unit = found.groups() if found else ("", "0", "")
    relative = unit == "%"
    value = float(number) * _UNITS[name].get(unit.lower(), 0.0)
    whole = name in ("params", "file", "memory", "trials")
    if not value > 0 or relative != bool(plus) or (whole and value < 1):
        raise BadInput(f"{name}={text} is no limit; write it as {_EXAMPLES[name]}.")
    return Limit(value, relative)

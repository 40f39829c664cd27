"""What a study found of an adapter's method: read from its metrics.json, and told on its card and by `inlay info`."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from inlay.tasks.evaluation import title
from inlay.tasks.printing import printable

KEY = "study"  # in metrics.json
SECTION = "study"  # of the card
_LONGEST, _MOST = 1000, 100  # characters of a text, members of a list or object


def read_study(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The study in a metrics.json, without what has another form than `inlay.study.attach` gives it; {} without one.

    Anyone may have written that file: texts are cut and made safe for a terminal, numbers are finite, lists are short.

    Returns:
        Texts: made_by (`compare` or `tune`), base, data, task, score, method, modules, strategy, placement. Numbers:
        width, steps, learning_rate, params, rank, methods and trials (how many there were), search_seconds, seconds.
        Yes or no: larger_is_better, edge. Lists of numbers: seeds, blocks. Numbers by name: counts, budget. A mean and
        its interval by name: test, forgetting. difference: such an interval, `to` which method, and whether it is a
        `tie`. curve: pairs of a learning rate and a score, None where it diverged.
    """
    found = metrics.get(KEY)
    if not isinstance(found, dict):
        return {}
    read = {key: reader(found.get(key)) for key, reader in _READERS.items()}
    return {key: value for key, value in read.items() if value not in (None, {}, [])}


def describe_study(study: Mapping[str, Any]) -> list[str]:
    """What `read_study` gave, in sentences; those of which something is missing are left out."""
    lines = [_describe_rank(study), _describe_search(study), _describe_difference(study), _describe_rate(study)]
    if counts := study.get("counts"):
        lines.append(f"Examples: {', '.join(f'{count:,.0f} {part}' for part, count in counts.items())}.")
    if forgotten := study.get("forgetting"):
        said = ", ".join(f"{title(name)} {_format(value)}" for name, value in forgotten.items())
        lines.append(f"What the base lost: {said}.")
    if "placement" in study:
        lines.append(f"Placement: {study['placement']}")
    if "seconds" in study:
        whole = _format_seconds(study["seconds"])
        search = study.get("search_seconds")
        lines.append(
            f"All runs took {whole}."
            if search is None
            else f"The search took {_format_seconds(search)} of {whole} in all."
        )
    return [line for line in lines if line]


def write_study_section(metrics: Mapping[str, Any]) -> str:
    """The section of a card, with its heading; nothing where there is no study."""
    lines = describe_study(read_study(metrics))
    return "\n".join(["## Study", "", *(f"- {_escape(line)}" for line in lines)]) if lines else ""


def _describe_rank(study: Mapping[str, Any]) -> str:
    if not {"rank", "methods"} <= study.keys() or not (scored := _describe_score(study)):
        return ""
    return f"Number {study['rank']:.0f} of {study['methods']:.0f} methods {scored}."


def _describe_search(study: Mapping[str, Any]) -> str:
    if "trials" not in study or not (scored := _describe_score(study)):
        return ""
    how = f", {study['strategy']}" if "strategy" in study else ""
    return f"Winner of a search ({study['trials']:.0f} runs{how}) {scored}."


def _describe_score(study: Mapping[str, Any]) -> str:
    """On what, by which score of the test part; nothing where that is missing."""
    if not {"data", "score"} <= study.keys() or study["score"] not in study.get("test", {}):
        return ""
    score, seeds = study["score"], len(study.get("seeds", ()))
    on = _shorten(study["data"]) + (f" ({_shorten(study['base'])})" if "base" in study else "")
    several = f", mean of {seeds} seeds with its 95 % t-interval" if seeds > 1 else ""
    return (
        f"on {on} by {title(score).lower()} of the test part, which chose nothing: {_format(study['test'][score])}"
        f"{several}"
    )


def _shorten(name: str) -> str:
    """Of a path on somebody's machine the last part."""
    return name.rstrip("/").rpartition("/")[2] if name.startswith(("/", "~", ".")) else name


def _describe_difference(study: Mapping[str, Any]) -> str:
    apart = study.get("difference")
    if not apart:
        return ""
    tie = "; the interval includes 0, which is a tie" if apart["tie"] else ""
    return f"Difference to {apart['to']} with the same seeds: {_format(apart, '+')}{tie}."


def _describe_rate(study: Mapping[str, Any]) -> str:
    curve = study.get("curve", [])
    if "learning_rate" not in study or not curve:
        return ""
    tried = ", ".join(f"{rate:.2g}: {'diverged' if score is None else f'{score:.4g}'}" for rate, score in curve)
    edge = ", at the edge of what was tried" if study.get("edge") else ""
    return f"Learning rate {study['learning_rate']:.2g}{edge}, chosen on the validation part ({tried})."


def _format(estimate: Mapping[str, Any], sign: str = "") -> str:
    low, high = estimate["low"], estimate["high"]
    between = "" if low is None or high is None else f" ({low:{sign}.4g} to {high:{sign}.4g})"
    return f"{estimate['mean']:{sign}.4g}{between}"


def _format_seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _escape(text: str) -> str:
    """As a line of Markdown, without tags and comments."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _read_text(value: Any) -> str | None:
    return printable(value[:_LONGEST]) if isinstance(value, str) and value else None


def _read_number(value: Any) -> int | float | None:
    return value if type(value) in (int, float) and math.isfinite(value) else None


def _read_flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _read_numbers(value: Any) -> list[int | float]:
    kept = [_read_number(each) for each in value[:_MOST]] if isinstance(value, list) else []
    return [each for each in kept if each is not None]


def _read_named(value: Any, read: Callable[[Any], Any]) -> dict[str, Any]:
    pairs = list(value.items())[:_MOST] if isinstance(value, dict) else []
    kept = {printable(str(name)[:_LONGEST]): read(each) for name, each in pairs}
    return {name: each for name, each in kept.items() if each is not None}


def _read_estimate(value: Any) -> dict[str, Any] | None:
    if not isinstance(value, dict) or _read_number(value.get("mean")) is None:
        return None
    return {key: _read_number(value.get(key)) for key in ("mean", "low", "high")}


def _read_difference(value: Any) -> dict[str, Any] | None:
    estimate = _read_estimate(value)
    if estimate is None or (to := _read_text(value.get("to"))) is None:
        return None
    return {**estimate, "to": to, "tie": value.get("tie") is True}


def _read_curve(value: Any) -> list[list[Any]]:
    pairs = value[:_MOST] if isinstance(value, list) else []
    read = [[_read_number(each) for each in pair] for pair in pairs if isinstance(pair, list) and len(pair) == 2]
    return [[rate, score] for rate, score in read if rate is not None]


_READERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        ("made_by", "base", "data", "task", "score", "method", "modules", "strategy", "placement"), _read_text
    ),
    **dict.fromkeys(
        ("width", "steps", "learning_rate", "params", "rank", "methods", "trials", "search_seconds", "seconds"),
        _read_number,
    ),
    **dict.fromkeys(("larger_is_better", "edge"), _read_flag),
    **dict.fromkeys(("seeds", "blocks"), _read_numbers),
    **dict.fromkeys(("counts", "budget"), lambda value: _read_named(value, _read_number)),
    **dict.fromkeys(("test", "forgetting"), lambda value: _read_named(value, _read_estimate)),
    "difference": _read_difference,
    "curve": _read_curve,
}

"""Pros and cons of each kind of method, with the figures that a comparison measured; nothing is said without one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from inlay.methods import METHODS
from inlay.methods.method import Kind
from inlay.study.comparison import Comparison
from inlay.study.report.standing import Estimate, Standing, find_standings
from inlay.study.report.table import escape_markdown, find_digits, format_estimate, format_number
from inlay.tasks.evaluation import title


@dataclass(frozen=True)
class Judgement:
    """What speaks for and against one kind of method in one comparison.

    Attributes:
        heading: The kind.
        methods: Those of it that were compared.
        pros: Sentences.
        cons: Sentences.
    """

    heading: str
    methods: list[str]
    pros: list[str]
    cons: list[str]


_HEADINGS: dict[Kind, str] = {
    "update": "Low-rank updates of weights (LoRA and its variants)",
    "scale": "Scales and shifts of features",
    "adapter": "Adapter modules",
    "prompt": "Prompts and prefixes",
    "part": "Parts of the base's own weights",
    "composite": "Several methods at once",
    "baseline": "For comparison: the head only, and all weights",
}


def judge_kinds(comparison: Comparison) -> list[Judgement]:
    """One judgement for each kind of which a method was compared, in the order of their best scores; baselines last."""
    standings = find_standings(comparison)
    kinds = dict.fromkeys(METHODS[each.method].kind for each in standings)
    return [
        _judge(kind, [each for each in standings if METHODS[each.method].kind == kind], comparison)
        for kind in sorted(kinds, key=lambda kind: kind == "baseline")
    ]


def write_markdown_kinds(comparison: Comparison) -> str:
    """The judgements as a page of Markdown."""
    parts = [f"# Pros and cons, as measured: {escape_markdown(comparison.subject)}"]
    for found in judge_kinds(comparison):
        lines = [f"- **+** {said}" for said in found.pros] + [f"- **-** {said}" for said in found.cons]
        parts.append(f"## {found.heading}\n\n{', '.join(found.methods)}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def find_dimension_changers() -> list[str]:
    """The methods that take a base to inputs of another dimension: a base of images to volumes."""
    return [name for name, method in METHODS.items() if "volume" in method.bases]


def _judge(kind: Kind, standings: Sequence[Standing], comparison: Comparison) -> Judgement:
    pros = [said for said in (_say_quality(standings, comparison), _say_size(standings)) if said]
    cons: list[str] = []
    if kind != "baseline":
        merging = [each for each in standings if each.row.merges]
        if merging:
            pros.append(_say_merged(merging))
        if kept := [each for each in standings if not each.row.merges]:
            cons.append(f"{_join(kept)} {_verb(kept, 'does', 'do')} not merge.")
    if cost := _say_cost(standings):
        added = [each.added_latency if each.added_macs is None else each.added_macs for each in standings]
        adds = any(percent is not None and percent > 0.05 for percent in added)
        (cons if adds and kind != "baseline" else pros).append(cost)
    if kind == "prompt":  # follows from what they are, as does the next
        cons.append("They add tokens, or keys and values, to which every layer that has them attends.")
    if kind != "baseline":
        _judge_dimension(standings, pros, cons)
    cons += [said for name in _LOSSES if (said := _say_loss(kind, standings, name))]
    return Judgement(_HEADINGS[kind], [each.method for each in standings], pros, cons)


def _judge_dimension(standings: Sequence[Standing], pros: list[str], cons: list[str]) -> None:
    able = find_dimension_changers()
    here = [each for each in standings if each.method in able]
    if here:
        pros.append(f"{_join(here)} can change the dimension of the input: a base of images learns volumes.")
    if len(here) < len(standings):
        others = "The others" if here else "They"
        cons.append(f"{others} cannot change the dimension of the input; of all methods only {', '.join(able)} can.")


def _say_size(standings: Sequence[Standing]) -> str:
    trained = _say_range(standings, lambda each: each.trainable, "{:,.0f}")
    memory = _say_range(standings, lambda each: each.peak_mb, "{:,.0f}")
    parts = [f"{trained} trained parameters"] * bool(trained) + [f"{memory} MB at the peak of a step"] * bool(memory)
    return f"Training: {', '.join(parts)}." if parts else ""


def _say_merged(merging: Sequence[Standing]) -> str:
    measured = _say_range(merging, lambda each: each.merged_latency, "{:+.1f} %")
    cost = f"; latency compared with the base is then {measured}" if measured else ""
    return f"{_join(merging)} {_verb(merging, 'merges', 'merge')} into the base's weights{cost}."


def _say_quality(standings: Sequence[Standing], comparison: Comparison) -> str:
    """The best of the kind, and how far that is from the best of all."""
    best = next((each for each in standings if comparison.score in each.scores), None)
    if best is None:
        return ""
    said = f"Best: {best.method} with {title(comparison.score)} {format_estimate(best.scores[comparison.score])}"
    if best.difference is None:
        return f"{said}, the best of all."
    apart = f"{best.difference.mean:+.{find_digits(best.scores[comparison.score].mean)}f}"
    return f"{said}, {f'a tie with the best of all ({apart})' if best.ties else f'{apart} from the best of all'}."


def _say_cost(standings: Sequence[Standing]) -> str:
    """Work and time that are added to a forward pass while nothing is merged."""
    macs = _say_range(standings, lambda each: each.added_macs, "{:+.1f} %")
    latency = _say_range(standings, lambda each: each.added_latency, "{:+.0f} %")
    said = " and ".join(part for part in (f"latency {latency}" * bool(latency), f"MACs {macs}" * bool(macs)) if part)
    busy = " (on a busy machine)" if latency and any(each.noisy for each in standings) else ""
    return f"Unmerged, compared with the base: {said}{busy}." if said else ""


_LOSSES = {
    "own_task": "The base's own task falls by",
    "text_loss": "The loss on held-out pre-training text rises by",
    "drift": "The base's features drift by",
}


def _say_loss(kind: Kind, standings: Sequence[Standing], name: str) -> str:
    losses: list[Estimate] = [each.forgetting[name] for each in standings if name in each.forgetting]
    if not losses:
        return ""
    low, high = min(each.mean for each in losses), max(each.mean for each in losses)
    digits = find_digits(high)
    while_on = "" if kind == "baseline" else " while the adapter is on"
    return f"{_LOSSES[name]} {_between(f'{low:.{digits}f}', f'{high:.{digits}f}')}{while_on}."


def _say_range(standings: Sequence[Standing], value: Callable[[Standing], float | None], form: str) -> str:
    values = [found for each in standings if (found := value(each)) is not None]
    return _between(format_number(min(values), form), format_number(max(values), form)) if values else ""


def _between(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _join(standings: Sequence[Standing]) -> str:
    names = [each.method for each in standings]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _verb(standings: Sequence[Standing], one: str, many: str) -> str:
    return one if len(standings) == 1 else many

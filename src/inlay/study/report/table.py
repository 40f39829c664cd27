"""A comparison as a table: Markdown, CSV, and plain text for a terminal, from one list of columns."""

import csv
import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from inlay.study.comparison import Comparison
from inlay.study.report.standing import Estimate, Standing, find_standings
from inlay.tasks.evaluation import title
from inlay.tasks.printing import printable

WIDTH = 120  # characters of a terminal


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: Its heading, with the unit.
        text: What a cell says; "-" where nothing was measured.
        value: By which a page sorts; None for what is unknown.
        short: Its heading in a terminal; None where it is left out there.
        brief: What a cell says in a terminal, where that is less.
        is_cost: It is a cost or a setting, rather than a score.
    """

    title: str
    text: Callable[[Standing], str]
    value: Callable[[Standing], float | str | None]
    short: str | None = None
    brief: Callable[[Standing], str] | None = None
    is_cost: bool = False


def list_columns(comparison: Comparison, standings: Sequence[Standing]) -> list[Column]:
    """The columns of a comparison; a column in which every cell would be empty is left out."""
    score = comparison.score
    others = dict.fromkeys(name for each in standings for name in each.scores if name != score)
    lost = dict.fromkeys(name for each in standings for name in each.forgetting)
    names = ["ece"] * ("ece" in others) + [name for name in others if name != "ece"]
    columns = [
        Column("method", lambda each: each.method, lambda each: each.method, "method"),
        _score_column(score, title(score), score),
        Column(
            "difference to the best",
            lambda each: format_difference(each, score),
            lambda each: each.difference.mean if each.difference else 0.0,
            "to the best",
            lambda each: format_difference(each, score, interval=False),
        ),
        *(_score_column(name, _HEADINGS.get(name, title(name)), _HEADINGS.get(name)) for name in names),
        *(_forgetting_column(name) for name in lost),
        _number_column("trained parameters", lambda each: each.trainable, "{:,.0f}", "trained"),
        _number_column("added MACs", lambda each: each.added_macs, "{:+.1f} %"),
        Column(
            "added latency",
            lambda each: _format_latency(each, each.added_latency),
            lambda each: each.added_latency,
            "latency",
            is_cost=True,
        ),
        Column(
            "latency merged",
            lambda each: _format_latency(each, each.merged_latency) if each.row.merges else "no",
            lambda each: each.merged_latency,
            "merged",
            is_cost=True,
        ),
        _number_column("peak memory, MB", lambda each: each.peak_mb, "{:,.0f}", "peak MB"),
        _number_column("energy, mJ", lambda each: each.energy_mj, "{:,.3g}"),
        _number_column("file, kB", lambda each: each.file_kb, "{:,.0f}"),
        Column("learning rate", format_rate, lambda each: each.row.learning_rate, "rate", is_cost=True),
    ]
    if len({each.row.steps for each in standings}) > 1:
        columns.append(_number_column("steps", lambda each: each.row.steps, "{:,.0f}", "steps"))
    return columns[:1] + [c for c in columns[1:] if any(c.text(each) not in ("-", "") for each in standings)]


_HEADINGS = {"ece": "ECE"}  # shorter than titles, and shown in a terminal too


def _score_column(name: str, heading: str, short: str | None) -> Column:
    return Column(
        heading,
        lambda each: format_estimate(each.scores.get(name)),
        lambda each: each.scores[name].mean if name in each.scores else None,
        short,
    )


_LOST = {"own_task": "lost on its own task", "text_loss": "rise of text loss, nats", "drift": "drift of features"}


def _forgetting_column(name: str) -> Column:
    return Column(
        _LOST.get(name, name),
        lambda each: format_estimate(each.forgetting.get(name)),
        lambda each: each.forgetting[name].mean if name in each.forgetting else None,
    )


def _number_column(
    heading: str, number: Callable[[Standing], float | None], form: str, short: str | None = None
) -> Column:
    def text(each: Standing) -> str:
        value = number(each)
        return "-" if value is None else format_number(value, form)

    return Column(heading, text, number, short, is_cost=True)


def format_number(value: float, form: str) -> str:
    """As str.format, but +0.0 for -0.0: a rounded nothing has no sign to read anything into."""
    text = form.format(value)
    return text.replace("-", "+", 1) if text.startswith("-") and not any(c in text for c in "123456789") else text


def format_estimate(estimate: Estimate | None) -> str:
    """Such as 0.971 ± 0.013: three decimals up to 1, else one."""
    if estimate is None:
        return "-"
    digits = find_digits(estimate.mean)
    spread = f" ± {estimate.half:.{digits}f}" if math.isfinite(estimate.half) else ""
    return f"{estimate.mean:.{digits}f}{spread}"


def find_digits(value: float) -> int:
    """Decimals that a score is shown with: three of a share, one of what goes to 100."""
    return 3 if abs(value) <= 1 else 2 if abs(value) < 10 else 1


def format_difference(standing: Standing, score: str, *, interval: bool = True) -> str:
    """Such as -0.012 (-0.020 to -0.004), with `tie` where the interval includes 0."""
    apart = standing.difference
    if apart is None:
        return "best" if standing.scores else "-"
    digits = find_digits(standing.scores[score].mean)
    shown = interval and math.isfinite(apart.half)
    between = f" ({apart.low:+.{digits}f} to {apart.high:+.{digits}f})" if shown else ""
    return f"{apart.mean:+.{digits}f}{between}{' tie' if standing.ties else ''}"


def format_rate(standing: Standing) -> str:
    """Such as 0.003, with `edge` where no smaller, or no larger, rate was tried."""
    return f"{standing.row.learning_rate:.2g}{' edge' if standing.row.edge else ''}"


def _format_latency(standing: Standing, percent: float | None) -> str:
    """Such as +24 %, or ~+24 % where the machine was busy."""
    return "-" if percent is None else f"{'~' * standing.noisy}{format_number(percent, '{:+.0f} %')}"


def write_markdown_table(comparison: Comparison) -> str:
    """The full table, and below it what it rests on and what was refused."""
    standings = find_standings(comparison)
    columns = list_columns(comparison, standings)
    lines = [
        f"| {' | '.join(column.title for column in columns)} |",
        f"|---|{'---:|' * (len(columns) - 1)}",
        *(f"| {' | '.join(column.text(each) for column in columns)} |" for each in standings),
    ]
    notes = "\n".join(f"- {escape_markdown(note)}" for note in list_notes(comparison))
    return "\n".join(lines) + f"\n\n{notes}\n"


def escape_markdown(text: str) -> str:
    """Names are anyone's: a line of a list, without tags."""
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def list_notes(comparison: Comparison) -> list[str]:
    """What stands below a table: data, budget, seeds, the search's cost, failures, and refused methods with reasons."""
    counts = ", ".join(f"{count:,} {part}" for part, count in comparison.counts.items())
    rates = sorted({len(row.curve) for row in comparison.rows})
    tried = "" if not rates else f"; each method has the best of {' or '.join(map(str, rates))} learning rates"
    seeds = len(comparison.seeds)
    notes = [
        f"{comparison.subject} ({counts} examples), {describe_budget(comparison)} a run, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}{tried}.",
        "Scores are those of the test part, which chose nothing; ± and brackets are 95 % t-intervals over the seeds. "
        "Differences are paired by seed, and a tie is one whose interval includes 0."
        if seeds > 1
        else "Scores are those of the test part, which chose nothing. One seed gives no intervals, and no ties.",
        f"The search for the learning rates took {format_seconds(comparison.search_seconds)} of "
        f"{format_seconds(comparison.seconds)} in all.",
    ]
    if about := describe_machine(comparison):
        notes.append(f"Measured with {', '.join(f'{key} {value}' for key, value in about.items())}.")
    notes += list_measurement_notes(comparison)
    notes += [f"{row.method}: {said}" for row in comparison.rows for said in row.failed]
    return notes + [f"Not compared: {said}" for said in list_refused(comparison)]


def list_refused(comparison: Comparison) -> list[str]:
    """The methods that were not compared, by reason."""
    names: dict[str, list[str]] = {}
    for name, reason in comparison.refused.items():
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(each)}: {reason}" for reason, each in names.items()]


def describe_machine(comparison: Comparison) -> dict[str, str]:
    """Device, threads and versions, by name; settings, of which there are many, are left to the .json file."""
    about = {key: value for key, value in comparison.about.items() if not isinstance(value, dict | list)}
    return {key: str(value) for key, value in {**about, **comparison.about.get("versions", {})}.items()}


def list_measurement_notes(comparison: Comparison) -> list[str]:
    """How energy was measured, and which latencies are not to be trusted."""
    sources = {row.costs.get("energy_source") for row in comparison.rows if row.costs.get("energy_j") is not None}
    notes = [f"Energy is {source}." for source in sorted(filter(None, sources))]
    if any(each.noisy for each in find_standings(comparison)):
        notes.append("~ marks latencies whose repetitions lie apart by more than a fifth: the machine was busy.")
    return notes


def describe_budget(comparison: Comparison) -> str:
    """What every run had, in words."""
    parts = {"steps": "{:,.0f} steps", "batch_size": "of {:,.0f}", "seconds": "{:,.0f} seconds"}
    return " ".join(parts.get(key, key + " {:g}").format(value) for key, value in comparison.budget.items())


def format_seconds(seconds: float) -> str:
    """Such as 90 s, 21 min or 2.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


_LESS_NEEDED = ("ECE", "peak MB", "merged", "latency")  # the first goes first where a line is too long


def write_terminal_table(comparison: Comparison) -> str:
    """The main columns, in at most 120 characters a line, and the notes."""
    standings = find_standings(comparison)
    columns = [column for column in list_columns(comparison, standings) if column.short is not None]
    lines = _align([_terminal_cells(column, standings) for column in columns])
    for name in _LESS_NEEDED:
        if len(lines[0]) > WIDTH:
            columns = [column for column in columns if column.short != name]
            lines = _align([_terminal_cells(column, standings) for column in columns])
    notes = (textwrap.fill(printable(note), WIDTH, subsequent_indent="  ") for note in list_notes(comparison))
    return "\n".join([*lines, "", *notes])


def _terminal_cells(column: Column, standings: Sequence[Standing]) -> list[str]:
    return [column.short or column.title, *((column.brief or column.text)(each) for each in standings)]


def _align(columns: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns of cells: the first column to the left, the others to the right."""
    padded = []
    for k, cells in enumerate(columns):
        width = max(map(len, cells))
        padded.append([cell.rjust(width) if k else cell.ljust(width) for cell in cells])
    return ["  ".join(line) for line in zip(*padded, strict=True)]


def write_csv_table(comparison: Comparison) -> str:
    """One line for each method, with every number in full and its unit in the heading; empty where unknown."""
    standings = find_standings(comparison)
    scores = dict.fromkeys(name for each in standings for name in each.scores)
    lost = dict.fromkeys(name for each in standings for name in each.forgetting)
    lines = []
    for each in standings:
        line: dict[str, float | str | bool | None] = {"method": each.method, "width": each.row.width}
        line |= {"learning_rate": each.row.learning_rate, "edge": each.row.edge, "merges": each.row.merges}
        for name in scores:
            line |= _spread(name, each.scores.get(name))
        line |= {**_spread("difference", each.difference), "tie": each.ties}
        for name in lost:
            line |= _spread(f"forgetting_{name}", each.forgetting.get(name))
        line |= {
            "trainable_parameters": each.trainable,
            "added_macs_percent": each.added_macs,
            "latency_ms": each.row.costs.get("latency_ms"),
            "latency_noisy": each.noisy,
            "added_latency_percent": each.added_latency,
            "merged_latency_percent": each.merged_latency,
            "peak_memory_mb": each.peak_mb,
            "energy_mj": each.energy_mj,
            "file_kb": each.file_kb,
            "seconds": each.row.seconds,
            "failed": "; ".join(each.row.failed),
        }
        lines.append({key: "" if _is_unknown(value) else value for key, value in line.items()})
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(lines[0]) if lines else ["method"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _spread(name: str, estimate: Estimate | None) -> dict[str, float | str | bool | None]:
    found = (None, None, None) if estimate is None else (estimate.mean, estimate.low, estimate.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))


def _is_unknown(value: float | str | bool | None) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


OVERVIEW_NOTE = "In bold the best of a column. A tie is not told apart from it by these seeds."


def list_overview(comparisons: Sequence[Comparison]) -> tuple[list[str], list[tuple[str, list[tuple[str, bool]]]]]:
    """Several comparisons as one table: a row for each method, a column for each comparison.

    Returns:
        The headings, and of each method its name and its cells, with whether it is the best there.
    """
    cells: dict[str, list[tuple[str, bool]]] = {}
    for k, comparison in enumerate(comparisons):
        for each in find_standings(comparison):
            line = cells.setdefault(each.method, [("-", False)] * len(comparisons))
            text = format_estimate(each.scores.get(comparison.score)) + " tie" * bool(each.ties)
            line[k] = (text, each.difference is None and bool(each.scores))
    return ["method", *(f"{each.data}, {each.base}: {title(each.score)}" for each in comparisons)], list(cells.items())


def write_overview_table(comparisons: Sequence[Comparison]) -> str:
    """`list_overview` as Markdown, with the best in bold."""
    heads, lines = list_overview(comparisons)
    return "\n".join(
        [
            f"| {' | '.join(map(escape_markdown, heads))} |",
            f"|---|{'---:|' * len(comparisons)}",
            *(f"| {method} | {' | '.join(f'**{t}**' if b else t for t, b in cells)} |" for method, cells in lines),
            "",
            OVERVIEW_NOTE,
            "",
        ]
    )

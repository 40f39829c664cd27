"""A comparison as one web page that needs no server: table, plots, pros and cons, and what it does not show."""

import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from inlay.files.atomic import replacing
from inlay.files.outputs import check_output_file
from inlay.study.comparison import Comparison
from inlay.study.report.anchors import NOT_COMPARABLE, find_anchors, load_anchors
from inlay.study.report.kinds import judge_kinds
from inlay.study.report.plots import draw_all
from inlay.study.report.standing import find_standings
from inlay.study.report.table import (
    OVERVIEW_NOTE,
    describe_budget,
    describe_machine,
    format_seconds,
    list_columns,
    list_measurement_notes,
    list_overview,
    list_refused,
)
from inlay.tasks.evaluation import title

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(comparisons: Sequence[Comparison], path: str | Path, *, anchors: bool = False) -> Path:
    """Save a page with everything in it: styles, plots as SVG, and a few lines of script by which the table is sorted.

    It opens from the disk, prints, follows the reader's choice of dark or light, and is read without the script too.

    Args:
        comparisons: One section for each, with a table of all of them in front if there are several.
        path: Of the file.
        anchors: Show what others published of the same methods as well.

    Raises:
        InlayError: The file cannot be written.
    """
    path = check_output_file(Path(path).expanduser())
    with replacing(path) as new:
        new.write_text(render_page(comparisons, anchors=anchors), encoding="utf-8")
    return path


def render_page(comparisons: Sequence[Comparison], *, anchors: bool = False) -> str:
    """The HTML; nothing of a name, label or reason can begin a tag."""
    several = len(comparisons) > 1
    data = list(dict.fromkeys(each.data for each in comparisons))
    heading = f"Methods compared on {data[0] if len(data) == 1 else f'{len(data)} tasks'}"
    body = [_write_overview(comparisons)] if several else []
    body += [_write_section(each, anchors, several) for each in comparisons]
    parts = {"TITLE": html.escape(heading), "LEAD": _say_lead(comparisons), "BODY": "\n".join(body)}
    return re.sub("@([A-Z]+)@", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def _say_lead(comparisons: Sequence[Comparison]) -> str:
    bases = ", ".join(dict.fromkeys(each.base for each in comparisons))
    methods = len({row.method for each in comparisons for row in each.rows})
    return html.escape(f"{methods} ways to fine-tune {bases}, each at its best learning rate.")


def _write_overview(comparisons: Sequence[Comparison]) -> str:
    heads, lines = list_overview(comparisons)
    rows = (
        _write_row([(cell, "") for cell, _ in [(method, False), *cells]], [leads for _, leads in [("", False), *cells]])
        for method, cells in lines
    )
    return f'<h2>All comparisons</h2>\n{_wrap_table(heads, rows, sortable=False)}\n<p class="note">{OVERVIEW_NOTE}</p>'


def _write_section(comparison: Comparison, anchors: bool, several: bool) -> str:
    about = f"{comparison.data}: " if several else ""
    parts = [
        f"<h2>{html.escape(about)}{'what' if about else 'What'} was compared, and how</h2>",
        _write_facts(comparison),
        f"<h2>{html.escape(about)}{'results' if about else 'Results'}</h2>",
        _write_table(comparison, costs=False),
        _write_table(comparison, costs=True),
        _write_list(_say_below_table(comparison), "note"),
        *(f"<figure>{canvas.to_svg(inline=True)}</figure>" for canvas in draw_all(comparison).values()),
        "<h2>Pros and cons, as measured</h2>",
        _write_kinds(comparison),
    ]
    if anchors and (published := _write_anchors(comparison)):
        parts.append(published)
    if comparison.refused:
        parts += ["<h2>Methods that were not compared</h2>", _write_list(list_refused(comparison))]
    return "\n".join([*parts, "<h2>Limits</h2>", _write_list(list_limits(comparison))])


def _write_facts(comparison: Comparison) -> str:
    counts = ", ".join(f"{count:,} {part}" for part, count in comparison.counts.items())
    rates = sorted({len(row.curve) for row in comparison.rows})
    facts = {
        "Base": comparison.base,
        "Data": f"{comparison.data} ({counts})",
        "Task": comparison.task,
        "Main score": f"{title(comparison.score)}, {'larger' if comparison.larger_is_better else 'smaller'} is better",
        "Budget": f"{describe_budget(comparison)}, the same for every run",
        "Seeds": ", ".join(map(str, comparison.seeds)),
        "Learning rates": f"{' or '.join(map(str, rates))} for each method, of which the validation part chose one; "
        "scores are those of the test part, which chose nothing",
        "Time": f"{format_seconds(comparison.seconds)}, of which the search for the rates took "
        f"{format_seconds(comparison.search_seconds)}",
        "Measured with": ", ".join(f"{key} {value}" for key, value in describe_machine(comparison).items()),
    }
    pairs = (f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items())
    return f"<dl>{''.join(pairs)}</dl>{_write_settings(comparison)}"


def _write_settings(comparison: Comparison) -> str:
    """Every setting of the runs, folded away; nothing where the comparison names none."""
    settings = comparison.about.get("settings")
    if not settings:
        return ""
    text = html.escape(json.dumps(settings, indent=1, ensure_ascii=False))
    return f"<details><summary>All settings of the runs</summary><pre>{text}</pre></details>"


def _write_table(comparison: Comparison, *, costs: bool) -> str:
    """The scores, or what each method costs: next to each other they are wider than a page."""
    standings = find_standings(comparison)
    first, *others = list_columns(comparison, standings)
    columns = [first, *(column for column in others if column.is_cost == costs)]
    rows = (
        _write_row(
            [(column.text(each), "" if (value := column.value(each)) is None else str(value)) for column in columns],
            [bool(each.scores) and each.difference is None] * len(columns),
        )
        for each in standings
    )
    return _wrap_table([column.title for column in columns], rows, sortable=True)


def _write_row(cells: Sequence[tuple[str, str]], leads: Sequence[bool]) -> str:
    """One line of a table: what each cell shows, the value that it is sorted by, and which are in bold."""
    written = (
        f'<td data-value="{html.escape(value)}">{"<b>" if bold else ""}{html.escape(text)}{"</b>" if bold else ""}</td>'
        for (text, value), bold in zip(cells, leads, strict=True)
    )
    return f"<tr>{''.join(written)}</tr>"


def _wrap_table(heads: Sequence[str], rows: Iterable[str], *, sortable: bool) -> str:
    head = "".join(f'<th scope="col">{html.escape(text)}</th>' for text in heads)
    kind = ' class="sortable"' if sortable else ""
    body = "\n".join(rows)
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _say_below_table(comparison: Comparison) -> list[str]:
    notes = [
        "± and brackets are 95 % t-intervals over the seeds; differences are paired by seed; a tie is a difference "
        "whose interval includes 0; edge: the best rate is the smallest or largest that was tried."
    ]
    notes += list_measurement_notes(comparison)
    return notes + [f"{row.method}: {said}" for row in comparison.rows for said in row.failed]


def _write_list(lines: Sequence[str], kind: str = "") -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<ul{f' class={kind!r}' if kind else ''}>{items}</ul>"


def _write_kinds(comparison: Comparison) -> str:
    articles = []
    for found in judge_kinds(comparison):
        items = [f"<li>{html.escape(said)}</li>" for said in found.pros]
        items += [f'<li class="con">{html.escape(said)}</li>' for said in found.cons]
        articles.append(
            f'<article><h3>{html.escape(found.heading)}</h3><p class="methods">{html.escape(", ".join(found.methods))}'
            f"</p><ul>{''.join(items)}</ul></article>"
        )
    return f'<div class="kinds">{"".join(articles)}</div>'


def _write_anchors(comparison: Comparison) -> str:
    found = find_anchors(comparison)
    if not found:
        return ""
    published = load_anchors()
    rows = (
        _write_row([(each.method, ""), (each.theirs, ""), (f"{each.score:.1f}", "")], [False] * 3) for each in found
    )
    table = _wrap_table(["method", "their name", "their score"], rows, sortable=False)
    said = html.escape(f"{published.said} {NOT_COMPARABLE} Source: {published.source}.")
    return f'<h2>Published elsewhere</h2>\n{table}\n<p class="note">{said}</p>'


def list_limits(comparison: Comparison) -> list[str]:
    """What the numbers of a comparison do not show, as far as it follows from them."""
    seeds, tested = len(comparison.seeds), comparison.counts.get("test")
    limits = [
        f"One base and one data set: {comparison.subject}. On others the order of the methods may be another.",
        f"{describe_budget(comparison)} a run: what a method reaches with more is not measured.",
    ]
    if seeds > 1:
        limits.append(
            f"The intervals say what {seeds} seeds do: order of the data and new weights. They say nothing of other "
            "test examples, and with few seeds they are wide. Each is of one difference by itself: of 20 differences "
            "that are none, one is expected to exclude 0."
        )
    else:
        limits.append("One seed: no difference can be told from chance.")
    if tested:
        limits.append(f"The test part has {tested:,} examples: one of them is {1 / tested:.2%}.")
    if edges := [row.method for row in comparison.rows if row.edge]:
        limits.append(f"A better rate may lie beyond those tried: {', '.join(edges)}.")
    limits.append("Latency, memory and energy are those of this machine, at the sizes of this task.")
    return limits

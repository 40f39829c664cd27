"""Plots for a slide: quality against a cost with the Pareto front, and a curve over the learning rate per method."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from inlay.errors import BadInput
from inlay.methods import METHODS
from inlay.study.comparison import Comparison, Row
from inlay.study.report.labels import Box, place_labels
from inlay.study.report.standing import Standing, find_standings
from inlay.tasks.canvas import GRID, INK, MUTED, PAPER, Canvas, Line, Point, Text, measure_text
from inlay.tasks.evaluation import title

SIZE = (1600, 900)  # pixels: 16:9
_LEFT, _RIGHT, _TOP, _BOTTOM = 150, 60, 196, 118  # margins around the axes
_TITLE, _LABEL, _SMALL = 42, 28, 26  # sizes of text

_KINDS = {
    "baseline": "baseline",
    "update": "low-rank update",
    "scale": "scale",
    "adapter": "adapter",
    "prompt": "prompt, prefix",
    "part": "part of the base",
    "composite": "several",
}
# Of each kind of method: its colour, after Okabe & Ito 2008, the corners of its mark, and where the first of them is.
_MARKS = {
    "baseline": ("#6e6e76", 4, 45),
    "update": ("#0072b2", 24, 0),
    "scale": ("#cc79a7", 4, 0),
    "adapter": ("#d55e00", 3, -90),
    "prompt": ("#009e73", 3, 90),
    "part": ("#e69f00", 5, -90),
    "composite": ("#56b4e9", 6, 0),
}


@dataclass(frozen=True)
class Cost:
    """A cost that quality is drawn against.

    Attributes:
        name: Of the file, and in a title.
        title: Of the axis, with the unit.
        value: Of a method; None where it was not measured.
        log: Its axis is logarithmic.
        base: What the base costs, drawn as a line.
        timed: It is a time, which depends on what else the machine does.
    """

    name: str
    title: str
    value: Callable[[Standing], float | None]
    log: bool = False
    base: float | None = None
    timed: bool = False


COSTS = (
    Cost("parameters", "trained parameters", lambda each: each.trainable, log=True),
    Cost(
        "latency",
        "latency that is added before merging, % of the base's",
        lambda each: each.added_latency,
        base=0.0,
        timed=True,
    ),
    Cost("memory", "peak memory of a training step, MB", lambda each: each.peak_mb),
)


def find_front(points: Sequence[tuple[float, float]], *, larger_is_better: bool = True) -> list[int]:
    """Which points no other one beats: none costs at most as much and scores at least as well, one of both strictly.

    Args:
        points: Pairs of cost and score.
        larger_is_better: Of the score; of the cost a smaller one always is.

    Returns:
        Their indices, the cheapest first.
    """
    sign = 1 if larger_is_better else -1
    order = sorted(range(len(points)), key=lambda k: (points[k][0], -sign * points[k][1]))
    front: list[int] = []
    for k in order:
        if not front or sign * points[k][1] > sign * points[front[-1]][1] or points[k] == points[front[-1]]:
            front.append(k)
    return front


@dataclass(frozen=True)
class _Axis:
    """Where values lie between two pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high, at = (self.low, self.high, value)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(value)
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def format_ticks(self, ticks: Sequence[float]) -> list[str]:
        """Of a linear axis, with as many decimals as tell them apart."""
        step = min((b - a for a, b in pairwise(ticks)), default=1.0)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [f"{tick:.{digits}f}" for tick in ticks]

    def list_ticks(self) -> list[float]:
        if not self.log:
            return _round_steps(self.low, self.high)
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        few = self.high / self.low < 30
        found = [m * 10.0**k for k in exponents for m in ((1, 2, 5) if few else (1,))]
        return [tick for tick in found if self.low <= tick <= self.high]


def _round_steps(low: float, high: float) -> list[float]:
    """Four to eight round numbers from low to high."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = min((m * unit for m in (1, 2, 5, 10)), key=lambda s: abs(s - rough))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def draw_quality(comparison: Comparison, cost: Cost) -> Canvas:
    """The main score of each method against a cost: means, error bars of 95 %, and the Pareto front of the means.

    Raises:
        BadInput: No method has both.
    """
    score = comparison.score
    shown = [each for each in find_standings(comparison) if cost.value(each) is not None and score in each.scores]
    if not shown:
        raise BadInput(f"no method of this comparison has both a score and {cost.title}; nothing can be drawn.")
    costs = [float(cost.value(each) or 0.0) for each in shown]
    means = [each.scores[score].mean for each in shown]
    base = cost.base
    canvas = Canvas(*SIZE, f"{title(score)} against {cost.title}")
    count = len(comparison.seeds)
    seeds = f"mean and 95 % interval of {count} seeds" if count > 1 else "one seed"
    heading = f"{title(score)} against {cost.title.partition(',')[0]}"
    busy = ", timed on a busy machine" if cost.timed and any(each.noisy for each in shown) else ""
    _draw_head(canvas, heading, f"{comparison.subject}, {seeds}{busy}")
    _draw_kinds(canvas, [METHODS[each.method].kind for each in shown])
    across = _make_cost_axis([*costs, *([] if base is None else [base])], cost.log)
    up = _make_score_axis(shown, score, _spans_decades(means, comparison))
    _draw_axes(canvas, across, up, cost.title)
    if base is not None:
        x = across.place(base)
        canvas.add(Line([(x, up.end), (x, up.start)], MUTED, 2, dashed=True))
    points = [(across.place(c), up.place(m)) for c, m in zip(costs, means, strict=True)]
    front = find_front(list(zip(costs, means, strict=True)), larger_is_better=comparison.larger_is_better)
    steps = _list_front_steps([points[k] for k in front], across.end)
    canvas.add(Line(steps, INK, 3))
    bars = [_find_bar(each, score, up, point[0]) for each, point in zip(shown, points, strict=True)]
    for each, point, bar in zip(shown, points, bars, strict=True):
        _draw_point(canvas, METHODS[each.method].kind, point, bar)
    lines = [*(bar for bar in bars if bar), *_list_thin_boxes(steps)]
    texts = []
    if base is not None:
        lines.append((x - 2, up.end, x + 2, up.start))
        texts.append(_draw_base_label(canvas, x, points))
    sizes = [(measure_text(each.method, _LABEL, bold=True) + 4, _LABEL * 1.05) for each in shown]
    frame = (across.start + 6, up.end + 6, SIZE[0] - 8, up.start - 6)
    for k, label in enumerate(place_labels(points, sizes, frame, lines, texts)):
        if label.leader:
            canvas.add(Line([points[k], label.leader], MUTED, 1.5))
        canvas.add(Text((label.at[0] + 2, label.at[1]), shown[k].method, _LABEL, bold=k in front, halo=True))
    return canvas


def _draw_base_label(canvas: Canvas, x: float, points: Sequence[Point]) -> Box:
    """At that end of the base's line which is farther from all points."""
    ends = (SIZE[1] - _BOTTOM - 20.0, _TOP + 18.0)
    y = max(ends, key=lambda end: min(math.dist((x + 30, end), point) for point in points))
    canvas.add(Text((x + 8, y), "base", _SMALL, MUTED, halo=True))
    return x + 8, y - _SMALL / 2, x + 12 + measure_text("base", _SMALL), y + _SMALL / 2


def _draw_head(canvas: Canvas, heading: str, told: str) -> None:
    canvas.add(Text((48, 50), heading, _TITLE, bold=True))
    while measure_text(told, _SMALL) > SIZE[0] - 96:
        told = told[:-4].rstrip(".") + "..."
    canvas.add(Text((48, 102), told, _SMALL, MUTED))


def _draw_kinds(canvas: Canvas, kinds: Sequence[str]) -> None:
    """One line that names the marks, and the front."""
    x = 60.0
    for kind in [kind for kind in _MARKS if kind in kinds]:
        canvas.add(_make_mark(kind, (x, 148)))
        canvas.add(Text((x + 20, 148), _KINDS[kind], _SMALL, MUTED))
        x += 20 + measure_text(_KINDS[kind], _SMALL) + 36
    canvas.add(Line([(x - 8, 148), (x + 32, 148)], INK, 3))
    canvas.add(Text((x + 44, 148), "Pareto front", _SMALL, MUTED))


def _make_mark(kind: str, at: Point, size: float = 11) -> Line:
    colour, corners, first = _MARKS[kind]
    size *= 1.25 if corners < 5 else 1.0
    angles = [math.radians(first + 360 * k / corners) for k in range(corners)]
    return Line([(at[0] + size * math.cos(a), at[1] + size * math.sin(a)) for a in angles], PAPER, 1.5, fill=colour)


def _make_dot(at: Point, colour: str) -> Line:
    angles = [2 * math.pi * k / 16 for k in range(16)]
    return Line([(at[0] + 5 * math.cos(a), at[1] + 5 * math.sin(a)) for a in angles], colour, 1, fill=colour)


def _make_cost_axis(values: Sequence[float], log: bool) -> _Axis:
    """From below the least to above the largest; the right edge leaves room for labels."""
    low, high = min(values), max(values)
    if log and low > 0:
        wide = max(high / low, 1.5)
        return _Axis(low / wide**0.06, high * wide**0.12, _LEFT, SIZE[0] - _RIGHT, log=True)
    wide = (high - low) or abs(high) * 0.2 or 1.0
    return _Axis(low - 0.06 * wide, high + 0.12 * wide, _LEFT, SIZE[0] - _RIGHT)


def _spans_decades(scores: Sequence[float], comparison: Comparison) -> bool:
    """True where differences would be lost on a linear axis, as of perplexities from 2 to 500."""
    return not comparison.larger_is_better and min(scores) > 0 and max(scores) / min(scores) > 20


def _make_score_axis(shown: Sequence[Standing], score: str, log: bool) -> _Axis:
    """Over all means; a bar may widen it by half of what they span, and is cut off beyond."""
    means = [each.scores[score].mean for each in shown]
    ends = [end for each in shown for end in (each.scores[score].low, each.scores[score].high) if math.isfinite(end)]
    if log:  # a span is a factor here
        means, ends = list(map(math.log, means)), [math.log(end) for end in ends if end > 0]
    low, high = min(means), max(means)
    wide = (high - low) or abs(high) * 0.1 or 1.0
    bottom = max(min([low, *ends]), low - wide / 2) - 0.04 * wide
    top = min(max([high, *ends]), high + wide / 2) + 0.06 * wide
    if log:
        bottom, top = math.exp(bottom), math.exp(top)
    return _Axis(bottom, top, SIZE[1] - _BOTTOM, _TOP, log)


def _draw_axes(canvas: Canvas, across: _Axis, up: _Axis, heading: str) -> None:
    ticks = up.list_ticks()
    for tick, said in zip(ticks, up.format_ticks(ticks), strict=True):
        y = up.place(tick)
        canvas.add(Line([(across.start, y), (across.end, y)], GRID, 2))
        canvas.add(Text((across.start - 14, y), said, _SMALL, INK, "end"))
    for tick in across.list_ticks():
        x = across.place(tick)
        canvas.add(Line([(x, up.start), (x, up.start + 8)], MUTED, 2))
        canvas.add(Text((x, up.start + 30), _shorten_number(tick), _SMALL, INK, "middle"))
    canvas.add(Line([(across.start, up.start), (across.end, up.start)], MUTED, 2))
    canvas.add(Text(((across.start + across.end) / 2, SIZE[1] - 36), heading, _LABEL, INK, "middle"))


def _shorten_number(value: float) -> str:
    """Such as 20 k or 1.5 M."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:.6g}"


def _list_front_steps(front: Sequence[Point], end: float) -> list[Point]:
    """A staircase: what one gets for each cost, from the cheapest method on."""
    steps = [front[0]]
    for x, y in front[1:]:
        steps += [(x, steps[-1][1]), (x, y)]
    return [*steps, (end, steps[-1][1])]


def _list_thin_boxes(steps: Sequence[Point]) -> list[Box]:
    pairs = pairwise(steps)
    return [(min(a, c) - 2, min(b, d) - 2, max(a, c) + 2, max(b, d) + 2) for (a, b), (c, d) in pairs]


def _find_bar(each: Standing, score: str, up: _Axis, x: float) -> Box | None:
    """The error bar as a thin box within the axes; None where there is no interval."""
    estimate = each.scores[score]
    if not math.isfinite(estimate.half):
        return None
    top, bottom = sorted((up.place(estimate.high), up.place(max(estimate.low, up.low))))
    return x - 2, max(top, up.end), x + 2, min(bottom, up.start)


def _draw_point(canvas: Canvas, kind: str, point: Point, bar: Box | None) -> None:
    if bar is not None:
        x, colour = point[0], _MARKS[kind][0]
        canvas.add(Line([(x, bar[1]), (x, bar[3])], colour, 2.5))
        ends = [y for y in (bar[1], bar[3]) if _TOP < y < SIZE[1] - _BOTTOM]  # a bar that is cut off has no end
        canvas.add(*(Line([(x - 6, y), (x + 6, y)], colour, 2.5) for y in ends))
    canvas.add(_make_mark(kind, point))


def draw_rates(comparison: Comparison) -> Canvas:
    """One small plot for each method: the score on the part that chooses, over the learning rates that were tried.

    The best rate has a mark and a number; a rate at which training diverged has a cross at the foot.

    Raises:
        BadInput: No method has a rate with a score.
    """
    rows = [row for row in comparison.rows if any(math.isfinite(value) for value in row.curve.values())]
    if not rows:
        raise BadInput("no method of this comparison has a score at a learning rate; nothing can be drawn.")
    values = [value for row in rows for value in row.curve.values() if math.isfinite(value)]
    rates = [rate for row in rows for rate in row.curve]
    canvas = Canvas(*SIZE, f"{title(comparison.score)} over the learning rate")
    heading = f"{title(comparison.score)} over the learning rate"
    _draw_head(canvas, heading, f"{comparison.subject}")
    told = "on the part that chooses; the mark is the chosen rate"
    if any(not math.isfinite(value) for row in rows for value in row.curve.values()):
        told += ", a cross one that diverged"
    canvas.add(Text((48, 148), told, _SMALL, MUTED))
    columns = next(wide for wide, most in ((3, 6), (4, 8), (5, 15), (6, math.inf)) if len(rows) <= most)
    columns = min(columns, len(rows))
    lines = math.ceil(len(rows) / columns)
    left, top, right, bottom = 96.0, 180.0, SIZE[0] - 30.0, SIZE[1] - 50.0
    wide, high = (right - left) / columns, (bottom - top) / lines
    spread = (max(values) - min(values)) or abs(max(values)) * 0.1 or 1.0
    # above `highest` there is room for the number of a mark
    least, highest, most = min(values) - 0.1 * spread, max(values) + 0.15 * spread, max(values) + 0.55 * spread
    if log := _spans_decades(values, comparison):
        factor = max(values) / min(values)
        least, highest, most = min(values) / factor**0.1, max(values) * factor**0.15, max(values) * factor**0.55
    for k, row in enumerate(rows):
        x, y = left + (k % columns) * wide, top + (k // columns) * high
        across = _Axis(min(rates) / 1.6, max(rates) * 1.6, x + 14, x + wide - 18, log=True)
        up = _Axis(least, most, y + high - 38, y + 42, log)
        _draw_curve(canvas, row, across, up, highest, first=k % columns == 0, last=k + columns >= len(rows))
    canvas.add(Text((SIZE[0] / 2, SIZE[1] - 24), "learning rate", _LABEL, INK, "middle"))
    return canvas


def _draw_curve(canvas: Canvas, row: Row, across: _Axis, up: _Axis, highest: float, *, first: bool, last: bool) -> None:
    """One panel; only the first of a line has numbers at the side, up to `highest`, and the last of a column below."""
    kind = METHODS[row.method].kind
    fitting = min(1.0, (across.end - across.start) / measure_text(row.method, _SMALL, bold=True))
    canvas.add(Text((across.start, up.end - 24), row.method, _SMALL * fitting, bold=True))
    ticks = [tick for tick in up.list_ticks() if tick <= highest]
    ticks = ticks if up.start - up.end > 200 else ticks[:: math.ceil(len(ticks) / 3)]
    for tick, said in zip(ticks, up.format_ticks(ticks), strict=True):
        y = up.place(tick)
        canvas.add(Line([(across.start, y), (across.end, y)], GRID, 2))
        if first:
            canvas.add(Text((across.start - 10, y), said, 22, INK, "end"))
    canvas.add(Line([(across.start, up.start), (across.end, up.start)], MUTED, 1.5))
    decades = across.list_ticks()
    room = (across.end - across.start) / (measure_text("1e-4", 22) + 8)
    written = decades[:: math.ceil(len(decades) / room)]
    for tick in decades:
        x = across.place(tick)
        canvas.add(Line([(x, up.start), (x, up.start + 6)], MUTED, 1.5))
        if last and tick in written:
            said = "1" if tick == 1 else f"{tick:.0e}".replace("e-0", "e-").replace("e+0", "e")
            canvas.add(Text((x, up.start + 20), said, 22, INK, "middle"))
    ordered = sorted(row.curve.items())
    points = [(across.place(rate), up.place(value)) for rate, value in ordered if math.isfinite(value)]
    if len(points) > 1:
        canvas.add(Line(points, _MARKS[kind][0], 3))
    canvas.add(*(_make_dot(point, _MARKS[kind][0]) for point in points))
    for rate, value in ordered:
        if not math.isfinite(value):
            _draw_cross(canvas, (across.place(rate), up.start - 10))
    chosen = row.curve.get(row.learning_rate, math.nan)
    if math.isfinite(chosen):
        at = (across.place(row.learning_rate), up.place(chosen))
        canvas.add(_make_mark(kind, at, 10))
        told = f"{row.learning_rate:.2g}{' edge' if row.edge else ''}"
        half = measure_text(told, 22) / 2 + 4
        x = min(max(at[0], across.start + half), across.end - half)
        canvas.add(Text((x, at[1] - 24), told, 22, INK, "middle", halo=True))


def _draw_cross(canvas: Canvas, at: Point) -> None:
    x, y = at
    canvas.add(Line([(x - 7, y - 7), (x + 7, y + 7)], MUTED, 3), Line([(x - 7, y + 7), (x + 7, y - 7)], MUTED, 3))


def draw_all(comparison: Comparison) -> dict[str, Canvas]:
    """Every plot that the comparison has the numbers for, by the name of its file."""
    found = {}
    standings = find_standings(comparison)
    for cost in COSTS:
        if any(cost.value(each) is not None and comparison.score in each.scores for each in standings):
            found[f"quality_{cost.name}"] = draw_quality(comparison, cost)
    if any(math.isfinite(value) for row in comparison.rows for value in row.curve.values()):
        found["rates"] = draw_rates(comparison)
    return found

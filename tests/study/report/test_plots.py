"""Plots of a comparison: the front is that of the definition, and no label lies on another."""

import random
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import combinations

import pytest

from inlay.errors import BadInput
from inlay.methods import METHODS
from inlay.study.report.labels import place_labels
from inlay.study.report.plots import COSTS, SIZE, draw_all, draw_quality, draw_rates, find_front
from inlay.tasks.canvas import Line, Text, measure_text
from study.report.examples import make_comparison

COMPARISON = make_comparison()


@pytest.fixture(scope="module")
def plots():
    return draw_all(COMPARISON)


@pytest.mark.parametrize("larger", [True, False])
def test_the_front_is_what_nothing_else_beats(larger):
    numbers = random.Random(0)
    points = [(numbers.randint(0, 9), numbers.randint(0, 9)) for _ in range(60)]
    sign = 1 if larger else -1

    def beats(a, b):
        return a[0] <= b[0] and sign * a[1] >= sign * b[1] and a != b

    expected = {k for k, p in enumerate(points) if not any(beats(other, p) for other in points)}
    found = find_front(points, larger_is_better=larger)
    assert set(found) == expected and len(found) == len(expected)
    assert [points[k][0] for k in found] == sorted(points[k][0] for k in found)


def text_box(text):
    wide = measure_text(text.text, text.size, bold=text.bold)
    left = text.at[0] - {"start": 0, "middle": wide / 2, "end": wide}[text.anchor]
    return left, text.at[1] - text.size / 2, left + wide, text.at[1] + text.size / 2


def overlap(a, b):
    return min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1


@pytest.mark.parametrize("name", ["quality_parameters", "quality_latency", "quality_memory", "rates"])
def test_no_text_lies_on_another_or_outside(name, plots):
    texts = [shape for shape in plots[name].shapes if isinstance(shape, Text)]
    boxes = [(text.text, text_box(text)) for text in texts]
    assert [(a[0], b[0]) for a, b in combinations(boxes, 2) if overlap(a[1], b[1])] == []
    assert all(b[0] >= 0 and b[1] >= 0 and b[2] <= SIZE[0] and b[3] <= SIZE[1] for _, b in boxes)
    assert {row.method for row in COMPARISON.rows} <= {text.text for text in texts}
    assert min(text.size for text in texts) >= 20  # read at the back of a room


def test_labels_of_a_crowd_keep_apart():
    numbers = random.Random(1)
    points = [(numbers.uniform(400, 700), numbers.uniform(300, 500)) for _ in METHODS]
    sizes = [(measure_text(name, 28), 29.0) for name in METHODS]
    placed = place_labels(points, sizes, (150, 190, 1590, 780))
    boxes = [(p.at[0], p.at[1] - h / 2, p.at[0] + w, p.at[1] + h / 2) for p, (w, h) in zip(placed, sizes, strict=True)]
    assert not any(overlap(a, b) for a, b in combinations(boxes, 2))


def test_a_better_method_lies_higher_and_a_dearer_one_to_the_right(plots):
    marks = [shape for shape in plots["quality_parameters"].shapes if isinstance(shape, Line) and shape.fill]
    middles = [[sum(axis) / len(axis) for axis in zip(*mark.points, strict=True)] for mark in marks]
    full, probe = middles[-len(COMPARISON.rows)], middles[-1]  # behind those of the legend, in the order of the rows
    assert full[0] > probe[0] + 500 and full[1] < probe[1] - 300


def test_the_image_has_the_size_of_a_slide_and_the_drawing_is_xml():
    canvas = draw_rates(COMPARISON)
    image = canvas.to_image()
    assert image.size == (1600, 900) and image.getpixel((0, 0)) == (255, 255, 255)
    assert len(image.resize((160, 90)).getcolors(160 * 90)) > 50
    root = ElementTree.fromstring(canvas.to_svg())
    assert root.attrib["viewBox"] == "0 0 1600 900"
    assert "var(" not in canvas.to_svg() and "var(--ink)" in canvas.to_svg(inline=True)


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_and_equal_points_are_drawn(seeds):
    few = make_comparison(seeds=seeds)
    same = [replace(row, scores={"accuracy": [0.5] * seeds}, costs=few.rows[0].costs) for row in few.rows[:3]]
    for comparison in (replace(few, rows=few.rows[:1]), replace(few, rows=same)):
        assert set(draw_all(comparison)) == {"quality_parameters", "quality_latency", "quality_memory", "rates"}


def test_what_was_not_measured_is_not_drawn():
    bare = replace(COMPARISON, rows=[replace(row, costs={}) for row in COMPARISON.rows])
    assert set(draw_all(bare)) == {"rates"}
    with pytest.raises(BadInput, match="trained parameters"):
        draw_quality(bare, COSTS[0])


def test_errors_over_decades_are_told_apart():
    """On a linear axis 2 and 20 would lie on one another below 2,000; an interval that reaches below 0 is cut off."""
    values = ([2.0, 2.0], [20.0, 20.0], [200.0, 200.0], [2000.0, 20.0])
    rows = [
        replace(row, scores={"accuracy": each}, curve=dict.fromkeys(row.curve, each[0]))
        for row, each in zip(COMPARISON.rows, values, strict=False)
    ]
    errors = replace(COMPARISON, larger_is_better=False, seeds=[0, 1], rows=rows)
    marks = [shape for shape in draw_quality(errors, COSTS[0]).shapes if isinstance(shape, Line) and shape.fill]
    heights = [sum(y for _, y in mark.points) / len(mark.points) for mark in marks[-len(rows) :]]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=4)
    assert heights[0] - heights[1] > 100
    said = {shape.text for shape in draw_rates(errors).shapes if isinstance(shape, Text)}
    assert {"10", "1000"} <= said

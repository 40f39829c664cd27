"""The page, the files of a folder, and the pros and cons: everything measured is there, and no name becomes a tag."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import get_args

import pytest

from inlay.cli.report import report
from inlay.errors import BadInput
from inlay.methods import METHODS
from inlay.methods.method import Kind
from inlay.study.comparison import Comparison
from inlay.study.report import kinds, plots, save_comparison, write_terminal_table
from inlay.study.report.anchors import load_anchors
from inlay.study.report.kinds import judge_kinds
from inlay.study.report.page import list_limits, render_page
from study.report.examples import make_comparison

COMPARISON = make_comparison()
EVIL = '</style></script><script>alert(1)</script><img src=x onerror="alert(2)">'
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Tags, their attributes and the text of a page; a tag that is not closed is an error."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page():
    return render_page([COMPARISON], anchors=True)


def test_the_page_needs_nothing_else(page):
    parsed = Page(page)
    assert not [tag for tag, _ in parsed.tags if tag in ("link", "img", "iframe", "object")]
    assert not [attrs for _, attrs in parsed.tags if {"src", "href"} & attrs.keys()]
    assert set(re.findall(r"https?://[^\s\"'<>]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "url(" not in page and "@import" not in page
    assert sum(tag == "svg" for tag, _ in parsed.tags) == 4


def test_the_page_says_what_was_compared_and_how(page):
    text = Page(page).text
    for said in ("1,078 train, 359 validation, 360 test", "340 steps of 32", "0, 1, 2, 3, 4", "of which the search"):
        assert said in text
    assert "lora-conv: ViT has no grouped convolutions; use lora." in text
    assert "A better rate may lie beyond those tried: partial." in text
    assert all(f">{row.method}<" in page for row in COMPARISON.rows)


def test_names_of_users_become_no_tags():
    evil = make_comparison(data=EVIL, base=EVIL)
    rows = [replace(row, failed=[EVIL]) for row in evil.rows[:2]]
    about = {"device": EVIL, "settings": {EVIL: EVIL}}
    evil = replace(evil, refused={"lora-conv": EVIL}, rows=rows, about=about)
    parsed = Page(render_page([evil, replace(COMPARISON, rows=rows)]))
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1
    assert not [tag for tag, _ in parsed.tags if tag == "img"]
    assert not [attrs for _, attrs in parsed.tags if "onerror" in attrs]
    assert EVIL in parsed.text


def test_a_cell_is_sorted_by_its_number(page):
    cells = [attrs["data-value"] for tag, attrs in Page(page).tags if tag == "td" and "data-value" in attrs]
    assert "56266" in cells and "0.003" in cells


def test_published_scores_are_marked_as_theirs(page):
    text = Page(page).text
    assert "arXiv:2409.16434" in text and "cannot be compared" in text
    assert "arXiv:2409.16434" not in render_page([replace(COMPARISON, rows=COMPARISON.rows[:1])])
    assert {row.method for row in load_anchors().rows} <= set(METHODS)


def test_every_kind_of_method_is_judged_with_measured_figures():
    found = judge_kinds(COMPARISON)
    assert {name for each in found for name in each.methods} == {row.method for row in COMPARISON.rows}
    update = next(each for each in found if "lora" in each.methods)
    assert "lora and dora merge into the base's weights; latency compared with the base is then +0.0 %." in update.pros
    adapters = next(each for each in found if "bottleneck" in each.methods)
    assert "bottleneck-linear merges into the base's weights" in " ".join(adapters.pros)
    assert "convpass, adapter-plus and bottleneck do not merge." in adapters.cons
    (cost,) = [said for said in adapters.cons if "latency" in said]
    latencies = [100 * (row.costs["latency_ms"] / 6 - 1) for row in COMPARISON.rows if row.method in adapters.methods]
    assert f"latency +{min(latencies):.0f} % to +{max(latencies):.0f} %" in cost
    part = next(each for each in found if "partial" in each.methods)
    assert "Unmerged, compared with the base: latency +0 % and MACs +0.0 %." in part.pros
    assert all("only spatial can" in " ".join(each.cons) for each in found if "full" not in each.methods)


def test_nothing_is_said_that_was_not_measured():
    bare = replace(COMPARISON, rows=[replace(row, costs={}, forgetting={}) for row in COMPARISON.rows])
    text = " ".join(said for each in judge_kinds(bare) for said in (*each.pros, *each.cons))
    assert not re.search(r"latency|MACs|MB|falls|drift", text)


def test_every_kind_of_method_has_a_heading_and_a_mark():
    assert set(get_args(Kind)) == set(kinds._HEADINGS) == set(plots._KINDS) == set(plots._MARKS)
    assert {method.kind for method in METHODS.values()} == set(get_args(Kind))


def test_limits_follow_from_the_comparison():
    assert any("0.28%" in said for said in list_limits(COMPARISON))  # 1 of 360
    assert any("One seed" in said for said in list_limits(make_comparison(seeds=1)))


def test_a_folder_holds_every_form(tmp_path):
    (tmp_path / "trials.jsonl").write_text("{}\n")
    small = replace(COMPARISON, rows=COMPARISON.rows[:2])
    path = save_comparison(small, tmp_path)
    drawn = ("quality_parameters", "quality_latency", "quality_memory", "rates")
    files = {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    files |= {f"comparison.{kind}" for kind in ("html", "md", "csv", "json")} | {"pros_and_cons.md"}
    assert {file.name for file in tmp_path.iterdir()} == files | {"trials.jsonl"}
    assert "- **-** Unmerged, compared with the base:" in (tmp_path / "pros_and_cons.md").read_text()
    assert path == tmp_path / "comparison.html" and Comparison.read(tmp_path / "comparison.json") == small


def test_several_comparisons_have_a_folder_each(tmp_path):
    bare = [replace(make_comparison(data=data), rows=[]) for data in ("a/b c/", "builtin:x")]
    save_comparison(bare, tmp_path)
    assert {each.name for each in tmp_path.iterdir() if each.is_dir()} == {"1_b-c_vit-tiny", "2_x_vit-tiny"}
    assert (tmp_path / "comparison.html").is_file()


def test_what_cannot_be_saved_is_said(tmp_path):
    with pytest.raises(BadInput, match="no comparison"):
        save_comparison([], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="another folder"):
        save_comparison(replace(COMPARISON, rows=[]), tmp_path / "file")


def test_stored_comparisons_are_shown_together(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        replace(COMPARISON, data=name, rows=[]).write(tmp_path / "runs" / name / "comparison.json")
    report([tmp_path / "runs"], tmp_path / "out")
    assert "builtin:vit-tiny on b" in capsys.readouterr().out
    assert {each.name for each in (tmp_path / "out").iterdir() if each.is_dir()} == {"1_a_vit-tiny", "2_b_vit-tiny"}
    with pytest.raises(BadInput, match=r"no comparison\.json"):
        report([tmp_path / "out" / "none"], tmp_path / "out")


def test_a_method_that_diverged_everywhere_is_a_row_without_scores():
    nothing = dict.fromkeys(COMPARISON.rows[1].curve, float("nan"))
    lost = replace(
        COMPARISON.rows[1], curve=nothing, scores={}, validation=[], costs={}, forgetting={}, failed=["lost"]
    )
    comparison = replace(COMPARISON, rows=[COMPARISON.rows[0], lost])
    assert "lora: lost" in Page(render_page([comparison])).text
    line = next(line for line in write_terminal_table(comparison).splitlines() if line.startswith("lora"))
    assert line.split()[:3] == ["lora", "-", "-"]
    assert next(each for each in judge_kinds(comparison) if "lora" in each.methods).cons
    only = replace(COMPARISON, rows=[lost])
    assert "lora: lost" in Page(render_page([only])).text and "<svg" not in render_page([only])

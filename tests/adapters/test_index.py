"""A folder of adapters as a local hub: its rows, its table, and its page as a browser shows it."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from inlay import InlayError, read_adapter, save_adapter
from inlay.adapters.curve import CURVE
from inlay.adapters.file import METRICS, ORIGIN, WEIGHTS
from inlay.adapters.hub.index import list_adapters, write_index
from inlay.adapters.hub.search import search

HISTORY = [{"step": s, "train_loss": 2 / s, "loss": 3 / s, "accuracy": 1 - 1 / s} for s in range(5, 30, 5)]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def large(make, processor, tmp_path_factory):
    metrics = {"validation": {"accuracy": 0.9, "loss": 0.1}, "dataset": "builtin:digits", "history": HISTORY}
    return save_adapter(make(r=8), tmp_path_factory.mktemp("saved") / "large", processor=processor, metrics=metrics)


@pytest.fixture
def zoos(zoo, large, tmp_path):
    """A large adapter with a history, a small one without, and one that is broken."""
    folder = tmp_path / "hub"
    shutil.copytree(large, folder / "large")
    shutil.copytree(zoo, folder / "small")
    shutil.copytree(zoo, folder / "broken")
    (folder / "broken" / WEIGHTS).write_bytes(b"{}")
    return folder


def test_a_history_becomes_a_picture_and_stays_in_the_metrics(zoos):
    with Image.open(zoos / "large" / CURVE) as drawn:
        assert drawn.size == (920, 300)
    assert read_adapter(zoos / "large").metrics["history"] == HISTORY
    assert f"]({CURVE})" in (zoos / "large" / "README.md").read_text()
    assert not (zoos / "small" / CURVE).exists() and CURVE not in (zoos / "small" / "README.md").read_text()


def test_the_index_names_all_and_no_machine(zoos):
    rows = write_index(zoos)
    assert [row["name"] for row in rows] == ["broken", "large", "small"] and rows == list_adapters(zoos)
    assert rows[0]["error"].startswith(f"{WEIGHTS} is truncated") and rows[1]["parameters"] > rows[2]["parameters"]
    for name in ("index.json", "index.html", "README.md"):
        assert str(zoos) not in (zoos / name).read_text()
    assert write_index(zoos) == rows and not list(zoos.glob("*.inlay-new*")) and not list(zoos.glob(".*"))


@pytest.mark.parametrize("odd", [[], "text", [[1]], [{"step": "x"}, 3], {"a": [1]}, {"latency_ms": "x", "loss": "y"}])
def test_metrics_of_any_kind_are_listed(zoos, odd):
    content = dict.fromkeys(("validation", "test", "cost", "history", "dataset"), odd)
    (zoos / "large" / METRICS).write_text(json.dumps(content))
    (zoos / "large" / ORIGIN).write_text(json.dumps({"repo": odd, "commit": odd}))
    assert [row["name"] for row in write_index(zoos)] == ["broken", "large", "small"]
    assert [row["name"] for row in search("vit-tiny", zoos, online=False)] == ["large", "small"]


def test_an_index_replaces_nothing_but_an_index(zoos):
    for name in ("README.md", "index.html", "index.json"):
        (zoos / name).write_text("# My project")
        with pytest.raises(InlayError, match=rf"{name} is not an index of adapters and would be overwritten"):
            write_index(zoos)
        assert (zoos / name).read_text() == "# My project" and len(list(zoos.iterdir())) == 4
        (zoos / name).unlink()
    card = (zoos / "small" / "README.md").read_text()
    with pytest.raises(InlayError, match="is an adapter itself; give the folder that it lies in"):
        write_index(zoos / "small")
    assert (zoos / "small" / "README.md").read_text() == card


def test_names_of_any_kind_keep_the_table_a_table(zoos):
    (zoos / "small").rename(zoos / "sm|all [x](y)\n")
    metrics = json.loads((zoos / "large" / METRICS).read_text())
    (zoos / "large" / METRICS).write_text(json.dumps({**metrics, "dataset": "a|b\n# c"}))
    rows = write_index(zoos)
    lines = [line for line in (zoos / "README.md").read_text().splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(rows) and {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {9}
    assert "| a\\|b # c |" in lines[3] and "(sm%7Call%20%5Bx%5D%28y%29%0A)" in lines[4]


def test_a_folder_whose_name_is_no_text_is_listed_as_broken(zoos):
    (zoos / "small").rename(zoos / os.fsdecode(b"\xff"))
    row = next(row for row in write_index(zoos) if "udcff" in row["name"])
    assert "is not valid UTF-8; rename it" in row["error"]


def test_names_and_labels_cannot_break_out_of_the_page(zoos):
    metrics = json.loads((zoos / "large" / METRICS).read_text())
    metrics["dataset"] = "</script><img src=x onerror=alert(1)>"
    (zoos / "large" / METRICS).write_text(json.dumps(metrics))
    write_index(zoos)
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append(tag)
    parser.feed((zoos / "index.html").read_text())
    assert "img" not in tags and tags.count("script") == 1


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_sorts_filters_and_opens(zoos):
    odd = {"validation": {"accuracy": "high", "loss": None}, "cost": {"latency_ms": "x"}, "dataset": "digits"}
    (zoos / "small" / METRICS).write_text(json.dumps(odd))  # which must not stop the page
    write_index(zoos)
    act = (
        "<script>document.querySelectorAll('th button')[5].click();"  # by parameters
        "const f=document.getElementById('filter');f.value='VIT-TINY digits';f.oninput()</script></body>"
    )
    (zoos / "act.html").write_text((zoos / "index.html").read_text().replace("</body>", act))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{zoos}/act.html#large"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert re.findall(r'href="(\w+)/README\.md"', shown) == ["small", "large"]
    assert "2 of 3 shown" in shown and 'aria-sort="ascending"' in shown
    assert shown.count("<svg") == 3, "a small curve in the row, and two panels below it"
    assert "inlay.load_adapter" in shown and "cat, dog, emu, fox, gnu" in shown


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("image-classification", ["large", "small"]),
        ("text-generation", []),
        ("builtin:vit-tiny", ["large", "small"]),
        ("builtin:vit", []),
        ("SMALL", ["small"]),
        ("digits", ["large", "small"]),
    ],
)
def test_search_finds_by_task_base_and_word(zoos, query, names):
    assert [row["name"] for row in search(query, zoos, online=False)] == names


def test_a_folder_without_adapters_is_one_sentence(tmp_path):
    for use in (list_adapters, write_index):
        with pytest.raises(InlayError, match="holds no adapter; give an adapter, or a folder of adapters"):
            use(tmp_path)
    assert search("digits", tmp_path / "none", online=False) == []

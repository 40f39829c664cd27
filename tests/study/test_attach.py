"""What a study found stands in the adapter that it came from: right, replaced by a later one, harmless from anyone."""

import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from typer.testing import CliRunner

from inlay import ImageTask, TrainConfig, compare, evaluate, load_adapter, read_adapter
from inlay.adapters.card import make_card
from inlay.adapters.file import CARD, CONFIG, METRICS, WEIGHTS
from inlay.adapters.study import KEY, describe_study, read_study, write_study_section
from inlay.adapters.verify import verify
from inlay.builtin.shapes import SHAPE_LABELS, generate_shapes
from inlay.cli.app import app
from inlay.errors import BadInput, WrongBase
from inlay.study.attach import attach_study, describe_row
from inlay.study.comparison import Comparison, Row

LORA, FULL, PROBE = [0.90, 0.94, 0.92], [0.91, 0.90, 0.89], [0.5, math.nan, 0.7]


def comparison(**changes) -> Comparison:
    def row(method: str, scores: list[float], **more) -> Row:
        curve = {1e-3: 0.8, 3e-3: 0.9, 1e-2: math.nan}
        return Row(method, 3e-3, 8, curve, False, {"accuracy": scores}, scores, **more)

    rows = [
        row("lora", LORA, forgetting={"own_task": [0.1, 0.2, 0.3], "drift": [0.1, 0.1, 0.1]}),
        row("full", FULL),
        row("probe", PROBE),
        row("ia3", []),
    ]
    facts = {
        "base": "builtin:vit-tiny", "data": "builtin:digits", "task": "image-classification", "score": "accuracy",
        "larger_is_better": True, "seeds": [0, 1, 2], "counts": {"train": 1152, "validation": 285, "test": 360},
        "budget": {"steps": 100.0, "batch_size": 32}, "rows": rows, "search_seconds": 400.0, "seconds": 9000.0,
    }  # fmt: skip
    return Comparison(**{**facts, **changes})


@pytest.fixture
def adapter(digits_adapter: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(digits_adapter, tmp_path / "digits"))


def test_the_winner_next_to_the_second(adapter: Path):
    before = {name: (adapter / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    old = json.loads((adapter / METRICS).read_text())
    attach_study(adapter, comparison(), "lora", placement="The last two blocks mattered most.")
    assert {name: (adapter / name).read_bytes() for name in before} == before
    metrics = json.loads((adapter / METRICS).read_text())
    assert {key: value for key, value in metrics.items() if key != KEY} == old
    study = metrics[KEY]
    assert (study["rank"], study["methods"], study["counts"]["test"]) == (1, 4, 360)
    # paired t-interval by scipy
    apart = stats.ttest_rel(LORA, FULL).confidence_interval(0.95)
    difference = study["difference"]
    assert (difference["to"], difference["tie"]) == ("full", bool(apart.low <= 0 <= apart.high))
    assert (difference["low"], difference["high"]) == pytest.approx((apart.low, apart.high))
    assert study["test"]["accuracy"]["mean"] == pytest.approx(statistics.mean(LORA))
    assert study["curve"] == [[1e-3, 0.8], [3e-3, 0.9], [1e-2, None]]
    assert study["forgetting"]["own_task"]["mean"] == pytest.approx(0.2)

    card = (adapter / CARD).read_text()
    assert card.index("## Study") < card.index("## Cost")
    for said in (
        "Number 1 of 4 methods on builtin:digits (builtin:vit-tiny) by accuracy of the test part",
        "0.92 (0.8703 to 0.9697), mean of 3 seeds",
        "Difference to full with the same seeds: +0.02",
        "which is a tie",
        "Learning rate 0.003, chosen on the validation part (0.001: 0.8, 0.003: 0.9, 0.01: diverged)",
        "1,152 train, 285 validation, 360 test",
        "own task 0.2",
        "Placement: The last two blocks mattered most.",
        "The search took 7 min of 2.5 h in all",
    ):
        assert said in card, said
    assert "failed" not in {check.result for check in verify(adapter)}
    # a later one stands in its place
    attach_study(adapter, comparison(data="builtin:shapes"), "lora")
    later = (adapter / CARD).read_text()
    assert later.count("## Study") == 1 and "builtin:shapes (builtin" in later and "Placement" not in later


def test_others_next_to_the_winner():
    probe = describe_row(comparison(), "probe")
    assert probe["rank"] == 3 and probe["difference"]["to"] == "lora"  # over the two seeds that both have
    assert probe["difference"]["mean"] == pytest.approx(statistics.mean([0.5 - 0.90, 0.7 - 0.92]))
    failed = describe_row(comparison(), "ia3")
    assert "difference" not in failed and failed["test"] == {}
    assert not any("Number" in line for line in describe_study(read_study({KEY: failed})))
    only = comparison(rows=comparison().rows[:1], seeds=[0])
    assert "difference" not in describe_row(only, "lora")
    json.dumps(describe_row(only, "lora"), allow_nan=False)


def test_a_card_tells_no_paths_of_a_machine():
    study = describe_row(comparison(data="/home/me/patients/", base="~/models/vit"), "lora")
    told = write_study_section({KEY: study})
    assert "on patients (vit) by" in told and "home" not in told and "models/" not in told


def test_mistakes(adapter: Path):
    with pytest.raises(BadInput, match="'nothing' was not compared; choose one of lora"):
        attach_study(adapter, comparison(), "nothing")
    with pytest.raises(WrongBase, match="is of builtin:vit-tiny, and the comparison of other"):
        attach_study(adapter, comparison(base="other"), "lora")
    assert KEY not in read_adapter(adapter).metrics


def test_a_card_that_is_written_with_the_study_can_have_a_later_one(adapter: Path):
    file = read_adapter(adapter)
    config = json.loads((adapter / CONFIG).read_text())
    study = describe_row(comparison(), "lora")
    text = make_card(file.record, config, {**file.metrics, KEY: study})
    assert text.count("## Study") == 1
    (adapter / CARD).write_text(text)
    attach_study(adapter, comparison(), "full")
    assert (adapter / CARD).read_text().count("## Study") == 1
    assert "## Study" not in make_card(file.record, config, file.metrics)


def test_info_shows_it(adapter: Path):
    run = CliRunner()
    assert "Number" not in run.invoke(app, ["info", str(adapter)]).output
    attach_study(adapter, comparison(), "lora")
    shown = " ".join(run.invoke(app, ["info", str(adapter)]).output.split())
    assert "Number 1 of 4 methods" in shown and "Difference to full" in shown
    facts = json.loads(run.invoke(app, ["info", str(adapter), "--json"]).output)
    assert facts["study"] == read_study(json.loads((adapter / METRICS).read_text()))
    assert facts["study"]["seeds"] == [0, 1, 2] and facts["study"]["budget"]["steps"] == 100


@pytest.mark.parametrize(
    "study",
    [
        None, [], "text", 3, {}, {"rank": "first"}, {"rank": True, "methods": 2},
        {"curve": [[1], "x", [1, 2, 3], None]},
        {"test": {"accuracy": 3}, "score": ["accuracy"]}, {"difference": {"mean": 1e999, "to": "x"}},
        {"difference": {"mean": 0.1, "to": {}}}, {"counts": {"train": "many"}}, {"seeds": [1, "2", None, 10**19]},
        {"seconds": {}, "search_seconds": 1}, {"placement": {"a": 1}}, {"forgetting": [1, 2]},
    ],
)  # fmt: skip
def test_what_anyone_may_have_written(study):
    found = read_study({KEY: study})
    json.dumps(found, allow_nan=False)
    assert isinstance(describe_study(found), list) and isinstance(write_study_section({KEY: study}), str)


def test_a_study_from_elsewhere_is_bounded_and_made_safe():
    bad = {
        "placement": "<script>alert(1)</script>\x1b[2J -->\n## Cost" + "x" * 10_000,
        "seeds": list(range(10_000)),
        "counts": {f"part{i}" * 1000: i for i in range(10_000)},
        "unknown": "dropped",
    }
    found = read_study({KEY: bad})
    assert len(json.dumps(found)) < 200_000 and "unknown" not in found and len(found["seeds"]) == 100
    text = write_study_section({KEY: bad})
    assert "<script>" not in text and "\x1b" not in text and "\n## Cost" not in text


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label, bright in (("dark", 0), ("light", 120)):
        (folder / label).mkdir()
        for i in range(12):
            pixels = generator.integers(bright, bright + 130, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of what the base was pre-trained for, in folders that are called as its labels."""
    folder = tmp_path_factory.mktemp("shapes")
    for i, (pixels, label) in enumerate(zip(*generate_shapes(120, seed=30_000), strict=True)):
        if label < 4:
            (folder / SHAPE_LABELS[label]).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / SHAPE_LABELS[label] / f"{i}.png")
    return folder


def test_after_a_comparison_the_best_adapter_is_there(images: Path, shapes: Path, tmp_path: Path):
    told: list[str] = []
    found = compare(
        ImageTask("builtin:vit-tiny", str(images), augment="none"),
        TrainConfig(str(tmp_path / "run"), batch_size=8, workers=0),
        methods=["probe", "ssf"], learning_rates=[1e-3], seeds=[1], steps=2, width=2, costs=False,
        base_data=str(shapes), tell=told.append,
    )  # fmt: skip
    assert all(row.forgetting.keys() == {"own_task", "drift"} for row in found.rows)
    probe = next(row for row in found.rows if row.method == "probe")
    assert probe.forgetting["own_task"] == [0.0] and probe.forgetting["drift"][0] == pytest.approx(0, abs=1e-12)
    folder = tmp_path / "run" / "best" / "adapter"
    assert told[-1] == f"the best adapter is in {folder}"
    adapter = load_adapter(folder)
    row = next(row for row in found.rows if row.method == "ssf")
    study = adapter.metrics[KEY]
    assert (study["method"], study["rank"]) == ("ssf", found.rows.index(row) + 1)
    # it is the adapter that was scored: the recipe's own way to its test part gives the same
    scores = evaluate(adapter, str(images), resamples=1).scores
    assert scores["accuracy"].value == pytest.approx(row.scores["accuracy"][0])
    assert scores["loss"].value == pytest.approx(row.scores["loss"][0], abs=1e-5)
    assert "## Study" in (folder / CARD).read_text()


def test_a_comparison_without_an_adapter_to_save(images: Path, tmp_path: Path, monkeypatch):
    told: list[str] = []
    task = ImageTask("builtin:vit-tiny", str(images), augment="none")
    settings = {"learning_rates": [1e-3], "seeds": [0], "steps": 1, "width": 2, "costs": False, "forgetting": False}
    train = TrainConfig(str(tmp_path / "run"), batch_size=8, workers=0)
    compare(task, train, methods=["probe"], tell=told.append, **settings)
    assert not (tmp_path / "run" / "best").exists() and "best adapter" not in told[-1]

    def refuse(*_, **__):
        raise BadInput("no room.")

    monkeypatch.setattr("inlay.study.attach.save_adapter", refuse)
    found = compare(task, train, methods=["probe", "ssf"], tell=told.append, **settings)
    assert told[-1] == "the best adapter is not saved: no room." and len(found.rows) == 2

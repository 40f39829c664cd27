"""Scores written into an adapter: whole or not at all, and the adapter is what it was."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml

from inlay import InlayError, evaluate, load_adapter, read_adapter
from inlay.adapters import notes
from inlay.adapters.evaluate import KEY, write_evaluation
from inlay.adapters.file import CARD, CONFIG, METRICS, WEIGHTS
from inlay.adapters.verify import verify
from inlay.tasks.evaluation import Evaluation, Score


@pytest.fixture
def evaluation():
    return Evaluation(
        "builtin:digits", "image-classification", "validation", 3, "image",
        {"accuracy": Score(0.5, 0.25, 0.75)}, {"accuracy": Score(0.25)}, [{"image": "a.png"}],
        [{"class": "cat", "precision": 0.5, "images": 2}], ["cat", "dog"], [[1, 1], [0, 1]], ["A note."],
    )  # fmt: skip


def test_the_adapter_stays_what_it_was(zoo, original, evaluation, pixels, outputs):
    before = {name: (zoo / name).read_bytes() for name in (WEIGHTS, CONFIG)}
    (zoo / "training.png").write_bytes(b"curve")
    write_evaluation(zoo, evaluation)
    assert {name: (zoo / name).read_bytes() for name in before} == before
    assert (zoo / "training.png").read_bytes() == b"curve"
    assert all(check.result == "ok" for check in verify(zoo) if not check.what.startswith("trained"))
    loaded = load_adapter(zoo)
    assert loaded.verified and torch.allclose(outputs(loaded.model), outputs(original[0]), atol=1e-5)
    noted = read_adapter(zoo).metrics
    assert noted["validation"] == {"accuracy": 0.875, "loss": 0.5} and noted[KEY]["builtin:digits"]["count"] == 3
    assert noted[KEY]["builtin:digits"]["scores"]["accuracy"] == {"value": 0.5, "low": 0.25, "high": 0.75}
    assert "rows" not in noted[KEY]["builtin:digits"]


def test_the_card_has_a_section_for_each_data_once(zoo, evaluation):
    before = (zoo / CARD).read_text()
    write_evaluation(zoo, evaluation)
    once = (zoo / CARD).read_text()
    assert "## Evaluation on builtin:digits" in once and "| Accuracy | 0.5000 (0.2500 to 0.7500) | 0.2500 |" in once
    assert "| cat | 0.5000 | 2 |" in once and once.index("## Evaluation") < once.index("## Cost")
    write_evaluation(zoo, evaluation)
    assert (zoo / CARD).read_text() == once
    write_evaluation(
        zoo, replace(evaluation, data="/home/someone/data/cats", notes=["'/home/someone/data/cats' it is."])
    )
    write_evaluation(zoo, replace(evaluation, scores={"accuracy": Score(0.875)}))
    after = (zoo / CARD).read_text()
    assert "## Evaluation on cats" in after and "'cats' it is." in after and "someone" not in after
    assert "| Accuracy | 0.8750 | 0.2500 |" in after and after.count("## Evaluation on builtin:digits") == 1
    assert set(read_adapter(zoo).metrics[KEY]) == {"builtin:digits", "/home/someone/data/cats"}
    kept = [line for line in before.splitlines() if line]
    assert [line for line in after.splitlines() if line in kept or not line] and set(kept) <= set(after.splitlines())
    assert yaml.safe_load(after.split("---")[1])["library_name"] == "peft"


def test_a_plain_adapter_and_a_lost_card_are_no_hindrance(zoo, plain, evaluation):
    plain(zoo)
    (zoo / CARD).unlink()
    (zoo / METRICS).unlink()
    write_evaluation(zoo, evaluation)
    assert (zoo / CARD).read_text().startswith("# zoo\n\n<!-- evaluation of builtin:digits -->")
    assert set(read_adapter(zoo).metrics) == {KEY}


def test_what_breaks_on_the_way_leaves_all_as_it_was(zoo, evaluation, monkeypatch):
    before = {path.name: path.read_bytes() for path in zoo.iterdir()}

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(notes, "put_section", full)
    with pytest.raises(OSError, match="No space"):
        write_evaluation(zoo, evaluation)
    assert {path.name: path.read_bytes() for path in zoo.iterdir()} == before
    assert [path.name for path in zoo.parent.iterdir()] == ["zoo"]


def test_a_link_keeps_what_it_leads_to(zoo, evaluation):
    (zoo / CARD).rename(zoo / "other.md")
    (zoo / CARD).symlink_to("other.md")
    before = (zoo / "other.md").read_text()
    write_evaluation(zoo, evaluation)
    assert (zoo / "other.md").read_text() == before and "## Evaluation" in (zoo / CARD).read_text()


def test_the_hubs_cache_is_left_alone(zoo, evaluation, tmp_path):
    snapshot = tmp_path / "models--user--zoo" / "snapshots" / "abc"
    shutil.copytree(zoo, snapshot)
    with pytest.raises(InlayError, match="'user/zoo' is on the Hub; `inlay pull` first"):
        write_evaluation(snapshot, evaluation)
    with pytest.raises(InlayError, match="`inlay pull` first"):
        evaluate("user/zoo", "builtin:digits", write=True)


def test_mistakes_are_one_sentence(zoo):
    loaded = load_adapter(zoo)
    with pytest.raises(InlayError, match="loaded already; leave base and device out"):
        evaluate(loaded, "builtin:digits", base="builtin:vit-tiny")
    with pytest.raises(InlayError, match="has no group of labels 'letters'"):
        evaluate(loaded, "builtin:digits", group="letters")
    with pytest.raises(InlayError, match="'0', '1', '2', '3', '4' and 5 others are labels of 'builtin:digits'"):
        evaluate(loaded, "builtin:digits")
    with pytest.raises(InlayError, match="resamples must be a whole number"):
        evaluate(loaded, "builtin:digits", resamples=0)
    assert json.loads((zoo / METRICS).read_text()).keys().isdisjoint({KEY})

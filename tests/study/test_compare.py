"""Methods side by side: each trained as it says, one table of what they cost and score."""

import csv
import json
from dataclasses import replace

import pytest

from inlay import Decoding, ImageTask, InlayError, TextTask, TrainConfig, load_base
from inlay.methods import METHODS
from inlay.study.compare import Compared, compare_images, compare_texts, table

TEXTS = TextTask("builtin:gpt2-tiny", "builtin:restaurants")


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "vision" in method.bases])
def test_a_method_trains_what_it_says(name):
    model = load_base("builtin:vit-tiny", labels=["a", "b"])
    frozen = {id(p) for n, p in model.named_parameters() if not n.startswith("classifier")}
    trained = {n: p for n, p in METHODS[name].adapt(model, 4).named_parameters() if p.requires_grad}
    assert any("classifier" in n for n in trained)
    assert any(id(p) in frozen for p in trained.values()) == (name == "full")
    assert any("classifier" not in n for n in trained) == (name != "probe")


def test_unknown_methods_and_no_seeds_are_refused(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path / "run"))
    with pytest.raises(InlayError, match="probe, lora"):
        compare_images(ImageTask("builtin:vit-tiny", "builtin:digits"), config, methods=["nothing"])
    with pytest.raises(InlayError, match="one seed or more"):
        compare_images(ImageTask("builtin:vit-tiny", "builtin:digits"), config, seeds=[])
    assert not (tmp_path / "run").exists()


def test_table_gives_mean_and_spread():
    rows = [
        Compared("lora", 2e-3, 12_345, {"accuracy": [0.9, 0.8, 1.0]}, 4.0, 56_400),
        Compared("probe", 1e-2, 970, {"accuracy": [0.5]}, 9.0, 4_300),
    ]
    assert table(rows).splitlines()[2:] == [
        "| lora | 12,345 | 0.002 | 0.9000 ± 0.1000 | 250 | 56 |",
        "| probe | 970 | 0.01 | 0.5000 | 111 | 4 |",
    ]


@pytest.fixture
def pairs(tmp_path):
    """A folder of csv files of E2E's form: 12 meanings with 2 references each."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    meanings = [(name, food) for name in ("The Oak", "Fern", "Cotto", "Zizzi") for food in ("Thai", "French", "Indian")]
    rows = [
        (f"name[{name}], food[{food}]", said)
        for name, food in meanings
        for said in (f"{name} serves {food} food.", f"Go to {name} for {food} food.")
    ]
    for split, part in (("train", rows[:12]), ("devset", rows[12:18]), ("test", rows[18:])):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("mr", "ref"), *part])
    return folder


def test_texts_are_compared_by_what_is_written_and_that_is_read_back(pairs, tmp_path, monkeypatch):
    train = TrainConfig(output_dir=str(tmp_path / "c"), epochs=2, batch_size=6, workers=0)

    def compare(max_new_tokens=6):
        return compare_texts(
            TextTask("builtin:gpt2-tiny", str(pairs), label_smoothing=0.1),
            train,
            methods=["lora", "bias"],
            seeds=[3],
            width=4,
            decoding=Decoding(max_new_tokens=max_new_tokens),
        )

    rows = compare()
    assert [(row.method, row.learning_rate) for row in rows] == [
        (n, METHODS[n].learning_rate) for n in ("lora", "bias")
    ]
    assert rows[0].trainable == 6 * 4 * (512 + 256 + 640 + 640)  # rank 4 on the four matrices of 6 blocks
    for row in rows:
        assert list(row.scores) == ["perplexity", "bleu", "chrf", "rouge_l"]
        assert all(len(values) == 1 for values in row.scores.values()) and row.scores["perplexity"][0] > 1
        assert row.peak_bytes > 4 * 1_484_800 and row.file_bytes > 4 * row.trainable  # the base only takes as much
        stored = json.loads((tmp_path / "c" / f"{row.method}-3" / "scores.json").read_text())
        assert stored["scores"] == {name: value for name, (value,) in row.scores.items()}
        assert stored["by"]["max_new_tokens"] == 6
    heads = (
        "| method | trained parameters | learning rate | perplexity | bleu | chrf | rouge_l | ms per step | peak MB | "
    )
    head, _, *lines = table(rows).splitlines()
    assert head == heads + "file, kB |" and len(lines) == 2
    perplexity, peak = f"{rows[0].scores['perplexity'][0]:.2f}", f"{rows[0].peak_bytes / 1e6:,.1f}"
    cells = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert (cells[0], cells[1], cells[3], cells[8]) == ("lora", "49,152", perplexity, peak)

    def judged(*_):
        raise AssertionError("texts are written again")

    monkeypatch.setattr("inlay.study.compare.judge", judged)
    assert [row.scores for row in compare()] == [row.scores for row in rows]
    with pytest.raises(AssertionError, match="written again"):
        compare(max_new_tokens=5)


def test_unknown_methods_are_refused_before_texts_are_read(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path / "run"))
    with pytest.raises(InlayError, match="probe, lora"):
        compare_texts(TEXTS, config, methods=["nothing"])
    with pytest.raises(InlayError, match="1 learning rates for 2 methods"):
        compare_texts(TEXTS, config, learning_rates=[1e-3])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("compare", "task"), [(compare_images, ImageTask), (compare_texts, TextTask)])
def test_weights_in_few_bits_are_not_trained(tmp_path, compare, task):
    config = TrainConfig(output_dir=str(tmp_path / "run"))
    with pytest.raises(InlayError, match="full and partial cannot train weights in 8 or 4 bits"):
        compare(task(quantize="8bit"), config, methods=["lora", "full", "partial"])


def test_what_would_stop_the_last_method_is_found_before_the_first_is_trained(tmp_path):
    methods = {"methods": ["lora", "prompt", "prefix"], "width": 20, "seeds": [0]}
    config = TrainConfig(output_dir=str(tmp_path / "run"))
    with pytest.raises(InlayError, match="max_new_tokens 240 and 20 virtual tokens"):
        compare_texts(TEXTS, config, **methods, decoding=Decoding(max_new_tokens=240))
    with pytest.raises(InlayError, match="prefix tuning puts keys and values into the cache"):
        compare_texts(TEXTS, replace(config, gradient_checkpointing=True), **methods)
    assert not (tmp_path / "run").exists()

"""Classifiers scored on labelled images: as recipes score them, per class, by name of the labels."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from inlay import ImageView, InlayError, evaluate, load_adapter, load_base, load_images, load_processor, save_adapter
from inlay.tasks.metrics import F1, Accuracy
from places import ROOT, SHARED
from tasks.recipe_scores import recipe_scores

SHIPPED = ROOT / "adapters_hub" / "digits-lora-vit-tiny"


def write_digits(folder, classes, per_class=6, name="digit {}"):
    pixels, labels = load_digits(return_X_y=True)
    for k in classes:
        inner = folder / name.format(k)
        inner.mkdir(parents=True)
        for i, flat in enumerate(pixels[labels == k][:per_class]):
            Image.fromarray((flat.reshape(8, 8) * (255 / 16)).round().astype(np.uint8)).save(inner / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def adapter(digits_adapter):
    return load_adapter(digits_adapter)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "digits", range(10))


def test_a_shipped_adapter_has_the_scores_that_its_recipe_wrote():
    found, noted = evaluate(SHIPPED, "builtin:digits", resamples=50), json.loads((SHIPPED / "metrics.json").read_text())
    assert found.split == "validation" and found.count == 359
    assert found.scores["accuracy"].value == noted["validation"]["accuracy"]
    assert found.scores["loss"].value == pytest.approx(noted["validation"]["loss"], abs=1e-5)
    assert found.base is None and any("head for these labels is new" in note for note in found.notes)


def test_scores_are_those_of_training(adapter, digits):
    found = evaluate(adapter, digits, split="validation", resamples=20)
    held = load_images(str(digits)).validation
    expected = recipe_scores(adapter.model, ImageView(held, adapter.processor), [Accuracy(), F1()])
    for name in ("accuracy", "f1", "loss"):
        assert found.scores[name].value == pytest.approx(expected[name], abs=1e-5)
    both = [evaluate(adapter, digits, split=split, resamples=5) for split in ("train", "validation")]
    names = [{(row["true"], row["image"]) for row in each.rows} for each in both]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 60


def test_a_folder_without_splits_is_scored_whole(adapter, digits):
    found = evaluate(adapter, digits, resamples=200)
    true, predicted = ([row[key] for row in found.rows] for key in ("true", "predicted"))
    assert found.split == "all" and found.count == 60 and "scored whole" in found.notes[0]
    assert found.scores["accuracy"].value == accuracy_score(true, predicted)
    assert found.scores["f1"].value == pytest.approx(f1_score(true, predicted, average="macro"))
    assert found.confusion == confusion_matrix(true, predicted, labels=adapter.labels).tolist()
    expected = precision_recall_fscore_support(true, predicted, labels=adapter.labels, zero_division=0)
    rows = {row["class"]: row for row in found.per_class}
    for k, label in enumerate(adapter.labels):
        if label in rows:
            assert [rows[label][key] for key in ("precision", "recall", "f1", "images")] == pytest.approx(
                [float(column[k]) for column in expected]
            )
    score = found.scores["accuracy"]
    assert score.low < score.value < score.high


def test_probabilities_are_the_models_own_and_calibration_is_by_hand(adapter, digits):
    found = evaluate(adapter, digits, resamples=5)
    row = found.rows[17]
    pixels = adapter.processor(
        Image.open(digits / row["true"] / row["image"]).convert("RGB"), return_tensors="pt"
    )["pixel_values"]  # fmt: skip
    with torch.no_grad():
        expected = adapter.model(pixel_values=pixels).logits[0].softmax(-1)
    assert row["probability"] == pytest.approx(float(expected.max()), abs=1e-4)
    assert row["probability_of_true"] == pytest.approx(float(expected[adapter.labels.index(row["true"])]), abs=1e-4)
    confidence, right = (np.array([r[key] for r in found.rows]) for key in ("probability", "right"))
    total = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found.scores["ece"].value == pytest.approx(total, abs=1e-4)
    assert any("15 bins" in note and "arXiv:1706.04599" in note for note in found.notes)


def test_some_labels_in_another_order_are_matched_by_name(adapter, digits, tmp_path):
    names = ["digit 7", "digit 2", "digit 5"]
    lines = [f"{digits}/{name}/{i}.png,{name}" for i in range(6) for name in names]
    (tmp_path / "some.csv").write_text("image,label\n" + "\n".join(lines))
    whole = {(r["true"], r["image"]): r for r in evaluate(adapter, digits, resamples=5).rows}
    found = evaluate(adapter, tmp_path / "some.csv", resamples=5)
    assert found.count == 18 and {row["true"] for row in found.rows} == set(names)
    for row in found.rows:
        assert row == whole[row["true"], row["image"]]
    one = write_digits(tmp_path / "one", [3], 1)
    found = evaluate(adapter, one)
    assert found.count == 1 and found.scores["accuracy"].low is None


def test_of_a_combination_one_tasks_classes_are_chosen_among(digits_adapter, digits, tmp_path):
    loaded = load_adapter(digits_adapter)
    loaded.file.record["tasks"] = {"high": {"digit 9": 9, "digit 4": 4}}
    write_digits(tmp_path / "two", [4, 9])
    found = evaluate(loaded, tmp_path / "two", group="high", resamples=5)
    assert found.labels == ["digit 9", "digit 4"] and len(found.confusion) == 2
    assert {row["predicted"] for row in found.rows} <= {"digit 4", "digit 9"}
    whole = {(r["true"], r["image"]): r for r in evaluate(loaded, digits, resamples=5).rows}
    for row in found.rows:  # among two, the true one is at least as probable
        assert row["probability_of_true"] >= whole[row["true"], row["image"]]["probability_of_true"]
    with pytest.raises(InlayError, match="'digit 0', 'digit 1'"):
        evaluate(loaded, digits, group="high")


def test_unknown_labels_and_empty_data_are_one_sentence(adapter, tmp_path):
    write_digits(tmp_path / "other", [1, 2], 2, "number {}")
    write_digits(tmp_path / "other", [3], 2)
    with pytest.raises(
        InlayError, match=r"^'number 1', 'number 2' are labels of '.*other', but not of adapter 'digits'"
    ):
        evaluate(adapter, tmp_path / "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InlayError, match="there are none"):
        evaluate(adapter, tmp_path / "empty")
    (tmp_path / "rows.csv").write_text("image,label\n")
    with pytest.raises(InlayError, match=r"rows\.csv"):
        evaluate(adapter, tmp_path / "rows.csv")


def test_a_split_of_its_own_is_what_is_scored(adapter, digits, tmp_path):
    for split, classes in (("train", range(10)), ("val", [1, 2]), ("test", [3])):
        for k in classes:
            shutil.copytree(digits / f"digit {k}", tmp_path / split / f"digit {k}")
    counts = {s: evaluate(adapter, tmp_path, split=s, resamples=5).count for s in (None, "test", "train", "all")}
    assert counts == {None: 12, "test": 6, "train": 60, "all": 78}
    limited = evaluate(adapter, tmp_path, limit=4, resamples=5)
    assert limited.count == 4 and {row["true"] for row in limited.rows} == {"digit 1", "digit 2"}


def test_a_base_with_the_same_labels_is_scored_too(tmp_path):
    from peft import LoraConfig, get_peft_model

    from inlay.bases.sites import lora_targets

    base = load_base("builtin:vit-tiny")
    own = [base.config.id2label[i] for i in sorted(base.config.id2label)]
    view = ImageView(load_images("builtin:shapes").validation, load_processor("builtin:vit-tiny"))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=lora_targets(base)))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.02)
    folder = save_adapter(model.eval(), tmp_path / "shapes", processor=view.processor)
    pictures = tmp_path / "pictures"
    for k in (0, 5, 9):
        (pictures / own[k]).mkdir(parents=True)
        rows = load_images("builtin:shapes").train
        for i in [i for i, label in enumerate(rows["label"][:]) if label == k][:5]:
            (pictures / own[k] / f"{i}.png").write_bytes(rows[i]["image"]["bytes"])
    found = evaluate(folder, pictures, resamples=5)
    expected = recipe_scores(
        load_base("builtin:vit-tiny"), ImageView(_as_own(pictures, own), view.processor), [Accuracy()]
    )
    assert found.base["accuracy"].value == pytest.approx(expected["accuracy"])
    assert found.base["loss"].value == pytest.approx(expected["loss"], abs=1e-4)
    assert found.base["loss"].value != pytest.approx(found.scores["loss"].value, abs=1e-3)
    merged = evaluate(load_adapter(folder).merge(), pictures, resamples=5)
    assert merged.base is None and merged.scores["loss"].value == pytest.approx(found.scores["loss"].value, abs=1e-4)
    assert evaluate(folder, pictures, resamples=5, compare=False).base is None


def _as_own(pictures, own):
    from inlay.tasks.images.data import load_images_to_score

    return load_images_to_score(str(pictures), own, adapter="shapes")[1]


def test_another_tasks_evaluation_refuses_it(adapter):
    from inlay.tasks.text.evaluate import evaluate as evaluate_text

    with pytest.raises(InlayError, match="is for image-classification, not for text-generation"):
        evaluate_text(adapter, "builtin:restaurants")


@pytest.mark.skipif(not (SHARED / "flowers5").is_dir(), reason="data beside the repository")
def test_real_photos(tmp_path):
    from peft import LoraConfig, get_peft_model

    from inlay.bases.sites import head_modules, lora_targets

    data, name = SHARED / "flowers5" / "dev", str(SHARED / "mobilenet_imagenet" / "hf" / "mobilenet_v2_1.0_224")
    torch.manual_seed(0)
    base = load_base(name, labels=["tulips", "roses", "daisy", "sunflowers", "dandelion"])
    model = get_peft_model(base, LoraConfig(target_modules=lora_targets(base), modules_to_save=head_modules(base)))
    folder = save_adapter(model.eval(), tmp_path / "flowers", processor=load_processor(name))
    found = evaluate(folder, data, limit=25, resamples=20)
    assert found.split == "validation" and found.count == 25 and sum(map(sum, found.confusion)) == 25
    assert [row["images"] for row in found.per_class if row["images"]] == [5] * 5

"""Classifiers whose classes do not exclude each other, or that give numbers: as transformers' own pipelines answer."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from sklearn.metrics import log_loss
from transformers import ViTForImageClassification, pipeline
from typer.testing import CliRunner

from inlay import (
    ImageTask,
    InlayError,
    classify_texts,
    evaluate,
    load_adapter,
    load_base,
    load_images,
    load_processor,
    predict,
    save_adapter,
)
from inlay.bases.load import resolve_base
from inlay.tasks.classification import class_probabilities, score_probabilities


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Some of the shapes, in folders named after the classes of builtin:vit-tiny."""
    folder, rows = tmp_path_factory.mktemp("shapes"), load_images("builtin:shapes")
    for i, label in enumerate(rows.train["label"][:60]):
        (folder / rows.labels[label]).mkdir(exist_ok=True)
        (folder / rows.labels[label] / f"{i}.png").write_bytes(rows.train[i]["image"]["bytes"])
    return folder


def make_base(folder, problem_type):
    model = ViTForImageClassification.from_pretrained(resolve_base("builtin:vit-tiny"))
    model.config.problem_type = problem_type
    model.save_pretrained(folder)
    load_processor("builtin:vit-tiny").save_pretrained(folder)
    return str(folder)


def make_adapter(folder, base):
    torch.manual_seed(0)
    model = get_peft_model(load_base(base), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    return save_adapter(model, folder, processor=load_processor(base))


@pytest.fixture(scope="module")
def multi_label(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multi")
    return make_adapter(folder / "adapter", make_base(folder / "base", "multi_label_classification"))


def test_several_labels_at_once_are_answered_by_a_sigmoid_each(multi_label, tmp_path):
    adapter = load_adapter(multi_label)
    classify = pipeline("image-classification", model=adapter.merge().model, image_processor=adapter.processor)
    image = Image.new("RGB", (32, 32), "red")
    expected = {row["label"]: row["score"] for row in classify(image, top_k=100)}
    found = predict(load_adapter(multi_label), [image], top=100)[0]
    assert len(found.labels) == len(expected) > 10 and sum(found.probabilities) > 1.5
    for label, probability in zip(found.labels, found.probabilities, strict=True):
        assert probability == pytest.approx(expected[label], abs=1e-4)
    from inlay.cli.app import app

    image.save(tmp_path / "red.png")
    said = CliRunner().invoke(app, ["predict", str(multi_label), str(tmp_path / "red.png"), "--json"])
    (row,) = json.loads(said.stdout)
    assert row["probabilities"] == pytest.approx(found.probabilities[:3], abs=1e-4)


def test_their_scores_take_each_class_by_itself(multi_label, images):
    found = evaluate(multi_label, images, resamples=5)
    adapter = load_adapter(multi_label)
    truth, probabilities = [], []
    for row in found.rows:
        image = Image.open(images / row["true"] / row["image"])
        with torch.no_grad():
            pixels = adapter.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"]
            probabilities.append(adapter.model(pixel_values=pixels).logits[0].double().sigmoid().numpy())
        truth.append([label == row["true"] for label in adapter.labels])
        assert row["probability"] == pytest.approx(probabilities[-1].max(), abs=1e-4)
    flat = log_loss(np.ravel(truth), np.ravel(probabilities))
    assert found.scores["loss"].value == pytest.approx(flat, abs=1e-4)
    top = np.argmax(probabilities, 1) == np.argmax(truth, 1)
    assert found.scores["accuracy"].value == pytest.approx(top.mean())
    assert found.base is not None and any("several classes at once" in note for note in found.notes)


def test_numbers_are_no_classes(tmp_path):
    folder = make_adapter(tmp_path / "adapter", make_base(tmp_path / "base", "regression"))
    with pytest.raises(InlayError, match=r"gives numbers \(problem_type regression\)"):
        predict(load_adapter(folder), [Image.new("RGB", (32, 32))])


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression", None])
def test_a_new_head_is_for_one_label_each(tmp_path, images, problem_type):
    base = make_base(tmp_path / "base", problem_type)
    model = load_base(base, labels=["a", "b"])
    loss = model(pixel_values=torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1])).loss
    assert model.config.problem_type == "single_label_classification" and loss.ndim == 0
    probabilities = class_probabilities(torch.tensor([[1.0, 2.0]]), model.config)
    assert probabilities.sum() == pytest.approx(1)


def test_a_recipe_says_that_one_label_each_is_not_what_the_base_is_for(tmp_path, images):
    base = make_base(tmp_path / "base", "multi_label_classification")
    labels = load_base(base).config.id2label
    task = ImageTask(model=base, dataset="builtin:shapes")
    data = task.load(0)
    assert list(data.source.labels) == [labels[i] for i in sorted(labels)]
    with pytest.raises(InlayError, match=r"several of its classes at once .* 'builtin:shapes' has one label"):
        task.base(data)


def test_a_text_classifier_answers_as_an_image_classifier_does(tmp_path):
    from inlay.bases.processors import load_tokenizer
    from inlay.tasks.sequences.processor import SequenceProcessor

    torch.manual_seed(0)
    base = load_base("builtin:gpt2-tiny", task="text-classification", labels=["x", "y", "z"])
    base.config.problem_type = "multi_label_classification"
    base.save_pretrained(tmp_path / "base")
    load_tokenizer("builtin:gpt2-tiny").save_pretrained(tmp_path / "base")
    again = load_base(tmp_path / "base", task="text-classification")
    model = get_peft_model(again, LoraConfig(r=2, target_modules=["c_attn"], task_type="SEQ_CLS", fan_in_fan_out=True))
    processor = SequenceProcessor(load_tokenizer(str(tmp_path / "base")))
    adapter = load_adapter(save_adapter(model, tmp_path / "adapter", processor=processor))
    (found,) = classify_texts(adapter, ["a text"], top=3)
    encoded, _ = processor.encode(["a text"], None)
    with torch.no_grad():
        expected = adapter.model(**processor.pad_rows(encoded)).logits[0].sigmoid()
    assert found.probabilities == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-5)


def test_scores_of_classes_that_exclude_each_other_stay_what_they_were():
    rng = np.random.default_rng(0)
    probabilities, true = rng.dirichlet(np.ones(4), 50), rng.integers(0, 4, 50)
    assert score_probabilities(probabilities, true, 1)["loss"].value == pytest.approx(log_loss(true, probabilities))

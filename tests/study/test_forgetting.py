"""What a base lost by adaptation: against numpy, transformers and results by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers import ViTImageProcessorPil as Processor

from inlay import METHODS, ImageView, load_images
from inlay.bases.load import list_builtin_bases, resolve_base, set_labels
from inlay.bases.processors import load_processor
from inlay.builtin.shapes import SHAPE_LABELS
from inlay.errors import BadInput
from inlay.study.forgetting import RememberedBase, linear_cka, measure_forgetting, remember_base
from inlay.tasks import TASKS
from inlay.tasks.adapter import TaskModel
from inlay.tasks.base import load_base, read_task
from inlay.tasks.evaluation import Request
from inlay.tasks.options import TaskData

IMAGES, TEXTS = TASKS["image-classification"], TASKS["text-generation"]
OWN_LABELS = ["dark", "light", "striped"]


def hsic_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith et al. 2019, equations 3 and 4, by Gram matrices."""
    n = len(x)
    centre = np.eye(n) - np.ones((n, n)) / n

    def hsic(k: np.ndarray, other: np.ndarray) -> float:
        return float(np.trace(k @ centre @ other @ centre)) / (n - 1) ** 2

    k, other = x @ x.T, y @ y.T
    return hsic(k, other) / np.sqrt(hsic(k, k) * hsic(other, other))


def test_cka_is_that_of_the_paper():
    generator = np.random.default_rng(0)
    for n, d, e in ((5, 3, 4), (40, 8, 8), (30, 50, 2), (200, 16, 33)):
        x = generator.normal(2.0, 3.0, (n, d))
        y = generator.normal(size=(n, e)) + x @ generator.normal(size=(d, e))
        assert linear_cka(torch.tensor(x), torch.tensor(y)) == pytest.approx(hsic_cka(x, y), abs=1e-12)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    x = torch.randn(50, 8, dtype=torch.float64)
    assert linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, x) <= 1
    assert np.isnan(linear_cka(x, torch.ones(50, 4)))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with labels of its own, and a folder of images with some of them, in another order."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("own")
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        initializer_range=0.4,
    )  # fmt: skip
    set_labels(config, OWN_LABELS)
    ViTForImageClassification(config).save_pretrained(folder / "base")
    Processor(size={"height": 16, "width": 16}).save_pretrained(folder / "base")
    generator = np.random.default_rng(0)
    for label in ("striped", "dark"):
        (folder / "images" / label).mkdir(parents=True)
        for i in range(15):
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{i}.png")
    return folder / "base", folder / "images"


def new_task(base: Path, rows: int = 24) -> TaskData:
    """Images of another task."""
    generator = torch.Generator().manual_seed(1)
    items = [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 4} for i in range(rows)]
    return TaskData(_Source("new"), items, items, load_processor(base), [], None, None, dict)


class _Source:
    def __init__(self, name: str) -> None:
        self.name = name


def adapt(base: Any, method: str, std: float = 0.3) -> nn.Module:
    """An adapted model that has been moved away from where it starts."""
    torch.manual_seed(1)
    model = METHODS[method].adapt(base, 2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += std * torch.randn_like(parameter)
    return model


def remember(own: tuple[Path, Path]) -> tuple[Any, RememberedBase]:
    base = load_base(own[0], labels=list("abcd"))
    return base, remember_base(base, IMAGES, new_task(own[0]), base_data=str(own[1]))


@pytest.mark.parametrize("method", ["lora", "visual-prompt", "attention-prefix", "full", "probe"])
def test_a_classifier_under_its_own_head(own: tuple[Path, Path], method: str):
    base, before = remember(own)
    assert not before.remarks
    plain = AutoModelForImageClassification.from_pretrained(own[0]).eval()
    data = load_images(str(own[1]))
    view = ImageView(data.train, load_processor(own[0]))
    pixels = torch.stack([view[i]["pixel_values"] for i in range(len(view))])
    true = torch.tensor([OWN_LABELS.index(data.labels[view[i]["labels"]]) for i in range(len(view))])
    held_out = torch.stack([item["pixel_values"] for item in new_task(own[0]).validation])
    with torch.no_grad():
        accuracy = float((plain(pixels).logits.argmax(-1) == true).float().mean())
        assert before.own is not None and before.own.score == pytest.approx(accuracy)
        first = plain.vit(held_out).last_hidden_state[:, 0]
        assert torch.allclose(before.features, first, atol=1e-5)

        model = adapt(base, method)
        values = {name: value.clone() for name, value in model.state_dict().items()}
        model.train()
        found = measure_forgetting(model, before)
        assert all(module.training for module in model.modules())
        body = (model if method in ("full", "probe") else model.get_base_model()).eval().vit
        after = float((plain.classifier(body(pixels).last_hidden_state[:, 0]).argmax(-1) == true).float().mean())
        drift = 1 - hsic_cka(first.double().numpy(), body(held_out).last_hidden_state[:, 0].double().numpy())
    assert found["own_task"] == pytest.approx(accuracy - after, abs=1e-6)
    assert found["drift"] == pytest.approx(drift, abs=1e-5)
    if method == "probe":
        assert found == {"own_task": 0.0, "drift": pytest.approx(0.0, abs=1e-12)}
    else:
        assert found["drift"] > 0.01
    # and nothing was changed by it: neither the trained model nor the base that is asked again
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert measure_forgetting(model, before) == found
    assert torch.equal(before.own.own.model.vit.embeddings.cls_token, plain.vit.embeddings.cls_token)


def test_what_is_unchanged_forgets_nothing(own: tuple[Path, Path]):
    for method in ("lora", "full"):
        base, before = remember(own)
        found = measure_forgetting(adapt(base, method, std=0.0), before)
        assert found == {"own_task": 0.0, "drift": pytest.approx(0.0, abs=1e-12)}


def test_data_of_the_base(own: tuple[Path, Path], tmp_path: Path):
    base = load_base(own[0], labels=list("abcd"))
    without = remember_base(base, IMAGES, new_task(own[0]))
    assert without.own is None and "--base-data" in without.remarks[0]
    assert measure_forgetting(adapt(base, "lora"), without).keys() == {"drift"}
    with pytest.raises(BadInput):
        remember_base(load_base(own[0], labels=list("abcd")), IMAGES, new_task(own[0]), base_data=str(tmp_path))
    with pytest.raises(BadInput, match="is what"):
        data = new_task(own[0])
        data.source.name = str(own[1])
        remember_base(load_base(own[0], labels=list("abcd")), IMAGES, data, base_data=str(own[1]))


def test_embedded_bases_know_what_they_were_trained_on():
    for name in {*list_builtin_bases()} - {"builtin:paint-tiny", "builtin:paint-judge"}:  # of no embedded data
        assert name in read_task(name).own_data
    for name, data in IMAGES.own_data.items():  # the labels of the data are the base's own
        assert data == "builtin:shapes" and tuple(IMAGES.labels(load_base(name), None)) == SHAPE_LABELS


# Language models.

TEXT = "name[The Sunny Arms], stars[four]\nThe Sunny Arms has four stars.\n" * 12


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "own.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def token_items(rows: int = 6) -> TaskData:
    tokens = [torch.arange(5 + i, 25 + i) for i in range(rows)]
    items = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in tokens]
    return TaskData(_Source("new"), items, items, None, [], None, None, dict)


def mean_loss(model: Any, before: RememberedBase) -> float:
    """Of all tokens but the first of each text, which nothing stands before; behind a learned prompt too."""
    assert before.own is not None
    losses = []
    for batch in before.own.batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
        chances = logits.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        losses.append(-chances[mask[:, 1:].bool()])
    return float(torch.cat(losses).mean())


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix", "full"])
@torch.no_grad()
def test_the_loss_of_a_language_model_rises(text_file: str, method: str):
    base = load_base("builtin:gpt2-tiny")
    before = remember_base(base, TEXTS, token_items(), base_data=text_file)
    plain = AutoModelForCausalLM.from_pretrained(resolve_base("builtin:gpt2-tiny"), dtype=torch.float32).eval()
    expected = mean_loss(plain, before)
    assert before.own is not None and -before.own.score == pytest.approx(expected, abs=1e-5)
    model = adapt(base, method, std=0.05)
    found = measure_forgetting(model, before)
    model.eval()
    assert found["text_loss"] == pytest.approx(mean_loss(model, before) - expected, abs=1e-5)
    assert found["drift"] > 0 and found["text_loss"] != 0


@torch.no_grad()
def test_a_language_model_that_became_a_classifier(text_file: str):
    """Its own output projection over its adapted body is compared with a model whose body has the merged weights."""
    base = load_base("builtin:gpt2-tiny", task="text-classification", labels=["yes", "no"])
    before = remember_base(base, TASKS["text-classification"], token_items(), base_data=text_file)
    assert before.features is not None and before.features.shape == (6 * 20, 128)
    model = adapt(base, "lora", std=0.05)
    found = measure_forgetting(model, before)
    fresh = load_base("builtin:gpt2-tiny")
    start = mean_loss(fresh, before)
    merged = model.merge_and_unload()
    head = fresh.lm_head.weight.clone()
    fresh.transformer.load_state_dict(merged.transformer.state_dict())
    fresh.lm_head.weight = nn.Parameter(head)
    assert found["text_loss"] == pytest.approx(mean_loss(fresh, before) - start, abs=1e-4)
    # a prefix stands outside of the body, and counts too
    base = load_base("builtin:gpt2-tiny", task="text-classification", labels=["yes", "no"])
    assert measure_forgetting(adapt(base, "prefix", std=0.0), before)["text_loss"] > 0.01


def test_the_text_of_the_embedded_language_model_is_what_its_card_tells():
    """Its card: a perplexity of 1.54 on held-out descriptions."""
    base = load_base("builtin:gpt2-tiny")
    own = TaskModel("base", base, TEXTS, TEXTS.load_processor("builtin:gpt2-tiny", None), [])
    found = TEXTS.evaluate(own, "builtin:descriptions", Request(compare=False, resamples=1, limit=12))
    assert found.scores["perplexity"].value == pytest.approx(1.54, abs=0.03)


@torch.no_grad()
def test_masks_by_prompts(monkeypatch):
    task, base = TASKS["mask-generation"], load_base("builtin:sam-tiny")
    pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    items = [{"pixel_values": each} for each in pixels]
    data = TaskData(_Source("new"), items, items, None, [], None, None, dict)
    monkeypatch.setattr(type(task), "own_examples", 2)
    before = remember_base(base, task, data)
    embedding = load_base("builtin:sam-tiny").vision_encoder(pixels).last_hidden_state  # B C h w
    rows = torch.stack([embedding[b, :, y, x] for b in range(2) for y in range(16) for x in range(16)])
    assert torch.allclose(before.features, rows, atol=1e-5)
    assert before.own is not None and 0.3 < before.own.score < 1
    assert measure_forgetting(adapt(base, "lora", std=0.0), before) == {
        "own_task": 0.0,
        "drift": pytest.approx(0.0, abs=1e-12),
    }


def test_scans_have_no_features_without_the_adapter_and_no_prompts():
    task = TASKS["volume-segmentation"]
    items = [{"pixel_values": torch.zeros(1, 8, 8, 8)}]
    data = TaskData(_Source("new"), items, items, None, [], None, None, dict)
    before = remember_base(load_base("builtin:sam-tiny"), task, data)
    assert before.features is None and before.own is None
    assert [remark.partition(":")[0] for remark in before.remarks] == ["drift", "own task"]
    assert measure_forgetting(nn.Linear(2, 2), before) == {}

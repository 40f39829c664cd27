"""What painted images are measured by, compared with values worked out by hand or computed by transformers."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
)

from command import run
from diffusion_models import write_pipeline
from inlay import InlayError, evaluate, load_adapter, load_base, paint, pipeline_targets, save_adapter
from inlay.tasks.text_to_image.encoder import load_encoder
from inlay.tasks.text_to_image.processor import load_prompt_processor
from inlay.tasks.text_to_image.scores import (
    compare_own_images,
    compare_with_subject,
    measure_feature_drift,
    measure_pixel_drift,
)

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
VISION = {"image_size": 16, "patch_size": 8, **SIZE}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA of a tiny pipeline, whose images it changes much."""
    where = tmp_path_factory.mktemp("painter")
    base = load_base(write_pipeline(where / "base"))
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=pipeline_targets(base), init_lora_weights=False))
    return save_adapter(model, where / "adapter", processor=load_prompt_processor(str(where / "base"), None))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three images with two prompts."""
    folder = tmp_path_factory.mktemp("subject")
    for i, prompt in enumerate(["a dog", "toy", "toy"]):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(prompt)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory, adapter):
    """A CLIP with random weights, and the tokenizer of the pipeline."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(2)
    text = {**SIZE, "vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 62, "eos_token_id": 63}
    model = CLIPModel(CLIPConfig(text_config={**text, "pad_token_id": 63}, vision_config=VISION, projection_dim=8))
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(adapter.parent / "base" / "tokenizer").save_pretrained(folder)
    return folder


def test_measures_are_those_of_their_formulas():
    painted, own = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    assert compare_with_subject(painted, own) == pytest.approx([(1 + 0 + 0.8) / 3, (0.6 + 0.8 + 0.96) / 3])
    assert compare_own_images(own) == pytest.approx((0 + 0.8 + 0.6) / 3) and compare_own_images(own[:1]) is None
    assert measure_feature_drift(painted, own[:2]) == pytest.approx([0, 0.2])
    black, grey = Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2), (51, 0, 0))
    assert measure_pixel_drift([black, black], [grey, black]) == pytest.approx([51 / 255 / 3, 0])


def test_features_are_those_that_transformers_computes(tmp_path, clip):
    torch.manual_seed(0)
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)) for i in range(3)]
    dino = Dinov2Model(Dinov2Config(**SIZE, image_size=16, patch_size=8)).eval()
    dino.save_pretrained(tmp_path / "dino")
    classifier = ViTForImageClassification(ViTConfig(**VISION, num_labels=3)).eval()
    classifier.save_pretrained(tmp_path / "vit")
    for folder, read in (
        (tmp_path / "dino", lambda pixels: dino(pixels).pooler_output),
        (tmp_path / "vit", lambda pixels: classifier.vit(pixels).last_hidden_state[:, 0]),
    ):
        encoder = load_encoder(folder, "cpu")
        pixels = encoder.processor(images=images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = torch.nn.functional.normalize(read(pixels), dim=-1)
        assert torch.allclose(encoder.encode_images(images), expected, atol=1e-5)
    encoder, model = load_encoder(clip, "cpu"), CLIPModel.from_pretrained(clip).eval()
    made = encoder.tokenizer(["dog", "toy"], padding="max_length", return_tensors="pt")
    pixels = encoder.processor(images=images[:2], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(**made, pixel_values=pixels)
    assert torch.allclose(encoder.encode_images(images[:2]), output.image_embeds, atol=1e-5)
    assert torch.allclose(encoder.encode_texts(["dog", "toy"]), output.text_embeds, atol=1e-5)


def test_what_gives_no_features_is_refused(adapter, digits_adapter):
    with pytest.raises(InlayError, match="gives no features of images; give the folder of a DINO or CLIP"):
        load_encoder(adapter.parent / "base")
    with pytest.raises(InlayError, match="no model folder at '/no/where'"):
        load_encoder("/no/where")
    with pytest.raises(InlayError, match="is for image-classification and paints nothing; leave encoder out"):
        evaluate(digits_adapter, "builtin:digits", encoder="builtin:vit-tiny")


def test_an_evaluation_is_of_what_adapter_and_base_paint(adapter, data, clip, monkeypatch):
    monkeypatch.setattr("inlay.tasks.text_to_image.evaluate.STEPS", 4)
    found = evaluate(adapter, data, encoder=clip, limit=3, resamples=19)
    assert (found.task, found.split, found.count, found.unit) == ("text-to-image", "all", 3, "seed")
    names = ["loss", "subject_fidelity", "clip_score", "drift_features", "drift_pixels", "own_fidelity"]
    assert list(found.scores) == names and list(found.base) == names[:3]
    assert all(score.low <= score.value <= score.high for name, score in found.scores.items() if name != names[-1])

    encoder, loaded = load_encoder(clip, "cpu"), load_adapter(adapter)
    own = encoder.encode_images([Image.open(path).convert("RGB") for path in sorted(data.glob("*.png"))])
    cosines = (own @ own.T).numpy()
    assert found.scores["own_fidelity"].value == pytest.approx((cosines.sum() - 3) / 6, abs=1e-5)
    asked = [("a dog", 0), ("toy", 1), ("a dog", 2)]
    assert [(row["prompt"], row["seed"]) for row in found.rows] == asked
    for model, scores in ((loaded, found.scores), (load_base(adapter.parent / "base"), found.base)):
        painted = encoder.encode_images([paint(model, [prompt], seeds=[seed], steps=4)[0] for prompt, seed in asked])
        assert scores["subject_fidelity"].value == pytest.approx(float((painted @ own.T).mean()), abs=2e-3)
        texts = encoder.encode_texts([prompt for prompt, _ in asked])
        assert scores["clip_score"].value == pytest.approx(float((painted * texts).sum(1).mean()), abs=2e-3)
    unrelated = found.rows[1]["unrelated_prompt"]
    (one,), (base,) = (paint(loaded, [unrelated], seeds=[1], steps=4, weight=weight) for weight in (1.0, 0.0))
    pixels = np.abs(np.asarray(one, float) - np.asarray(base, float)).mean() / 255
    assert found.rows[1]["drift_pixels"] == pytest.approx(pixels, abs=2e-3) and pixels > 0.01
    assert any("one of 2 prompts of the data" in note and "in 4 steps" in note for note in found.notes)


def test_a_merged_adapter_has_no_drift_and_says_so(adapter, data, monkeypatch):
    monkeypatch.setattr("inlay.tasks.text_to_image.evaluate.STEPS", 2)
    found = evaluate(load_adapter(adapter).merge(), data, limit=2, resamples=9)
    assert found.base is None and list(found.scores) == ["loss", "subject_fidelity", "own_fidelity"]
    assert any("nor drift from it: the adapter is merged" in note for note in found.notes)
    assert any("builtin:" in note and "give encoder a DINO or CLIP" in note for note in found.notes)


def test_through_the_command_line(adapter, data, clip, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("inlay.tasks.text_to_image.evaluate.STEPS", 2)
    options = ("--encoder", clip, "--limit", 2, "--adapter-only", "--csv", tmp_path / "rows.csv", "--json")
    status, out, err = run(capsys, monkeypatch, "evaluate", adapter, data, *options)
    assert status == 0, err
    told = json.loads(out)
    assert set(told["scores"]) == {"loss", "subject_fidelity", "clip_score", "own_fidelity"} and "base" not in told
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 3

"""Text-to-image pipelines: weights by part as in diffusers, dense differences, and weights fitted on images."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from diffusion_models import write_pipeline
from inlay import combine, load_adapter, load_base, save_adapter
from inlay.combine import fit
from inlay.combine.examples import load_examples
from inlay.combine.merge import compute_outputs
from inlay.tasks.text_to_image.processor import load_prompt_processor

TARGETS = r"unet\..*(to_q|to_v|conv1|conv_in)|text_encoder\..*(q_proj|fc1)"
PARTS = [{"unet": 1.0, "text_encoder": 0.5}, {"unet": -0.5, "text_encoder": 2.0}]


def adapt(folder, base, seed):
    """A saved LoRA of denoiser and text encoders, as if trained."""
    model = load_base(base)
    config = LoraConfig(r=2, lora_alpha=seed, target_modules=TARGETS)
    model = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = 0.2 * torch.randn(value.shape, generator=generator)
    return save_adapter(model, folder, processor=load_prompt_processor(str(base), None))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("bases") / "sd")


@pytest.fixture(scope="module")
def pair(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return adapt(folder / "dog", base, 3), adapt(folder / "toy", base, 4)


def make_inputs(loaded):
    return loaded.task.random_inputs(loaded.model, loaded.processor)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_each_part_weighs_as_in_diffusers(base, pair, tmp_path):
    combine(dict(zip(pair, PARTS, strict=True)), out=tmp_path / "both")
    loaded = load_adapter(tmp_path / "both")
    assert loaded.file.record["combined"]["of"] == [
        {"name": folder.name, "weight": weight} for folder, weight in zip(pair, PARTS, strict=True)
    ]
    plain = load_base(base)
    pipeline = plain.make_pipeline()
    for folder in pair:
        pipeline.load_lora_weights(str(folder), adapter_name=folder.name)
    pipeline.set_adapters([folder.name for folder in pair], PARTS)
    inputs = make_inputs(loaded)
    found, wanted = compute_outputs(loaded.model, inputs), compute_outputs(plain, inputs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
    pipeline.set_adapters([folder.name for folder in pair], [1.0, 1.0])
    assert (compute_outputs(plain, inputs) - wanted).abs().max() > 0.01


def test_a_dense_sum_has_the_weights_of_each_part(base, pair, tmp_path):
    combine(dict(zip(pair, PARTS, strict=True)), dense=True, out=tmp_path / "dense")
    combine(dict(zip(pair, PARTS, strict=True)), out=tmp_path / "both")
    dense, both = load_adapter(tmp_path / "dense"), load_adapter(tmp_path / "both")
    inputs = make_inputs(both)
    assert dense.file.config["peft_type"] == "INLAY_PARTIAL"
    torch.testing.assert_close(
        compute_outputs(dense.model, inputs), compute_outputs(both.model, inputs), rtol=0, atol=2e-6
    )


def test_weights_are_fitted_on_images_with_prompts(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(fit.fit_weights.__kwdefaults__, "steps", 8)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text("a dog and a toy")
    start = dict(zip(pair, PARTS, strict=True))
    made = combine(start, fit=str(photos), examples=2, out=tmp_path / "out")
    fitted = made.fitted
    assert fitted.after < fitted.before and fitted.examples == 2 and made.weights == fitted.weights
    assert [set(weight) for weight in made.weights.values()] == [{"unet", "text_encoder"}] * 2
    given = combine(start, out=tmp_path / "given").folder
    for folder, loss in ((tmp_path / "out", fitted.after), (given, fitted.before)):
        loaded = load_adapter(folder)
        with torch.no_grad():
            found = load_examples(loaded, str(photos), 2, 0).mean(loaded.model).item()
        assert found == pytest.approx(loss, rel=1e-4)

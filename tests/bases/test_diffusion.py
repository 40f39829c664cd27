"""Text-to-image bases, compared with the pipelines, schedulers and scripts of diffusers that they follow."""

import copy
import json
import shutil
import sys

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from torch import nn
from transformers import T5Config, T5EncoderModel

from diffusion_models import write_pipeline
from hub.client import online
from hub.server import Repo
from inlay import InlayError, load_base, lora_targets, pipeline_targets
from inlay.bases.diffusion.families import FAMILIES
from inlay.bases.diffusion.model import DiffusionModel
from inlay.bases.learning_rate import scale_rate
from inlay.bases.sites import sites
from inlay.measure.footprint import footprint
from inlay.measure.memory import measure_peak, plan_memory
from inlay.methods import METHODS
from inlay.tasks import find_task
from inlay.tasks.base import load_skeleton
from inlay.tasks.text_to_image.loss import DenoisingLoss
from inlay.tasks.text_to_image.processor import load_prompt_processor
from inlay.train.launch import disable_checkpointing, enable_checkpointing

KINDS = ("sd", "sdxl", "sd3")
EVERY = pytest.mark.parametrize("kind", KINDS)
PROMPTS = ["a dog", "sks"]
TASK = find_task("text-to-image")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("pipelines")
    return {kind: write_pipeline(where / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def bases(folders):
    """They are not changed."""
    return {kind: load_base(folder) for kind, folder in folders.items()}


def draw(model, folder):
    """A batch with latents, noise and levels at both ends and between."""
    batch = TASK.random_inputs(model, load_prompt_processor(str(folder), None))
    last = model.config.train_timesteps - 1
    return {key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in batch.items()} | {
        "timesteps": torch.tensor([0, 3, last // 2, last])
    }


def read_conditions(model, tokenized):
    tokens = {name.replace("input_ids", "text_encoder"): ids for name, ids in tokenized.items()}
    return FAMILIES[model.config.pipeline].encode(model, tokens, (16, 16))


# Prompts


@EVERY
@torch.no_grad()
def test_the_denoiser_reads_what_the_pipeline_makes_of_prompts(kind, folders, bases):
    model = bases[kind]
    found = read_conditions(model, load_prompt_processor(str(folders[kind]), None).tokenize(PROMPTS))
    pipeline = model.make_pipeline()
    encoded = pipeline.encode_prompt(
        **({"prompt_2": None} if kind != "sd" else {}),
        **({"prompt_3": None} if kind == "sd3" else {}),
        prompt=PROMPTS,
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    assert torch.equal(found["encoder_hidden_states"], encoded[0])
    if kind == "sdxl":
        assert torch.equal(found["added_cond_kwargs"]["text_embeds"], encoded[2])
        ids = pipeline._get_add_time_ids((16, 16), (0, 0), (16, 16), torch.float32, text_encoder_projection_dim=16)
        assert torch.equal(found["added_cond_kwargs"]["time_ids"], ids.repeat(2, 1))
    if kind == "sd3":
        assert torch.equal(found["pooled_projections"], encoded[2])


@torch.no_grad()
def test_t5_is_read_too_where_a_pipeline_of_sd3_has_it(folders, bases):
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=63)
    torch.manual_seed(0)
    parts = {name: getattr(bases["sd3"], name) for name in bases["sd3"].config.parts}
    made = copy.deepcopy(bases["sd3"].config)
    made.parts["text_encoder_3"] = {"library": "transformers", "class": "T5EncoderModel", "config": config.to_dict()}
    model = DiffusionModel(made, {**parts, "text_encoder_3": T5EncoderModel(config).eval()})
    pipeline = bases["sd3"].make_pipeline()
    pipeline.register_modules(text_encoder_3=model.text_encoder_3, tokenizer_3=pipeline.tokenizer)
    clip = load_prompt_processor(str(folders["sd3"]), None).tokenize(PROMPTS)
    padded = pipeline.tokenizer(PROMPTS, padding="max_length", max_length=256, return_tensors="pt").input_ids
    found = read_conditions(model, {**clip, "input_ids_3": padded})
    expected, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS, None, None, device="cpu", do_classifier_free_guidance=False
    )
    assert torch.equal(found["encoder_hidden_states"], expected) and torch.equal(found["pooled_projections"], pooled)


# Noise


def look_at_denoiser(model, batch):
    """What goes into the denoiser, and the output of the model."""
    seen = {}
    handle = model.denoiser.register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
    with torch.no_grad():
        output = model(**batch)
    handle.remove()
    return seen, output


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_noise_and_targets_are_those_of_ddpm(kind, folders, bases):
    model = bases["sd"]
    batch = draw(model, folders["sd"])
    latents, levels = model.encode_images(batch["pixel_values"]), batch["timesteps"]
    before = model.config.scheduler
    model.config.scheduler = {**before, "prediction_type": kind}
    try:
        seen, output = look_at_denoiser(model, batch)
    finally:
        model.config.scheduler = before
    scheduler = DDPMScheduler.from_config(before)
    expected = {
        "epsilon": batch["noise"],
        "v_prediction": scheduler.get_velocity(latents, batch["noise"], levels),
        "sample": latents,
    }[kind]
    assert torch.allclose(seen["sample"], scheduler.add_noise(latents, batch["noise"], levels), atol=1e-6)
    assert torch.equal(seen["timestep"], levels) and torch.allclose(output.target, expected, atol=1e-6)
    assert output.loss == pytest.approx(float((output.prediction - expected).square().mean()))
    # The weights of min-SNR (Hang et al. 2023, section 3.4) as the scripts of diffusers compute them.
    ratio = compute_snr(scheduler, levels)
    divisor = {"epsilon": ratio, "v_prediction": ratio + 1, "sample": torch.ones(4)}[kind]
    weights = ratio.clamp_max(5.0) / divisor
    errors = (output.prediction - expected).square().flatten(1).mean(1)
    model.config.scheduler = {**before, "prediction_type": kind}
    try:
        with torch.no_grad():
            found = DenoisingLoss(5.0, kind)(model, batch).loss
    finally:
        model.config.scheduler = before
    assert float(found) == pytest.approx(float((errors * weights).mean()), rel=1e-5)


def test_noise_and_levels_are_those_of_flow_matching(folders, bases):
    model = bases["sd3"]
    batch = draw(model, folders["sd3"])
    latents = model.encode_images(batch["pixel_values"])
    seen, output = look_at_denoiser(model, batch)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.config.scheduler)
    places = model.config.train_timesteps - 1 - batch["timesteps"]  # diffusers starts from noise only
    levels = scheduler.timesteps[places]
    assert torch.allclose(seen["timestep"], levels, rtol=1e-5)
    assert torch.allclose(seen["hidden_states"], scheduler.scale_noise(latents, levels, batch["noise"]), atol=1e-5)
    assert torch.equal(output.target, batch["noise"] - latents) and output.alphas_cumprod is None
    with torch.no_grad():  # it has no signal-to-noise ratio to weight by
        assert DenoisingLoss(5.0)(model, batch).loss == pytest.approx(float(output.loss))


def test_levels_are_drawn_as_the_papers_say(bases):
    torch.manual_seed(0)
    for kind, (low, high) in {"sd": (0.24, 0.26), "sd3": (0.11, 0.16)}.items():  # P(N(0, 1) < logit 1/4) = 0.136
        drawn = bases[kind].draw_timesteps(20_000)
        assert drawn.min() >= 0 and drawn.max() <= 999 and low < (drawn < 250).float().mean() < high


def test_rows_count_by_their_weight(folders, bases):
    batch = draw(bases["sd"], folders["sd"])
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0])
    with torch.no_grad():
        output = bases["sd"](**batch)
        errors = (output.prediction - output.target).square().flatten(1).mean(1)
        found = DenoisingLoss()(bases["sd"], {**batch, "weight": weights}).loss
    assert float(found) == pytest.approx(float((errors[0] + 0.5 * errors[2]) / 1.5))


# Parts


@EVERY
def test_a_skeleton_has_the_same_tensors(kind, folders, bases):
    skeleton = load_skeleton(folders[kind])
    assert {name: value.shape for name, value in skeleton.state_dict().items()} == {
        name: value.shape for name, value in bases[kind].state_dict().items()
    }
    assert all(value.is_meta for value in skeleton.parameters())


@EVERY
def test_lora_goes_into_the_attention_of_the_denoiser(kind, bases):
    """Of which diffusers has a list: one processor for each."""
    model = bases[kind]
    part = model.config.denoiser
    places = [f"{part}.{name.removesuffix('processor')}" for name in model.denoiser.attn_processors]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    attention = [name for name in linear if name.startswith(tuple(places))]
    assert attention and sorted(pipeline_targets(model)) == sorted(attention)
    assert lora_targets(model, "attention") == pipeline_targets(model)
    everything = {*pipeline_targets(model, "all", convolutions=True, text_encoders=True)}
    assert {*attention, *lora_targets(model)} < everything
    assert not any(name.startswith("vae.") for name in everything)
    ends = (".q_proj", ".k_proj", ".v_proj", ".out_proj")
    of_texts = {name for name in linear if name.startswith("text_encoder") and name.endswith(ends)}
    if kind == "sdxl":  # it reads the states before the last layer of its first encoder
        of_texts = {name for name in of_texts if not (name.startswith("text_encoder.") and ".layers.1." in name)}
    assert of_texts and {name for name in everything if name.startswith("text_encoder")} == of_texts
    inside = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n.startswith(part) and "block" in n}
    assert {name for name in everything if isinstance(model.get_submodule(name), nn.Conv2d)} == inside
    with pytest.raises(InlayError, match="no single stack of equal blocks"):
        sites(model)
    with pytest.raises(InlayError, match=r"Linear is no text-to-image base; use lora_targets\."):
        pipeline_targets(nn.Linear(2, 2))


def test_its_learning_rate_falls_with_its_width(bases):
    wide = copy.copy(bases["sd"].config)
    wide.parts = {"unet": {"config": {"block_out_channels": [320, 640, 1280, 1280]}}}
    model = copy.copy(bases["sd"])
    assert scale_rate(3e-3, model) == 3e-3
    model.config = wide
    assert scale_rate(3e-3, METHODS["lora"].adapt(copy.deepcopy(model), 2)) == pytest.approx(
        3e-3 * (128 / 1280) ** 0.78
    )


# Memory


@pytest.mark.parametrize(("kind", "checkpointing"), [("sd", True), ("sd3", False)])
def test_memory_is_planned_as_it_is_measured(kind, checkpointing, bases):
    model = METHODS["lora"].adapt(copy.deepcopy(bases[kind]), 2)
    batch, loss = TASK.planned_batch(bases[kind], 2, 0, 0)
    settings = {"loss": loss, "gradient_checkpointing": checkpointing}
    planned = plan_memory(model, batch, **settings)
    assert planned.base == footprint(bases[kind]).bytes_total  # VAE and text encoders as well
    assert planned.peak == pytest.approx(measure_peak(model, batch, **settings), rel=0.1)


@EVERY
def test_checkpointing_changes_no_gradient(kind, folders, bases):
    model = copy.deepcopy(bases[kind])
    config = METHODS["lora"].config(model, 2)
    config.target_modules = pipeline_targets(model, text_encoders=True)
    config.init_lora_weights = False
    model = METHODS["lora"].attach(model, config).train()
    batch = TASK.random_inputs(model, load_prompt_processor(str(folders[kind]), None))

    def compute_gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plain = compute_gradients()
    enable_checkpointing(model)
    on = [name for name, module in model.named_modules() if getattr(module, "gradient_checkpointing", False)]
    assert any("text_encoder" in name for name in on) and any(model.config.denoiser in name for name in on)
    found = compute_gradients()
    disable_checkpointing(model)
    assert all(torch.allclose(found[name], value, atol=1e-7) for name, value in plain.items())
    idle = [name for name, value in plain.items() if not value.any()]
    assert all("transformer_blocks.1.attn.add_q_proj" in name for name in idle)  # the last block of SD 3 drops the text


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_the_blocks_of_the_denoiser_are_held_in_few_bits(bits, folders, bases):
    model = load_base(folders["sd"], quantize=bits)
    packed = {name for name, m in model.named_modules() if type(m).__name__ in ("Linear8bitLt", "Linear4bit")}
    blocks = {name for name in lora_targets(model) if isinstance(model.get_submodule(name), nn.Linear)}
    wide = {name for name in blocks if bits == "8bit" or model.get_submodule(name).in_features % 64 == 0}
    assert packed == wide and packed
    skeleton = load_skeleton(folders["sd"], quantize=bits)
    assert packed == {
        name for name, m in skeleton.named_modules() if type(m).__name__ in ("Linear8bitLt", "Linear4bit")
    }
    batch = draw(bases["sd"], folders["sd"])
    with torch.no_grad():
        found, whole = model(**batch).prediction, bases["sd"](**batch).prediction
    assert 0 < (found - whole).norm() < 0.1 * whole.norm()
    adapted = METHODS["lora"].adapt(model, 2)
    adapted.train()(**batch).loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


# Files


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated")  # which diffusers passes
def test_a_pipeline_of_the_hub_is_a_base(folders, bases, tmp_path):
    with online(tmp_path / "cache") as hub:
        files = [path for path in folders["sd"].rglob("*") if path.is_file()]
        hub.repos["ann/tiny"] = Repo()
        hub.repos["ann/tiny"].add(
            {str(path.relative_to(folders["sd"])): (path.read_bytes(), False) for path in files}, "a pipeline"
        )
        model = load_base("ann/tiny")
        processor = load_prompt_processor("ann/tiny", None)
    batch = TASK.random_inputs(model, processor)
    with torch.no_grad():
        assert torch.equal(model(**batch).prediction, bases["sd"](**batch).prediction)


def change(folder, to, file, **values):
    """A copy of a pipeline whose JSON file says something else."""
    shutil.copytree(folder, to)
    path = to / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return to


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, r"is a FluxPipeline of diffusers; inlay adapts Stable"),
        ("model_index.json", {"vae": [None, None]}, r"the pipeline .* lacks its vae\."),
        ("model_index.json", {"unet": None}, r"lacks its denoiser or text encoder\."),
        ("model_index.json", {"unet": ["strangers", "UNet"]}, r"the unet of .* needs code of strangers, which inlay"),
        ("model_index.json", {"unet": "UNet"}, r"does not name the class of its unet; download it again\."),
        ("model_index.json", {"unet": ["diffusers", "NoSuchModel"]}, r"diffusers has no model 'NoSuchModel'"),
        ("model_index.json", {"unet": ["diffusers", "DDIMScheduler"]}, r"diffusers has no model 'DDIMScheduler'"),
        ("unet/config.json", {"sample_size": None}, r"the unet of .* does not say the size of its images"),
        ("unet/config.json", {"block_out_channels": [8, 24]}, r"broken"),
    ],
)
def test_a_pipeline_that_is_no_base_is_refused_in_one_sentence(file, values, message, folders, tmp_path):
    broken = change(folders["sd"], tmp_path / "broken", file, **values)
    with pytest.raises(InlayError, match=message) as refused:
        load_base(broken)
    assert "\n" not in str(refused.value)


def test_files_that_are_not_there_are_named(folders, tmp_path):
    shutil.copytree(folders["sd"], tmp_path / "broken")
    (tmp_path / "broken" / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(InlayError, match=r"scheduler/scheduler_config\.json of .* cannot be read"):
        load_base(tmp_path / "broken")
    shutil.copytree(folders["sd"], tmp_path / "pickled")
    (tmp_path / "pickled" / "unet" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "unet.bin")
    with pytest.raises(InlayError, match="safetensors"):
        load_base(tmp_path / "pickled")


@pytest.mark.parametrize("load", [load_base, load_skeleton])
def test_without_diffusers_it_says_what_to_install(load, folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InlayError, match=r"need diffusers: pip install 'inlay\[diffusion\]'\.$"):
        load(folders["sd"])

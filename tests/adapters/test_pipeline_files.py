"""LoRA of a text-to-image pipeline is one file for inlay and for diffusers: each computes what the other does."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from diffusion_models import write_pipeline
from inlay import combine, import_adapter, load_adapter, load_base, save_adapter
from inlay.adapters.file import CONFIG, WEIGHTS, read_adapter
from inlay.adapters.weight_file import PIPELINE_WEIGHTS, SETTINGS, find_weights, fits_pipeline
from inlay.errors import InlayError
from inlay.tasks.text_to_image.processor import load_prompt_processor

# Attention, feed-forward layers and convolutions of the UNet, and layers of the text encoder.
TARGETS = (
    r"unet\..*(to_q|to_out\.0|ff\.net\.2|conv1|conv_in|proj_in|time_emb_proj)|text_encoder\..*(q_proj|out_proj|fc1)"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("bases") / "sd")


@pytest.fixture(scope="module")
def adapt(base):
    """A function that gives the base with a LoRA in it as if trained."""

    def adapt(seed=0, **settings):
        model = load_base(base)
        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS, **settings}))
        for name, value in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                torch.nn.init.normal_(value, std=0.2)
        return model.eval()

    return adapt


@pytest.fixture(scope="module")
def save(base, adapt):
    """A function that saves such a LoRA, and gives its model and folder."""

    def save(folder, seed=0, **settings):
        model = adapt(seed, **settings)
        return model, save_adapter(model, folder, processor=load_prompt_processor(str(base), None))

    return save


@pytest.fixture(scope="module")
def two(save, tmp_path_factory):
    """Two saved adapters of different ranks and sites."""
    folder = tmp_path_factory.mktemp("two")
    few = r"unet\..*(to_q|to_k|conv1)|text_encoder\..*(q_proj|fc2)"
    return save(folder / "a")[1], save(folder / "b", 1, r=2, lora_alpha=3, target_modules=few)[1]


def predict(model):
    """The predicted noise of two images."""
    generator = torch.Generator().manual_seed(3)
    pixels, noise = torch.randn(2, 3, 16, 16, generator=generator), torch.randn(2, 4, 8, 8, generator=generator)
    tokens = torch.randint(0, 60, (2, 8), generator=generator)
    with torch.no_grad():
        return model(pixel_values=pixels, input_ids=tokens, timesteps=torch.tensor([300, 700]), noise=noise).prediction


def predict_in_diffusers(base, *folders, weights=None):
    """The same by the modules of a pipeline into which diffusers has loaded the files."""
    model = load_base(base)
    pipeline = model.make_pipeline()
    for folder in folders:
        pipeline.load_lora_weights(str(folder), adapter_name=folder.name)
    if weights:
        pipeline.set_adapters([folder.name for folder in folders], weights)
    return predict(model)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "use_rslora": True,
            "rank_pattern": {"conv1": 2, "q_proj": 1},
            "alpha_pattern": {r"attn1\.to_q": 9, "fc1": 1.5},
        },
        {"use_dora": True},
        {"lora_bias": True, "target_modules": r"unet\..*(to_out\.0|conv2)"},
    ],
    ids=["patterns", "dora", "bias"],
)
def test_diffusers_loads_what_inlay_saves(settings, base, save, tmp_path):
    model, folder = save(tmp_path / "a", **settings)
    assert {path.name for path in folder.iterdir()} >= {CONFIG, PIPELINE_WEIGHTS} and not (folder / WEIGHTS).exists()
    wanted = predict(model)
    assert (wanted - predict(load_base(base))).abs().max() > 0.01
    torch.testing.assert_close(predict_in_diffusers(base, folder), wanted, rtol=0, atol=1e-6)
    loaded = load_adapter(folder)
    assert loaded.verified
    torch.testing.assert_close(predict(loaded.model), wanted, rtol=0, atol=0)


def test_equal_pixels(base, two):
    def paint(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        settings = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
        return pipeline("a dog", generator=torch.Generator().manual_seed(0), **settings).images

    theirs = StableDiffusionPipeline.from_pretrained(base)
    plain = paint(theirs)
    theirs.load_lora_weights(str(two[0]))
    ours = paint(load_adapter(two[0]).model.get_base_model().make_pipeline())
    assert (ours - plain).abs().max() > 0.05
    torch.testing.assert_close(paint(theirs), ours, rtol=0, atol=0)


def test_one_form_for_all_versions(base, two):
    """Keys as transformers 4 has them; settings that fit its modules, which stand in a `text_model`, as an ending."""
    with safe_open(two[0] / PIPELINE_WEIGHTS, "pt") as file:
        keys, settings = list(file.keys()), json.loads(file.metadata()[SETTINGS])
    assert "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_A.weight" in keys
    assert "encoder.layers.1.mlp.fc1" in settings["text_encoder.target_modules"]
    assert "base_model.model.text_encoder.encoder.layers.1.mlp.fc1.lora_A.weight" in read_adapter(two[0]).shapes
    pipeline = load_base(base).make_pipeline()
    pipeline.text_encoder = CLIPTextModelWithProjection(pipeline.text_encoder.config)
    pipeline.load_lora_weights(str(two[0]))
    stored = load_file(two[0] / PIPELINE_WEIGHTS)
    up, down = (stored[f"text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_{x}.weight"] for x in "BA")
    layer = pipeline.text_encoder.text_model.encoder.layers[1].mlp.fc1
    torch.testing.assert_close(layer.get_delta_weight("default_0"), 5 / 3 * up @ down)


def test_what_diffusers_would_lose_stays_in_peft_s_file(adapt):
    """Layers of the VAE, and tensors that are trained whole."""
    config = adapt().peft_config["default"].to_dict()
    for name in ("vae.decoder.conv_in.lora_A.weight", "unet.conv_out.weight", "transformer.h.0.c_attn.inlay_up.weight"):
        assert not fits_pipeline(config, [f"base_model.model.{name}"])
    assert fits_pipeline(config, ["base_model.model.unet.conv_out.lora_A.weight"])


def test_what_is_refused(two, tmp_path):
    folder = shutil.copytree(two[0], tmp_path / "a")
    tensors = load_file(folder / PIPELINE_WEIGHTS)
    (folder / PIPELINE_WEIGHTS).unlink()
    with pytest.raises(InlayError, match=rf"has no {WEIGHTS}"):
        read_adapter(folder)
    save_file(tensors, folder / PIPELINE_WEIGHTS, {"format": "pt", SETTINGS: "[1"})
    with pytest.raises(InlayError, match=rf"{SETTINGS} in the metadata of .* cannot be read"):
        read_adapter(folder)
    key = "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_A.weight"
    twice = tensors | {key.replace("text_model.", ""): tensors[key].clone()}
    save_file(twice, folder / PIPELINE_WEIGHTS, {"format": "pt"})
    with pytest.raises(InlayError, match="holds one tensor under two names"):
        read_adapter(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(InlayError, match=rf"inlay import makes one of its {PIPELINE_WEIGHTS}"):
        read_adapter(folder)


def test_a_flipped_bit_is_found(two, tmp_path):
    folder = shutil.copytree(two[0], tmp_path / "a")
    data = bytearray((folder / PIPELINE_WEIGHTS).read_bytes())
    data[-3] ^= 1
    (folder / PIPELINE_WEIGHTS).write_bytes(data)
    with pytest.raises(InlayError, match="does not match the checksum"):
        read_adapter(folder)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_the_sum_is_what_diffusers_adds(base, two, tmp_path):
    """Ranks side by side: pipe.set_adapters(["a", "b"], [1, -0.5]), and from the base's names to the file's."""
    made = combine({two[0]: 1, two[1]: -0.5}, out=tmp_path / "sum")
    assert made.widths == {"LORA": 5} and find_weights(made.folder).name == PIPELINE_WEIGHTS
    wanted = predict_in_diffusers(base, *two, weights=[1, -0.5])
    assert (wanted - predict_in_diffusers(base, two[0])).abs().max() > 0.01
    torch.testing.assert_close(predict_in_diffusers(base, made.folder), wanted, rtol=0, atol=2e-6)
    loaded = load_adapter(made.folder)
    assert loaded.verified
    torch.testing.assert_close(predict(loaded.model), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("settings", [{"width": "auto", "error": 0.1}, {"rule": "ties", "width": 2}])
def test_rules_and_widths(settings, base, two, tmp_path):
    """Whatever the rule, both read the same from the file."""
    made = combine(dict.fromkeys(two, 1.0), out=tmp_path / "c", **settings)
    assert find_weights(made.folder).name == PIPELINE_WEIGHTS
    found = predict(load_adapter(made.folder).model)
    torch.testing.assert_close(predict_in_diffusers(base, made.folder), found, rtol=0, atol=1e-6)


def test_report_and_dense(base, save, two, tmp_path):
    """DoRA does not add, but its difference of weights does: that is no LoRA, and goes into peft's file."""
    dora = save(tmp_path / "dora", use_dora=True)[1]
    with pytest.raises(InlayError, match="is a DoRA"):
        combine({dora: 1, two[0]: 1}, out=tmp_path / "no")
    made = combine({dora: 0.5}, out=tmp_path / "dense", dense=True, report=tmp_path / "r.json")
    assert find_weights(made.folder).name == WEIGHTS and (tmp_path / "r.json").is_file()
    assert load_adapter(made.folder).verified


def test_diffusers_saves_and_inlay_imports(base, adapt, tmp_path):
    """With settings as it is; without them alpha is asked for, where diffusers takes the rank for it."""
    model = adapt(use_rslora=True, rank_pattern={"conv1": 2}, alpha_pattern={"to_q": 9})
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    start = "base_model.model."
    parts = {
        part: {k.removeprefix(f"{start}{part}."): v for k, v in tensors.items() if k.startswith(f"{start}{part}.")}
        for part in ("unet", "text_encoder")
    }
    settings = model.peft_config["default"].to_dict() | {"target_modules": TARGETS}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path / "theirs", parts["unet"], parts["text_encoder"],
        unet_lora_adapter_metadata=settings, text_encoder_lora_adapter_metadata=settings,
    )  # fmt: skip
    made = import_adapter(tmp_path / "theirs", tmp_path / "ours", base=str(base))
    assert (made.form, made.checked, made.left_out) == ("diffusers", "its base's weights", [])
    torch.testing.assert_close(predict(load_adapter(made.folder).model), predict(model), rtol=0, atol=1e-6)
    torch.testing.assert_close(predict_in_diffusers(base, made.folder), predict(model), rtol=0, atol=1e-6)


def test_layers_of_the_vae_that_a_list_names_as_well_are_left_out_unless_they_were_trained(base, tmp_path, caplog):
    """`to_q` is in the attention of the VAE, too, which no training of images reaches and diffusers does not load."""
    torch.manual_seed(0)
    model = get_peft_model(load_base(base), LoraConfig(r=2, target_modules=["to_q"])).eval()
    trained = [name for name, _ in model.named_parameters() if "lora_B" in name and ".vae." not in name]
    assert len(trained) < sum("lora_B" in name for name, _ in model.named_parameters()), "some are in the VAE"
    with torch.no_grad():
        for name in trained:
            torch.nn.init.normal_(model.get_parameter(name), std=0.2)
    processor = load_prompt_processor(str(base), None)
    folder = save_adapter(model, tmp_path / "a", processor=processor)
    assert "layers of the VAE (vae." in caplog.text and "pipeline_targets" in caplog.text
    assert find_weights(folder).name == PIPELINE_WEIGHTS and not any(
        ".vae." in key for key in read_adapter(folder).shapes
    )
    torch.testing.assert_close(predict(load_adapter(folder).model), predict(model))
    torch.testing.assert_close(predict_in_diffusers(base, folder), predict(model), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name and ".vae." in name:
                value.fill_(0.1)
    kept = read_adapter(save_adapter(model, tmp_path / "b", processor=processor))
    assert kept.weights.name == WEIGHTS and any(".vae." in key for key in kept.shapes)

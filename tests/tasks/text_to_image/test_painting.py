"""What bases and adapters paint, compared with diffusers' own pipelines; sheets of it; merged pipelines."""

import json

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from command import run
from diffusion_models import write_pipeline
from inlay import InlayError, load_adapter, load_base, merge, paint, pipeline_targets, save_adapter
from inlay.tasks.text_to_image.paint import draw_paintings
from inlay.tasks.text_to_image.processor import load_prompt_processor

KINDS = ("sd", "sdxl", "sd3")
EVERY = pytest.mark.parametrize("kind", KINDS)
FEW = {"steps": 3, "guidance": 3.0}
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline of each kind."""
    where = tmp_path_factory.mktemp("pipelines")
    return {kind: write_pipeline(where / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def bases(folders):
    """They are not changed."""
    return {kind: load_base(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory):
    """A LoRA of denoiser and text encoder, which changes what is painted."""
    found = {}
    for kind in ("sd", "sd3"):
        folder = folders[kind]
        base = load_base(folder)
        torch.manual_seed(1)
        names = pipeline_targets(base, text_encoders=True)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=names, init_lora_weights=False))
        out = tmp_path_factory.mktemp("adapters") / kind
        found[kind] = save_adapter(model, out, processor=load_prompt_processor(str(folder), None))
    return found


def paint_with_diffusers(folder, kind, prompt, seed, adapter=None):
    """What the pipeline paints, loaded without inlay, with an adapter's folder or without."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **(WITHOUT_T5 if kind == "sd3" else {}))
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    generator = torch.Generator().manual_seed(seed)
    return pipeline(prompt, generator=generator, num_inference_steps=3, guidance_scale=3.0, height=16, width=16).images[
        0
    ]


def differ(one, other):
    """The largest difference of two images, 0 to 255."""
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max()


@EVERY
def test_an_image_depends_on_its_prompt_and_seed_only(kind, folders, bases):
    base = bases[kind]
    images = paint(base, ["dog", "toy"], seeds=[0, 7], batch_size=3, **FEW)
    assert [image.size for image in images] == [(16, 16)] * 4 and not base.training
    (alone,) = paint(base, ["toy"], seeds=[7], **FEW)
    assert differ(alone, images[3]) <= 1 < min(differ(alone, image) for image in images[:3])
    assert differ(alone, paint_with_diffusers(folders[kind], kind, "toy", 7)) <= 1


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_adapter_and_merged_pipeline_paint_in_diffusers_what_they_paint_here(kind, folders, adapters, tmp_path):
    adapter = load_adapter(adapters[kind])
    (painted,) = paint(adapter, ["dog"], seeds=[3], **FEW)
    (of_base,) = paint(adapter, ["dog"], seeds=[3], weight=0.0, **FEW)
    assert differ(painted, of_base) > 1
    assert differ(painted, paint_with_diffusers(folders[kind], kind, "dog", 3, adapters[kind])) <= 1
    dtype = "float16" if kind == "sd" else None
    merged = merge(adapters[kind], tmp_path / "merged", dtype=dtype)
    assert merged.effect > 0.01 and merged.error < (0.01 if dtype else 1e-4)
    assert merged.bytes == sum(path.stat().st_size for path in merged.folder.rglob("*") if path.is_file()) - sum(
        (merged.folder / name).stat().st_size for name in ("README.md", "merge.json")
    )
    assert differ(painted, paint_with_diffusers(merged.folder, kind, "dog", 3)) <= 1
    card = (merged.folder / "README.md").read_text()
    assert "from diffusers import DiffusionPipeline" in card and ("text_encoder_3=None" in card) == (kind == "sd3")
    assert differ(painted, paint(load_base(merged.folder), ["dog"], seeds=[3], **FEW)[0]) <= 1


def test_a_merged_pipeline_is_stored_in_whole_weights(adapters, tmp_path):
    with pytest.raises(InlayError, match="a text-to-image pipeline is not stored in 8bit when merged; give a dtype"):
        merge(adapters["sd"], tmp_path / "merged", quantize="8bit")
    assert not (tmp_path / "merged").exists()


def test_weight_scales_an_adapter(folders, adapters):
    """The same as a base to whose weights the scaled update was added by hand."""
    adapter = load_adapter(adapters["sd"], folders["sd"])
    (painted,) = paint(adapter, ["dog"], weight=0.5, **FEW)
    layers = {name: m for name, m in adapter.model.named_modules() if hasattr(m, "get_delta_weight")}
    base = load_base(folders["sd"])
    for name, layer in layers.items():
        base.get_submodule(name.removeprefix("base_model.model.")).weight.data += 0.5 * layer.get_delta_weight(
            "default"
        )
    assert differ(painted, paint(base, ["dog"], **FEW)[0]) <= 1
    with pytest.raises(InlayError, match=r"weight 0\.5 scales unmerged LoRA layers"):
        paint(base, ["dog"], weight=0.5)


def test_the_base_is_found_among_pipelines(folders, adapters):
    """A pipeline is one model, and its parts are none."""
    assert load_adapter(adapters["sd"], folders["sd"].parent).model.name_or_path == str(folders["sd"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompts": []}, "there must be a prompt for each image"),
        ({"prompts": [" "]}, "there must be a prompt for each image"),
        ({"prompts": "dog"}, "prompts must be a list, got a string"),
        ({"seeds": []}, "there is no seed to paint from"),
        ({"seeds": [-1]}, "a seed must be a whole number of at least 0, got -1"),
        ({"image_size": 20}, r"images of 8, 16 \.\.\. 8192 pixels a side, not 20"),
        ({"image_size": 80_000}, r"not 80000"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 1001}, "this pipeline has 1000 noise levels, got steps 1001"),
        ({"guidance": float("nan")}, "guidance must be a number of at least 0"),
        ({"weight": float("inf")}, "weight must be a finite number"),
        ({"negative": "cat", "guidance": 1.0}, "a negative prompt has no effect at guidance 1; raise guidance"),
    ],
)
def test_mistakes_are_told_in_one_sentence(given, said, bases):
    with pytest.raises(InlayError, match=said):
        paint(bases["sd"], **{"prompts": ["dog"], **given})


def test_an_image_of_nan_and_a_model_that_paints_nothing_are_refused(folders, digits_adapter):
    base = load_base(folders["sd"])
    base.vae.decoder.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(InlayError, match="the image of 'dog' from seed 0 has values that are no numbers"):
        paint(base, ["dog"], **FEW)
    with pytest.raises(InlayError, match="is for image-classification, not for text-to-image; use predict"):
        paint(load_adapter(digits_adapter), ["dog"])
    with pytest.raises(InlayError, match="ViTForImageClassification paints no images"):
        paint(load_base("builtin:vit-tiny"), ["dog"])


def test_a_sheet_has_a_row_for_each_caption(tmp_path):
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (400, 200), "blue")
    path = draw_paintings(
        [[red, blue], [red]], ["a dog", "word " * 60], tmp_path / "s.png", columns=["1", "2"], side=64
    )
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[1] == 2 * 64 + 3 * 10
    assert (sheet == (255, 0, 0)).all(-1).sum() == 2 * 64 * 64 and (sheet == (0, 0, 255)).all(-1).sum() == 64 * 32
    (first, *_, last) = np.flatnonzero((sheet == (255, 0, 0)).all(-1).any(1))
    assert last - first > 300  # the second caption takes many lines


def test_predict_paints_sheets_and_files(adapters, tmp_path, capsys, monkeypatch):
    few = ("--seeds", 2, "--seed", 5, "--steps", 2)
    places = ("--sheet", tmp_path / "sheet.png", "--output", tmp_path / "images")
    status, out, err = run(capsys, monkeypatch, "predict", adapters["sd"], "a dog", "toy", *few, *places, "--json")
    assert status == 0, err
    told = json.loads(out)
    assert [(row["prompt"], row["seed"]) for row in told["images"]] == [
        ("a dog", 5), ("a dog", 6), ("toy", 5), ("toy", 6),
    ]  # fmt: skip
    assert [path.name for path in sorted((tmp_path / "images").iterdir())] == [
        "1_a_dog_5.png", "1_a_dog_6.png", "2_toy_5.png", "2_toy_6.png",
    ]  # fmt: skip
    assert np.asarray(Image.open(told["images"][0]["file"])).shape == (16, 16, 3)
    assert np.asarray(Image.open(told["sheet"])).shape[1] == 2 * 160 + 3 * 10
    for options, said in (
        ((), "nothing would keep the images; give --sheet FILE.png, --output FOLDER or both."),
        (("--sheet", tmp_path / "sheet.doc"), "must be the name of an image, such as sheet.png"),
        (("--sheet", tmp_path / "no" / "sheet.png"), "there is no folder"),
        (("--output", tmp_path / "sheet.png"), "is a file; name a folder"),
    ):
        status, _, err = run(capsys, monkeypatch, "predict", adapters["sd"], "dog", *options)
        assert status == 2 and said in err and "Traceback" not in err

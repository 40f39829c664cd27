"""Regions under adapters of their own, compared with a loop over diffusers' own parts."""

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from command import run
from diffusion_models import write_pipeline
from inlay import Bank, InlayError, Region, Sampling, load_base, paint, paint_regions, pipeline_targets, save_adapter
from inlay.adapters.load import load_adapter
from inlay.tasks.text_to_image.processor import load_prompt_processor

FEW = Sampling(steps=3, guidance=3.0)
REGIONS = [Region("a", "dog"), Region("b", "toy")]


@pytest.fixture(scope="module", params=["sd", "sd3"])
def made(request, tmp_path_factory):
    """A pipeline, and two LoRAs of denoiser and text encoder that change what is painted."""
    where = tmp_path_factory.mktemp(request.param)
    folder = write_pipeline(where / "base", request.param)
    adapters = {}
    for seed, name in enumerate("ab"):
        base = load_base(folder)
        torch.manual_seed(seed)
        names = pipeline_targets(base, text_encoders=True)
        model = get_peft_model(base, LoraConfig(r=2, target_modules=names, init_lora_weights=False))
        adapters[name] = save_adapter(model, where / name, processor=load_prompt_processor(str(folder), None))
    return folder, adapters


def differ(one, other):
    """The largest difference of two images, 0 to 255."""
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max()


def paint_by_hand(folder, adapters, seed):
    """Two windows of 8 x 8 latents that share 4 columns, of which each decides the half that is nearer to it."""
    pipes = []
    for name in "ab":
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
        pipe.load_lora_weights(adapters[name])
        pipes.append(pipe)
    latents = torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(seed))[None]
    scheduler = pipes[0].scheduler
    scheduler.set_timesteps(3)
    with torch.no_grad():
        prompts = [
            torch.cat(p.encode_prompt(text, "cpu", 1, True)[::-1])
            for p, text in zip(pipes, ("dog", "toy"), strict=True)
        ]
        for step in scheduler.timesteps:
            noise = torch.zeros_like(latents)
            for pipe, prompt, start, own in zip(pipes, prompts, (0, 4), (slice(0, 6), slice(6, 12)), strict=True):
                window = latents[..., start : start + 8]
                without, guided = pipe.unet(torch.cat([window] * 2), step, encoder_hidden_states=prompt).sample
                whole = torch.zeros_like(latents)
                whole[..., start : start + 8] = without + 3.0 * (guided - without)
                noise[..., own] = whole[..., own]
            latents = scheduler.step(noise, step, latents).prev_sample
        vae = pipes[0].vae
        decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    return pipes[0].image_processor.postprocess(decoded, output_type="pil")[0]


def test_one_region_is_what_its_adapter_paints(made):
    folder, adapters = made
    bank = Bank(str(folder), adapters)
    for name in "ab":
        (found,) = paint_regions(bank, [Region(name, "dog")], seeds=[3], sampling=FEW)
        (alone,) = paint(load_adapter(adapters[name]), ["dog"], seeds=[3], steps=3, guidance=3.0)
        assert differ(found, alone) <= 1
    # without guidance the batch has one row for each window
    plain = Sampling(steps=3, guidance=1.0)
    (found,) = paint_regions(bank, [Region(None, "dog")], seeds=[3], sampling=plain)
    assert differ(found, paint(load_base(folder), ["dog"], seeds=[3], steps=3, guidance=1.0)[0]) <= 1


def test_windows_share_what_the_nearer_one_decides(made):
    folder, adapters = made
    bank = Bank(str(folder), adapters)
    images = paint_regions(bank, REGIONS, seeds=[0, 7, 1], overlap=0.5, sampling=FEW)
    assert [image.size for image in images] == [(24, 16)] * 3
    (again,) = paint_regions(bank, REGIONS, seeds=[7], overlap=0.5, sampling=FEW)
    assert differ(again, images[1]) <= 1 < differ(images[0], images[1])
    if bank.model.config.pipeline == "StableDiffusionPipeline":
        assert differ(again, paint_by_hand(folder, adapters, 7)) <= 1
    three = paint_regions(bank, [*REGIONS, Region(None, "grass")], overlap=0.25, sampling=FEW)
    assert three[0].size == (40, 16)


def test_what_cannot_be_is_said(made):
    folder, adapters = made
    bank = Bank(str(folder), adapters)
    for regions, options, said in [
        ([], {}, "there must be a prompt"),
        (REGIONS, {"overlap": 1.0}, "overlap must be at least 0 and below 1"),
        (REGIONS, {"seeds": []}, "no seed"),
        (REGIONS, {"seeds": [-1]}, "a seed must be a whole number of at least 0, got -1"),
        (REGIONS, {"sampling": Sampling(weight=0.5)}, "a=0.5"),
        ([Region("c", "dog")], {}, "unknown adapter 'c'"),
    ]:
        with pytest.raises(InlayError, match=said):
            paint_regions(bank, regions, **options)
    with pytest.raises(InlayError, match="paints no images"):
        paint_regions(Bank("builtin:vit-tiny"), [Region(None, "dog")])


def test_command_paints_a_sheet(made, tmp_path, capsys, monkeypatch):
    _, adapters = made
    asked = [f"{adapters['a']}=dog", f"{adapters['b']}=toy"]
    sheet, output = tmp_path / "sheet.png", tmp_path / "images"
    options = ("--seeds", 2, "--steps", 2, "--sheet", sheet, "--output", output)
    status, out, _ = run(capsys, monkeypatch, "paint", *asked, *options)
    assert status == 0 and "28, 16" in out and len(list(output.iterdir())) == 2
    with Image.open(sheet) as image:
        assert image.size == (350, 161)
    for asked, said in ((["x"], "has no '='"), (["x="], "has no prompt"), (["x=dog"], "nothing would keep")):
        status, _, err = run(capsys, monkeypatch, "paint", *asked)
        assert status == 2 and said in err

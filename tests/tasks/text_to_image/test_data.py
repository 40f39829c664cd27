"""Images with prompts: where prompts come from, what is refused, and what a view makes of an item."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_models import write_pipeline
from inlay import InlayError, TextToImageTask, load_base
from inlay.builtin.paintings import BACKGROUNDS, generate_subject
from inlay.tasks import find_task
from inlay.tasks.evaluation import Training
from inlay.tasks.text_to_image.data import load_captioned, load_captioned_to_score, open_captioned, read_captioned
from inlay.tasks.text_to_image.processor import load_prompt_processor
from inlay.tasks.text_to_image.view import PromptView


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("base") / "sd")


def draw(folder, count=3):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 28, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(folder)


def test_prompts_come_from_captions_and_else_from_the_option(tmp_path):
    where = draw(tmp_path)
    (tmp_path / "1.txt").write_text("a toy\n")
    rows = [{"file_name": "2.png", "text": "a cat"}, {"file_name": "else.png", "text": "-"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [row.prompt for row in read_captioned(where, "a dog")] == ["a dog", "a toy", "a cat"]
    with pytest.raises(InlayError, match=r"1 of 3 images in .* have no prompt \(0\); give --prompt, or captions"):
        read_captioned(where)


@pytest.mark.parametrize("name", ["dog", "toy"])
def test_the_embedded_subjects_are_those_of_the_generator(name):
    rows = load_captioned(f"builtin:{name}").train
    beginning = {"dog": "a photo of sks dog", "toy": "a photo of zwx toy"}[name]
    assert [row.prompt for row in rows] == [f"{beginning} on {background}" for background in BACKGROUNDS]
    assert np.array_equal(np.stack([np.asarray(open_captioned(row)) for row in rows]), generate_subject(name))
    assert load_captioned(f"builtin:{name}", "a dog").train[0].prompt == "a dog"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: "builtin:cat",
            r"unknown data 'builtin:cat'; the embedded subjects are builtin:dog, builtin:toy",
        ),
        (lambda folder: "no/such", r"'no/such' is no folder; give a folder of images"),
        (lambda folder: str(folder.mkdir() or folder), r"there is no image in"),
    ],
)
def test_data_that_is_not_there_is_named(make, message, tmp_path):
    with pytest.raises(InlayError, match=message):
        load_captioned(make(tmp_path / "empty"), "a dog")


def test_all_files_that_cannot_be_read_are_named(tmp_path):
    where = draw(tmp_path)
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:200])
    with pytest.raises(InlayError, match=r"2 of 3 images in .* cannot be read \(1\.png: .*, 2\.png: "):
        load_captioned(where, "a dog")
    draw(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png"}')
    with pytest.raises(InlayError, match=r"line 1 of .*metadata\.jsonl is not"):
        load_captioned(where, "a dog")


def test_of_a_few_images_nothing_is_held_out(tmp_path):
    few, many = load_captioned(draw(tmp_path / "9", 9), "a dog"), load_captioned(draw(tmp_path / "10", 10), "a dog")
    assert (len(few.train), len(few.validation)) == (9, 0) and (len(many.train), len(many.validation)) == (8, 2)
    trained = Training(str(tmp_path / "9"), {"seed": 0})
    split, rows, _ = load_captioned_to_score(str(tmp_path / "9"), "a dog", training=trained)
    assert split == "all" and len(rows) == 9
    with pytest.raises(InlayError, match=r"nothing is held out of the 9 images of .*; leave split out"):
        load_captioned_to_score(str(tmp_path / "9"), "a dog", split="validation")


def test_an_item_is_what_the_model_takes(base, tmp_path):
    processor = load_prompt_processor(str(base), None)
    draw(tmp_path, 1)
    view = PromptView(read_captioned(str(tmp_path), "a dog"), processor)
    item = view[0]
    with Image.open(tmp_path / "0.png") as image:  # 28 x 20: the middle square, then 16 pixels a side
        square = image.resize((16, 16), Image.Resampling.LANCZOS, box=(4, 0, 24, 20))
    expected = torch.tensor(np.asarray(square) / 127.5 - 1).permute(2, 0, 1).float()
    assert torch.allclose(item["pixel_values"], expected, atol=1e-6)
    assert torch.equal(item["input_ids"], processor.tokenize(["a dog"])["input_ids"][0]) and item["weight"] == 1


def test_images_are_mirrored_and_prompts_left_out_by_chance(base, tmp_path):
    processor = load_prompt_processor(str(base), None)
    rows = read_captioned(draw(tmp_path, 1), "a dog")
    plain, empty = PromptView(rows, processor)[0], processor.tokenize([""])["input_ids"][0]
    view = PromptView(rows, processor, flip=True, drop_prompts=0.25)
    torch.manual_seed(0)
    items = [view[0] for _ in range(200)]
    mirrored = [torch.equal(item["pixel_values"], plain["pixel_values"].flip(-1)) for item in items]
    dropped = [torch.equal(item["input_ids"], empty) for item in items]
    assert 0.4 < np.mean(mirrored) < 0.6 and 0.15 < np.mean(dropped) < 0.35


def test_held_out_images_have_fixed_noise_at_levels_of_every_height(base, tmp_path):
    processor = load_prompt_processor(str(base), None)
    rows = read_captioned(draw(tmp_path, 4), "a dog")
    view, again = (PromptView(rows, processor, seed=3, levels=1000) for _ in range(2))
    assert [int(view[i]["timesteps"]) for i in range(4)] == [125, 375, 625, 875]
    assert all(torch.equal(view[i]["noise"], again[i]["noise"]) for i in range(4))
    assert not torch.equal(view[0]["noise"], view[1]["noise"]) and view[0]["noise"].shape == (4, 8, 8)


def test_options_go_to_the_data(base, tmp_path):
    task = TextToImageTask(
        model=str(base), dataset=draw(tmp_path, 12), prompt="a dog", image_size=32, augment="flip", drop_prompts=0.5,
        snr_gamma=5.0,
    )  # fmt: skip
    data = task.load(0)
    assert data.train.flip and data.train.drop_prompts == 0.5 and data.loss.snr_gamma == 5.0
    assert data.train[0]["pixel_values"].shape == (3, 32, 32) and data.validation[0]["noise"].shape == (4, 16, 16)
    assert not data.validation.flip and data.validation.drop_prompts == 0
    assert data.example()["pixel_values"].shape == (1, 3, 32, 32) and "weight" not in data.example()
    with pytest.raises(InlayError, match="multiple of 2 pixels a side"):
        TextToImageTask(model=str(base), dataset=str(tmp_path), prompt="a dog", image_size=33).load(0)


def test_min_snr_is_refused_where_there_is_no_such_ratio(tmp_path):
    base = write_pipeline(tmp_path / "sd3", "sd3")
    task = TextToImageTask(model=str(base), dataset=draw(tmp_path / "data"), prompt="a dog", snr_gamma=5.0)
    with pytest.raises(InlayError, match=r"trained by flow matching, which has none; leave it out\.$"):
        task.load(0)


def test_a_forward_pass_is_measured_at_any_size(base):
    inputs = find_task("text-to-image").forward_inputs(load_base(base), 2, 0, 24)
    assert inputs["pixel_values"].shape == (2, 3, 24, 24) and inputs["noise"].shape == (2, 4, 12, 12)

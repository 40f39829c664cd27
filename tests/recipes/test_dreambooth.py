"""The recipe for a subject of a few images, on a tiny pipeline: the prior, samples on the way, a run that is killed."""

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion_models import write_pipeline
from inlay import InlayError, TextToImageTask, load_adapter, load_base, read_adapter
from inlay.tasks.text_to_image.paint import Sampling, paint_pairs
from places import ROOT

RECIPE = str(ROOT / "recipes/dreambooth_lora.py")
PROMPT, CLASS = "sks", "a dog"


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [RECIPE, *map(str, arguments)])
        runpy.run_path(RECIPE, run_name="__main__")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A base, three images of a subject, a prior and samples; an evaluation at each second of eight steps."""
    folder = tmp_path_factory.mktemp("subject")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    base = write_pipeline(tmp_path_factory.mktemp("base") / "sd")
    given = {
        "--model": base,
        "--dataset": folder,
        "--prompt": PROMPT,
        "--class_prompt": CLASS,
        "--prior_images": 5,
        "--validation_images": 2,
        "--sampling_steps": 2,
        "--epochs": 5.2,  # of three images of the subject and as many of the prior
        "--batch_size": 4,
        "--eval_every": 2,
        "--workers": 0,
        "--dropout": 0.1,
    }
    return [*(word for pair in given.items() for word in pair), "--validation_prompt", "sks dog", "a dog"]


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(*options, "--output_dir", folder)
    return folder


def read_images(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_it_trains_and_saves_a_subject(trained, options):
    file = read_adapter(trained / "adapter")
    assert file.record["task"] == "text-to-image" and file.metrics["training"]["steps"] == 8
    loaded = load_adapter(trained / "adapter")
    assert loaded.deviation < 1e-4
    (sample,) = paint_pairs(loaded.model, [("sks dog", 1)], Sampling(2))
    with Image.open(trained / "samples/000008/0_1.png") as last:
        assert np.array_equal(np.asarray(last), np.asarray(sample))


def test_the_prior_is_what_the_base_paints_of_the_class(trained, options):
    painted = paint_pairs(load_base(options[1]), [(CLASS, seed) for seed in range(5)], Sampling(2))
    for i, image in enumerate(painted):
        with Image.open(trained / "prior" / f"{i:03}.png") as kept:
            assert np.array_equal(np.asarray(kept), np.asarray(image))
    assert len(list((trained / "prior").iterdir())) == 5


def test_subject_and_prior_are_learned_in_equal_shares(options, tmp_path):
    """As many of each (Ruiz et al. 2023, section 3.3, equation 2), the prior under its weight."""
    task = TextToImageTask(
        model=str(options[1]), dataset=str(options[3]), prompt=PROMPT, class_prompt=CLASS, prior_images=5,
        prior_weight=0.5,
    )  # fmt: skip
    data = task.load(0)

    class Train:
        output_dir = str(tmp_path)

    view = task.complete_training(data.train, Train)
    assert len(view) == 6 and [row.name for row in view.rows] == ["0", "1", "2"]
    (tmp_path / "prior").mkdir()
    for i in range(5):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / "prior" / f"{i:03}.png")
    torch.manual_seed(0)
    items = [view[3 + i % 3] for i in range(60)]
    assert {float(item["weight"]) for item in items} == {0.5} and float(view[0]["weight"]) == 1.0
    assert {round(float(item["pixel_values"][0, 0, 0] + 1) * 127.5) for item in items} == {0, 1, 2, 3, 4}
    tokens = data.processor.tokenize([CLASS])["input_ids"][0]
    assert all(torch.equal(item["input_ids"], tokens) for item in items)


def test_the_sheet_has_a_row_for_each_evaluation(trained):
    assert sorted(path.name for path in (trained / "samples").iterdir()) == [f"00000{i}" for i in (2, 4, 6, 8)]
    assert len(read_images(trained / "samples")) == 4 * 2 * 2
    with Image.open(trained / "sheet.png") as sheet:
        assert sheet.width > 2 * 160 and sheet.height > 8 * 160
    assert len(json.loads((trained / "finished.json").read_text())["history"]) == 4


def test_an_earlier_step_is_another_image(trained):
    images = read_images(trained / "samples")
    assert images["000002/0_0.png"] != images["000008/0_0.png"]


def _killed_at(step, arguments):
    """The recipe in a process of its own, which ends without a word after so many steps."""
    from inlay.train.run import Run

    log = Run.log

    def log_and_die(self, row):
        log(self, row)
        if row["step"] == step and "gradient_norm" in row:
            os.kill(os.getpid(), signal.SIGKILL)

    Run.log = log_and_die
    torch.set_num_threads(1)
    run(*arguments)


@pytest.mark.parametrize("step", [1, 5])
def test_a_killed_run_ends_as_one_that_was_left_alone(step, trained, options, tmp_path):
    arguments = [str(word) for word in (*options, "--output_dir", tmp_path / "run")]
    process = multiprocessing.get_context("fork").Process(target=_killed_at, args=(step, arguments))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    painted = {path: (tmp_path / "run" / path).stat().st_mtime_ns for path in read_images(tmp_path / "run")}
    assert len([path for path in painted if path.startswith("prior")]) == 5
    run(*arguments)
    assert read_images(tmp_path / "run") == read_images(trained)
    for path, when in painted.items():
        if path.startswith("prior"):
            assert (tmp_path / "run" / path).stat().st_mtime_ns == when, "the prior was painted again"
    weights, expected = ((folder / "best/trainable.safetensors").read_bytes() for folder in (tmp_path / "run", trained))
    assert weights == expected


def test_overwriting_paints_the_prior_again(trained, options, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "prior" / "000.png").write_bytes(b"")
    run(*options, "--output_dir", folder, "--overwrite", "--epochs", 0.6)
    assert read_images(folder / "prior") == read_images(trained / "prior")
    assert [path.name for path in (folder / "samples").iterdir()] == ["000001"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--convolutions", "--text_encoder", "--sites", "all", "--augment", "flip"],
        ["--drop_prompts", 0.5, "--snr_gamma", 5, "--text_encoder"],
        ["--precision", "bf16", "--gradient_checkpointing"],
        ["--quantize", "8bit"],
    ],
    ids=lambda words: words[0],
)
def test_it_trains_with(arguments, options, tmp_path, capsys):
    few = options[: options.index("--class_prompt")]
    run(*few, "--epochs", 1.4, "--batch_size", 2, "--workers", 0, "--output_dir", tmp_path / "run", *arguments)
    out = capsys.readouterr().out
    assert out.startswith("memory: base ") or "linear layers" in out.partition("\n")[0]
    file = read_adapter(tmp_path / "run" / "adapter")
    (weights,) = file.folder.glob("*.safetensors")
    parts = {key.removeprefix("base_model.model.").partition(".")[0] for key in load_file(weights)}
    assert parts == ({"unet", "text_encoder"} if "--text_encoder" in arguments else {"unet"})
    assert file.metrics["training"]["steps"] == 3 and np.isfinite(file.metrics["validation"]["train_loss"])
    assert load_adapter(file.folder).verified


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": " "}, r"^prompt must say what the images show, got ' '\.$"),
        ({"class_prompt": ""}, r"^class_prompt must say"),
        ({"validation_prompt": ["a dog", ""]}, r"one is empty\.$"),
        ({"group": "x"}, r"leave group out\.$"),
        ({"prior_images": 0}, r"prior_images must be a whole number of at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(given, message):
    with pytest.raises(InlayError, match=message):
        TextToImageTask(**given)


def test_a_study_paints_nothing_on_the_way():
    with pytest.raises(InlayError, match="leave class_prompt and validation_prompt out"):
        TextToImageTask(class_prompt="a dog").load_parts()

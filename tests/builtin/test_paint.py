"""builtin:paint-tiny and its judge: that they load quietly, are small, and see and paint what their cards say."""

import json
import re
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open

from inlay.bases.load import BUILTIN
from inlay.builtin.paint_judge import KINDS, LABELS, judge_images, label_scene, score_paintings
from inlay.builtin.paintings import (
    COLOURS,
    RARE_TOKENS,
    SUBJECTS,
    Scene,
    Thing,
    describe_scene,
    generate_paintings,
    generate_subject,
    paint_scene,
)

diffusers = pytest.importorskip("diffusers")
FOLDER, JUDGE = BUILTIN / "paint-tiny", BUILTIN / "paint-judge"


@pytest.fixture(scope="module")
def pipeline():
    with warnings.catch_warnings(action="error"):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_base_is_a_plain_stable_diffusion_pipeline(pipeline):
    assert type(pipeline) is diffusers.StableDiffusionPipeline
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "vae": pipeline.vae}
    for name, part in parts.items():
        assert {p.dtype for p in part.parameters()} == {torch.float32}, name
        assert f"{part.num_parameters():,}" in (FOLDER / "README.md").read_text(encoding="utf-8"), name
    tokenizer = pipeline.tokenizer
    for word in (*RARE_TOKENS, "dog", "toy", "ring", "grass", "photo", "painting"):
        assert len(tokenizer.tokenize(word)) == 1, word
    assert tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings


@pytest.mark.parametrize(("folder", "most"), [(FOLDER, 6_000_000), (JUDGE, 500_000)])
def test_a_folder_is_small_holds_fp16_and_tells_no_place(folder, most):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= most
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                kinds = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118 - no dict
            assert kinds <= {torch.float16, torch.int64}, path
        if path.name.endswith("config.json"):
            assert "_name_or_path" not in json.loads(path.read_text(encoding="utf-8"))


def test_the_judge_names_what_held_out_paintings_show():
    made = generate_paintings(60, seed=4711, held_out=True)
    labels = np.stack([label_scene(scene) for scene in made.scenes])
    scores = score_paintings(judge_images(made.images), labels)
    assert min(scores[kind] for kind in ("background", "shape", "colour")) >= 0.95
    assert min(scores[name] for name in ("dog", "toy")) >= 0.95


@pytest.mark.parametrize("name", ["dog", "toy"])
def test_the_judge_tells_a_subject_from_another_of_its_class(name):
    assert (judge_images(generate_subject(name, 12, seed=9))["subject"][name] > 0.5).mean() >= 0.9
    others = [Scene(ground, (Thing(name, colour),)) for ground in ("sand", "night") for colour in COLOURS]
    said = judge_images(np.stack([paint_scene(s, np.random.default_rng(i)) for i, s in enumerate(others)]))
    assert (said["subject"][name] < 0.5).all() and (said["class"][name] > 0.5).mean() > 0.8


def test_scores_count_what_was_asked_for():
    scenes = [
        Scene("grass", (Thing("ring", "red"), Thing("star", "blue")), "above"),
        Scene("snow", (Thing("dog", "red"),)),
    ]
    labels = np.stack([label_scene(scenes[0]), label_scene(scenes[1], SUBJECTS)])
    assert [LABELS[i] for i in labels[1].nonzero()[0]] == ["background: snow", "class: dog", "subject: dog"]

    def said(rows):
        columns = dict(zip(LABELS, np.array(rows).T, strict=True))
        return {kind: {name: columns[f"{kind}: {name}"] for name in names} for kind, names in KINDS.items()}

    assert set(score_paintings(said(labels), labels).values()) == {1.0}
    wrong = labels.copy()
    wrong[0, LABELS.index("shape: ring")], wrong[0, LABELS.index("shape: cross")] = 0, 1
    wrong[1, LABELS.index("subject: dog")] = 0
    scores = score_paintings(said(wrong), labels)
    # The dog has no colour of its own, and no shape; the other image has no class.
    assert scores == {"background": 1.0, "shape": 0.0, "colour": 1.0, "class": 1.0, "dog": 0.5, "toy": 1.0}


def test_a_short_painting_has_the_background_that_was_asked_for(pipeline):
    scenes = [Scene(ground, (Thing("circle", "red"),)) for ground in ("grass", "night", "snow", "brick")]
    captions = [describe_scene(scene) for scene in scenes]
    made = pipeline(
        captions, num_inference_steps=8, guidance_scale=3.0, generator=torch.manual_seed(0), output_type="np"
    )
    said = judge_images((made.images * 255).round().astype(np.uint8))["background"]
    assert [max(said, key=lambda name: said[name][i]) for i in range(4)] == [scene.background for scene in scenes]


def test_the_card_keeps_what_was_asked_of_the_base():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| ([\w ,]+) \| (\d+)% \| (\d+)% \| (\d+)% \|", card)
    assert len(rows) == 3
    for name, background, shape, colour in rows:
        assert int(background) >= 90 and int(shape) >= 80 and int(colour) >= 80, name

"""What the embedded judge says of generated paintings, whose scenes are known, and of what the embedded base paints."""

import numpy as np
from peft import LoraConfig, get_peft_model
from PIL import Image

from inlay import evaluate, load_base, pipeline_targets, save_adapter
from inlay.builtin.paintings import describe_scene, generate_paintings, generate_subject
from inlay.tasks.text_to_image.judge import find_named, find_subjects, score_prompts
from inlay.tasks.text_to_image.processor import load_prompt_processor


def test_the_judge_finds_what_paintings_show_and_no_more():
    """Paintings whose scenes are known, with their own captions, and with those of others."""
    found = generate_paintings(24, seed=5)
    images = [Image.fromarray(pixels) for pixels in found.images]
    assert find_named("A red ring left of a blue square, at night") == [
        ("background", "night"), ("shape", "square"), ("shape", "ring"), ("colour", "red"), ("colour", "blue"),
    ]  # fmt: skip
    captions = [describe_scene(scene) for scene in found.scenes]
    assert np.mean(score_prompts(images, captions)) > 0.85 > 0.5 > np.mean(score_prompts(images[1:], captions[:-1]))
    assert np.isnan(score_prompts(images[:1], ["a photo of sks dog"])).all()
    for name, other in (("dog", "toy"), ("toy", "dog")):
        present = find_subjects([Image.fromarray(pixels) for pixels in generate_subject(name)])
        assert present[name].mean() > 0.8 and present[other].mean() < 0.2


def test_on_the_embedded_base_the_judge_takes_part(tmp_path, monkeypatch):
    monkeypatch.setattr("inlay.tasks.text_to_image.evaluate.STEPS", 2)
    base = load_base("builtin:paint-tiny")
    model = get_peft_model(base, LoraConfig(r=1, target_modules=pipeline_targets(base)))
    folder = save_adapter(model, tmp_path / "new", processor=load_prompt_processor("builtin:paint-tiny", None))
    found = evaluate(folder, "builtin:toy", limit=2, resamples=9)
    assert {"presence", "prompt_fidelity"} <= set(found.scores) & set(found.base)
    assert found.scores["drift_pixels"].value == 0 and found.scores["loss"] == found.base["loss"]  # B is zero
    assert found.scores["own_fidelity"].value > found.scores["subject_fidelity"].value
    assert any("compared by builtin:paint-judge with 6 images" in note for note in found.notes)

"""Paintings: the same for the same seed, as their captions say, and without what is held out or to be learnt later."""

import numpy as np
import pytest

from inlay.builtin.paintings import (
    BACKGROUNDS,
    COLOURS,
    RARE_TOKENS,
    SHAPES,
    SUBJECTS,
    Scene,
    Thing,
    describe_scene,
    generate_paintings,
    generate_subject,
    is_held_out,
    paint_scene,
)


def test_paintings_are_the_same_for_the_same_seed_and_independent_of_the_count():
    many, few = generate_paintings(6, seed=3), generate_paintings(4, seed=3)
    assert np.array_equal(many.images[:4], few.images) and many.captions[:4] == few.captions
    assert many.images.shape == (6, 64, 64, 3) and many.images.dtype == np.uint8
    assert not np.array_equal(generate_paintings(4, seed=4).images, few.images)
    assert generate_paintings(1, seed=0, size=96).images.shape == (1, 96, 96, 3)
    with pytest.raises(ValueError, match="count=-1"):
        generate_paintings(-1, seed=0)


def test_a_caption_names_what_the_scene_holds_and_nothing_else():
    made = generate_paintings(100, seed=5)
    for caption, scene in zip(made.captions, made.scenes, strict=True):
        words = caption.split()
        assert [w for w in words if w in COLOURS or w in (*SHAPES, "dog", "toy")]
        assert {w for w in words if w in BACKGROUNDS} <= {scene.background}
        assert {w for w in words if w in COLOURS} <= {thing.colour for thing in scene.things}
        assert {w for w in words if w in (*SHAPES, "dog", "toy")} == {thing.kind for thing in scene.things}
        assert not set(words) & set(RARE_TOKENS)
    scene = Scene("grass", (Thing("ring", "red", "striped"), Thing("square", "blue")), "left of")
    assert describe_scene(scene) == "a striped red ring left of a blue square on grass"
    ways = {describe_scene(scene, np.random.default_rng(i)) for i in range(40)}
    assert any("a blue square right of a striped red ring" in way for way in ways) and len(ways) > 15


@pytest.mark.parametrize(
    ("place", "axis", "sign"), [("left of", 1, -1), ("right of", 1, 1), ("above", 0, -1), ("below", 0, 1)]
)
def test_the_first_thing_lies_where_the_caption_says(place, axis, sign):
    scene = Scene("night", (Thing("square", "red"), Thing("square", "yellow")), place)
    image = paint_scene(scene, np.random.default_rng(0)).astype(int)
    red = np.argwhere((image[..., 0] > 180) & (image[..., 1] < 90)).mean(0)
    yellow = np.argwhere((image[..., 0] > 180) & (image[..., 1] > 170) & (image[..., 2] < 90)).mean(0)
    assert sign * (red - yellow)[axis] > 15


def test_one_triple_in_six_is_held_out_and_every_pair_is_seen():
    triples = [(Thing(s, c), b) for s in SHAPES for c in COLOURS for b in BACKGROUNDS]
    held_out = [(t.kind, t.colour, b) for t, b in triples if is_held_out(t, b)]
    assert len(held_out) == 36
    for pair in ((0, 1), (0, 2), (1, 2)):
        assert len({tuple(triple[i] for i in pair) for triple in held_out}) == 36  # each pair once
    assert not any(is_held_out(t, s.background) for s in generate_paintings(80, seed=0).scenes for t in s.things)
    assert all(is_held_out(s.things[0], s.background) for s in generate_paintings(30, seed=0, held_out=True).scenes)


@pytest.mark.parametrize("name", ["dog", "toy"])
def test_a_subject_is_in_colours_of_its_own(name):
    images = generate_subject(name)
    assert images.shape == (6, 64, 64, 3) and np.array_equal(images, generate_subject(name))
    look = SUBJECTS[name]
    mark = np.array(look.coat if name == "dog" else look.body)
    near = (np.abs(images.astype(int) - mark).max(-1) < 12).sum((1, 2))
    others = (np.abs(generate_paintings(40, seed=0).images.astype(int) - mark).max(-1) < 12).sum((1, 2))
    assert near.min() > 40 and np.median(others) < 10

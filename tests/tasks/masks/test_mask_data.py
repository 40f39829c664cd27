"""Scenes, maps of objects, and the prompts and masks that are drawn from them."""

import unicodedata

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from inlay import (
    InlayError,
    MaskView,
    load_adapter,
    load_base,
    load_masks,
    load_processor,
    predict_masks,
    save_adapter,
)
from inlay.builtin.scenes import MOST, generate_scenes
from inlay.tasks.evaluation import SPLITS
from inlay.tasks.masks.data import Masked, load_masks_to_score, read_map, split_classes
from inlay.tasks.masks.processing import choose_intensity, load_mask_processor, mask_processor_settings
from inlay.tasks.masks.prompts import boxes_around, draw_points
from inlay.tasks.masks.view import collate_masks
from places import SHARED

NUCLEI = SHARED / "nuclei_dsb2018/dev"


@pytest.fixture(scope="module")
def processor():
    return load_processor("builtin:sam-tiny")


@pytest.fixture
def folder(tmp_path):
    """Three pictures of 60 x 40 with maps of 8, 16 and 1 bits."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for i, kind in enumerate((np.uint8, np.uint16, bool)):
        objects = np.zeros((40, 60), kind)
        objects[5:15, 10:30] = 1
        objects[25:35, 40:55] = 1 if kind is bool else 2 + 300 * (kind is np.uint16)
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(tmp_path / f"images/{i}.png")
        Image.fromarray(objects).save(tmp_path / f"labels/{i}.png")
    return tmp_path


def test_scenes_are_fixed_by_seed_and_place():
    few, many = generate_scenes(3, seed=4), generate_scenes(5, seed=4)
    assert np.array_equal(few.images, many.images[:3]) and np.array_equal(few.instances, many.instances[:3])
    assert not np.array_equal(few.images, generate_scenes(3, seed=5).images)
    assert few.images.shape == (3, 128, 128, 3) and few.parents.shape == (3, MOST + 1)
    assert generate_scenes(0, seed=0).images.shape == (0, 128, 128, 3)
    assert generate_scenes(2, seed=0, size=64, kind="cells").instances.shape == (2, 64, 64)
    with pytest.raises(ValueError, match="kind mixed or cells"):
        generate_scenes(1, seed=0, kind="cats")


@pytest.mark.parametrize("kind", ["mixed", "cells"])
def test_scenes_hold_whole_numbered_objects_of_a_visible_size(kind):
    made = generate_scenes(40, seed=1, kind=kind)
    counts = [np.bincount(one.ravel()) for one in made.instances]
    assert all((count[1:] >= 20).all() for count in counts)
    assert np.mean([len(count) - 1 for count in counts]) > 5
    grey = (made.images == made.images[..., :1]).all((1, 2, 3)).mean()
    assert 0.3 < grey < 0.7
    for one, parents in zip(made.instances, made.parents, strict=True):
        assert parents.max() <= one.max() and not parents[one.max() + 1 :].any()
        assert all(parents[k] != k for k in range(1, one.max() + 1))


def test_points_are_drawn_from_the_whole_region():
    torch.manual_seed(0)
    regions = torch.zeros(3, 20, 30, dtype=torch.bool)
    regions[0, 4:6, 7:9], regions[1, 19, 29] = True, True
    points, there = draw_points(regions, 200)
    assert points.shape == (3, 200, 2) and there[:2].all() and not there[2].any()
    assert {tuple(point) for point in points[0].tolist()} == {(7, 4), (8, 4), (7, 5), (8, 5)}
    assert points[1].unique(dim=0).tolist() == [[29, 19]]


def test_boxes_lie_around_masks():
    torch.manual_seed(0)
    masks = torch.zeros(2, 3, 20, 30, dtype=torch.bool)
    masks[0, 0, 4:6, 7:12], masks[1, 2, 0:20, 29] = True, True
    boxes = boxes_around(masks)
    assert boxes[0, 0].tolist() == [7, 4, 11, 5] and boxes[1, 2].tolist() == [29, 0, 29, 19]
    assert boxes[0, 1].tolist() == [0, 0, 29, 19]
    moved = boxes_around(masks.expand(50, 2, 3, 20, 30), jitter=0.5)
    assert (moved >= 0).all() and (moved[..., 2] <= 29).all() and (moved[..., 3] <= 19).all()
    assert (moved[..., :2] <= moved[..., 2:]).all() and moved[:, 0, 0].std(0).min() > 0.3


def test_a_folder_is_split_by_seed(folder):
    data = load_masks(str(folder), seed=1)
    assert len(data.train) == 2 and len(data.validation) == 1 and data.meaning == "instances"
    assert load_masks(str(folder), seed=1) == data
    assert {tuple(np.unique(read_map(item.objects))) for item in (*data.train, *data.validation)} == {
        (0, 1, 2), (0, 1, 302), (0, 1),
    }  # fmt: skip


def test_a_folder_of_splits_keeps_them(folder):
    for split in ("train", "val"):
        (folder / split).mkdir()
    for part in ("images", "labels"):
        for split in ("train", "val"):
            (folder / split / part).mkdir()
        for i in range(3):
            (folder / part / f"{i}.png").rename(folder / ("val" if i == 2 else "train") / part / f"{i}.png")
    data = load_masks(str(folder))
    assert [item.name for item in data.train] == ["0", "1"] and [item.name for item in data.validation] == ["2"]


def spoil(folder, what):
    labels = folder / "labels"
    if what == "alone":
        (labels / "1.png").unlink()
    elif what == "size":
        Image.fromarray(np.ones((40, 59), np.uint8)).save(labels / "1.png")
    elif what == "colours":
        Image.fromarray(np.ones((40, 60, 3), np.uint8)).save(labels / "1.png")
    elif what == "empty":
        Image.fromarray(np.zeros((40, 60), np.uint8)).save(labels / "1.png")
    elif what == "broken":
        (folder / "images/1.png").write_bytes((folder / "images/1.png").read_bytes()[:200])
    else:
        Image.fromarray(np.ones((40, 60), np.uint8)).save(labels / "1.tif")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("alone", r"1 files have no counterpart: 1\.png"),
        ("size", r"1\.png \(59 x 40, but its image has 60 x 40\)"),
        ("colours", r"1\.png \(RGB: a map has one channel"),
        ("empty", r"1\.png \(no object in it\)"),
        ("broken", r"1\.png \(.*truncated"),
        ("twice", r"a second file of the stem of 1\."),
    ],
)
def test_what_is_wrong_is_said_with_the_files_name(folder, what, said):
    spoil(folder, what)
    with pytest.raises(InlayError, match=said):
        load_masks(str(folder))


def test_what_is_no_data_is_refused(tmp_path):
    with pytest.raises(InlayError, match="'builtin:cats'; the embedded scenes are builtin:scenes"):
        load_masks("builtin:cats")
    with pytest.raises(InlayError, match="images/ and labels/"):
        load_masks(str(tmp_path / "nowhere"))
    with pytest.raises(InlayError, match="there are no files"):
        load_masks(str(tmp_path))
    with pytest.raises(InlayError, match=r"meaning must be instances or classes, .* got .*'things'"):
        load_masks("builtin:scenes", meaning="things")


def test_parts_of_a_class_become_objects():
    classes = np.array([[1, 0, 2, 2], [0, 1, 0, 0], [0, 0, 0, 1]])
    assert split_classes(classes).tolist() == [[1, 0, 3, 3], [0, 1, 0, 0], [0, 0, 0, 2]]


def test_embedded_scenes_are_cells_that_pretraining_has_not_seen():
    data = load_masks("builtin:scenes", limit=8)
    assert len(data.train) == 8 and len(data.validation) == 2
    assert np.array_equal(data.train[0].image, generate_scenes(1, seed=20_000, kind="cells").images[0])


def test_an_item_is_prompts_in_the_frame_of_the_model(folder, processor):
    """60 x 40 becomes 128 x 85: an object at 10..29 x 5..14 lies at about 21..64 x 10..32."""
    item = MaskView(load_masks(str(folder)).validation, processor, "points", count=4, seed=0)[0]
    shapes = {key: tuple(value.shape) for key, value in item.items()}
    assert shapes == {
        "pixel_values": (3, 128, 128), "labels": (4, 64, 64), "input_points": (4, 3, 2), "input_labels": (4, 3),
    }  # fmt: skip
    asked = item["labels"][:, 0, 0] >= 0
    assert asked.sum() in (1, 2) and (item["labels"][~asked] == -1).all()
    assert (item["labels"][:, 43:] <= 0).all()  # below the picture is padding
    keys = ("labels", "input_points", "input_labels")
    for mask, points, labels in zip(*(item[key][asked] for key in keys), strict=True):
        assert labels.tolist() == [1, 1, 0]
        x, y = ((points + 0.5) / 2).long().unbind(-1)
        assert mask[y[:2].clamp_max(63), x[:2].clamp_max(63)].float().mean() >= 0.5  # at the edge half a pixel is lost
        assert mask.sum() > 100


def test_training_draws_anew_and_validation_does_not(processor):
    data = load_masks("builtin:scenes", limit=8)
    training = MaskView(data.train, processor, count=3)
    validation = MaskView(data.validation, processor, "point", count=6, seed=0)
    torch.manual_seed(0)
    first, second = training[0], training[0]
    assert not torch.equal(first["input_points"], second["input_points"])
    torch.manual_seed(0)
    assert torch.equal(training[0]["input_points"], first["input_points"])
    state = torch.get_rng_state()
    a, b = validation[1], validation[1]
    assert all(torch.equal(a[key], b[key]) for key in a) and torch.equal(torch.get_rng_state(), state)
    assert a["labels"].shape[0] == 6


def test_a_batch_has_one_kind_of_prompts(processor):
    torch.manual_seed(0)
    view = MaskView(load_masks("builtin:scenes", limit=4).train, processor, count=2, turn=True)
    kinds = set()
    for _ in range(20):
        batch = collate_masks([view[0], view[1]])
        assert batch["pixel_values"].shape == (2, 3, 128, 128) and "kind" not in batch
        kinds.add(frozenset(batch) - {"pixel_values", "labels"})
    points = {"input_points", "input_labels"}
    assert kinds == {frozenset(points), frozenset({"input_boxes"}), frozenset(points | {"input_boxes"})}


def test_turned_pictures_and_maps_stay_together(processor):
    picture = np.zeros((40, 60, 3), np.uint8)
    objects = np.zeros((40, 60), np.int64)
    picture[5:15, 10:30], objects[5:15, 10:30] = 255, 1
    view = MaskView([Masked("one", picture, objects)], processor, "box", count=1, turn=True)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        item = view[0]
        bright = torch.nn.functional.avg_pool2d(item["pixel_values"][:1], 2)[0] > 0
        assert (bright != (item["labels"][0] == 1)).float().mean() < 0.02
        seen.add(tuple(item["labels"][0].nonzero().float().mean(0).round().tolist()))
    assert len(seen) >= 6


def test_crops_show_an_object_larger(folder, processor):
    view = MaskView(load_masks(str(folder)).train, processor, "box", count=2, crop=32)
    torch.manual_seed(0)
    areas = [int((view[i % 2]["labels"] == 1).flatten(1).sum(1).max()) for i in range(10)]
    assert min(areas) > 0 and max(areas) > 600  # of 64 x 64; the largest object is 200 of 2400 pixels
    whole = MaskView(load_masks(str(folder)).train, processor, "box", count=2, crop=500, seed=0)
    assert (whole[0]["labels"][:, 43:] <= 0).all()


@pytest.mark.parametrize("place", [(20, 36), (0, 0), (60, 92)])
def test_a_crop_is_one_part_of_picture_and_map_around_an_object(processor, place):
    """An object of 4 x 4 in 64 x 96 pixels, white on grey, in parts of 32 x 32 that become 128 x 128."""
    row, column = place
    picture, objects = np.full((64, 96, 3), 128, np.uint8), np.zeros((64, 96), np.int64)
    picture[row : row + 4, column : column + 4], objects[row : row + 4, column : column + 4] = 255, 1
    view = MaskView([Masked("one", picture, objects)], processor, "box", count=1, crop=32)
    grey = processor(images=Image.fromarray(picture[:, ::-1] // 2 + 64), return_tensors="pt")["pixel_values"].min()
    seen = []
    for seed in range(20):
        torch.manual_seed(seed)
        item = view[0]
        mask = item["labels"][0] == 1  # 64 x 64
        bright = torch.nn.functional.avg_pool2d(item["pixel_values"][:1], 2)[0]
        assert mask.sum() == 64 and (bright[mask] > bright[~mask].max() - 0.5).all()
        assert (bright >= grey - 0.1).all(), "a part has no black edge where the picture ends"
        low = mask.nonzero().amin(0)
        seen.append(low)
        if place == (20, 36):  # far enough from the edges: within the middle half, but for what the object is wide
            assert ((low >= 16 - 8) & (low <= 48)).all()
        else:
            assert low[0] == (0 if row == 0 else 56) or low[1] == (0 if column == 0 else 56)
    if place == (20, 36):  # the part moves by 16 of its 32 pixels; its point within the object only by 3
        assert (torch.stack(seen).amax(0) - torch.stack(seen).amin(0) > 16).all()


def test_wrong_settings_of_a_view_are_refused(processor):
    with pytest.raises(InlayError, match="prompts must be one of any, point, points, box"):
        MaskView((), processor, "line")


@pytest.mark.skipif(not NUCLEI.is_dir(), reason="the shared nuclei are not here")
def test_real_nuclei_are_read():
    data = load_masks(str(NUCLEI), limit=4)
    assert len(data.train) == 4 and all(read_map(item.objects).max() > 1 for item in data.train)


# Images of 16 bits


@pytest.fixture
def camera(tmp_path):
    """Bright discs on a dark ground, 12 bits of a camera in PNGs of 16 bits, and the same scaled to 8 bits by hand."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for i in range(5):
        objects = ((y - 20 - i) ** 2 + (x - 30) ** 2 < 100).astype(np.uint8)
        values = (200 + 1500 * objects.astype(int) + rng.integers(0, 100, objects.shape)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / f"images/{i}.png")
        Image.fromarray(objects).save(tmp_path / f"labels/{i}.png")
    return tmp_path


def test_a_camera_of_12_bits_is_scaled_by_percentiles(camera, processor):
    rows = load_masks(str(camera)).validation
    values = np.asarray(Image.open(rows[0].image)).astype(float)
    low, high = np.percentile(values, (1, 99))
    eight = (np.clip((values - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)
    expected = processor(images=Image.fromarray(eight).convert("RGB"), return_tensors="pt")["pixel_values"][0]
    found = MaskView(rows, processor, "box", seed=0)[0]["pixel_values"]
    assert torch.allclose(found, expected, atol=0.02)
    whole = MaskView(rows, choose_intensity(load_processor("builtin:sam-tiny"), "range"), "box", seed=0)[0]
    spread = [float(pixels.amax() - pixels.amin()) for pixels in (found, whole["pixel_values"])]
    assert spread[0] > 10 * spread[1]


def test_an_adapter_keeps_how_16_bits_are_scaled(camera, tmp_path):
    rows = load_masks(str(camera)).validation
    image, point = rows[0].image, [(30.0, 22.0)]
    found = {}
    for intensity in ("percentiles", "range"):
        torch.manual_seed(0)
        model = get_peft_model(
            load_base("builtin:sam-tiny"), LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
        )
        processor = choose_intensity(load_processor("builtin:sam-tiny"), intensity)
        folder = save_adapter(model, tmp_path / intensity, processor=processor)
        adapter = load_adapter(folder)
        assert adapter.processor.intensity == intensity
        assert ("16 bits" in (folder / "README.md").read_text()) == (intensity == "percentiles")
        found[intensity] = predict_masks(adapter, image, points=point).scores
        with Image.open(image) as opened:
            assert predict_masks(adapter, opened, points=point).scores == found[intensity]
    assert abs(found["percentiles"][0] - found["range"][0]) > 1e-4
    plain = get_peft_model(load_base("builtin:sam-tiny"), LoraConfig(r=2, target_modules=["qkv"]))
    folder = save_adapter(plain, tmp_path / "plain", processor=load_processor("builtin:sam-tiny"))
    assert load_adapter(folder).processor.intensity == "percentiles"


def test_an_adapter_from_before_the_choice_scales_by_the_whole_range():
    settings = mask_processor_settings(load_processor("builtin:sam-tiny"))
    assert (
        load_mask_processor("builtin:sam-tiny", dict(settings)).intensity == settings.pop("intensity") == "percentiles"
    )
    assert load_mask_processor("builtin:sam-tiny", settings).intensity == "range"
    with pytest.raises(InlayError, match="unknown intensity 'maximum'; choose one of percentiles, range"):
        choose_intensity(load_processor("builtin:sam-tiny"), "maximum")


# Splits


def write_pairs(folder, values):
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for name, value in values.items():
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(folder / "images" / f"{name}.png")
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(folder / "labels" / f"{name}.png")


def test_equal_images_with_maps_stay_on_one_side(tmp_path, caplog):
    write_pairs(tmp_path / "a", {f"{i}{copy}": i for i in range(10) for copy in "ab"})
    data = load_masks(str(tmp_path / "a"))
    sides = [{item.name[0] for item in split} for split in (data.train, data.validation)]
    assert not sides[0] & sides[1] and len(data.validation) == 4
    write_pairs(tmp_path / "b" / "train", {"x": 1, "y": 2})
    write_pairs(tmp_path / "b" / "val", {"z": 1})
    load_masks(str(tmp_path / "b"))
    assert "1 of 1 images of validation are in training too" in caplog.text
    write_pairs(tmp_path / "c", {f"{i}": 7 for i in range(5)})
    assert len(load_masks(str(tmp_path / "c")).validation) == 1 and "all images" in caplog.text


def test_test_images_never_choose_anything(tmp_path):
    write_pairs(tmp_path / "train", {f"{i}": i for i in range(10)})
    write_pairs(tmp_path / "test", {f"t{i}": 100 + i for i in range(3)})
    data = load_masks(str(tmp_path))
    assert not [item for item in (*data.train, *data.validation) if item.name.startswith("t")]
    assert (len(data.train), len(data.validation)) == (8, 2)
    found = {split: load_masks_to_score(str(tmp_path), split=split) for split in (None, *SPLITS)}
    assert {split: (one[0], len(one[1])) for split, one in found.items()} == {
        None: ("test", 3), "test": ("test", 3), "validation": ("validation", 2), "train": ("train", 8),
        "all": ("all", 13),
    }  # fmt: skip
    assert found["validation"][1] == data.validation


def test_stems_of_two_unicode_forms_are_one(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    write_pairs(tmp_path, {composed: 1, "tea": 2})
    (tmp_path / "labels" / f"{composed}.png").rename(tmp_path / "labels" / f"{decomposed}.png")
    data = load_masks(str(tmp_path))
    assert len(data.train) + len(data.validation) == 2


def test_a_folder_of_classes_is_sent_to_the_classifier(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "0.png")
    with pytest.raises(InlayError, match=r"recipes/lora_vit\.py or load_images"):
        load_masks(str(tmp_path))

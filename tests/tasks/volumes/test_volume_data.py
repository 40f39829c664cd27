"""Labelled scans from every layout, and crops of them as a model gets them."""

import json
import pickle
import random
import time

import numpy as np
import pytest
import torch

from inlay.errors import InlayError
from inlay.tasks.volumes.data import Case, load_volumes
from inlay.tasks.volumes.nifti import read_volume, write_volume
from inlay.tasks.volumes.scan import VolumeProcessor
from inlay.tasks.volumes.view import VolumeView, collate_volumes, cut_crop, random_affine, rotate_crop
from inlay.train.sampler import SeededDataset, seed_cpu
from places import SHARED

HIPPOCAMPUS = SHARED / "hippocampus_msd04/dev"
RANDOM = np.random.default_rng(0)


def save(path, array=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_volume(path, RANDOM.random((4, 5, 6), np.float32) if array is None else array, np.eye(4))
    return path


def label(*values):
    array = np.zeros((4, 5, 6), np.uint8)
    array.flat[: len(values)] = values
    return array


def pairs(root, *names, folders=("images", "labels"), values=(1, 2)):
    for name in names:
        save(root / folders[0] / f"{name}.nii.gz")
        save(root / folders[1] / f"{name.removesuffix('_0000')}.nii.gz", label(*values))
    return root


def describe(root, **content):
    (root / "dataset.json").write_text(json.dumps(content))
    return str(root)


def names(cases):
    return [case.name for case in cases]


def refused(*words, **arguments):
    with pytest.raises(InlayError) as caught:
        load_volumes(**arguments)
    message = str(caught.value)
    assert all(str(word) in message for word in words), message
    assert "\n" not in message and message.endswith(".")


# Folders


def test_two_folders_are_split_by_seed_and_name(tmp_path):
    root = pairs(tmp_path, *(f"c{i:02}" for i in range(10)), values=(7, 3))
    data = load_volumes(str(root))
    assert data.labels == ("class 3", "class 7") and data.modality == "other"
    assert (len(data.train), len(data.validation)) == (8, 2)
    # The same cases on every machine: written down here, not computed.
    assert names(data.validation) == names(load_volumes(str(root)).validation) == ["c04", "c06"]
    assert names(load_volumes(str(root), seed=1).validation) != ["c04", "c06"]
    assert all(case.values == (3, 7) for case in (*data.train, *data.validation))
    pairs(tmp_path, "new")
    more = load_volumes(str(root))
    assert len({*names(more.validation)} ^ {"c04", "c06"}) <= 2  # a new case moves few others
    named = load_volumes(str(root), labels=["first", "second", "third", "fourth"], modality="ct", validation=0.5)
    assert named.labels[1] == "second" and named.modality == "ct" and len(named.validation) == 6


def test_other_layouts(tmp_path):
    msd = pairs(tmp_path / "a", "x_0000", "y_0000", folders=("imagesTr", "labelsTr"))
    (msd / "imagesTr" / "._x_0000.nii.gz").write_text("resource fork")
    assert sorted(names((*load_volumes(str(msd)).train, *load_volumes(str(msd)).validation))) == ["x", "y"]
    split = tmp_path / "b"
    pairs(split / "train", "x", "y"), pairs(split / "val", "z")
    data = load_volumes(str(split))
    assert (names(data.train), names(data.validation)) == (["x", "y"], ["z"])
    held = pairs(tmp_path / "c", "x", "y", folders=("imagesTr", "labelsTr"))
    pairs(held, "z", folders=("imagesVal", "labelsVal"))
    assert names(load_volumes(str(held)).validation) == ["z"]


def test_npz_with_spacing(tmp_path):
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", image=RANDOM.random((4, 5, 6)), label=label(1), spacing=(1, 2, 3))
    data = load_volumes(str(tmp_path))
    assert (len(data.train), len(data.validation), data.labels) == (2, 1, ("class 1",))
    scan = VolumeProcessor(None, (4, 4, 4)).read(data.train[0])
    assert scan.spacing_mm == (3, 2, 1) and scan.labels.sum() == 1


def test_the_decathlons_description(tmp_path):
    pairs(tmp_path, "x", "y", "z", folders=("imagesTr", "labelsTr"), values=(1, 5))
    training = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in "xyz"]
    name = describe(
        tmp_path,
        labels={"0": "background", "5": "Posterior", "1": "Anterior"},
        modality={"0": "MRI"},
        training=training[:2],
        validation=training[2:],
    )
    data = load_volumes(name)
    assert data.labels == ("Anterior", "Posterior") and data.modality == "mr"
    assert (names(data.train), names(data.validation)) == (["x", "y"], ["z"])
    scan = VolumeProcessor(None, (4, 4, 4)).read(data.train[0])
    assert scan.labels.unique().tolist() == [0, 1, 2]


def test_nnunets_description(tmp_path):
    pairs(tmp_path, "x_0000", "y_0000", folders=("imagesTr", "labelsTr"))
    name = describe(
        tmp_path, labels={"background": 0, "tumour": 1, "edema": 2}, channel_names={"0": "CT"}, file_ending=".nii.gz"
    )
    data = load_volumes(name)
    assert data.labels == ("tumour", "edema") and data.modality == "ct"
    listed = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in "xy"]
    again = load_volumes(describe(tmp_path, labels={"tumour": 1, "edema": 2}, training=listed))
    assert names(again.train) == names(data.train) and again.modality == "other"


def test_layouts_that_make_no_task(tmp_path):
    refused("there is no folder", name=str(tmp_path / "none"))
    refused("there is no folder", name="")
    refused("builtin:volumes", name="builtin:heads")
    refused("nothing", name=str(tmp_path))
    (tmp_path / "notes.txt").touch()
    refused("notes.txt", "above or below", name=str(tmp_path))
    refused("two cases", "got 1", name=str(pairs(tmp_path / "a", "x")))
    refused("between 0 and 1", name=str(tmp_path), validation=1.0)
    refused("modality mr, ct or other", "'pet'", name=str(tmp_path), modality="pet")
    refused("empty", name=str(pairs(tmp_path / "e", "x", "y", values=())))
    refused("2 different class names", "['one']", name=str(pairs(tmp_path / "n", "x", "y")), labels=["one"])


def test_partners_must_be_there(tmp_path):
    pairs(tmp_path, "a", "b", "c")
    (tmp_path / "labels" / "a.nii.gz").unlink()
    (tmp_path / "images" / "b.nii.gz").unlink()
    refused("a.nii.gz (no label map)", "b.nii.gz (no image)", "inlay audit", name=str(tmp_path))
    pairs(tmp_path, "a", "b")
    save(tmp_path / "images" / "a.nii")
    refused("a second file of the case", name=str(tmp_path))
    (tmp_path / "images" / "a.nii").unlink()
    pairs(tmp_path, "d_0000"), save(tmp_path / "images" / "d_0001.nii.gz")
    refused("d_0001.nii.gz (a further channel", name=str(tmp_path))


def test_descriptions_that_cannot_be_used(tmp_path):
    pairs(tmp_path, "x", "y")
    (tmp_path / "dataset.json").write_text("{")
    refused("dataset.json", "labels", name=str(tmp_path))
    refused("dataset.json", name=describe(tmp_path, labels={"whole": [1, 2]}))
    refused("dataset.json", name=describe(tmp_path, name="no labels"))
    refused("names and values of their own", name=describe(tmp_path, labels={"1": "a", "2": "a"}))
    refused("4 channels", name=describe(tmp_path, labels={"1": "a"}, modality=dict.fromkeys("0123", "MR")))
    lost = [{"image": "images/x.nii.gz", "label": "labels/lost.nii.gz"}]
    refused("lost.nii.gz (listed", name=describe(tmp_path, labels={"1": "a"}, training=lost))
    refused(
        "training in",
        "must be a list of objects with image and label",
        name=describe(tmp_path, labels={"1": "a"}, training=["images/x.nii.gz"]),
    )


# Views


def case(shape, at=None, values=(1,), affine=None, name="a"):
    """A case in memory whose image tells every voxel's place."""
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    labels = np.zeros(shape, np.uint8)
    for place, value in zip(at or [tuple(n // 2 for n in shape)], values, strict=True):
        labels[place] = value
    return Case(name, image, labels, affine, None)


def test_validation_takes_whole_scans_and_pads_batches():
    processor = VolumeProcessor(None, (4, 4, 4))
    view = VolumeView([case((6, 5, 4)), case((3, 8, 4))], processor)
    items = list(map(view.__getitem__, range(2)))
    assert items[0]["pixel_values"].shape == (1, 4, 5, 6) and items[0]["labels"].dtype == torch.int64
    batch = collate_volumes(items)
    assert batch["pixel_values"].shape == (2, 1, 4, 8, 6) and batch["labels"].shape == (2, 4, 8, 6)
    assert torch.equal(batch["pixel_values"][1, :, :, :, :3], items[1]["pixel_values"])
    assert (batch["labels"][0, :, 5:] == -1).all() and not batch["pixel_values"][0, :, :, 5:].any()
    assert (batch["labels"][0, :, :5] >= 0).all()
    assert collate_volumes(items[:1])["labels"].shape == (1, 4, 5, 6)


def test_small_scans_are_padded_to_the_crop():
    view = VolumeView([case((6, 5, 4))], VolumeProcessor(None, (8, 3, 9)), training=True, augment=False, foreground=0)
    item, whole = view[0], view.scan(0)
    assert item["pixel_values"].shape == (1, 8, 3, 9)
    inside = item["labels"] >= 0
    assert inside.sum() == 4 * 3 * 6
    assert (item["pixel_values"][0][~inside] == 0).all()
    rows = [
        r for r in range(3) if torch.equal(item["pixel_values"][0][inside].view(4, 3, 6), whole.image[0, :, r : r + 3])
    ]
    assert len(rows) == 1


def test_foreground_is_found_and_classes_alike():
    places = [(2, 3, 4), (27, 20, 30)]
    one = case((30, 32, 34), places, (1, 2))
    one.label[10:14, 10:14, 10:14] = 2  # 64 times as large as class 1
    seed_cpu(0)
    for foreground, low, high in ((1.0, 200, 200), (0.5, 90, 150), (0.0, 0, 40)):
        view = VolumeView([one], VolumeProcessor(None, (8, 8, 8)), training=True, augment=False, foreground=foreground)
        labels = [view[0]["labels"] for _ in range(200)]
        assert low <= sum((x > 0).any().item() for x in labels) <= high
        if foreground == 1:
            assert 60 < sum((x == 1).any().item() for x in labels) < 140
            assert len({tuple(x.flatten().tolist()) for x in labels}) > 30
    nothing = case((30, 32, 34), [(0, 0, 0)], (0,))
    view = VolumeView([nothing], VolumeProcessor(None, (8, 8, 8)), training=True)
    assert view[0]["labels"].max() == 0


def test_items_are_functions_of_their_seed():
    data = load_volumes("builtin:volumes")
    processor = VolumeProcessor.fitted(data, (16, 24, 24))
    view = VolumeView(data.train[:2], processor, training=True, flip=(0, 1, 2))
    drawn = SeededDataset(view, seed=3)
    first = [drawn[i % 2, i] for i in range(6)]
    random.random(), torch.rand(3)
    fresh = SeededDataset(pickle.loads(pickle.dumps(view)), seed=3)
    for i, item in enumerate(first):
        again = fresh[i % 2, i]
        assert all(torch.equal(item[key], again[key]) for key in item)
        assert item["pixel_values"].shape == (1, 16, 24, 24) and torch.isfinite(item["pixel_values"]).all()
        assert set(item["labels"].unique().tolist()) <= {-1, 0, 1, 2}
    assert not torch.equal(first[0]["pixel_values"], first[2]["pixel_values"])
    loader = torch.utils.data.DataLoader(
        SeededDataset(view, seed=3), batch_sampler=[[(0, 0), (1, 1)]], num_workers=1, collate_fn=collate_volumes
    )
    batch = next(iter(loader))
    assert torch.equal(batch["pixel_values"][1], first[1]["pixel_values"])


def test_flips_are_asked_for():
    processor = VolumeProcessor(None, (4, 5, 6))
    plain = VolumeView([case((6, 5, 4))], processor, training=True, augment=False)[0]["pixel_values"]
    for axis in range(3):
        view = VolumeView([case((6, 5, 4))], processor, training=True, augment=False, flip=(axis,))
        found = [view[0]["pixel_values"] for _ in range(20)]
        turned = plain.flip(axis + 1)
        assert all(torch.equal(x, plain) or torch.equal(x, turned) for x in found)
        assert any(torch.equal(x, turned) for x in found) and any(torch.equal(x, plain) for x in found)


def test_turned_crops_keep_image_and_labels_together(monkeypatch):
    """A blob whose image equals its label stays so; without a turn the crop is the plain one."""
    z, y, x = np.ogrid[:20, :40, :40]
    blob = ((z - 9) ** 2 * 4 + (y - 22) ** 2 + (x - 17) ** 2 < 100).astype(np.uint8).transpose(2, 1, 0)
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    processor = VolumeProcessor(None, (12, 24, 24), "ct", -1.0, 1.0)
    scan = processor.read(Case("a", blob.astype(np.float32), blob, affine))
    seed_cpu(1)
    for _ in range(5):
        image, labels = rotate_crop(scan, (3, 10, 6), (12, 24, 24))
        assert image.shape == (1, 12, 24, 24) and labels.shape == (12, 24, 24)
        assert set(labels.unique().tolist()) <= {-1, 0, 1} and labels.sum() > 500
        assert ((image[0] > 0.5) == (labels == 1)).float().mean() > 0.97
    monkeypatch.setattr("inlay.tasks.volumes.view.random_affine", lambda spacing: torch.eye(3, dtype=torch.float64))
    for start in ((3, 10, 6), (-4, 20, -5), (0, 0, 0), (8, 16, 16)):
        for mine, plain in zip(
            rotate_crop(scan, start, (12, 24, 24)), cut_crop(scan, start, (12, 24, 24)), strict=True
        ):
            torch.testing.assert_close(mine, plain, rtol=0, atol=1e-4)


def test_thick_slices_are_turned_in_their_plane():
    seed_cpu(0)
    for _ in range(20):
        matrix = random_affine((5.0, 1.0, 0.5))
        assert matrix[0].tolist() == [1, 0, 0] and matrix[1:, 0].tolist() == [0, 0]
        turn = matrix * torch.tensor([5.0, 1.0, 0.5])[:, None] / torch.tensor([5.0, 1.0, 0.5])
        scale = turn[1:, 1:].det().sqrt()
        assert 0.84 < scale < 1.19
        torch.testing.assert_close(turn[1:, 1:] @ turn[1:, 1:].T, scale**2 * torch.eye(2).double(), check_dtype=False)
    assert any(abs(random_affine((1.0, 1.0, 1.0))[0, 1]) > 0.05 for _ in range(10))


def test_cache_is_bounded_and_changes_nothing(monkeypatch):
    cases = [case((20, 20, 20), name=str(i)) for i in range(4)]
    processor = VolumeProcessor(None, (20, 20, 20))
    read = []
    original = processor.read
    monkeypatch.setattr(processor, "read", lambda c: read.append(c.name) or original(c))
    size = 20**3 * (4 + 2)
    view = VolumeView(cases, processor, cache_gb=2.5 * size / 1e9)
    first = [view[i] for i in (0, 1, 0, 2, 0, 1, 3)]
    assert read == ["0", "1", "2", "1", "3"]  # 0 was used between, so 1 went
    assert view._bytes == 2 * size and len(view._kept) == 2
    assert torch.equal(first[1]["pixel_values"], first[5]["pixel_values"])
    read.clear()
    none = VolumeView(cases, processor, cache_gb=0)
    assert torch.equal(none[0]["labels"], none[0]["labels"]) and read == ["0", "0"] and not none._kept


def test_views_refuse_what_makes_no_sense():
    processor = VolumeProcessor(None, (4, 4, 4))
    with pytest.raises(InlayError, match="there are no cases"):
        VolumeView([], processor)
    with pytest.raises(InlayError, match="case 'a' has no label map"):
        VolumeView([Case("a", np.zeros((3, 3, 3)))], processor)
    for wrong in ({"flip": (3,)}, {"foreground": 1.5}, {"cache_gb": -1}):
        with pytest.raises(InlayError, match="flip must name axes 0, 1 or 2"):
            VolumeView([case((4, 4, 4))], processor, **wrong)


# Real data


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampus scans are not beside the checkout (shared/data)")
def test_hippocampus():
    begun = time.process_time()
    data = load_volumes(str(HIPPOCAMPUS), modality="mr")
    assert (len(data.train), len(data.validation), data.labels) == (48, 12, ("class 1", "class 2"))
    processor = VolumeProcessor.fitted(data, (32, 48, 32))
    assert processor.spacing_mm == (1.0, 1.0, 1.0)
    view = VolumeView(data.train, processor, training=True)
    whole = VolumeView(data.validation, processor)
    for index in range(12):
        item, scan = whole[index], whole.scan(index)
        assert item["labels"].unique().tolist() == [0, 1, 2]
        assert abs(item["pixel_values"].mean()) < 1e-3 and item["pixel_values"].std() == pytest.approx(1, abs=1e-2)
        assert item["pixel_values"].abs().max() < 8  # whatever the scan's maximum, 112 or 1.7e6
        own = data.validation[index]
        assert np.array_equal(processor.back(scan.labels, scan), read_volume(own.label, "label")[0])
    seed_cpu(0)
    crops = [view[i] for i in range(12)]
    assert sum((c["labels"] > 0).any().item() for c in crops) >= 8
    assert time.process_time() - begun < 20

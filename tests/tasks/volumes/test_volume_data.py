"""Labelled scans from every layout, and crops of them as a model gets them."""

import json
import pickle
import random
import time

import numpy as np
import pytest
import torch

from inlay.errors import InlayError
from inlay.tasks.evaluation import Training
from inlay.tasks.volumes.data import Case, find_cases, find_scans, load_volumes, load_volumes_to_score
from inlay.tasks.volumes.formats import read_volume, write_volume
from inlay.tasks.volumes.options import VolumeTask
from inlay.tasks.volumes.scan import VolumeProcessor, median_spacing
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


@pytest.mark.parametrize(("count", "folds"), [(12, 5), (5, 5), (7, 3)])
@pytest.mark.parametrize("group", [None, r"(p\d+)_"])
def test_folds_are_disjoint_and_hold_all(tmp_path, count, folds, group):
    pairs(tmp_path, *(f"p{i}_{scan}" for i in range(count) for scan in "ab"))
    share, found = 1 / folds, []
    for fold in range(folds):
        data = load_volumes(tmp_path, seed=3, validation=share, fold=fold, group=group)
        held = names(data.validation)
        assert held and not {*held} & {*names(data.train)} and len(held) + len(data.train) == 2 * count
        found += held
        if group:
            assert not {name[:-2] for name in held} & {name[:-2] for name in names(data.train)}
        settings = {"seed": 3, "fold": fold, "folds": folds, "group": group}
        scored = load_volumes_to_score(tmp_path, training=Training(str(tmp_path), settings))
        assert (scored[0], names(scored[1])) == ("validation", held)
    assert len(found) == len({*found}) == 2 * count
    first = names(load_volumes(tmp_path, seed=3, validation=share, group=group).validation)
    assert first == found[: len(first)]


def test_folds_that_cannot_be_made(tmp_path):
    pairs(tmp_path, "a", "b", "c")
    with pytest.raises(InlayError, match="3 cases, too few for 5 folds"):
        load_volumes(tmp_path, fold=1)
    with pytest.raises(InlayError, match="fold must be from 0 to 4"):
        VolumeTask(fold=5)
    with pytest.raises(InlayError, match="needs fold"):
        VolumeTask(folds=3)
    pairs(tmp_path / "own" / "train", "a", "b")
    pairs(tmp_path / "own" / "val", "c")
    with pytest.raises(InlayError, match="no folds"):
        load_volumes(tmp_path / "own", fold=1)


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
    refused("modality must be mr, ct or other", "'pet'", name=str(tmp_path), modality="pet")
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
    refused("need the channels channel_0: d (2 channels, 1 too many)", name=str(tmp_path))


def test_descriptions_that_cannot_be_used(tmp_path):
    pairs(tmp_path, "x", "y")
    (tmp_path / "dataset.json").write_text("{")
    refused("dataset.json", "labels", name=str(tmp_path))
    refused("dataset.json", name=describe(tmp_path, labels={"whole": [1, 2]}))
    refused("dataset.json", name=describe(tmp_path, name="no labels"))
    refused("names and values of their own", name=describe(tmp_path, labels={"1": "a", "2": "a"}))
    refused(
        "MR_0, MR_1, MR_2, MR_3",
        "1 channel, so that it lacks MR_1",
        name=describe(tmp_path, labels={"1": "a"}, modality=dict.fromkeys("0123", "MR")),
    )
    lost = [{"image": "images/x.nii.gz", "label": "labels/lost.nii.gz"}]
    refused("lost.nii.gz (listed", name=describe(tmp_path, labels={"1": "a"}, training=lost))
    refused(
        "training in",
        "must be a list of objects with image and label",
        name=describe(tmp_path, labels={"1": "a"}, training=["images/x.nii.gz"]),
    )


def test_values_names_and_ignored_voxels_of_every_description(tmp_path):
    """BraTS 1, 2, 4; FreeSurfer's thousands; nnU-Net's "ignore" wherever it stands: classes are 1..K inside."""
    for number, (labels, values, ignored) in enumerate(
        (
            ({"1": "necrosis", "2": "oedema", "4": "enhancing"}, (1, 2, 4), None),
            ({"background": 0, "left": 1000, "right": 2000}, (1000, 2000), None),
            ({"background": 0, "tumour": 1, "ignore": 2}, (1,), 2),
            ({"0": "background", "1": "Ignore", "3": "b", "7": "c"}, (3, 7), 1),
            (None, (1000, 2000), None),
            (None, (2**31 - 1, 300), None),
        )
    ):
        folder = tmp_path / str(number)
        for name in "xy":
            save(folder / "images" / f"{name}.nii.gz")
            present = np.array([0, *values, *([] if ignored is None else [ignored])], np.int32)
            save(folder / "labels" / f"{name}.nii.gz", np.resize(present, (4, 5, 6)))
        if labels is not None:
            describe(folder, labels=labels)
        data = load_volumes(str(folder))
        wanted = sorted(values)
        assert data.train[0].values == tuple(wanted) and data.train[0].ignored == ignored
        names = {value: name for name, value in labels.items()} if number in (1, 2) else labels
        names = {v: f"class {v}" for v in wanted} if names is None else {int(v): n for v, n in names.items()}
        assert data.labels == tuple(names[v] for v in wanted)
        processor = VolumeProcessor.fitted(data, (4, 4, 4))
        assert (processor.values or tuple(range(1, len(wanted) + 1))) == tuple(wanted)
        scan = processor.read(data.train[0])
        own = np.resize(present, (4, 5, 6))
        expected = np.zeros(own.shape, int)
        for k, value in enumerate(wanted, 1):
            expected[own == value] = k
        if ignored is not None:
            expected[own == ignored] = -1
        assert np.array_equal(processor.back(scan.labels, scan), expected)


def test_ignored_voxels_keep_their_image_in_crops_and_padding_does_not(tmp_path):
    one = case((6, 5, 4), values=(1,))
    one.label[:, :, 2:] = 9
    one = Case("a", one.image, one.label, None, (1,), 9)
    processor = VolumeProcessor(None, (8, 5, 6))
    whole = processor.read(one)
    for augment in (False, True):
        view = VolumeView([one], processor, training=True, augment=augment, foreground=0)
        seed_cpu(0)
        for _ in range(10):
            item = view[0]
            assert set(item["labels"].unique().tolist()) <= {-1, 0, 1}
            if not augment:
                assert torch.equal(item["pixel_values"][0, 2:6], whole.image[0])
                assert (item["labels"][4:6] == -1).all() and (item["labels"][:2] == -1).all()
                assert not item["pixel_values"][0, :2].any() and not item["pixel_values"][0, 6:].any()
    seed_cpu(0)
    image, labels = rotate_crop(whole, (-2, 0, 0), (8, 5, 6))
    assert (labels == -1).any() and (labels == -2).any()
    assert image[0][labels == -2].abs().mean() > 0.1 and not image[0][labels == -1].any()


@pytest.mark.parametrize(
    ("images", "labels", "cases", "faults"),
    [
        (["case_0000", "case_0001", "case_0002"], ["case_0000", "case_0001", "case_0002"], 3, 0),
        (["case_0000_0000", "case_0001_0000"], ["case_0000", "case_0001"], 2, 0),
        (["a_0000", "b_0000"], ["a", "b"], 2, 0),
        (["a_0000", "a_0001", "b_0000", "b_0001"], ["a", "b"], 2, 0),
        (["a", "b"], ["a_0000", "b_0000"], 2, 0),
        (["a_0001", "b"], ["a_0001", "b"], 2, 0),
        (["2019_0000", "2019_0001"], ["2019_0000", "2019_0001"], 2, 0),
        (["a_0000", "a"], ["a"], 1, 1),
        (["a_0000", "a_0001"], ["b"], 0, 3),
    ],
)
@pytest.mark.parametrize("listed", [False, True])
def test_numbers_are_channels_only_where_the_label_map_says_so(tmp_path, images, labels, cases, faults, listed):
    for name in images:
        save(tmp_path / "images" / f"{name}.nii.gz")
    for name in labels:
        save(tmp_path / "labels" / f"{name}.nii.gz", label(1))
    if listed:
        if faults or images[0] == "a" or len(images) > len(labels):
            return
        describe(
            tmp_path, labels={"1": "x"},
            training=[{"image": f"images/{i}.nii.gz", "label": f"labels/{n}.nii.gz"}
                      for i, n in zip(images, labels, strict=True)],
        )  # fmt: skip
    found = find_cases(str(tmp_path))
    assert (len(found.train), len(found.faults)) == (cases, faults)
    assert all(one.name in labels or one.name in images for one in found.train)


@pytest.mark.parametrize("layout", ["train and test", "nnunet", "train, val and test"])
def test_test_data_choose_nothing(tmp_path, layout):
    if layout == "nnunet":
        pairs(tmp_path, *(f"train{i}" for i in range(5)), folders=("imagesTr", "labelsTr"))
        pairs(tmp_path, "test0", "test1", folders=("imagesTs", "labelsTs"))
    else:
        pairs(tmp_path / "train", *(f"train{i}" for i in range(5)))
        pairs(tmp_path / "test", "test0", "test1")
        if "val" in layout:
            pairs(tmp_path / "val", "val0")
    data = load_volumes(str(tmp_path))
    wanted = ["val0"] if "val" in layout else [n for n in names(data.validation) if n.startswith("train")]
    assert names(data.validation) == wanted and len(wanted) == 1
    assert not any("test" in name for name in names(data.train))
    chosen, cases, labels, _ = load_volumes_to_score(str(tmp_path), split="test")
    assert (chosen, names(cases), labels) == ("test", ["test0", "test1"], ("class 1", "class 2"))
    for split in (None, "all", "validation", "train"):
        assert not any("test" in name for name in names(load_volumes_to_score(str(tmp_path), split=split)[1]))


def test_what_is_wrong_with_test_data_does_not_stop_a_training(tmp_path):
    pairs(tmp_path / "train", "a", "b"), pairs(tmp_path / "test", "c")
    save(tmp_path / "test" / "images" / "d.nii.gz")
    assert len(load_volumes(str(tmp_path)).train) == 1
    with pytest.raises(InlayError, match="no label map"):
        load_volumes_to_score(str(tmp_path), split="test")


def test_files_that_are_not_read_are_named(tmp_path, caplog):
    pairs(tmp_path, "a", "b")
    (tmp_path / "images" / "b.nii.gz").rename(tmp_path / "images" / "b.NII.GZ")
    for name in ("c.bmp", "d.tif", "e.img", "f.nii.bz2", "README.md", "a.json", ".DS_Store"):
        (tmp_path / "images" / name).touch()
    (tmp_path / "labels" / "dicom").mkdir()
    found = find_cases(str(tmp_path))
    assert names(found.train) == ["a", "b"] and not found.faults
    assert [file.rpartition("/")[2] for file in found.unread] == ["c.bmp", "d.tif", "e.img", "f.nii.bz2", "dicom"]
    load_volumes(str(tmp_path))
    assert "5 files" in caplog.text and "c.bmp" in caplog.text


def test_spacings_far_from_a_millimetre(tmp_path):
    """A microscope's 0.4 micron and a map of 20 m: the median is not rounded away."""
    for spacing in (0.0004, 0.123456, 3000.0):
        cases = [case((6, 5, 4), affine=np.diag([spacing, spacing, spacing, 1.0])) for _ in range(2)]
        found = median_spacing(cases)
        assert found == pytest.approx((spacing,) * 3, rel=5e-4)
        assert VolumeProcessor(found, (4, 4, 4)).read(cases[0]).spacing_mm == pytest.approx(found, rel=1e-3)


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


def test_the_processor_says_which_axes_training_mirrors():
    """So that what an adapter says of its training is what the view did."""
    processor = VolumeProcessor(None, (4, 5, 6), flip=(2,))
    assert VolumeProcessor.from_dict(json.loads(json.dumps(processor.to_dict()))).flip == (2,)
    plain = VolumeView([case((6, 5, 4))], processor, training=True, augment=False, flip=())[0]["pixel_values"]
    view = VolumeView([case((6, 5, 4))], processor, training=True, augment=False)
    found = [view[0]["pixel_values"] for _ in range(20)]
    assert all(torch.equal(x, plain) or torch.equal(x, plain.flip(3)) for x in found)
    assert any(torch.equal(x, plain.flip(3)) for x in found)
    old = {k: v for k, v in processor.to_dict().items() if k != "flip"}
    assert VolumeProcessor.from_dict(old).flip == () and "flip" not in VolumeProcessor.from_dict(old).to_dict()
    for wrong in ({"flip": (3,)}, {"flip": "DH"}, {"values": (0, 1)}, {"values": (1, 1)}, {"values": (2**31,)}):
        with pytest.raises(InlayError, match=r"flip|values"):
            VolumeProcessor(None, (4, 5, 6), **wrong)


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
    assert view._bytes == 2 * size and len(view._cache) == 2
    assert torch.equal(first[1]["pixel_values"], first[5]["pixel_values"])
    read.clear()
    none = VolumeView(cases, processor, cache_gb=0)
    assert torch.equal(none[0]["labels"], none[0]["labels"]) and read == ["0", "0"] and not none._cache


def test_views_refuse_what_makes_no_sense():
    processor = VolumeProcessor(None, (4, 4, 4))
    with pytest.raises(InlayError, match="there are no cases"):
        VolumeView([], processor)
    with pytest.raises(InlayError, match="case 'a' has no label map"):
        VolumeView([Case("a", np.zeros((3, 3, 3)))], processor)
    for wrong in ({"flip": (3,)}, {"foreground": 1.5}, {"cache_gb": -1}):
        with pytest.raises(InlayError, match="flip must name axes 0, 1 or 2"):
            VolumeView([case((4, 4, 4))], processor, **wrong)


# Folders of scans without label maps


def test_scans_of_a_folder_are_cases_by_name(tmp_path, caplog):
    for name in ("b.nii", "a.nii.gz", "C.NII.GZ", ".hidden.nii.gz"):
        (tmp_path / name).touch()
    for name in ("volumes.csv", "notes.docx"):
        (tmp_path / name).touch()
    found = find_scans(tmp_path)
    assert [(case.name, case.image.name) for case in found] == [("C", "C.NII.GZ"), ("a", "a.nii.gz"), ("b", "b.nii")]
    assert "1 entries of" in caplog.text and "notes.docx" in caplog.text and "csv" not in caplog.text


def test_the_number_of_an_only_channel_is_no_part_of_a_name(tmp_path):
    (tmp_path / "x_0000.nii.gz").touch()
    assert names(find_scans(tmp_path)) == ["x"]
    (tmp_path / "y.nii.gz").touch()
    assert names(find_scans(tmp_path)) == ["x_0000", "y"]


def test_a_folder_without_scans_or_with_twins_is_refused(tmp_path):
    with pytest.raises(InlayError, match=r"there is no folder '.*none'"):
        find_scans(tmp_path / "none")
    with pytest.raises(InlayError, match="is empty; give a folder of scans"):
        find_scans(tmp_path)
    for name in ("a.nii", "a.nii.gz"):
        (tmp_path / name).touch()
    with pytest.raises(InlayError, match=r"two scans of the name 'a': a\.nii and a\.nii\.gz"):
        find_scans(tmp_path)


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


def test_training_draws_scans_of_a_rare_class_more_often(tmp_path):
    pairs(tmp_path, *(f"c{i}" for i in range(11)), values=(1,))
    pairs(tmp_path, *(f"r{i}" for i in range(2)), values=(1, 2))
    data = VolumeTask(dataset=str(tmp_path), crop=[4, 4, 4]).load(0)
    rare = sum(case.name.startswith("r") for case in data.source.train)
    assert data.train.weights == {2: pytest.approx((0.5 * len(data.source.train) / rare) ** 0.5)}
    assert not data.validation.weights and len(data.train) == len(data.source.train)


@pytest.mark.parametrize("inner", ["imagesTr", "images", "imagesTs"])
def test_a_folder_above_the_scans_names_them(inner, tmp_path):
    (tmp_path / inner).mkdir()
    with pytest.raises(InlayError, match=rf"holds no scan \({inner}\); give '.*{inner}'"):
        find_scans(tmp_path)

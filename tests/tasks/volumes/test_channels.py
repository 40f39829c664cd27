"""Scans of several channels: found, named, normalised one by one, and refused by name where one lacks."""

import json
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from inlay.cli.app import app
from inlay.cli.volumes import name_channels
from inlay.errors import InlayError
from inlay.tasks import TASKS
from inlay.tasks.volumes.audit import audit
from inlay.tasks.volumes.data import Case, find_scans, load_volumes
from inlay.tasks.volumes.formats import read_header, read_volume, write_volume
from inlay.tasks.volumes.scan import VolumeProcessor, read_image
from inlay.tasks.volumes.segment import segment
from inlay.tasks.volumes.view import VolumeView, collate_volumes

NAMES = ("T1", "FLAIR", "CT")
RANDOM = np.random.default_rng(0)
VOXELS = RANDOM.normal(50, 40, (3, 9, 8, 7)).astype(np.float32)
LABEL = (RANDOM.random((9, 8, 7)) < 0.3).astype(np.uint8)


def write_case(folder, name, channels=(0, 1, 2)):
    """nnU-Net's files of a case, and its label map."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for i in channels:
        write_volume(folder / f"imagesTr/{name}_{i:04}.nii.gz", VOXELS[i], np.eye(4))
    write_volume(folder / f"labelsTr/{name}.nii.gz", LABEL, np.eye(4))


def describe(folder, **content):
    names = {str(i): name for i, name in enumerate(NAMES)}
    (folder / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "x": 1}, "channel_names": names} | content)
    )


def write_series(path, voxels=VOXELS):
    """A 4D file as the Decathlon's."""
    nibabel.save(nibabel.Nifti1Image(np.moveaxis(voxels, 0, -1), np.eye(4)), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("nnunet")
    for name in ("a", "b"):
        write_case(root, name)
    describe(root)
    return root


def test_numbered_files_are_one_case_and_each_channel_is_normalised_by_itself(folder):
    data = load_volumes(str(folder))
    assert data.channels == {"T1": "mr", "FLAIR": "mr", "CT": "ct"}
    processor = VolumeProcessor.fitted(data, (8, 8, 8), window=(-1000, 1000))
    assert processor.channels == NAMES and processor.intensity == ("percentile", "percentile", "ct")
    scan = processor.read(data.train[0])
    assert scan.image.shape == (3, 7, 8, 9)
    single = VolumeProcessor((1, 1, 1), (8, 8, 8))
    for i in range(2):
        alone = single.read(Case("alone", VOXELS[i])).image[0]
        assert torch.equal(scan.image[i], alone)
    assert np.allclose(scan.image[2].numpy(), VOXELS[2].transpose(2, 1, 0) / 1000, atol=1e-6)
    again = VolumeProcessor.from_dict(json.loads(json.dumps(processor.to_dict())))
    assert again.channels == NAMES and again.intensities == processor.intensities
    assert "channels" not in single.to_dict()
    item = VolumeView(data.train, processor, training=True)[0]
    assert collate_volumes([item, item])["pixel_values"].shape == (2, 3, 8, 8, 8)
    assert not audit(str(folder)).errors and "T1, FLAIR, CT" in str(audit(str(folder)))


def test_every_way_to_give_a_scan_is_the_same_scan(folder, tmp_path):
    processor = VolumeProcessor((1, 1, 1), (8, 8, 8), channels=NAMES)
    files = [folder / f"imagesTr/a_{i:04}.nii.gz" for i in range(3)]
    expected = processor.read(Case("a", VOXELS)).image
    write_series(tmp_path / "4d.nii.gz")
    np.savez(tmp_path / "first.npz", image=VOXELS)
    np.savez(tmp_path / "last.npz", image=np.moveaxis(VOXELS, 0, -1), label=LABEL)
    turned = Case("turned", VOXELS[[2, 0, 1]], channels=("CT", "T1", "FLAIR"))  # by name, whatever the order
    ways = [files[0], files[2], files, dict(zip(NAMES[::-1], files[::-1], strict=True)), turned, tmp_path / "4d.nii.gz"]
    ways += [tmp_path / "first.npz", tmp_path / "last.npz", (tmp_path / "4d.nii.gz").read_bytes()]
    ways.append([file.read_bytes() for file in files])
    for way in ways:
        assert torch.equal(processor.read(way).image, expected), way
    assert np.array_equal(read_image(Case("a", tuple(files)))[0], VOXELS)
    assert read_header(tmp_path / "4d.nii.gz")[0] == read_header(tmp_path / "first.npz")[0] == (9, 8, 7, 3)
    assert read_volume(tmp_path / "4d.nii.gz", channels=True)[0].shape == VOXELS.shape


def test_what_lacks_is_refused_by_name(folder, tmp_path):
    processor = VolumeProcessor((1, 1, 1), (8, 8, 8), channels=NAMES)
    files = [folder / f"imagesTr/a_{i:04}.nii.gz" for i in range(3)]
    write_series(tmp_path / "4d.nii.gz", VOXELS[:2])
    write_case(tmp_path, "c", (0, 2))
    shifted = tmp_path / "shifted.nii.gz"
    write_volume(shifted, VOXELS[0], np.diag([1.0, 1, 1.2, 1]))
    np.savez(tmp_path / "cube.npz", image=np.ones((3, 3, 3, 3)))
    cases = [
        (processor, {"T1": files[0], "T2": files[1], "CT": files[2]}, "T2 is unknown and FLAIR is missing"),
        (processor, files[:2], "T1, FLAIR, CT, and got 2 files"),
        (processor, tmp_path / "4d.nii.gz", "2 channels, so that it lacks CT"),
        (processor, tmp_path / "imagesTr/c_0000.nii.gz", r"lacks the channel FLAIR \(c_0001.nii.gz\)"),
        (processor, [files[0], shifted, files[2]], "shifted.nii.gz.*not on the grid of the first channel"),
        (processor, Case("x", VOXELS, channels=("T1", "T2", "CT")), "T2 is unknown and FLAIR is missing"),
        (processor, tmp_path / "cube.npz", "which one is that of channels"),
        (VolumeProcessor(None, (8, 8, 8)), tmp_path / "4d.nii.gz", "has 2 channels and the adapter takes one"),
    ]
    for reader, scan, said in cases:
        with pytest.raises(InlayError, match=said):
            reader.read(scan)
    describe(tmp_path)
    with pytest.raises(InlayError, match=r"c_0001.nii.gz \(the case lacks the channel FLAIR"):
        load_volumes(str(tmp_path))
    assert any("lacks the channel FLAIR" in finding.what for finding in audit(str(tmp_path)).errors)
    for wrong in ({"channels": ("a", "a")}, {"channels": "ab"}, {"channels": ("a", "b"), "intensity": ("ct",)}):
        with pytest.raises(InlayError, match=r"channels must be|one for each"):
            VolumeProcessor(None, (8, 8, 8), **wrong)


def test_a_folder_of_scans_is_grouped_by_its_channels(folder, tmp_path):
    found = find_scans(folder / "imagesTr", NAMES)
    assert [case.name for case in found] == ["a", "b"] and len(found[0].files) == 3 and found[0].channels == NAMES
    write_case(tmp_path, "c", (0, 1))
    with pytest.raises(InlayError, match=r"c_0002.nii.gz \(the case lacks the channel CT"):
        find_scans(tmp_path / "imagesTr", NAMES)


class Difference(torch.nn.Module):
    """Class 1 where the first channel is above the second."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(5.0))

    def forward(self, pixel_values):
        """Logits of two classes."""
        apart = self.gain * (pixel_values[:, :1] - pixel_values[:, 1:2])
        return SimpleNamespace(logits=torch.cat([torch.zeros_like(apart), apart], 1))


def test_masks_of_several_channels_and_the_channel_that_is_drawn(folder, tmp_path, monkeypatch):
    adapter = SimpleNamespace(
        model=Difference().eval(), processor=VolumeProcessor(None, (8, 8, 8), channels=NAMES), labels=["x"],
        task=TASKS["volume-segmentation"], name="difference",
    )  # fmt: skip
    files = [folder / f"imagesTr/a_{i:04}.nii.gz" for i in range(3)]
    first, second = (adapter.processor.normalise(VOXELS[i], i) for i in range(2))
    found = segment(adapter, files[1], progress=False)
    assert np.array_equal(found.mask, first > second)
    for file in files:
        with pytest.raises(InlayError, match="is the scan itself"):
            found.save(file)
    write_series(tmp_path / "4d.nii.gz")
    saved = segment(adapter, tmp_path / "4d.nii.gz", progress=False).save(tmp_path / "mask.nii.gz")
    assert np.array_equal(nibabel.load(saved).get_fdata(), found.mask)
    assert np.array_equal(adapter.processor.read_channel(files[0], adapter.processor.find_channel("FLAIR")), VOXELS[1])
    monkeypatch.setattr("inlay.cli.volumes.load_ensemble", lambda *_: [adapter])
    words = [f"{name}={file}" for name, file in zip(NAMES, files, strict=True)]
    out = tmp_path / "out.nii.gz"
    drawn = ["--montage", str(tmp_path / "m.png"), "--channel", "CT"]
    ran = CliRunner().invoke(app, ["segment", "A", *words[::-1], "-o", str(out), *drawn])
    assert ran.exit_code == 0, ran.output
    assert np.array_equal(nibabel.load(out).get_fdata(), found.mask) and (tmp_path / "m.png").is_file()


def test_words_of_the_command_line():
    assert name_channels(["scan.nii.gz"]) == "scan.nii.gz"
    assert name_channels(["t1=a.nii", "t2=b=c.nii"]) == {"t1": "a.nii", "t2": "b=c.nii"}
    for words, said in ((["a.nii", "t2=b.nii"], "must be NAME=FILE"), (["t=a", "t=b"], "given twice")):
        with pytest.raises(InlayError, match=said):
            name_channels(words)


def test_golden_and_random_inputs_have_all_channels():
    task, processor = TASKS["volume-segmentation"], VolumeProcessor(None, (4, 6, 8), channels=NAMES)
    golden = task.golden_inputs(None, processor)["pixel_values"]
    one = task.golden_inputs(None, VolumeProcessor(None, (4, 6, 8)))["pixel_values"]
    assert golden.shape == (1, 3, 24, 32, 28) and torch.equal(golden[:, :1], one)
    assert not torch.equal(golden[:, 0], golden[:, 1])
    assert task.random_inputs(None, processor)["pixel_values"].shape == (1, 3, 4, 6, 8)


def test_neither_embedded_channel_tells_the_classes_by_itself():
    """Balls are brighter or darker in each channel at random; whether both agree tells the class."""
    data = load_volumes("builtin:channels")
    assert list(data.channels) == ["first", "second"] and set(data.channels.values()) == {"mr"}
    case = data.train[0]
    bright = [
        (channel > np.median(channel[case.label == 0][channel[case.label == 0] > channel.mean() / 2]))
        for channel in case.image
    ]
    both = bright[0] == bright[1]
    assert both[case.label == 1].mean() > 0.8 and both[case.label == 2].mean() < 0.2


def test_axes_of_channels_that_do_not_fit_are_those_of_their_files(tmp_path):
    """Of a scan that is stored in another order than D, H, W too."""
    turned = np.array([[0, 0, 1.0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    for name, shape, affine in (("a", (4, 5, 6), turned), ("b", (4, 5, 7), turned), ("c", (4, 5, 6), np.eye(4))):
        write_volume(tmp_path / f"{name}.nii.gz", np.ones(shape, np.float32), affine)
    files = {name: tmp_path / f"{name}.nii.gz" for name in "abc"}
    for second, words in (("b", r"shape 4x5x7 and not 4x5x6 \(X, Y, Z\)"), ("c", "an affine that moves a corner by")):
        with pytest.raises(InlayError, match=rf"{second}.nii.gz', the channel channel_1 .*: it has {words}"):
            read_image(Case("x", (files["a"], files[second])))

"""Whole scans by windows: against MONAI, with prompts and flips, and from the command line."""

import gzip
import json
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from peft import get_peft_model
from PIL import Image

from inlay import InlayError, VolumeSession, segment
from inlay.cli import app as cli
from inlay.tasks.volumes.obedience import lift_clicked
from inlay.tasks.volumes.scan import VolumeProcessor
from inlay.tasks.volumes.windows import ScanPrompts
from methods.volumes import build, settings
from places import SHARED
from tasks.volumes.standin import LABELS, adapter, blobs

HIPPOCAMPUS = SHARED / "hippocampus_msd04" / "dev"
# Voxel index to mm: left-posterior-superior, with axes swapped, unequal spacing and an origin.
TURNED = np.array([[0, -1.5, 0, 40.0], [-0.8, 0, 0, 30.0], [0, 0, 2.0, -50.0], [0, 0, 0, 1.0]])


def save(path, array, affine=TURNED, units="mm"):
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units(units)
    image.header["descrip"] = b"a scan"
    image.header.set_slope_inter(2.0, 3.0)
    image.to_filename(path)
    return path


@pytest.fixture
def scan(tmp_path):
    return save(tmp_path / "scan.nii.gz", blobs((22, 30, 41)))


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_without_prompts_it_is_monais_sliding_window(scan, overlap, batch_size):
    given = adapter()
    read = given.processor.read(scan)

    def predictor(pixels):
        return given.model(pixel_values=pixels).logits.softmax(1)

    with torch.no_grad():
        wanted = sliding_window_inference(read.image[None], (16, 16, 16), 1, predictor, overlap, mode="gaussian")[0]
    found = segment(given, read, overlap=overlap, batch_size=batch_size, keep_probabilities=True)
    own = given.processor.back(wanted, read, "linear")
    assert np.abs(found.probabilities - own).max() < 1e-3
    sure = np.sort(own, 0)[-1] - np.sort(own, 0)[-2] > 1e-4
    assert (found.mask == own.argmax(0))[sure].all() and sure.mean() > 0.99
    assert found.mask.dtype == np.uint8 and set(np.unique(found.mask)) == {0, 1, 2}


def test_a_scan_smaller_than_a_window_is_padded_as_monai_pads(tmp_path):
    given, path = adapter(crop=(16, 24, 16)), save(tmp_path / "small.nii", blobs((9, 30, 12)))
    read = given.processor.read(path)

    def predictor(pixels):
        return given.model(pixel_values=pixels).logits.softmax(1)

    with torch.no_grad():
        wanted = sliding_window_inference(read.image[None], (16, 24, 16), 1, predictor, 0.5, mode="gaussian")[0]
    found = segment(given, read, keep_probabilities=True)
    assert found.mask.shape == (9, 30, 12)
    assert np.abs(found.probabilities - given.processor.back(wanted, read, "linear")).max() < 1e-3


def test_on_a_finer_own_grid_probabilities_are_interpolated(tmp_path):
    given = adapter(crop=(12, 16, 16), spacing_mm=(3.0, 1.7, 2.0))
    read = given.processor.read(save(tmp_path / "scan.nii.gz", blobs((40, 30, 44))))
    assert read.image.shape[1] == 29 and read.image.shape[2] < 40

    def predictor(pixels):
        return given.model(pixel_values=pixels).logits.softmax(1)

    with torch.no_grad():
        wanted = sliding_window_inference(read.image[None], (12, 16, 16), 1, predictor, 0.5, mode="gaussian")[0]
    found = segment(given, read, keep_probabilities=True)
    own = given.processor.back(wanted, read, "linear")
    assert np.abs(found.probabilities - own).max() < 2e-3
    sure = np.sort(own, 0)[-1] - np.sort(own, 0)[-2] > 1e-4
    assert (found.mask == own.argmax(0))[sure].all()


def test_points_and_boxes_reach_their_place_in_every_orientation(tmp_path):
    generator = np.random.default_rng(0)
    for flips in (False, True):
        for _ in range(4):
            turn = np.eye(4)
            turn[:3, :3] = np.eye(3)[generator.permutation(3)] * generator.choice([-1, 1], 3) * [1.5, 0.8, 2.0]
            path = save(tmp_path / "flat.nii.gz", np.zeros((22, 30, 41), np.int16), turn)
            found = segment(
                adapter(), path, points=[(4, 25, 33), (15, 6, 9, "dark"), (10, 10, 20, 0)],
                boxes=[(18, 20, 36, 14, 28, 30, 2)], flips=flips,
            )  # fmt: skip
            wanted = np.zeros((22, 30, 41), np.uint8)
            for x, y, z, label in ((4, 25, 33, 1), (15, 6, 9, 2)):
                at = np.stack(np.meshgrid(*(np.arange(n) for n in wanted.shape), indexing="ij"), -1)
                wanted[((at - (x, y, z)) ** 2).sum(-1) <= 4] = label
            wanted[14:19, 20:29, 30:37] = 2
            # Windows without the prompt say otherwise where they overlap: the far side of a ball may be cut.
            right = found.mask == wanted
            assert right.mean() > 0.995
            assert found.mask[4, 25, 33] == 1 and found.mask[15, 6, 9] == 2 and found.mask[16, 24, 33] == 2
            assert not found.mask[wanted == 0].any()


def test_windows_get_the_prompts_that_fall_into_them(scan):
    given = adapter()
    read = given.processor.read(scan)
    # (d, h, w) of the own voxel (4, 25, 33): the affine swaps x and y and reverses both.
    d, h, w = read.to_grid((4, 25, 33))
    segment(given, read, points=[(4, 25, 33, 2)], batch_size=8)
    told = [(points, labels) for points, labels, *_ in given.model.seen if points is not None]
    shape = read.image.shape[1:]
    starts = [sorted({*range(0, n - 15, 8), n - 16}) for n in shape]
    holding = [[s for s in axis if s - 0.5 <= p <= s + 15.5] for axis, p in zip(starts, (d, h, w), strict=True)]
    wanted = sorted((d - a, h - b, w - c) for a in holding[0] for b in holding[1] for c in holding[2])
    assert sorted(tuple(p) for points, _ in told for p in points[:, 0].tolist()) == [pytest.approx(t) for t in wanted]
    assert all((labels == 2).all() for _, labels in told)
    assert given.model.encoded == len(starts[0]) * len(starts[1]) * len(starts[2])


def test_flips_are_averaged(scan):
    """A model that says bright in the half of low indices: with flips no half is left."""
    given = adapter(crop=(41, 30, 22))

    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def forward(self, pixel_values):
            logits = torch.zeros(len(pixel_values), 3, *pixel_values.shape[2:])
            for axis in range(3):
                half = pixel_values.shape[axis + 2] // 2
                logits[:, 1].narrow(axis + 1, 0, half).add_(axis + 1)
            return type("Output", (), {"logits": logits})

    given.model = Half()
    plain = segment(given, scan, keep_probabilities=True).probabilities.astype(np.float32)
    mean = segment(given, scan, keep_probabilities=True, flips=True).probabilities.astype(np.float32)
    every = [plain[(slice(None), *(slice(None, None, s) for s in steps))] for steps in np.ndindex(2, 2, 2)
             for steps in [tuple(1 - 2 * np.array(steps))]]  # fmt: skip
    assert np.abs(plain - plain[:, ::-1]).max() > 0.1
    inner = (slice(None), slice(None), slice(None), slice(0, 20))  # an odd axis has no middle: leave it out
    assert np.abs(np.mean(every, 0) - mean)[inner].max() < 2e-3


@pytest.mark.parametrize("flip", [(0,), (2,), (0, 1)])
def test_only_axes_that_training_mirrored_are_averaged(spatial, flip, tmp_path):
    """2, 4 or 8 versions, each by torch's flip; and none at all for an adapter that was trained without."""
    spatial.processor = VolumeProcessor(None, (16, 20, 24), flip=flip)
    read = spatial.processor.read(save(tmp_path / "scan.nii.gz", blobs((22, 30, 22))))  # two windows along each axis
    every = [[]]
    for axis in flip:
        every += [[*axes, axis + 2] for axes in every]
    assert len(every) == 2 ** len(flip)

    def predictor(pixels):
        return sum(spatial.model(pixel_values=pixels.flip(a)).logits.softmax(1).flip(a) for a in every) / len(every)

    with torch.no_grad():
        wanted = sliding_window_inference(read.image[None], (16, 20, 24), 1, predictor, 0.5, mode="gaussian")[0]
    found = segment(spatial, read, flips=True, keep_probabilities=True).probabilities
    assert np.abs(found - spatial.processor.back(wanted, read, "linear")).max() < 1e-3


def test_flips_of_an_adapter_that_was_trained_without_are_refused(scan, tmp_path, capsys, monkeypatch):
    given = adapter(flip=())
    with pytest.raises(InlayError, match=r"was not trained on mirrored scans, .* leave flips out"):
        segment(given, tmp_path / "is not even read.nii.gz", flips=True)
    assert not given.model.encoded
    monkeypatch.setattr("inlay.adapters.load.load_adapter", lambda *_, **__: adapter(flip=()))
    monkeypatch.setattr(sys, "argv", ["inlay", "segment", "any", str(scan), "-o", str(tmp_path / "m.nii"), "--flips"])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert status.value.code == 2 and "leave flips out" in capsys.readouterr().err
    assert not (tmp_path / "m.nii").exists()


@pytest.mark.parametrize("values", [(1000, 2000), (1, 4), (2, 1), (300, 7), (70000, 2**31 - 1)])
def test_a_mask_has_the_numbers_of_the_label_maps(tmp_path, scan, values):
    """Voxel by voxel what an adapter of classes 1 and 2 gives, under other numbers; in file, volumes and session."""
    plain = segment(adapter(), scan, points=[(4, 25, 33, "dark")])
    found = segment(adapter(values=values), scan, points=[(4, 25, 33, values[1])], largest=False)
    wanted = np.array([0, *values])[plain.mask]
    assert np.array_equal(found.mask, wanted) and found.volumes_ml == pytest.approx(plain.volumes_ml)
    assert found.names == dict(zip(values, LABELS, strict=True)) and np.array_equal(found.class_mask, plain.mask)
    image = nib.load(found.save(tmp_path / "mask.nii.gz"))
    assert np.array_equal(np.asarray(image.dataobj), wanted) and image.get_data_dtype() == found.mask.dtype
    assert found.mask.dtype == (np.uint8 if max(values) < 256 else np.int16 if max(values) < 2**15 else np.int32)
    (told,) = (extension.get_content() for extension in image.header.extensions)
    told = told.decode() if isinstance(told, bytes) else told
    assert json.loads(told) == {"labels": {"0": "background", **{str(v): n for v, n in found.names.items()}}}
    session = VolumeSession(adapter(values=values), scan)
    first = session.click((4, 25, 33))
    assert first[4, 25, 33] == values[0] and np.array_equal(first, session.segmentation.mask)
    assert session.click((15, 6, 9), label=values[1])[15, 6, 9] == values[1]
    assert session.box((14, 20, 30), (18, 28, 36), label="dark")[16, 24, 33] == values[1]
    assert set(np.unique(session.mask)) <= {0, *values} and session.segmentation.names == found.names
    kept = segment(adapter(values=values), scan, points=[(4, 25, 33, "dark")], largest=True)
    both = segment(adapter(), scan, points=[(4, 25, 33, "dark")], largest=True)
    assert np.array_equal(kept.class_mask, both.mask)


def test_a_prompt_names_a_class_by_its_number_in_the_mask(scan):
    for label in (1, "1", 3, 2001):
        with pytest.raises(InlayError, match="the adapter has 0 background, 1000 bright, 2000 dark"):
            segment(adapter(values=(1000, 2000)), scan, points=[(4, 25, 33, label)])
    for label in (2000, "2000", "dark"):
        found = segment(adapter(values=(1000, 2000)), scan, points=[(4, 25, 33, label)])
        assert found.mask[4, 25, 33] == 2000


@pytest.mark.parametrize(("unit", "mm"), [("meter", 1000.0), ("micron", 0.001), ("unknown", 1.0)])
def test_volumes_are_in_ml_and_the_mask_in_the_scans_own_unit(tmp_path, unit, mm):
    path = save(tmp_path / "scan.nii.gz", blobs((22, 30, 41)), units=unit)
    plain = segment(adapter(), save(tmp_path / "mm.nii.gz", blobs((22, 30, 41))))
    found = segment(adapter(), path)
    assert np.array_equal(found.mask, plain.mask) and np.allclose(found.affine[:3], plain.affine[:3] * mm)
    assert found.volumes_ml == pytest.approx({name: v * mm**3 for name, v in plain.volumes_ml.items()})
    own, image = nib.load(path), nib.load(found.save(tmp_path / "mask.nii.gz"))
    assert np.array_equal(own.affine, image.affine) and own.header.get_xyzt_units() == image.header.get_xyzt_units()


@pytest.mark.parametrize("how", ["same", "other spelling", "symbolic link", "hard link", "link to its folder"])
@pytest.mark.parametrize("by", ["segment", "predict", "save"])
def test_the_scan_is_never_overwritten(tmp_path, scan, how, by, capsys, monkeypatch):
    before = scan.read_bytes()
    out = {
        "same": scan,
        "other spelling": tmp_path / "x" / ".." / scan.name,
        "symbolic link": tmp_path / "link.nii.gz",
        "hard link": tmp_path / "hard.nii.gz",
        "link to its folder": tmp_path / "folder" / scan.name,
    }[how]
    (tmp_path / "x").mkdir()
    (tmp_path / "link.nii.gz").symlink_to(scan)
    (tmp_path / "hard.nii.gz").hardlink_to(scan)
    (tmp_path / "folder").symlink_to(tmp_path)
    if by == "save":
        with pytest.raises(InlayError, match="is the scan itself"):
            segment(adapter(), scan).save(out)
    elif by == "predict":
        with pytest.raises(InlayError, match="is the scan itself"):
            adapter().task.prepare([str(scan)], {"out": out})
    else:
        status, _, err = run(capsys, monkeypatch, "any", scan, "-o", out)
        assert status == 2 and "is the scan itself" in err
    assert scan.read_bytes() == before
    found = segment(adapter(), scan).save(tmp_path / "other.nii.gz")
    assert found.is_file() and segment(adapter(), scan).save(found) == found, "a mask may be written anew"


def test_two_orientations_get_a_word(tmp_path, scan, caplog):
    image = nib.load(scan)
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine @ np.diag([-1, 1, 1, 1]), 1)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), scan)
    segment(adapter(), scan)
    assert caplog.text.count("its sform and its qform") == 1 and str(scan) in caplog.text


def test_only_the_largest_component_stays(tmp_path):
    image = np.zeros((24, 24, 24), np.int16)
    image[2:10, 2:10, 2:10] = 100
    image[15:20, 15:20, 15:20] = 100
    image[14:22, 3:9, 14:22] = -100
    path = save(tmp_path / "scan.nii.gz", image)
    every, largest = segment(adapter(), path), segment(adapter(), path, largest=True)
    assert every.mask[17, 17, 17] == 1 and every.mask[5, 5, 5] == 1 and every.mask[17, 5, 17] == 2
    assert largest.mask[17, 17, 17] == 0 and largest.mask[5, 5, 5] == 1 and largest.mask[17, 5, 17] == 2
    assert (largest.mask == np.where((every.mask == 1) & (np.indices(image.shape)[0] > 12), 0, every.mask)).all()


@pytest.mark.parametrize("name", ["mask.nii", "mask.nii.gz"])
@pytest.mark.parametrize("source", ["file", "memory", "npz"])
def test_a_mask_is_saved_on_the_scans_grid(tmp_path, scan, name, source):
    given = adapter()
    if source == "npz":
        np.savez(tmp_path / "scan.npz", image=blobs((22, 30, 41)), affine=TURNED)
        scan = tmp_path / "scan.npz"
    found = segment(given, given.processor.read(scan) if source == "memory" else scan)
    assert found.save(tmp_path / name) == tmp_path / name
    image = nib.load(tmp_path / name)
    assert image.get_data_dtype() == np.uint8 and np.array_equal(np.asarray(image.dataobj), found.mask)
    assert np.allclose(image.affine, TURNED, atol=1e-5) and image.header.get_xyzt_units()[0] == "mm"
    assert np.allclose(image.header.get_zooms(), (0.8, 1.5, 2.0), atol=1e-5)
    if source == "file":
        own = nib.load(scan).header
        assert [image.header[f"{k}form_code"] for k in "sq"] == [own[f"{k}form_code"] for k in "sq"]
    assert found.volumes_ml == {
        label: pytest.approx((found.mask == k).sum() * 0.8 * 1.5 * 2.0 / 1000) for k, label in enumerate(LABELS, 1)
    }
    assert not [p for p in tmp_path.iterdir() if "inlay-new" in p.name]


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_the_header_is_the_scans_but_for_what_its_voxels_meant(tmp_path, kind):
    image = kind(blobs((20, 22, 24))[..., None], TURNED)
    image.set_qform(TURNED, 1)
    image.set_sform(TURNED, 4)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_intent("t test", (3,))
    image.header["cal_max"] = 500
    image.to_filename(tmp_path / "scan.nii.gz")
    header = nib.load(segment(adapter(), tmp_path / "scan.nii.gz").save(tmp_path / "mask.nii.gz")).header
    assert isinstance(header, kind.header_class) and header.get_data_shape() == (20, 22, 24)
    assert (header["qform_code"], header["sform_code"], header.get_xyzt_units()) == (1, 4, ("mm", "sec"))
    assert header.get_intent()[0] == "none" and header["cal_max"] == 0 and header.get_slope_inter() == (None, None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"points": [(1, 2)]}, "a point as x, y, z"),
        ({"points": [(22, 2, 2)]}, r"a point \(22, 2, 2\) lies outside the scan of 22 x 30 x 41 voxels"),
        ({"points": [(1, 2, 3, 5)]}, "1 bright, 2 dark"),
        ({"points": [(1, 2, 3, "liver")]}, "'liver'"),
        ({"points": [(1, float("nan"), 3)]}, r"a point \(1, nan, 3\) lies outside the scan"),
        ({"boxes": [(1, 2, 3, 4, 5)]}, "a box as"),
        ({"boxes": [(1, 2, 3, 4, 5, 60)]}, r"a box \(4, 5, 60\) lies outside the scan"),
        ({"boxes": [(1, 2, 3, 4, 5, 6, 0)]}, "a box needs a class, and 0 is the background"),
        ({"overlap": 1.0}, "overlap must be from 0 to below 1 .* got 1.0"),
        ({"batch_size": 0}, "batch_size at least 1, got 0.5 and 0"),
    ],
)
def test_mistakes_are_named(scan, options, sentence):
    with pytest.raises(InlayError, match=sentence):
        segment(adapter(), scan, **options)


def test_wrong_files_and_adapters_are_named(tmp_path, scan, pictures, digits_adapter):
    from inlay import load_adapter

    with pytest.raises(InlayError, match=r"none\.nii\.gz"):
        segment(adapter(), tmp_path / "none.nii.gz")
    with pytest.raises(InlayError, match=r"0\.png"):
        segment(adapter(), pictures / "0.png")
    nib.Nifti1Image(np.zeros((5, 6), np.float32), np.eye(4)).to_filename(tmp_path / "flat.nii")
    with pytest.raises(InlayError, match=r"flat\.nii"):
        segment(adapter(), tmp_path / "flat.nii")
    with pytest.raises(InlayError, match="is for image-classification, not for volume-segmentation"):
        segment(load_adapter(digits_adapter), scan)
    found = segment(adapter(), scan)
    with pytest.raises(InlayError, match=r"ending with \.nii\.gz or \.nii"):
        found.save(tmp_path / "mask.png")
    with pytest.raises(InlayError, match="folder that exists"):
        found.save(tmp_path / "nowhere" / "mask.nii")


def test_the_bytes_of_a_file_are_segmented_as_the_file(tmp_path, scan):
    """And the mask in memory is that which is saved."""
    found = segment(adapter(), scan.read_bytes())
    saved = segment(adapter(), scan).save(tmp_path / "mask.nii.gz")
    assert gzip.decompress(found.to_bytes()) == gzip.decompress(saved.read_bytes())
    assert found.save(tmp_path / "again.nii.gz").is_file()


def test_the_work_ends_between_windows(scan):
    passes = []

    def stop_at_third():
        passes.append(len(passes))
        if len(passes) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment(adapter(), scan, before_windows=stop_at_third)
    assert passes == [0, 1, 2]


def test_the_encoder_runs_once_for_a_window(tmp_path):
    given = adapter()
    session = VolumeSession(given, save(tmp_path / "scan.nii.gz", np.zeros((60, 40, 50), np.int16)))
    assert not session.mask.any() and given.model.encoded == 0
    first = session.click((20, 20, 20))
    assert first[20, 20, 20] == 1 and given.model.encoded == 1
    second = session.click((22, 20, 25), label="dark")
    assert second[22, 20, 25] == 2 and second[20, 20, 20] == 1
    third = session.click((20, 20, 21), positive=False)
    assert third[20, 20, 21] == 0
    assert (given.model.encoded, given.model.decoded) == (1, 3)
    points, labels, _, before = given.model.seen[-1]
    assert labels.tolist() == [[1, 2, 0]] and points.shape == (1, 3, 3) and before.shape == (1, 3, 16, 16, 16)
    assert given.model.seen[0][3] is None
    far = session.click((50, 30, 40))
    assert far[50, 30, 40] == 1 and (far[:30] == third[:30]).all()
    assert (given.model.encoded, given.model.decoded) == (2, 4)
    assert given.model.seen[-1][1].tolist() == [[1]], "a window gets the prompts inside it alone"
    assert (session.undo() == third).all() and (session.undo() == second).all() and (session.undo() == first).all()
    assert (session.click((22, 20, 25), label=2) == second).all()
    assert given.model.encoded == 2, "undo keeps the encoding"
    assert not session.reset().any() and not session.undo().any()
    session.click((20, 20, 20))
    assert given.model.encoded == 3


def test_a_window_is_centred_on_the_first_click_and_stays_in_the_scan(tmp_path):
    given = adapter(crop=(8, 10, 12))
    path = save(tmp_path / "scan.nii.gz", np.zeros((40, 40, 40), np.int16), np.eye(4))
    session = VolumeSession(given, path)
    session.click((20, 21, 22))
    assert given.model.seen[-1][0].tolist() == [[[4, 5, 6]]]
    session.reset()
    session.click((39, 1, 0))
    assert given.model.seen[-1][0].tolist() == [[[0, 1, 11]]]
    mask = session.box((10, 10, 10), (12, 13, 14), label=2)
    assert (mask[10:13, 10:14, 10:15] == 2).all() and (mask == 2).sum() == 3 * 4 * 5
    assert session.segmentation.volumes_ml["dark"] == pytest.approx(0.06)


def test_overlapping_windows_are_blended(tmp_path):
    given = adapter()
    session = VolumeSession(given, save(tmp_path / "scan.nii.gz", blobs((40, 40, 40)), np.eye(4)))
    session.click((12, 12, 12), label=1)
    mask = session.click((21, 12, 12), label=1)
    assert given.model.encoded == 2 and mask[12, 12, 12] == 1 and mask[21, 12, 12] == 1
    session.click((16, 12, 12), positive=False)
    assert given.model.encoded == 2 and given.model.decoded == 4, "both windows hold the third click"
    assert session.mask[16, 12, 12] == 0


def test_a_failed_click_changes_nothing(tmp_path):
    session = VolumeSession(adapter(), save(tmp_path / "scan.nii.gz", blobs((20, 20, 20))))
    mask = session.click((5, 5, 5))
    with pytest.raises(InlayError, match=r"\(5, 5, 25\) lies outside the scan"):
        session.click((5, 5, 25))
    with pytest.raises(InlayError, match="'x'"):
        session.click((5, 5, 5), label="x")
    assert (session.mask == mask).all()
    assert not session.undo().any()


def test_one_window_answers_as_segment_does(tmp_path):
    """A scan that fits into one window: session and `segment` see the same."""
    path = save(tmp_path / "scan.nii.gz", blobs((14, 15, 16)))
    found = segment(adapter(), path, points=[(4, 5, 6)], keep_probabilities=True)
    mask = VolumeSession(adapter(), path).click((4, 5, 6))
    close = np.sort(found.probabilities, 0)[-1] - np.sort(found.probabilities, 0)[-2] < 0.01
    assert (mask == found.mask)[~close].all() and close.mean() < 0.05


@pytest.fixture
def spatial():
    """A tiny SAM with the 3D spatial adapter, its trained parts at random."""
    given = adapter(crop=(16, 20, 24))
    given.model, given.labels = get_peft_model(build(), settings()), ["organ", "lesion"]
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in given.model.parameters():
            if parameter.requires_grad and parameter.ndim > 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    given.model.eval()
    return given


@pytest.mark.parametrize("flips", [False, True])
def test_an_adapted_sam_segments_as_monai_would(spatial, scan, flips):
    read = spatial.processor.read(scan)
    every = [[axis + 2 for axis in range(3) if i >> axis & 1] for i in range(8 if flips else 1)]

    def predictor(pixels):
        return sum(spatial.model(pixel_values=pixels.flip(a)).logits.softmax(1).flip(a) for a in every) / len(every)

    with torch.no_grad():
        wanted = sliding_window_inference(read.image[None], (16, 20, 24), 4, predictor, 0.25, mode="gaussian")[0]
    found = segment(spatial, scan, overlap=0.25, batch_size=4, flips=flips, keep_probabilities=True)
    own = spatial.processor.back(wanted, read, "linear")
    assert np.abs(found.probabilities - own).max() < 1e-3
    assert len(np.unique(found.mask)) > 1 and (found.mask == own.argmax(0)).mean() > 0.999


def test_prompts_change_what_an_adapted_sam_says(spatial, scan):
    plain = segment(spatial, scan, keep_probabilities=True).probabilities
    for prompt in ({"points": [(4, 25, 33, "lesion")]}, {"boxes": [(2, 20, 30, 8, 28, 36, "lesion")]}):
        told = segment(spatial, scan, batch_size=3, keep_probabilities=True, **prompt).probabilities
        assert np.abs(told - plain)[:, 4, 25, 33].max() > 1e-3
        assert (told == plain).all(0).mean() > 0.2, "far windows say what they said"


def test_an_adapted_sam_encodes_once_and_hears_every_click(spatial, scan):
    runs = []
    spatial.model.base_model.model.vision_encoder.register_forward_hook(lambda *_: runs.append(1))
    session, read = VolumeSession(spatial, scan), spatial.processor.read(scan)
    points = [(10, 14, 20), (8, 17, 22), (12, 11, 18)]
    masks = [session.click(points[0], label=2), session.click(points[1], positive=False), session.click(points[2])]
    assert len(runs) == 1
    start = [min(max(0, round(c) - n // 2), size - n) for c, n, size in
             zip(read.to_grid(points[0]), (16, 20, 24), read.image.shape[1:], strict=True)]  # fmt: skip
    box = tuple(slice(first, first + n) for first, n in zip(start, (16, 20, 24), strict=True))
    places = torch.tensor(read.to_grid(points) - np.array(start), dtype=torch.float32)[None]
    given = {"pixel_values": read.image[(slice(None), *box)][None]}
    for i, mask in enumerate(masks):
        with torch.no_grad():
            output = spatial.model(
                input_points=places[:, : i + 1], input_labels=torch.tensor([[2, 0, 1][: i + 1]]), **given
            )
        said = replace(ScanPrompts.none(), points=places[0, : i + 1], labels=torch.tensor([2, 0, 1][: i + 1]))
        logits = lift_clicked(output.logits, [said]).half().float()
        given = {"image_embeddings": output.image_embeddings, "input_masks": logits}
        wanted = torch.zeros(read.image.shape[1:], dtype=torch.uint8)
        wanted[box] = logits[0].argmax(0).byte()
        assert (spatial.processor.back(wanted, read) == mask).mean() > 0.999 and mask.any()
    assert (session.undo() == masks[1]).all() and (session.undo() == masks[0]).all() and len(runs) == 2


def run(capsys, monkeypatch, *arguments):
    """The command in this process: exit status, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["inlay", "segment", *map(str, arguments)])
    monkeypatch.setattr("inlay.adapters.load.load_adapter", lambda *_, **__: adapter())
    with pytest.raises(SystemExit) as status:
        cli.main()
    return int(status.value.code or 0), *capsys.readouterr()


def test_the_command_compares_with_a_second_mask(capsys, monkeypatch, tmp_path, scan):
    mask, again, picture, page = (tmp_path / name for name in ("mask.nii.gz", "n.nii.gz", "m.png", "m.html"))
    assert run(capsys, monkeypatch, "any", scan, "-o", mask)[0] == 0
    shown = ["--montage", picture, "--html", page]
    assert run(capsys, monkeypatch, "any", scan, "-o", again, *shown, "--compare", mask)[0] == 0
    white = (np.asarray(Image.open(picture).convert("RGB")) == 255).all(-1)
    assert white.sum() > 200 and '"reference": "H4s' in page.read_text(encoding="utf-8")  # a mask, gzipped
    for options, sentence in (
        (["--compare", mask], "--compare shows a second mask in --montage or --html"),
        ([*shown, "--compare", tmp_path / "none.nii"], "none.nii' is no file; give a mask on the scan's grid"),
    ):
        status, _, err = run(capsys, monkeypatch, "any", scan, "-o", again, *options)
        assert status == 2 and sentence in err


def test_the_command_writes_mask_picture_and_page(capsys, monkeypatch, tmp_path, scan):
    mask, picture, page = (tmp_path / name for name in ("mask.nii.gz", "m.png", "m.html"))
    given = ["any", scan, "-o", mask, "--point", "4,25,33", "--point", "15, 6, 9,dark", "--negative", "10,10,20"]
    status, out, _ = run(
        capsys, monkeypatch, *given, "--box", "18,20,36,14,28,30,2", "--montage", picture, "--html", page, "--json"
    )
    facts = json.loads(out)
    wanted = segment(
        adapter(), scan, points=[(4, 25, 33), (15, 6, 9, 2), (10, 10, 20, 0)], boxes=[(14, 20, 30, 18, 28, 36, "dark")]
    )
    assert status == 0 and np.array_equal(np.asarray(nib.load(mask).dataobj), wanted.mask)
    assert facts["volumes_ml"] == pytest.approx(wanted.volumes_ml)
    assert [facts[k] for k in ("mask", "montage", "html")] == [str(mask), str(picture), str(page)]
    assert picture.stat().st_size > 10_000 and page.stat().st_size > 2_000_000
    status, out, _ = run(capsys, monkeypatch, *given, "--largest", "--flips", "--overlap", 0.25)
    assert status == 0 and out.splitlines()[0].startswith("bright: ") and out.splitlines()[2] == f"mask: {mask}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-o", "{tmp}/mask.png"], "ending with .nii.gz or .nii or .nrrd"),
        (["-o", "{tmp}/m.nii", "--html", "{tmp}/m.png"], "ending with .html"),
        (["-o", "{tmp}/m.nii", "--point", "1,2"], "'1,2' must be x,y,z"),
        (["-o", "{tmp}/m.nii", "--point", "1,2,here"], "'1,2,here'"),
        (["-o", "{tmp}/m.nii", "--point", "1,2,3,liver"], "'liver'"),
        (["-o", "{tmp}/m.nii", "--negative", "1,2,300"], "(1, 2, 300) lies outside the scan"),
        (["-o", "{tmp}/m.nii", "--box", "1,2,3"], "'1,2,3' must be x0,y0,z0,x1,y1,z1"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(capsys, monkeypatch, tmp_path, scan, arguments, sentence):
    before = sorted(tmp_path.iterdir())
    status, out, err = run(capsys, monkeypatch, "any", scan, *[text.format(tmp=tmp_path) for text in arguments])
    assert status == 2 and out == "" and sentence in err and err.startswith("error: ") and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampus scans are not on this machine")
def test_real_scans_come_back_on_their_own_grid(tmp_path):
    path = sorted((HIPPOCAMPUS / "imagesTr").glob("*.nii.gz"))[0]
    given = adapter(crop=(32, 32, 32))
    given.processor = VolumeProcessor((1.0, 1.0, 1.0), (32, 32, 32))
    segment(given, path, points=[(17, 25, 17)]).save(tmp_path / "mask.nii.gz")
    own, image = nib.load(path), nib.load(tmp_path / "mask.nii.gz")
    assert image.shape == own.shape and np.array_equal(image.affine, own.affine)
    assert image.header.get_xyzt_units() == own.header.get_xyzt_units()
    assert image.get_data_dtype() == np.uint8 and np.asarray(image.dataobj)[17, 25, 17] == 1

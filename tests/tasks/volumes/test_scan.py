"""From a scan's own grid to the model's and back, over all orientations, spacings and kinds of voxels."""

import itertools
import json
import sys
from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch

from inlay.errors import InlayError
from inlay.tasks.volumes.data import Case, VolumeData
from inlay.tasks.volumes.formats import write_volume
from inlay.tasks.volumes.grid import reorient_from_ras, reorient_to_ras, resize, spacing_of
from inlay.tasks.volumes.scan import VolumeProcessor, find_window, median_spacing

RANDOM = np.random.default_rng(1)
SHAPE, SPACING = (7, 9, 5), (0.8, 1.1, 3.0)  # x, y, z in RAS


def affines(oblique=False):
    """Every flip and permutation of an anisotropic grid; oblique ones are also turned by about 8 degrees."""
    turn = np.eye(3)
    if oblique:
        turn, _ = np.linalg.qr(np.eye(3) + np.array([[0, 0.1, -0.05], [-0.1, 0, 0.08], [0.05, -0.08, 0]]))
        turn *= np.sign(np.diag(turn))
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            own = np.zeros((4, 4))
            own[3, 3] = 1
            for axis in range(3):
                own[order[axis], axis] = flips[axis]
                own[order[axis], 3] = 0 if flips[axis] > 0 else SHAPE[order[axis]] - 1
            base = np.diag([*SPACING, 1.0])
            base[:3, :3] = turn @ base[:3, :3]
            base[:3, 3] = (-3, 5, 40)
            yield base @ own, order, flips


@pytest.fixture
def stored():
    """A scan in RAS, and the same as each orientation stores it."""
    generator = np.random.default_rng(0)
    ras, labels = generator.random(SHAPE, np.float32), generator.integers(0, 3, SHAPE, dtype=np.uint8)

    def store(order, flips):
        along = tuple(axis for axis in range(3) if flips[axis] < 0)
        return [np.ascontiguousarray(np.flip(a.transpose(order), along)) for a in (ras, labels)]

    return ras, labels, store


@pytest.mark.parametrize("oblique", [False, True])
def test_all_48_orientations_give_one_scan_and_come_back_exactly(stored, oblique):
    ras, labels, store = stored
    processor = VolumeProcessor(None, (4, 4, 4))
    wanted = torch.from_numpy(processor.normalise(ras).transpose(2, 1, 0).copy())
    for affine, order, flips in affines(oblique):
        image, truth = store(order, flips)
        scan = processor.read(Case("a", image, truth, affine))
        torch.testing.assert_close(scan.image[0], wanted, rtol=1e-5, atol=1e-6)
        assert torch.equal(scan.labels, torch.from_numpy(labels.transpose(2, 1, 0).astype(np.int64)))
        assert scan.spacing_mm == pytest.approx(SPACING[::-1])
        assert np.array_equal(processor.back(scan.labels, scan), truth)
        both = processor.back(torch.stack([scan.labels, scan.labels + 1]), scan)
        assert both.shape == (2, *truth.shape) and np.array_equal(both[1], truth + 1)


def test_nibabel_and_monai_agree(stored, tmp_path):
    """nibabel's canonical axes; MONAI's resampling to the grid of a scan, and back to the own one."""
    from monai.data import MetaTensor
    from monai.transforms import SpatialResample

    _, _, store = stored
    processor = VolumeProcessor((1.0, 0.6, 0.5), (4, 4, 4), "ct", 0.0, 1.0)
    for affine, order, flips in itertools.islice(affines(oblique=True), 0, None, 11):
        image, labels = store(order, flips)
        nibabel.save(nibabel.Nifti1Image(image, affine), tmp_path / "a.nii.gz")
        canonical = nibabel.as_closest_canonical(nibabel.load(tmp_path / "a.nii.gz"))
        view, grid = reorient_to_ras(image, affine)
        assert np.array_equal(view.transpose(2, 1, 0), canonical.get_fdata(dtype=np.float32))
        assert np.allclose(grid, canonical.affine, atol=1e-5)

        scan = processor.read(Case("a", image, labels, affine))
        ends = affine[:3, :3] @ scan.to_own([[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]]).T + affine[:3, 3:]
        new = np.eye(4)  # indices x, y, z = w, h, d of the scan to mm
        new[:3, :3], new[:3, 3] = ends[:, :3] - ends[:, 3:], ends[:, 3]
        to = {"dst_affine": torch.from_numpy(new), "spatial_size": scan.image.shape[:0:-1], "align_corners": False}
        source = MetaTensor(torch.from_numpy(image)[None], affine=torch.from_numpy(affine))
        smooth = SpatialResample(mode="bilinear", padding_mode="border")(source, **to)[0].numpy().transpose(2, 1, 0)
        assert np.allclose(scan.image[0].numpy(), smooth * 2 - 1, atol=1e-4)
        source = MetaTensor(torch.from_numpy(labels)[None].float(), affine=torch.from_numpy(affine))
        nearest = SpatialResample(mode="nearest", padding_mode="border")(source, **to)
        same = scan.labels.numpy() == nearest[0].numpy().transpose(2, 1, 0)
        assert same.mean() > 0.98  # centres that lie on an edge may fall to either side
        back = {"dst_affine": torch.from_numpy(affine), "spatial_size": image.shape, "align_corners": False}
        again = SpatialResample(mode="nearest", padding_mode="border")(nearest, **back)[0].numpy()
        assert (again == processor.back(scan.labels, scan)).mean() > 0.98


@pytest.mark.parametrize("spacing", [(0.7, 0.5, 0.4), (3.0, 0.6, 0.8), (5.0, 2.0, 2.0)])
def test_resampled_scans_come_back_on_their_grid(stored, spacing):
    _, _, store = stored
    processor = VolumeProcessor(spacing, (4, 4, 4))
    for affine, order, flips in affines():
        image, truth = store(order, flips)
        scan = processor.read(Case("a", image, truth, affine))
        assert scan.image.shape[1:] == scan.labels.shape
        assert scan.spacing_mm == pytest.approx(spacing, rel=0.35)
        # The whole field of view stays.
        extent = np.array(scan.labels.shape) * scan.spacing_mm
        assert extent == pytest.approx(np.array(SHAPE[::-1]) * SPACING[::-1])
        back = processor.back(scan.labels, scan)
        assert back.shape == truth.shape
        if all(new <= own for new, own in zip(spacing, SPACING[::-1], strict=True)):
            assert np.array_equal(back, truth)  # exact wherever voxels got no larger
        assert processor.back(scan.image, scan, "linear").shape == (1, *truth.shape)


def test_a_ramp_is_resampled_where_it_was():
    """A linear function of mm stays that function, on the new grid and back on the own one."""
    shape, affine = (12, 14, 10), np.diag([-0.8, 1.1, 3.0, 1.0])
    affine[:3, 3] = (30, -20, 10)
    index = np.indices(shape).reshape(3, -1).T
    weights = np.array([1.0, 2.0, -1.5])
    ramp = ((index @ affine[:3, :3].T + affine[:3, 3]) @ weights).reshape(shape).astype(np.float32)
    processor = VolumeProcessor((1.3, 0.5, 1.0), (4, 4, 4), "ct", -1.0, 1.0)
    processor.normalise = lambda array, channel: array
    scan = processor.read(Case("a", ramp, None, affine))
    grid = np.indices(scan.image.shape[1:]).reshape(3, -1).T
    own = scan.to_own(grid)
    wanted = ((own @ affine[:3, :3].T + affine[:3, 3]) @ weights).reshape(scan.image.shape[1:])
    inner = (slice(2, -2),) * 3
    assert np.allclose(scan.image[0].numpy()[inner], wanted[inner], atol=2e-2 * np.abs(ramp).max())
    back = processor.back(scan.image[0], scan, "linear")
    assert np.allclose(back[inner], ramp[inner], atol=2e-2 * np.abs(ramp).max())


def test_points_go_both_ways_and_hit_their_voxel(stored):
    _, _, store = stored
    for spacing in (None, (1.0, 0.4, 1.9)):
        processor = VolumeProcessor(spacing, (4, 4, 4))
        for affine, order, flips in affines(oblique=True):
            image, truth = store(order, flips)
            truth = np.zeros_like(truth)
            at = tuple(n // 2 for n in truth.shape)
            truth[at] = 1
            scan = processor.read(Case("a", image, truth, affine))
            point = scan.to_grid(at)
            assert scan.to_own(point) == pytest.approx(np.array(at))
            inside = np.argwhere(scan.labels.numpy() == 1)
            if len(inside):
                assert np.abs(inside.mean(0) - point).max() <= 1
            if spacing is None:
                assert point == pytest.approx(inside[0])
                assert scan.to_grid([at, at]).shape == (2, 3)


def test_thick_slices_and_single_slices():
    affine = np.diag([0.5, 0.5, 5.0, 1.0])
    scan = VolumeProcessor((1.0, 1.0, 1.0), (4, 4, 4)).read(Case("a", RANDOM.random((32, 24, 6)), None, affine))
    assert tuple(scan.image.shape) == (1, 30, 12, 16) and scan.spacing_mm == (1.0, 1.0, 1.0)
    one = VolumeProcessor((2.0, 1.0, 1.0), (4, 4, 4)).read(Case("a", RANDOM.random((32, 24, 1)), None, np.eye(4)))
    assert tuple(one.image.shape) == (1, 1, 24, 32)


def test_downsampling_averages():
    """A structure thinner than the new voxels is not lost."""
    values = np.zeros((1, 1, 64), np.float32)
    values[..., ::4] = 1
    small = resize(values, (1, 1, 8), "linear")
    assert small.shape == (1, 1, 8) and np.allclose(small[..., 1:-1], 0.25, atol=0.05)


def test_turned_back_inverts_turned():
    array = np.arange(24).reshape(2, 3, 4)
    for affine, _, _ in affines():
        view, _ = reorient_to_ras(array, affine)
        assert np.array_equal(reorient_from_ras(view, affine), array)
        assert np.array_equal(reorient_from_ras(np.stack([view, view]), affine)[1], array)


# Intensities


@pytest.mark.parametrize("top", [112.0, 4000.0, 1.7e6])
def test_intensity_is_robust_and_of_one_scale(top):
    image = np.random.default_rng(0).gamma(4, 0.1, (20, 20, 20)).astype(np.float32)
    wanted = VolumeProcessor(None, (8, 8, 8)).normalise(image)
    scaled = image * np.float32(top) + 5
    scaled[0, 0, 0] = 100 * top  # one hot voxel moves nothing
    found = VolumeProcessor(None, (8, 8, 8)).normalise(scaled)
    assert found.dtype == np.float32
    assert abs(found.mean()) < 1e-3 and found.std() == pytest.approx(1, abs=1e-3)
    assert np.abs(found - wanted)[1:].max() < 0.05


def test_constant_mostly_empty_and_integer_images():
    processor = VolumeProcessor(None, (8, 8, 8))
    for value in (0, 7, 1e6):
        assert not processor.normalise(np.full((4, 4, 4), value)).any()
    sparse = np.zeros((20, 20, 20), np.uint8)
    sparse[3, 3, 3:6] = 200
    assert processor.normalise(sparse).max() > 10  # under 0.5 % of the voxels, but all that there is
    a = np.random.default_rng(0).integers(0, 255, (8, 8, 8), dtype=np.uint8)
    assert np.allclose(processor.normalise(a), processor.normalise(a.astype(np.float64) * 3))


def test_ct_window_is_fixed():
    processor = VolumeProcessor(None, (8, 8, 8), "ct", -200, 300)
    assert processor.normalise([-1000, -200, 50, 300, 3000]).tolist() == [-1, -1, 0, 1, 1]


# Settings


def test_settings_survive_json():
    for processor in (VolumeProcessor(None, (8, 9, 10)), VolumeProcessor((1.5, 1, 2), (64, 64, 64), "ct", -100, 240.5)):
        again = VolumeProcessor.from_dict(json.loads(json.dumps(processor.to_dict())))
        assert again.to_dict() == processor.to_dict() and vars(again) == vars(processor)


@pytest.mark.parametrize(
    "change",
    [
        {"spacing_mm": [1, 1]},
        {"spacing_mm": [1, 1, 0]},
        {"spacing_mm": [1, 1, "2"]},
        {"spacing_mm": [1, 1, float("nan")]},
        {"crop": [8, 8]},
        {"crop": [8, 8, 0]},
        {"crop": [8, 8, 8.5]},
        {"crop": [8, 8, 10**9]},
        {"crop": None},
        {"intensity": "mr"},
        {"low": 5.0, "high": 5.0},
        {"high": None},
        {"high": float("inf")},
        {"more": 1},
    ],
)
def test_nonsense_is_refused(change):
    settings = VolumeProcessor(None, (8, 8, 8)).to_dict()
    with pytest.raises(InlayError, match=rf"^(?=.*{next(iter(change))}).*, got "):
        VolumeProcessor.from_dict(settings | change)
    for bad in ({}, None, [1], {"spacing_mm": None}):
        with pytest.raises(InlayError, match=r"a volume processor has the settings .*, got "):
            VolumeProcessor.from_dict(bad)


def test_median_spacing_and_modality_fit_a_processor(tmp_path):
    cases = []
    for i, z in enumerate((1.0, 3.0, 5.0)):
        path = tmp_path / f"{i}.nii"
        write_volume(path, np.zeros((3, 4, 5), np.int16), np.diag([0.7, -0.8, z, 1]))
        cases.append(Case(str(i), path))
    assert median_spacing(cases) == (3.0, 0.8, 0.7)
    data = VolumeData("a", tuple(cases), (), ("x",), "ct")
    assert VolumeProcessor.fitted(data, (8, 8, 8)).to_dict()["spacing_mm"] == [3.0, 0.8, 0.7]
    assert VolumeProcessor.fitted(data, (8, 8, 8), None).spacing_mm is None
    assert VolumeProcessor.fitted(data, (8, 8, 8)).intensity == "ct"


# Label maps and other input


def test_label_maps_must_lie_on_their_image_and_name_classes():
    image, labels = RANDOM.random((4, 5, 6)), np.zeros((4, 5, 6), np.uint8)
    labels[1, 1, 1], labels[2, 2, 2] = 4, 255
    read = VolumeProcessor(None, (4, 4, 4)).read
    found = read(Case("a", image, labels, None, (255, 4))).labels  # in the order of the classes
    assert (found[1, 1, 1], found[2, 2, 2], found.sum()) == (2, 1, 3)
    with pytest.raises(InlayError, match="'a' holds the labels 255; it may hold 0, 4"):
        read(Case("a", image, labels, None, (4,)))
    with pytest.raises(InlayError, match="shape 6x5x3 and not 6x5x4"):
        read(Case("a", image, labels[:3]))
    with pytest.raises(InlayError, match="numbers that are not whole"):
        read(Case("a", image, labels + 0.5))
    with pytest.raises(InlayError, match="holds the labels -1; it may hold 0 to"):
        read(Case("a", image, labels.astype(np.int16) - 1))


def test_a_label_map_stored_in_another_orientation_is_turned(tmp_path):
    image, labels = RANDOM.random((4, 5, 6)).astype(np.float32), np.random.default_rng(0).integers(0, 3, (4, 5, 6))
    write_volume(tmp_path / "i.nii", image, np.eye(4))
    other = np.diag([-1.0, 1, 1, 1])
    other[0, 3] = 3
    write_volume(tmp_path / "l.nii", labels[::-1], other)
    scan = VolumeProcessor(None, (4, 4, 4)).read(Case("a", tmp_path / "i.nii", tmp_path / "l.nii"))
    assert np.array_equal(scan.labels.numpy().transpose(2, 1, 0), labels)
    write_volume(tmp_path / "l.nii", labels, np.diag([1.0, 1, 2, 1]))
    with pytest.raises(InlayError, match=r"l\.nii' is not on the grid .* an affine that moves a corner by 5 mm"):
        VolumeProcessor(None, (4, 4, 4)).read(Case("a", tmp_path / "i.nii", tmp_path / "l.nii"))


def test_back_refuses_another_grid():
    processor = VolumeProcessor(None, (4, 4, 4))
    scan = processor.read(Case("a", RANDOM.random((4, 5, 6))))
    with pytest.raises(InlayError, match="grid 6x5x4 of 'a', got shape"):
        processor.back(np.zeros((4, 5, 6)), scan)
    assert spacing_of(np.diag([1.0, 2, 3, 1])) == (3.0, 2.0, 1.0)


def test_a_case_in_memory_is_checked():
    read = VolumeProcessor(None, (4, 4, 4)).read
    with pytest.raises(InlayError, match="affine of case 'a' is wrong: an affine that maps no space"):
        read(Case("a", np.zeros((3, 3, 3)), None, np.diag([1.0, 1, 0, 1])))
    for image in (np.zeros((3, 3)), np.full((3, 3, 3), np.nan)):
        with pytest.raises(InlayError, match="voxels of case 'a' must be finite numbers along three axes"):
            read(Case("a", image))


def test_without_the_extra_the_error_names_it(monkeypatch, tmp_path):
    write_volume(tmp_path / "a.nii", np.zeros((3, 3, 3)), np.eye(4))
    monkeypatch.setitem(sys.modules, "nibabel", None)
    for source in (tmp_path / "a.nii", Case("a", np.zeros((3, 3, 3)))):
        with pytest.raises(InlayError, match=r"pip install 'inlay\[volumes\]'"):
            VolumeProcessor(None, (4, 4, 4)).read(source)


def test_the_window_of_ct_holds_the_classes():
    """Liver at 60 HU between air and bone; a small case counts as much as a large one."""
    generator = np.random.default_rng(0)
    cases = []
    for name, side, level in (("large", 24, 60.0), ("small", 8, 100.0)):
        image = np.where(generator.random((side,) * 3) < 0.5, -1000.0, 1500.0)
        label = np.zeros(image.shape, np.uint8)
        label[2:6, 2:6, 2:6] = 1
        image[label == 1] = level + generator.uniform(-5, 5, 64)
        cases.append(Case(name, image.astype(np.float32), label))
    low, high = find_window(cases)
    inside = np.concatenate([case.image[case.label == 1] for case in cases])
    assert (low, high) == (np.floor(np.quantile(inside, 0.005)), np.ceil(np.quantile(inside, 0.995)))
    assert find_window([Case("empty", cases[0].image, np.zeros_like(cases[0].label))]) == (-1000, 1000)
    data = VolumeData("a", tuple(cases), (), ("liver",), "ct")
    found, given = (VolumeProcessor.fitted(data, (8, 8, 8), window=window) for window in (None, (-50, 200)))
    assert (found.low, found.high) == (low, high) and (given.low, given.high) == (-50, 200)
    with pytest.raises(InlayError, match="is for CT"):
        VolumeProcessor.fitted(replace(data, modality="mr"), (8, 8, 8), window=(0, 1))

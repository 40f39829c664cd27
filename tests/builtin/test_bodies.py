"""The generated scans: seeded, quick, anisotropic, and with lesions that single slices do not give away."""

import time

import numpy as np
import pytest
import torch

from inlay.builtin.bodies import LABELS, generate_bodies
from inlay.tasks.volumes.data import Case, load_volumes
from inlay.tasks.volumes.scan import VolumeProcessor


@pytest.fixture(scope="module")
def cases():
    values = tuple(range(1, len(LABELS) + 1))
    return [Case(*body, values) for body in generate_bodies()]


def test_seeded_and_independent_of_the_count(cases):
    for mine, again in zip(cases, generate_bodies(3), strict=False):
        assert mine.name == again.name and np.array_equal(mine.affine, again.affine)
        assert np.array_equal(mine.image, again.image) and np.array_equal(mine.label, again.label)
    other = next(generate_bodies(1, seed=1))
    assert other.image.shape != cases[0].image.shape or not np.array_equal(other.image, cases[0].image)


def test_quick():
    begun = time.process_time()
    assert len(list(generate_bodies(48))) == 48
    assert time.process_time() - begun < 6  # 1.3 s on one quiet core


def test_sizes_spacings_and_scales_vary(cases):
    processor = VolumeProcessor(None, (32, 32, 32))
    scans = [processor.read(case) for case in cases]
    shapes = np.array([scan.image.shape[1:] for scan in scans])
    assert shapes.min() >= 16 and shapes.max() <= 52
    spacings = np.array([scan.spacing_mm for scan in scans]).round(3)
    assert {*spacings[:, 0].tolist()} == {1.0, 1.5, 2.0, 2.5, 3.0} and set(spacings[:, 2].tolist()) == {0.9, 1.0}
    assert len({tuple(np.argmax(np.abs(case.affine[:3, :3]), 0)) for case in cases}) == 6  # every permutation
    tops = [case.image.max() for case in cases]
    assert min(tops) < 500 and max(tops) > 50_000
    for case, scan in zip(cases, scans, strict=True):
        assert np.array_equal(processor.back(scan.labels, scan), case.label)
        assert scan.labels.unique().tolist() == [0, 1, 2]
        assert 0.0005 < (scan.labels == 2).float().mean() < 0.06


def test_lesions_look_like_vessels_in_a_slice_but_end_within_a_few(cases):
    """Brightness does not tell them apart; how far brightness goes on across the slices does."""
    processor = VolumeProcessor((1.0, 1.0, 1.0), (32, 32, 32))
    lesions, vessels, long_lesions, long_vessels = [], [], [], []
    for case in cases[:16]:
        scan = processor.read(case)
        image, labels = scan.image[0], scan.labels
        bright = image > image[labels == 2].quantile(0.2)
        run = torch.nn.functional.avg_pool1d(bright.float().flatten(1).T, 15, 1, 7).T.view(bright.shape)
        middle = slice(image.shape[0] // 4, -image.shape[0] // 4)
        for mask, values, runs in (
            (labels == 2, lesions, long_lesions),
            (bright & (labels == 0), vessels, long_vessels),
        ):
            values.append(image[middle][mask[middle]])
            runs.append(run[middle][mask[middle]])
    inside, outside = torch.cat(lesions), torch.cat(vessels)
    assert abs(inside.mean() - outside.mean()) < 0.5 * inside.std()
    assert torch.cat(long_vessels).mean() > torch.cat(long_lesions).mean() + 0.15


def test_as_data():
    data = load_volumes("builtin:volumes")
    assert (len(data.train), len(data.validation), data.labels, data.modality) == (38, 10, LABELS, "mr")

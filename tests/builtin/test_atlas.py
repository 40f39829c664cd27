"""The generated heads: seeded, as large as a scan of a head, pairs that differ by their side only, small structures."""

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from inlay.builtin.atlas import LABELS, draw_atlas, generate_heads


@pytest.fixture(scope="module")
def heads():
    return list(generate_heads(4, spacing_mm=2.0))


def test_seeded_and_independent_of_the_count(heads):
    for mine, again in zip(heads, generate_heads(2, spacing_mm=2.0), strict=False):
        assert mine.name == again.name and np.array_equal(mine.affine, again.affine)
        assert np.array_equal(mine.image, again.image) and np.array_equal(mine.label, again.label)
    assert not np.array_equal(next(generate_heads(1, 2.0, seed=1)).image, heads[0].image)


def test_32_structures_in_each_head_and_a_third_of_them_tiny(heads):
    assert len(LABELS) == len(set(LABELS)) == 32
    shares = np.array([np.bincount(head.label.ravel(), minlength=33)[1:] / head.label.size for head in heads])
    assert (shares > 0).all() and (shares.mean(0) < 1e-4).sum() >= 10 and shares.sum(1).max() < 0.05
    assert all(head.image.dtype == np.int16 and head.image.shape == head.label.shape == (82, 99, 84) for head in heads)


def test_left_and_right_are_alike_but_for_their_place(heads):
    """So mirrored crops would be wrong."""
    for name, left, right in zip(LABELS[:28:2], draw_atlas()[:28:2], draw_atlas()[1:28:2], strict=True):
        assert name.startswith("left") and left.centre[0] < 0
        assert np.array_equal(left.centre * (-1, 1, 1), right.centre) and np.array_equal(left.radii, right.radii)
        assert left.brightness == right.brightness
    for head in heads:
        labels = head.label
        for value in (1, 2):  # the largest pair is darker than what is around it
            rim = binary_dilation(labels == value, iterations=3) & (labels == 0)
            assert np.median(head.image[labels == value]) < 0.95 * np.median(head.image[rim])
        x = [np.nonzero(labels == value)[0].mean() for value in (1, 2)]
        assert x[0] < x[1] - 10  # RAS: the left of the head has smaller x


def test_structures_lie_elsewhere_in_each_head(heads):
    middles = np.array([[np.argwhere(head.label == value).mean(0) for value in range(1, 33)] for head in heads])
    assert (middles.std(0).max(-1) > 0.3).all() and middles.std(0).max() < 8  # voxels of 2 mm


def test_no_structure_is_cut_off_by_the_box_it_is_drawn_in(monkeypatch):
    from inlay.builtin import atlas

    boxed = next(generate_heads(1, spacing_mm=3.0))
    monkeypatch.setattr(atlas, "_find_box", lambda place, *_: tuple(slice(0, n) for n in place.shape[1:]))
    whole = next(generate_heads(1, spacing_mm=3.0))
    assert np.array_equal(boxed.label, whole.label) and np.array_equal(boxed.image, whole.image)


def test_a_scan_at_1_mm_has_the_size_of_a_scanned_head():
    head = next(generate_heads(1))
    assert head.image.shape == (165, 198, 168)
    assert np.allclose(np.diag(head.affine)[:3], 1)
    assert set(np.unique(head.label)) == set(range(33))

"""Masks as prompts, scribbles and lassos: what is read, what changes, and what undo brings back."""

from itertools import pairwise
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from inlay import InlayError, VolumeSession, segment
from inlay.tasks.volumes import session as session_module
from inlay.tasks.volumes.correction import correct_mask, read_mask
from inlay.tasks.volumes.obedience import lift_clicked
from inlay.tasks.volumes.strokes import MOST, STEP, Stroke, choose_clicks, fill_lasso, fill_scribble
from inlay.tasks.volumes.windows import Grid, ScanPrompts
from tasks.volumes.standin import adapter, blobs

SHAPE = (18, 20, 22)
TURNED = np.array([[0, 0, -1.0, 30], [2.0, 0, 0, -10], [0, 1.5, 0, 4], [0, 0, 0, 1]])


def save(path, array, affine=TURNED):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.fixture
def scan(tmp_path):
    return save(tmp_path / "scan.nii.gz", blobs(SHAPE))


def ball(centre, radius, shape=SHAPE):
    at = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    return np.linalg.norm(at - np.array(centre), axis=-1) <= radius


def test_a_mask_is_read_on_the_scans_own_grid(tmp_path, scan):
    """The same mask as a file, its bytes, a file whose axes nibabel turned to RAS, voxels, and a Segmentation."""
    given = adapter(values=(4, 2))
    mask = np.where(ball((5, 6, 7), 3), 4, np.where(ball((12, 12, 12), 3), 2, 0)).astype(np.uint8)
    path = save(tmp_path / "mask.nii.gz", mask)
    turned = tmp_path / "ras.nii.gz"
    nib.save(nib.as_closest_canonical(nib.load(path)), turned)
    assert nib.load(turned).shape != SHAPE
    read = given.processor.read(scan)
    wanted = np.select([mask == 4, mask == 2], [1, 2])
    for source in (path, path.read_bytes(), turned, mask):
        assert np.array_equal(read_mask(source, read, given.labels, given.processor.values), wanted)
    begun = VolumeSession(given, scan, mask=path).segmentation
    assert np.array_equal(begun.mask, mask) and np.array_equal(VolumeSession(given, scan, mask=begun).mask, mask)


def test_wrong_masks_are_named(tmp_path, scan):
    read = adapter().processor.read(scan)
    shifted = TURNED.copy()
    shifted[0, 3] += 3
    wrong = save(tmp_path / "wrong.nii.gz", np.zeros(SHAPE, np.uint8), shifted)
    with pytest.raises(InlayError, match=r"wrong.nii.gz' is not on the grid of the scan 'scan'.*3 mm"):
        read_mask(wrong, read, ["bright", "dark"])
    with pytest.raises(InlayError, match="not on the grid"):
        segment(adapter(), scan, mask=np.zeros((5, 5, 5), np.uint8))
    with pytest.raises(InlayError, match="holds 3; it may hold 0 and the adapter's classes: 1 bright, 2 dark"):
        VolumeSession(adapter(), scan, mask=np.full(SHAPE, 3))


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0)])
def test_the_model_gets_the_mask_at_the_voxels_nearest(scan, spacing):
    given = adapter(crop=(28, 24, 12), spacing_mm=spacing)
    read = given.processor.read(scan)
    grid, mask = Grid(read, given.processor.crop), ball((5, 6, 7), 4).astype(np.uint8)
    got = grid.cut_mask(mask, (0, 0, 0), grid.shape)
    inside = tuple(slice(int(b), int(b) + n) for b, n in zip(grid.before, read.image.shape[1:], strict=True))
    same = given.processor.back(got[inside].numpy(), read) == mask
    assert got.shape == grid.shape and same.all() and got.sum() == got[inside].sum() > 0


def test_only_what_is_connected_to_a_prompt_changes():
    before = np.zeros((12, 12, 12), np.uint8)
    before[1:3, 1:3, 1:3] = 2
    after = np.zeros_like(before)
    after[5:8, 5:8, 5:8] = 1  # at the click
    after[8, 8, 8] = 1  # connected over a corner only
    after[10:, 10:, 10:] = 1  # elsewhere
    merged = correct_mask(before, after, [(6, 6, 6)], [], ["one", "two"])
    wanted = before.copy()
    wanted[5:8, 5:8, 5:8] = 1
    assert np.array_equal(merged, wanted)
    boxed = correct_mask(before, after, [], [(11, 11, 11, 9, 9, 9, "one")], ["one", "two"])
    assert boxed[10:, 10:, 10:].all() and not boxed[5:9, 5:9, 5:9].any() and (boxed[1:3, 1:3, 1:3] == 2).all()
    unheard = correct_mask(before, before, [(2, 2, 2, 0)], [], ["one", "two"])
    assert unheard[2, 2, 2] == 0 and (unheard != before).sum() == 1, "the voxel that was clicked takes its class"


def test_segment_and_session_correct_a_mask_alike(scan):
    given = adapter(crop=(20, 22, 24))  # one window
    mask = np.where(ball((13, 14, 16), 3), 1, 0).astype(np.uint8)  # of nothing in the image
    found = segment(given, scan, points=[(3, 15, 4, "dark")], mask=mask)
    passed = given.model.seen[-1][3]
    assert passed.shape == (1, 20, 22, 24) and passed.sum() == mask.sum(), "every window gets the mask"
    session = VolumeSession(given, scan, mask=mask)
    clicked = session.click((3, 15, 4), label="dark")
    assert np.array_equal(clicked, found.mask) and clicked[3, 15, 4] == 2
    assert ((clicked != mask) == (clicked == 2)).all() and (clicked == 2).sum() > 1
    free = segment(given, scan, mask=mask).mask
    assert (free != mask)[ball((5, 6, 6), 1)].all(), "without a prompt the answer is the model's"


def test_a_correction_is_undone_and_done_again(scan):
    given = adapter()
    mask = ball((9, 9, 9), 4).astype(np.uint8)
    session = VolumeSession(given, scan, mask=mask)
    states = [session.mask, session.click((3, 3, 3), label="dark"), session.scribble([(4, 4, 15), (12, 4, 15)])]
    states += [session.lasso([(2, 2), (6, 2), (6, 6), (2, 6)], axis=2, index=18, label=2)]
    states += [session.box((10, 12, 14), (13, 15, 16), label=2)]
    assert all((a != b).any() for a, b in pairwise(states))
    for state in states[-2::-1]:
        assert np.array_equal(session.undo(), state)
    assert np.array_equal(session.undo(), mask)
    for state in states[1:]:
        assert np.array_equal(session.redo(), state)
    session.undo()
    session.click((1, 1, 1), positive=False)
    again = session.mask
    assert np.array_equal(session.redo(), again), "a new prompt forgets what was undone"
    assert np.array_equal(session.reset(), mask)


def test_a_session_without_a_mask_does_again_what_was_undone(tmp_path):
    session = VolumeSession(adapter(), save(tmp_path / "scan.nii.gz", blobs((40, 40, 40)), np.eye(4)))
    states = [session.click((8, 8, 8)), session.click((30, 30, 30), label=2), session.click((30, 31, 28))]
    assert np.array_equal(session.undo(), states[1]) and np.array_equal(session.undo(), states[0])
    assert np.array_equal(session.redo(), states[1]) and np.array_equal(session.redo(), states[2])


def test_what_a_session_holds_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(session_module, "HISTORY", 3 * 3 * 16**3 * 2)  # three answers
    monkeypatch.setattr(session_module, "ENCODED", 1)
    monkeypatch.setattr(session_module, "HEARD", 2)
    given = adapter()
    session = VolumeSession(given, save(tmp_path / "scan.nii.gz", blobs((40, 40, 40)), np.eye(4)))
    for place in range(6, 13):
        mask = session.click((8, 8, place))
    assert sum(len(window.answers) for window in session._windows) == 4 and given.model.seen[-1][1].shape == (1, 2)
    session.click((32, 32, 32))
    assert [window.encoded is None for window in session._windows] == [True, False]
    assert np.array_equal(session.undo(), mask)
    encoded = given.model.encoded
    session.click((8, 8, 8))
    assert given.model.encoded == encoded + 1, "an encoding that was dropped is computed again"
    for _ in range(9):
        mask = session.undo()
    assert mask.any(), "the oldest prompts stay"


class Deaf(torch.nn.Module):
    """A model that says background everywhere, whatever it is told."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, pixel_values=None, image_embeddings=None, **prompts):
        image_embeddings = pixel_values if image_embeddings is None else image_embeddings
        logits = torch.zeros(1, 3, *image_embeddings.shape[2:]) + self.bias
        logits[:, 0] = 4
        return SimpleNamespace(logits=logits, image_embeddings=image_embeddings)


def test_each_voxel_hears_the_click_that_is_nearest():
    logits = torch.zeros(1, 3, 12, 12, 12)
    logits[:, 0] = 4
    logits[:, 2, 3, 3, 3] = 20
    near = torch.tensor([[3.0, 3, 3], [3, 3, 4], [9, 9, 9], [9, 9, 9]])
    said = ScanPrompts(near, torch.tensor([2, 1, 1, 2]), torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))
    lifted = lift_clicked(logits, [said])
    classes = lifted.argmax(1)[0]
    assert [int(classes[tuple(p)]) for p in near.long().tolist()] == [2, 1, 2, 2], "of two in one voxel the later one"
    assert torch.equal(lifted[:, 2, :5, :5, :3], logits[:, 2, :5, :5, :3]), "a click that was heard changes nothing"
    around = lifted[0, 2, 9, 9]
    assert around[9] == 5 and 0 < around[10] < around[9] and around[11] < around[10] and around[2] == 0
    assert torch.equal(lifted[:, 0], logits[:, 0]) and logits[0, 1].max() == 0, "a copy"


@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("corrects", [False, True])
def test_what_was_said_of_voxels_holds_until_something_else_is_said(scan, spacing, corrects):
    """Also where the model hears nothing, on a grid other than the model's, and after later prompts."""
    given = adapter(crop=(28, 24, 12), spacing_mm=spacing)
    given.model = Deaf()
    session = VolumeSession(given, scan, mask=np.zeros(SHAPE, np.uint8) if corrects else None)
    assert session.click((17.4, 19.5, 0), label=2)[17, 19, 0] == 2
    mask = session.click((3, 4, 5))
    assert mask[3, 4, 5] == 1 and (mask == 1).sum() > 1, "what the model is as unsure of follows"
    line = [(5, 5, 5), (5, 12, 5), (10, 12, 9)]
    scribbled = session.scribble(line, label="dark")
    x, y, z = fill_scribble(line).T
    assert (scribbled[x, y, z] == 2).all() and scribbled[3, 4, 5] == 1
    x, y, z = fill_lasso([(8, 8), (14, 8), (14, 15), (8, 15)], 2, 9).T
    mask = session.lasso([(8, 8), (14, 8), (14, 15), (8, 15)], axis=2, index=9)
    assert (mask[x, y, z] == 1).all() and mask[5, 8, 5] == 2 and mask[10, 12, 9] == 1, "the later one counts"
    assert np.array_equal(session.undo(), scribbled)
    found = segment(
        given, scan, points=[(3, 4, 5), (12, 4, 18, "dark")], mask=np.zeros(SHAPE, int) if corrects else None
    )
    assert found.mask[3, 4, 5] == 1 and found.mask[12, 4, 18] == 2


def test_a_scribble_passes_through_voxels():
    voxels = fill_scribble([(0, 0, 0), (0, 0, 3), (2, 2, 3.4)])
    assert voxels.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 3], [1, 1, 3], [2, 2, 3]]
    assert fill_scribble([(1.2, 2, 3)]).tolist() == [[1, 2, 3]]


def test_a_lasso_encloses_voxels():
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    circle = np.stack([50 + 20 * np.cos(angle), 30 + 20 * np.sin(angle)], 1)
    inside = fill_lasso(circle, axis=1, index=7.2)
    assert (inside[:, 1] == 7).all()
    assert np.hypot(inside[:, 0] - 50, inside[:, 2] - 30).max() <= 20 and len(inside) > 0.97 * np.pi * 20**2
    square = fill_lasso([(2, 3), (5, 3), (5, 7), (2, 7)], axis=2, index=1)
    assert len(square) == 20 and square.min(0).tolist() == [2, 3, 1], "what the contour runs through is enclosed"
    assert len(fill_lasso([(1.5, 2.5), (4.5, 2.5), (4.5, 5.5), (1.5, 5.5)], axis=2, index=1)) == 9
    assert fill_lasso([(2.2, 3.2), (2.4, 3.2), (2.2, 3.4)], axis=0, index=4).tolist() == [[4, 2, 3]]


def test_of_a_stroke_the_model_hears_a_few_voxels_that_are_far_apart():
    short = fill_scribble([(5, 5, 5), (5, 5, 20)])
    assert choose_clicks(short).tolist() == [[5, 5, 12]], "the middle"
    long = choose_clicks(fill_scribble([(0, 0, 0), (0, 0, 40)]))
    assert long.tolist() == [[0, 0, 20], [0, 0, 8], [0, 0, 32]]
    assert len(choose_clicks(fill_scribble([(0, 0, 0), (0, 0, 40)]), (1, 1, 0.5))) == 1, "as the model sees it"
    disc = fill_lasso([(0, 0), (99, 0), (99, 99), (0, 99)], axis=2, index=3)
    chosen = choose_clicks(disc)
    apart = np.linalg.norm(chosen[:, None] - chosen[None], axis=-1)[~np.eye(len(chosen), dtype=bool)]
    assert 4 <= len(chosen) <= MOST and apart.min() > STEP and (chosen[:, 2] == 3).all()
    assert {tuple(voxel) for voxel in chosen} <= {tuple(voxel) for voxel in disc}


def test_segment_takes_strokes(scan):
    """All of their voxels get the class, also where a mask is corrected; the model hears some of them as points."""
    given = adapter()
    bright = fill_scribble([(5, 5, 5), (5, 12, 5), (10, 12, 9)])
    nothing = fill_lasso([(8, 8), (14, 8), (14, 15), (8, 15)], 2, 3)
    strokes = [Stroke(bright, "dark"), Stroke(nothing, 0)]
    for mask in (None, np.zeros(SHAPE, int), np.ones(SHAPE, int)):
        found = segment(given, scan, strokes=strokes, mask=mask).mask
        assert (found[tuple(bright.T)] == 2).all() and not found[tuple(nothing.T)].any()
    heard = [(*voxel, "dark") for voxel in choose_clicks(bright).tolist()]
    told = segment(given, scan, points=heard).mask
    told[tuple(bright.T)] = 2
    assert np.array_equal(segment(given, scan, strokes=strokes[:1]).mask, told)


@pytest.mark.parametrize(
    ("stroke", "says"),
    [
        (Stroke(np.array([[1, 2, 90]]), 1), "lies outside the scan"),
        (Stroke(np.zeros((0, 3), int), 1), "one or more voxels"),
        (Stroke(np.array([[1.5, 2, 3]]), 1), "whole numbers"),
        (Stroke(np.array([[1, 2, 3]]), "bone"), "unknown label 'bone'"),
    ],
)
def test_strokes_that_segment_refuses(scan, stroke, says):
    with pytest.raises(InlayError, match=says):
        segment(adapter(), scan, strokes=[stroke])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda s: s.scribble([]), "a scribble is a list"),
        (lambda s: s.scribble([(1, 2)]), "3 numbers"),
        (lambda s: s.scribble([(1, 2, 3), (1, 2, 90)]), "lies outside the scan"),
        (lambda s: s.scribble([(1, 2, 3), (1e9, 2, 3), (1, 2, 4)]), "lies outside the scan"),
        (lambda s: s.lasso([(1, 2), (3, 4)], 0, 5), "3 or more points"),
        (lambda s: s.lasso([(1, 2), (3, 4), (5, 2)], 3, 5), "axis must be 0, 1 or 2"),
        (lambda s: s.lasso([(0, 0), (1e9, 0), (0, 5)], 0, 5), "at most 4,096"),
    ],
)
def test_strokes_that_make_no_sense(scan, call, says):
    session = VolumeSession(adapter(), scan)
    with pytest.raises(InlayError, match=says):
        call(session)
    assert not session.mask.any() and not session.undo().any()

"""Training on crops and scoring whole scans: the loss, its windows, and a run that is killed."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from peft import get_peft_model

from inlay import InlayError, TrainConfig, VolumeProcessor, VolumeView, fit
from inlay.methods.spatial.decoder import PromptTensors
from inlay.methods.spatial.prompts import clicks_on_errors
from inlay.methods.spatial.sam import dice_cross_entropy, draw_mixed_prompts, draw_prompts
from inlay.tasks.volumes.data import Case, find_present_classes
from inlay.tasks.volumes.loss import LossSums, WholeVolume
from inlay.tasks.volumes.scan import find_window
from inlay.tasks.volumes.scores import VolumeDice, overlap
from inlay.tasks.volumes.view import collate_volumes
from inlay.train.sampler import SeededDataset
from methods.volumes import build, settings, volumes


class Threshold(torch.nn.Module):
    """Class 1 where the scan is above 0; notes what it was shown."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, pixel_values):
        """Logits of two classes."""
        self.seen.append(tuple(pixel_values.shape))
        return type("Output", (), {"logits": torch.cat([torch.zeros_like(pixel_values), 9 * pixel_values], dim=1)})


def test_whole_scans_are_put_together_from_windows():
    model, volume = Threshold().eval(), volumes(1, (20, 40, 24))
    labels = (volume[:, 0] > 0).long()
    labels[:, :, 36:] = -1
    loss = WholeVolume((16, 16, 16))
    output = loss(model, {"pixel_values": volume, "labels": labels})
    assert all(shape[2:] == (16, 16, 16) for shape in model.seen) and len(model.seen) > 1
    assert torch.equal(output.classes[:, :, :36].long(), (volume[:, 0] > 0).long()[:, :, :36])
    counts, zeros = loss.answers(output, {"labels": labels})
    assert counts.tolist() == [[[int((labels == 1).sum())] * 3]] and not zeros.any()
    assert loss.weight({"pixel_values": volume}) == 1


class Scores(torch.nn.Module):
    """Scores of three classes that depend on the place in a window, so that blending matters."""

    def forward(self, pixel_values):
        """Logits of background and two classes."""
        ramp = torch.linspace(-1, 1, pixel_values.shape[-1]).expand_as(pixel_values)
        return SimpleNamespace(logits=torch.cat([ramp, 2 * pixel_values, -pixel_values], dim=1))


@pytest.mark.parametrize("window", [(8, 8, 8), (5, 16, 7), (32, 8, 24)])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_loss_of_whole_scans_is_that_of_monais_windows_at_once(window, rows):
    """Added up plane by plane, it equals `dice_cross_entropy` of all probabilities; with voxels to be ignored."""
    generator = torch.Generator().manual_seed(0)
    volumes_ = torch.randn(rows, 1, 21, 12, 17, generator=generator)
    labels = torch.randint(-1, 3, (rows, 21, 12, 17), generator=generator)
    labels[0, 18:] = -1  # the end of a scan that is to be ignored is part of it all the same
    batch = {"pixel_values": volumes_, "labels": labels}
    if rows == 2:
        volumes_[1, :, :, 10:], labels[1, :, 10:] = 0, -1  # what pads a batch
    found = WholeVolume(window)(Scores().eval(), batch)
    logits = torch.full((rows, 3, 21, 12, 17), 0.0)
    for row in range(rows):
        h = 12 if row == 0 else 10

        def shares(part):
            return Scores()(part).logits.softmax(1)

        blended = sliding_window_inference(volumes_[row : row + 1, :, :, :h], window, 4, shares, 0.25, mode="gaussian")
        logits[row : row + 1, :, :, :h] = blended.clamp(min=1e-7).log()
    assert float(found.loss) == pytest.approx(float(dice_cross_entropy(logits, labels)), abs=1e-5)
    inside = labels >= 0
    assert torch.equal(found.classes.long()[inside], logits.argmax(1)[inside])
    counts, _ = WholeVolume(window).answers(found, batch)
    assert torch.equal(counts, overlap(logits.argmax(1), labels, 2))


def test_a_scan_without_a_scored_voxel_has_a_loss():
    batch = {"pixel_values": torch.randn(1, 1, 9, 9, 9), "labels": torch.full((1, 9, 9, 9), -1)}
    found = WholeVolume((8, 8, 8))(Scores().eval(), batch)
    assert torch.isfinite(found.loss) and not WholeVolume((8, 8, 8)).answers(found, batch)[0].any()


def test_scoring_holds_no_scores_of_a_whole_scan(monkeypatch):
    """What is alive at a time does not grow with the scan's depth: the largest tensor is one window's planes."""
    largest = []
    original = LossSums.add
    monkeypatch.setattr(LossSums, "add", lambda self, shares, labels: (
        largest.append(shares.untyped_storage().nbytes()), original(self, shares, labels))[1])  # fmt: skip
    for depth in (24, 96):
        volume = torch.randn(1, 1, depth, 12, 12)
        WholeVolume((8, 8, 8))(Scores().eval(), {"pixel_values": volume, "labels": (volume[:, 0] > 0).long()})
        assert max(largest) == 3 * 9 * 12 * 12 * 4
        largest.clear()


@pytest.mark.parametrize("crop", [(1, 16, 16), (4, 16, 16), (16, 3, 16), (2, 5, 7), (3, 3, 3)])
def test_crops_of_few_voxels_train_and_answer(crop):
    """Two to four thick slices, or fewer voxels than the reach of a simulated click."""
    model = get_peft_model(build(), settings(classes=["ball"], rounds=2))
    processor = VolumeProcessor(None, crop)
    view = VolumeView(cases(2), processor, training=True)
    torch.manual_seed(0)
    model.train()
    for _ in range(2):
        loss = model(**collate_volumes([view[0], view[1]])).loss
        loss.backward()
        assert torch.isfinite(loss)
    small = Case("a", cases(1)[0].image[:6, :7, :5], cases(1)[0].label[:6, :7, :5], np.eye(4), (1,))
    with torch.no_grad():
        whole = collate_volumes([VolumeView([small], processor)[0]])
        assert torch.isfinite(WholeVolume(crop)(model.eval(), whole).loss)


def test_clicks_on_errors_of_small_volumes_are_those_of_padded_ones():
    """avg_pool3d itself, where it takes the volume; in a smaller one the only wrong voxel."""
    labels = torch.zeros(1, 6, 7, 8, dtype=torch.long)
    labels[0, 1:5, 2:6, 1:4] = 1
    wrong = (labels > 0).float()
    dense = torch.nn.functional.avg_pool3d(wrong[:, None], 5, stride=1, padding=2)[:, 0] * wrong
    torch.manual_seed(0)
    points, said = clicks_on_errors(torch.stack([torch.ones(6, 7, 8), torch.zeros(6, 7, 8)])[None], labels, 1)
    at = tuple(points[0, 0].long().tolist())
    assert said.tolist() == [[1]] and dense[0][at] >= 0.9 * dense.max()
    for shape in ((1, 4, 4), (2, 2, 2), (1, 1, 1), (4, 9, 9)):
        labels = torch.zeros(1, *shape, dtype=torch.long)
        labels[0, -1, -1, -1] = 1
        points, said = clicks_on_errors(torch.tensor([1.0, 0]).view(1, 2, 1, 1, 1).expand(1, 2, *shape), labels, 2)
        assert points[0, 0].tolist() == [n - 1 for n in shape] and said.tolist() == [[1, -1]]


def test_settings_that_make_no_sense():
    for wrong in ({"window": (16, 16)}, {"window": (16, 16, 16), "overlap": 1}):
        with pytest.raises(InlayError, match="window"):
            WholeVolume(**wrong)


def cases(count=4):
    """Scans of a bright ball in noise, of several sizes."""
    generator = np.random.default_rng(0)
    made = []
    for i in range(count):
        shape = (16 + i, 20, 18)
        away = np.linalg.norm(np.indices(shape) - np.array([[[[8 + i]]], [[[10]]], [[[9]]]]), axis=0)
        label = (away < 5).astype(np.uint8)
        image = label + 0.3 * generator.standard_normal(shape)
        made.append(Case(f"ball {i}", image.astype(np.float32), label, np.eye(4), (1,)))
    return made


def run(folder, epochs=3.0):
    torch.manual_seed(0)
    model = get_peft_model(build(), settings(classes=["ball"], rounds=1))
    processor = VolumeProcessor(None, (16, 16, 16))
    found = fit(
        model,
        VolumeView(
            cases(), processor, training=True, present=[{1}, *[set()] * (len(cases()) - 1)]
        ),  # as if it were rare
        VolumeView(cases(2), processor),
        TrainConfig(output_dir=str(folder), epochs=epochs, batch_size=2, learning_rate=1e-2, workers=0, eval_every=3),
        metrics=[VolumeDice(["ball"])],
        collate=collate_volumes,
        loss=WholeVolume((16, 16, 16)),
    )
    return model, found


def test_fit_keeps_the_weights_of_the_best_dice(tmp_path):
    model, found = run(tmp_path)
    assert found.steps == 6 and len(found.history) == 2 and set(found.metrics) == {"loss", "dice"}
    view, counts = VolumeView(cases(2), VolumeProcessor(None, (16, 16, 16))), []
    for i in range(2):
        batch = collate_volumes([view[i]])
        with torch.no_grad():
            said = WholeVolume((16, 16, 16))(model, batch).classes
        counts.append(overlap(said, batch["labels"], 1)[0])
    metric = VolumeDice(["ball"])
    metric.add_batch(predictions=torch.stack(counts), references=torch.zeros(2, dtype=torch.long))
    assert metric.compute()["dice"] == pytest.approx(found.metrics["dice"], abs=1e-6)


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    expected, _ = run(tmp_path / "whole")
    step, seen = WholeVolume.__call__, []

    def breaks(self, model, batch):
        seen.append(model.training)
        if sum(seen) == 5:
            raise KeyboardInterrupt
        return step(self, model, batch)

    monkeypatch.setattr(WholeVolume, "__call__", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken")
    monkeypatch.setattr(WholeVolume, "__call__", step)
    model, found = run(tmp_path / "broken")
    assert found.resumed
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_structure_of_a_ten_thousandth_is_in_a_third_of_the_crops():
    """Half of the two thirds that are placed at a class: as often as one that fills a quarter of the scan."""
    label = np.zeros((64, 100, 100), np.uint8)
    label[:, :25] = 1
    label[30:34, 80:84, 80:84] = 2  # 64 of 640,000 voxels
    case = Case("rare", np.zeros(label.shape, np.float32), label, values=(1, 2))
    view = VolumeView([case], VolumeProcessor(None, (8, 8, 8)), training=True, augment=False, crops=90)
    torch.manual_seed(0)
    random.seed(0)
    items = [view[i]["labels"] for i in range(len(view))]
    assert 0.2 < np.mean([bool((labels == 2).any()) for labels in items]) < 0.47


def crowd(count=20, rare=2):
    """Scans with class 1, of which few have class 2; the first voxel tells which scan it is."""
    made = []
    for i in range(count):
        label = np.zeros((12, 12, 12), np.uint8)
        label[3:6, 3:6, 3:6] = 1
        label[9:, 9:, 9:] = 2 * (i < rare)
        made.append(Case(f"{i}", np.full(label.shape, i, np.float32), label, values=(1, 2)))
    return made


def test_scans_of_a_rare_class_are_drawn_more_often():
    """Weights by hand: a class in 2 of 20 scans counts sqrt(0.5 / 0.1), the others 1."""
    few, processor = crowd(), VolumeProcessor(None, (4, 4, 4), "ct", 0, 20)
    present = find_present_classes(few)
    assert present == [{1, 2}] * 2 + [{1}] * 18
    view = VolumeView(few, processor, training=True, augment=False, present=present)
    drawn = SeededDataset(view, seed=0)
    assert len(view) == 20 and view.weights == {2: pytest.approx(5**0.5)}
    items = [drawn[i % 20, i] for i in range(2000)]
    scans = [round(float(item["pixel_values"].max() + 1) * 10) for item in items]
    chosen = [item for scan, item in zip(scans, items, strict=True) if scan < 2]
    assert len(chosen) / 2000 == pytest.approx(2 * 5**0.5 / (18 + 2 * 5**0.5), abs=0.03) and {*scans} == {*range(20)}
    placed = np.mean([bool((item["labels"] == 2).any()) for item in chosen])
    assert placed == pytest.approx(2 / 3 * 5**0.5 / (1 + 5**0.5), abs=0.07)
    assert all(torch.equal(drawn[i % 20, i]["labels"], items[i]["labels"]) for i in (3, 700, 1999))


def test_classes_that_half_of_the_scans_have_change_nothing():
    few, processor = crowd(6, 3), VolumeProcessor(None, (4, 4, 4))
    views = [VolumeView(few, processor, training=True, present=each) for each in (None, find_present_classes(few))]
    for i in range(30):
        one, other = (SeededDataset(view, seed=1)[i % 6, i] for view in views)
        assert torch.equal(one["pixel_values"], other["pixel_values"]) and torch.equal(one["labels"], other["labels"])


def sparse(case, kept):
    """A case of which only some planes have labels; what is under the others is wrong on purpose."""
    label = np.full_like(case.label, 9)
    label[kept] = case.label[kept]
    return replace(case, label=label, ignored=9)


def test_ignored_voxels_have_no_gradient_and_get_no_click():
    torch.manual_seed(0)
    labels = torch.randint(-1, 3, (2, 9, 8, 7))
    logits = torch.randn(2, 3, 9, 8, 7, requires_grad=True)
    dice_cross_entropy(logits, labels).backward()
    assert not logits.grad.movedim(1, -1)[labels < 0].any() and logits.grad.movedim(1, -1)[labels >= 0].any()
    nothing = dice_cross_entropy(logits, torch.full_like(labels, -1))
    assert torch.isfinite(nothing) and not torch.autograd.grad(nothing, logits)[0].any()
    for draw in (draw_prompts, draw_mixed_prompts):
        for step in range(20):
            prompts = draw(PromptTensors(), logits.detach(), labels, begins=step % 2 == 0)
            if prompts.points is None:
                continue
            for row, (points, said) in enumerate(zip(prompts.points.long(), prompts.labels, strict=True)):
                d, h, w = points[said >= 0].T
                assert torch.equal(labels[row, d, h, w], said[said >= 0])


def test_crops_lie_where_something_is_labelled():
    """Of 60 planes 2 are labelled; a crop has 8. Anywhere, one in seven would have a labelled voxel."""
    label = np.zeros((60, 16, 16), np.uint8)
    label[20:40, 4:8, 4:8] = 1
    case = sparse(Case("a", np.zeros(label.shape, np.float32), label, values=(1,)), [31, 50])
    view = VolumeView([case], VolumeProcessor(None, (8, 8, 8)), training=True, augment=False, crops=200)
    random.seed(0)
    items = [view[i]["labels"] for i in range(200)]
    assert all((labels >= 0).any() for labels in items)
    assert 0.6 < np.mean([bool((labels == 1).any()) for labels in items]) < 0.95  # two thirds, and some by chance
    nothing = VolumeView([sparse(case, [])], VolumeProcessor(None, (8, 8, 8)), training=True)
    assert (nothing[0]["labels"] == -1).all()


def test_ignored_voxels_steer_neither_the_window_of_ct_nor_the_classes():
    label = np.zeros((8, 8, 8), np.uint8)
    label[:4] = 1
    image = np.random.default_rng(0).normal(40, 5, label.shape).astype(np.float32)
    plain = Case("a", image, label, values=(1, 2))
    hidden = replace(plain, label=np.where(np.arange(8)[:, None, None] > 5, 9, label), ignored=9)
    hidden.image[6:] = 3000
    assert find_window([hidden]) == find_window([plain]) and find_present_classes([hidden]) == [{1}]


def test_a_model_learns_from_a_few_labelled_planes(tmp_path):
    """A quarter of the planes is labelled; whole scans are scored."""
    torch.manual_seed(0)
    model = get_peft_model(build(), settings(classes=["ball"], rounds=1))
    processor = VolumeProcessor(None, (16, 16, 16))
    found = fit(
        model,
        VolumeView([sparse(case, slice(2, None, 4)) for case in cases()], processor, training=True),
        VolumeView(cases(2), processor),
        TrainConfig(output_dir=str(tmp_path), epochs=6, batch_size=2, learning_rate=1e-2, workers=0, eval_every=12),
        metrics=[VolumeDice(["ball"])],
        collate=collate_volumes,
        loss=WholeVolume((16, 16, 16)),
    )
    assert found.metrics["dice"] > 0.5


def test_several_crops_of_a_scan_in_an_epoch():
    processor, few = VolumeProcessor(None, (16, 16, 16)), cases(2)
    view = VolumeView(few, processor, training=True, crops=3)
    reads = []
    view.processor.read = lambda case: (reads.append(case.name), VolumeProcessor.read(processor, case))[1]
    assert len(view) == 6 and len(VolumeView(few, processor, crops=3)) == 2  # whole scans come once
    for i in range(6):
        assert view.scan(i).name == few[i // 3].name and view[i]["labels"].shape == (16, 16, 16)
    assert reads == [few[0].name, few[1].name]
    with pytest.raises(InlayError, match="crops"):
        VolumeView(few, processor, training=True, crops=0)

"""Training on crops and scoring whole scans: the loss, its windows, and a run that is killed."""

import numpy as np
import pytest
import torch
from peft import get_peft_model

from inlay import InlayError, TrainConfig, VolumeProcessor, VolumeView, fit
from inlay.tasks.volumes.data import Case
from inlay.tasks.volumes.loss import WholeVolume
from inlay.tasks.volumes.scores import VolumeDice, overlap
from inlay.tasks.volumes.view import collate_volumes
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
    assert torch.equal(output.logits.argmax(1)[:, :, :36], (volume[:, 0] > 0).long()[:, :, :36])
    counts, zeros = loss.answers(output, {"labels": labels})
    assert counts.tolist() == [[[int((labels == 1).sum())] * 3]] and not zeros.any()
    assert loss.weight({"pixel_values": volume}) == 1


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
        VolumeView(cases(), processor, training=True),
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
            said = WholeVolume((16, 16, 16))(model, batch).logits.argmax(1)
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

"""Segmenters of scans scored on label maps: as recipes and `segment` have it, by scan and class, by name of a class."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from command import run
from inlay import InlayError, VolumeView, evaluate, load_adapter, load_volumes, segment
from inlay.builtin.bodies import generate_bodies
from inlay.tasks.volumes.formats import read_volume, write_volume
from inlay.tasks.volumes.loss import WholeVolume
from inlay.tasks.volumes.scores import VolumeDice
from inlay.tasks.volumes.view import collate_volumes
from places import ROOT, SHARED
from tasks.recipe_scores import recipe_scores

SHIPPED = ROOT / "adapters_hub" / "lesions-spatial-sam-tiny"


@pytest.fixture(scope="module")
def adapter():
    return load_adapter(SHIPPED)


def write_scans(folder, names, order=(1, 2), count=2):
    """Generated scans with their classes `order` under the numbers 1, 2 ...; others become background."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for name, image, label, affine in generate_bodies(count):
        renumbered = np.zeros_like(label)
        for new, old in enumerate(order, 1):
            renumbered[label == old] = new
        write_volume(folder / "imagesTr" / f"{name}.nii.gz", image, affine)
        write_volume(folder / "labelsTr" / f"{name}.nii.gz", renumbered, affine)
    labels = {"0": "background", **{str(i): label for i, label in enumerate(names, 1)}}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "modality": {"0": "MRI"}}))
    return folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return write_scans(tmp_path_factory.mktemp("data") / "scans", ["organ", "lesion"])


@pytest.fixture(scope="module")
def found(adapter, scans):
    return evaluate(adapter, scans, resamples=20)


def test_the_recipes_dice_is_that_of_the_models_grid(adapter, scans, found):
    data = load_volumes(str(scans))
    view = VolumeView([*data.train, *data.validation], adapter.processor)
    expected = recipe_scores(
        adapter.model, view, [VolumeDice(data.labels)], loss=WholeVolume(adapter.processor.crop),
        collate=collate_volumes, batch_size=1,
    )  # fmt: skip
    assert found.count == 2 and found.split == "all"
    assert found.scores["dice_model_grid"].value == pytest.approx(expected["dice"], abs=1e-6)


def test_a_shipped_adapter_has_the_score_that_its_recipe_wrote(adapter):
    whole = evaluate(adapter, "builtin:volumes", resamples=20)
    noted = json.loads((SHIPPED / "metrics.json").read_text())["validation"]["dice"]
    assert whole.count == 10 and whole.split == "validation"
    assert whole.scores["dice_model_grid"].value == pytest.approx(noted, abs=2e-3)  # the file is in float16
    assert whole.scores["dice"].value == pytest.approx(noted, abs=0.02) and whole.base is None


def test_rows_are_what_segment_and_monai_say(adapter, scans, found):
    from monai.metrics import compute_dice, compute_hausdorff_distance
    from nibabel import load

    for file in sorted((scans / "imagesTr").iterdir()):
        name = file.name.removesuffix(".nii.gz")
        truth = load(scans / "labelsTr" / file.name)
        mask = segment(adapter, file, progress=False)
        spacing = np.linalg.norm(mask.affine[:3, :3], axis=0)
        for k, label in enumerate(adapter.labels, 1):
            a, b = (torch.from_numpy(np.asarray(m) == k)[None, None] for m in (mask.mask, truth.dataobj))
            row = next(r for r in found.rows if r["case"] == name and r["class"] == label)
            assert row["dice"] == pytest.approx(float(compute_dice(a, b)), abs=1e-5)
            far = compute_hausdorff_distance(a, b, percentile=95, include_background=True, spacing=spacing.tolist())
            assert row["hd95_mm"] == pytest.approx(float(far), abs=1e-3)
            assert row["predicted_ml"] == pytest.approx(mask.volumes_ml[label], abs=1e-5)
    assert found.scores["dice"].value == pytest.approx(np.mean([row["dice"] for row in found.rows]), abs=1e-5)
    assert [row["class"] for row in found.per_class] == ["organ", "lesion"]
    assert set(found.scores) >= {"dice", "iou", "hd95_mm", "nsd", "dice_organ", "dice_lesion"}


def test_errors_of_volumes_medians_and_tolerance(adapter, scans, found):
    """From the volumes in the rows, by hand."""
    signed = np.array([row["predicted_ml"] - row["reference_ml"] for row in found.rows])
    percent = [100 * e / row["reference_ml"] for e, row in zip(signed, found.rows, strict=True) if row["reference_ml"]]
    for name, values in (("volume_error_ml", signed), ("volume_error_percent", np.array(percent))):
        assert found.scores[name].value == pytest.approx(values.mean(), abs=1e-3)
        assert found.scores[f"absolute_{name}"].value == pytest.approx(np.abs(values).mean(), abs=1e-3)
    dice = [row["dice"] for row in found.rows]
    assert found.scores["median_dice"].value == pytest.approx(np.median(dice), abs=1e-5)
    wide = evaluate(adapter, scans, resamples=2, compare=False, options={"tolerance_mm": 50.0})
    assert wide.scores["nsd"].value == 1.0 > found.scores["nsd"].value and "within 50 mm" in " ".join(wide.notes)
    with pytest.raises(InlayError, match=r"unknown option 'tolerance'; evaluating .* has tolerance_mm, plot"):
        evaluate(adapter, scans, options={"tolerance": 1.0})


def test_a_box_plot_and_the_worst_scans_are_drawn(capsys, monkeypatch, scans, found, tmp_path):
    status, _, err = run(
        capsys, monkeypatch, "evaluate", SHIPPED, scans, "--adapter-only", "--plot", tmp_path / "boxes.png",
        "--worst", 1, "--worst-folder", tmp_path / "worst", "--csv", tmp_path / "scores.csv",
    )  # fmt: skip
    assert status == 0, err
    means = {case: np.mean([row["dice"] for row in found.rows if row["case"] == case])
             for case in {row["case"] for row in found.rows}}  # fmt: skip
    worst = min(means, key=means.__getitem__)
    assert [path.name for path in (tmp_path / "worst").iterdir()] == [f"{means[worst]:.3f}_{worst}.png"]
    with Image.open(tmp_path / "boxes.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(2**24)) > 20
    assert (tmp_path / "scores.csv").read_text().splitlines()[0].endswith("volume_error_ml,volume_error_percent")
    status, _, err = run(
        capsys, monkeypatch, "evaluate", ROOT / "adapters_hub" / "digits-lora-vit-tiny", "builtin:digits", "--worst", 1
    )
    assert status == 2 and "--worst is an option for volume-segmentation" in err and err.count("\n") == 1


def test_classes_are_matched_by_name(adapter, found, tmp_path):
    rows = {(row["case"], row["class"]): row for row in found.rows}
    other = evaluate(adapter, write_scans(tmp_path / "b", ["lesion", "organ"], (2, 1), count=1), resamples=5)
    assert len(other.rows) == 2 and all(row == rows[row["case"], row["class"]] for row in other.rows)
    some = evaluate(adapter, write_scans(tmp_path / "c", ["lesion"], (2,), count=1), resamples=5, compare=False)
    assert [row["class"] for row in some.rows] == ["lesion"] and "dice_model_grid" not in some.scores
    assert some.rows[0] == rows[some.rows[0]["case"], "lesion"]


def test_other_numbers_of_the_same_classes_score_alike(adapter, found, tmp_path):
    """The adapter's classes under 1000 and 4 in the data; the rows tell the adapter's own numbers."""
    folder = write_scans(tmp_path / "d", ["organ", "lesion"], count=1)
    for file in (folder / "labelsTr").iterdir():
        array, affine = read_volume(file, "label")
        write_volume(file, np.array([0, 1000, 4])[array], affine)
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organ": 1000, "lesion": 4}}))
    other = evaluate(adapter, folder, resamples=5)
    rows = {(row["case"], row["class"]): row for row in found.rows}
    assert len(other.rows) == 2 and all(row == rows[row["case"], row["class"]] for row in other.rows)
    assert {row["class"]: row["value"] for row in other.rows} == {"organ": 1, "lesion": 2}
    assert {row["class"]: row["value"] for row in other.per_class} == {"organ": 1, "lesion": 2}


def test_voxels_to_be_ignored_are_not_scored(adapter, tmp_path):
    """Counted by hand: of the mask that `segment` gives, without the voxels that the data calls "ignore"."""
    folder = write_scans(tmp_path / "e", ["organ", "lesion"], count=1)
    for file in (folder / "labelsTr").iterdir():
        array, affine = read_volume(file, "label")
        array[: array.shape[0] // 2] = 3
        write_volume(file, array, affine)
    (folder / "dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "organ": 1, "lesion": 2, "ignore": 3}})
    )
    scored = evaluate(adapter, folder, resamples=5)
    assert {row["class"] for row in scored.rows} == {"organ", "lesion"}
    for file in sorted((folder / "imagesTr").iterdir()):
        mask = segment(adapter, file, progress=False).mask
        truth, _ = read_volume(folder / "labelsTr" / file.name, "label")
        for k, label in enumerate(adapter.labels, 1):
            a, b = (mask == k) & (truth != 3), truth == k
            wanted = 2 * (a & b).sum() / (a.sum() + b.sum()) if a.any() or b.any() else 1
            name = file.name.removesuffix(".nii.gz")
            row = next(row for row in scored.rows if (row["case"], row["class"]) == (name, label))
            assert row["dice"] == pytest.approx(wanted, abs=1e-6)


def test_unknown_classes_and_empty_folders_are_named(adapter, tmp_path):
    write_scans(tmp_path / "a", ["organ", "tumour"], count=1)
    with pytest.raises(InlayError, match=r"^'tumour' is a label of .* which knows 'organ', 'lesion'"):
        evaluate(adapter, tmp_path / "a")
    (tmp_path / "none").mkdir()
    with pytest.raises(InlayError, match="holds nothing"):
        evaluate(adapter, tmp_path / "none")


@pytest.mark.skipif(not (SHARED / "hippocampus_msd04").is_dir(), reason="data beside the repository")
def test_real_scans_of_other_classes_are_refused(adapter):
    with pytest.raises(InlayError, match="'class 1', 'class 2' are labels of"):
        evaluate(adapter, SHARED / "hippocampus_msd04" / "dev")

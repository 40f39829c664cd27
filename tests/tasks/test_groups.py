"""Examples of one patient or slide stay together: in every split that is held out, in scoring, and in resampling."""

import csv
import json
import shutil
from collections import Counter

import datasets
import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold

from inlay import BadInput, ImageTask, InlayError, MaskTask, SequenceTask, TextTask, VolumeTask, evaluate, load_adapter
from inlay.compress.prune.trained import load_trained
from inlay.compress.quantize import load_batches
from inlay.tasks.evaluation import Training, count_units
from inlay.tasks.folds import Fold
from inlay.tasks.groups import find_groups, hold_out_groups, relative_paths
from inlay.tasks.images.data import load_images, load_images_to_score
from inlay.tasks.statistics import score_with_intervals
from inlay.tasks.text.data import load_texts, load_texts_to_score
from tasks.test_parts import PARTS, ROWS, picture, write_masks, write_volumes

PATIENTS = 15


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


# Data of 15 patients with four examples each. Of the examples of one patient some have the one class, some the other.


def patient_of(i):
    return f"P{i % PATIENTS:02}"


def write_csv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path.parent)


def class_folders(folder, numbers=range(60)):
    for i in numbers:
        picture(i, folder / "ab"[i // PATIENTS % 2] / f"{patient_of(i)}_tile{i}.png")
    return str(folder)


def image_table(folder):
    for i in range(60):
        picture(i, folder / "images" / f"{i}.png")
    rows = [[f"images/{i}.png", "ab"[i // PATIENTS % 2], patient_of(i)] for i in range(60)]
    return write_csv(folder / "metadata.csv", ["file_name", "label", "patient"], rows)


def sequence_pairs(folder):
    rows = [[f"text {i}", f"pair {i}", "ab"[i // PATIENTS % 2], patient_of(i)] for i in range(60)]
    return write_csv(folder / "all.csv", ["text1", "text2", "label", "Patient"], rows)


def prompts(folder):
    rows = [[f"prompt {i}", f"completion {i}", patient_of(i)] for i in range(60)]
    return write_csv(folder / "all.csv", ["prompt", "completion", "patient"], rows)


def documents(folder):
    folder.mkdir()
    rows = [json.dumps({"text": f"A document of {i}. " * 40, "patient": patient_of(i)}) for i in range(60)]
    (folder / "all.jsonl").write_text("\n".join(rows))
    return str(folder)


def masks(folder):
    write_masks(folder, range(30))
    for kind in ("images", "labels"):
        for file in sorted((folder / kind).iterdir()):
            file.rename(file.with_name(f"{patient_of(int(file.stem.split('_')[0]))}_{file.name}"))
    return str(folder)


def volumes(folder):
    write_volumes(folder, range(30))
    for kind in ("images", "labels"):
        for file in sorted((folder / kind).iterdir()):
            file.rename(file.with_name(f"{patient_of(int(file.name[4:-7]))}_{file.name}"))
    return str(folder)


LAYOUTS = {
    "class folders": (ImageTask, class_folders, r"P\d+"),
    "images with a table": (ImageTask, image_table, "patient"),
    "pairs": (SequenceTask, sequence_pairs, "patient"),
    "prompts": (TextTask, prompts, "patient"),
    "documents": (TextTask, documents, "patient"),
    "masks": (MaskTask, masks, r"images/(P\d+)_"),
    "scans": (VolumeTask, volumes, r"(P\d+)_case"),
}
EVERY = pytest.mark.parametrize("layout", LAYOUTS)


def groups_of(rows):
    return rows["group"][:] if isinstance(rows, datasets.Dataset) else [row.group for row in rows]


@EVERY
def test_every_held_out_part_has_groups_of_its_own(layout, tmp_path, caplog):
    options, make, group = LAYOUTS[layout]
    task = options(dataset=make(tmp_path / "data"), group=group)
    row = next(row for row in ROWS.values() if row.options is options)
    parts = task.load_parts(1)
    source = parts.data.source
    found = {part: groups_of(getattr(source, part)) for part in PARTS}
    assert not any({*found[a]} & {*found[b]} for a in PARTS for b in PARTS if a < b)
    together = Counter(group for part in PARTS for group in found[part])
    assert {*together} == {patient_of(i) for i in range(PATIENTS)} and len({*together.values()}) == 1
    shares = [len(found[part]) / together.total() for part in PARTS]
    assert shares == pytest.approx([0.81, 0.09, 0.1] if options is TextTask else [0.64, 0.16, 0.2], abs=0.05)
    assert all(len({*row.content(getattr(source, part))}) for part in PARTS) and not caplog.text
    # Two parts, and what evaluate scores after a training that noted its options.
    two = task.load(1).source
    scored = row.score(task.dataset, split="validation", training=parts.training)
    assert groups_of(two.validation) == groups_of(scored) == found["test"]
    assert row.content(two.validation) == row.content(scored) == row.content(source.test)
    left = row.score(task.dataset, split="train", training=parts.training)
    assert {*groups_of(left)} == {*groups_of(two.train)} and row.content(left) == row.content(two.train)
    # Another seed holds other groups out; without the option there are none, and patients are on both sides.
    assert {*groups_of(task.load(2).source.validation)} != {*found["test"]}
    plain = row.score(task.dataset, split="validation", training=Training(task.dataset, {"seed": 1}))
    assert not isinstance(plain, datasets.Dataset) or "group" not in plain.column_names


@pytest.mark.parametrize("seed", range(3))
def test_groups_are_spread_over_classes_as_scikit_learn_spreads_them(seed):
    """Unequal groups of three classes: as near to a fifth of each class as a fold of StratifiedGroupKFold is."""
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(40), generator.integers(1, 20, 40))
    ids = (groups % 3 + (generator.random(len(groups)) < 0.3)) % 3  # mostly of one class
    names = [f"patient {group}" for group in groups]
    held = hold_out_groups(names, range(len(ids)), Fold(0.2), seed, "image", ids=ids.tolist(), labels=["a", "b", "c"])
    total = np.bincount(ids)

    def error(rows):
        return np.abs(np.bincount(ids[rows], minlength=3) / total - 0.2).max()

    folds = StratifiedGroupKFold(5).split(ids, ids, groups)
    assert error(held) <= max(0.03, *(error(fold) for _, fold in folds))
    assert held == sorted(held) and not {groups[i] for i in held} & {*np.delete(groups, held)}


def test_what_is_held_out_does_not_change():
    """Adapters of before are scored on what they have not seen: written down here, not computed."""
    names = [f"P{i % 10}" for i in range(40)]
    ids = [i % 2 for i in range(40)]
    held = [hold_out_groups(names, range(40), Fold(0.2), seed, "image", ids=ids) for seed in (0, 1)]
    assert [sorted({names[i] for i in each}) for each in held] == WRITTEN


WRITTEN = [["P5", "P6"], ["P3", "P4"]]


def test_a_group_larger_than_a_share_is_held_out_where_there_is_no_smaller_one():
    for seed in range(4):
        assert hold_out_groups(["a"] * 6 + ["b"] * 4, range(10), Fold(0.2), seed, "image") == [6, 7, 8, 9]
        # Of a class with two patients one is held out, though it has half of that class.
        names, ids = [f"P{i}" for i in range(12)], [0] * 10 + [1] * 2
        held = hold_out_groups(names, range(12), Fold(0.2), seed, "image", ids=ids, labels=["many", "few"])
        assert [ids[i] for i in held] == [0, 0, 1]


def test_a_class_of_one_group_stays_in_training(caplog):
    names, ids = ["a", "b", "c", "d", "e", "only"] * 4, [0, 0, 0, 0, 0, 1] * 4
    held = hold_out_groups(names, range(24), Fold(0.2), 0, "image", ids=ids, labels=["cat", "dog"])
    assert "only" not in {names[i] for i in held} and len(held) == 4
    assert (
        "no image of these classes is held out, as training would be left without one of a class: dog." in caplog.text
    )
    with pytest.raises(BadInput, match="every group has all images of a class"):
        hold_out_groups(["a", "b"], range(2), Fold(0.2), 0, "image", ids=[0, 1], labels=["cat", "dog"])


def test_equal_examples_join_their_groups(caplog):
    names = [f"P{i // 2}" for i in range(40)]
    contents = [*range(39), 0]  # of the first and the last patient
    for seed in range(8):
        held = {names[i] for i in hold_out_groups(names, contents, Fold(0.2), seed, "image")}
        assert ("P0" in held) == ("P19" in held)
    # A blank tile of every patient would join all: it is on both sides, and counted.
    held = hold_out_groups(names, [i if i % 2 else "blank" for i in range(40)], Fold(0.2), 0, "image")
    assert len(held) == 8 and "4 of 8 images held out are in training too, in other groups." in caplog.text


def test_groups_on_both_sides_of_the_datas_own_splits_are_counted(tmp_path, caplog):
    for split, numbers in (
        ("train", (*range(8), *range(15, 23))),
        ("val", (*range(35, 40), 54)),
        ("test", (31, 55, 59)),
    ):
        class_folders(tmp_path / split, numbers)  # 15 later it is the same patient
    task = ImageTask(dataset=str(tmp_path), group=r"P\d+")
    task.load(0)
    known = ["3 of 5 groups of validation (3 of its 6 images) are in training too: P05, P06, P07."]
    assert caplog.messages == known
    caplog.clear()
    task.load_parts(0)
    assert caplog.messages == [*known, "1 of 3 groups of test (1 of its 3 images) are in training too: P01."]
    class_folders(tmp_path / "test", [24])  # P09
    caplog.clear()
    task.load_parts(0)
    assert caplog.messages[2:] == ["1 of 4 groups of test (1 of its 4 images) are in validation too: P09."]


def test_a_split_of_its_own_may_lack_the_column(tmp_path):
    rows = [[f"text {i}", "ab"[i % 2], patient_of(i)] for i in range(40)]
    write_csv(tmp_path / "train.csv", ["text", "label", "patient"], rows)
    write_csv(tmp_path / "test.csv", ["text", "label"], [["new", "a"], ["other", "b"]])
    task = SequenceTask(dataset=str(tmp_path), group="patient")
    parts = task.load_parts(0)
    assert "group" not in parts.data.source.test.column_names and "group" in parts.data.source.train.column_names
    row = ROWS["text-classification"]
    for split in ("test", "validation", "train", "all"):
        row.score(task.dataset, split=split, training=parts.training)


# Mistakes


def test_mistakes_are_named(tmp_path):
    photos, table = class_folders(tmp_path / "photos"), image_table(tmp_path / "table")
    texts, book = sequence_pairs(tmp_path / "texts"), masks(tmp_path / "masks")
    for task, said in (
        (
            ImageTask(dataset=table, group="patent"),
            r"'patent' is no column of .* \(it has 'patient'\), and as a regular expression it matches no path",
        ),
        (ImageTask(dataset=photos, group=r"slide\d+"), r"'slide\\d\+' for .* matches no path \(the first is 'a/P00_"),
        (ImageTask(dataset=photos, group="P(0"), r"the regular expression 'P\(0' for .* cannot be read: missing"),
        (ImageTask(dataset=photos, group="P0[0-8]_"), r"24 of 60 paths of .* have no match of 'P0\[0-8\]_'"),
        (ImageTask(dataset=photos, group="tile"), "all 60 images are of one group .'tile'.*add others"),
        (ImageTask(dataset="builtin:digits", group=r"P\d+"), "'builtin:digits' has no column"),
        (ImageTask(dataset=table, group="label"), r"'label' is no column of .* \(it has 'patient'\)"),
        (SequenceTask(dataset=texts, group="patent"), r"no column 'patent' to keep together; choose one of .*'text2'"),
        (MaskTask(dataset=book, group="(x*)"), r"the regular expression '\(x\*\)' for .* matches no path"),
    ):
        with pytest.raises(BadInput, match=said):
            task.load(0)
    write_csv(tmp_path / "gaps/all.csv", ["text", "label", "patient"], [["x", "a", "P1"], ["y", "b", " "]])
    with pytest.raises(BadInput, match=r"column 'patient' of .* is empty in 1 of 2 rows \(from 0: 1\)"):
        SequenceTask(dataset=str(tmp_path / "gaps"), group="patient").load(0)


def test_too_few_groups_for_three_parts(tmp_path):
    class_folders(tmp_path / "data", [i for i in range(60) if i % PATIENTS < 2])
    task = ImageTask(dataset=str(tmp_path / "data"), group=r"P\d+")
    task.load(0)
    with pytest.raises(InlayError, match="too few different groups for three parts"):
        task.load_parts(0)


def test_an_expression_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr("inlay.tasks.groups.SECONDS", 0.05)
    with pytest.raises(BadInput, match=r"takes more than 0\.05 s for one path"):
        find_groups("(a|aa)+$", "photos", (), lambda column: (), ["a" * 60 + "b"])


def test_paths_are_those_within_the_data(tmp_path, monkeypatch):
    """Else an expression would find a number in the name of a folder above."""
    monkeypatch.chdir(tmp_path)
    paths = relative_paths(
        [tmp_path / "P7/photos/a/1.png", "P7/photos/b/2.png", "elsewhere/3.png"], tmp_path / "P7/photos"
    )
    assert paths == ["a/1.png", "b/2.png", "elsewhere/3.png"]


# Scoring


def test_intervals_are_those_of_a_cluster_bootstrap():
    """Whole groups are drawn, each with all its units: written out in numpy."""
    generator = np.random.default_rng(0)
    groups = np.repeat([f"P{i}" for i in range(12)], generator.integers(1, 9, 12))
    values = (
        generator.normal(size=len(groups))
        + np.repeat(generator.normal(size=12), [np.sum(groups == f"P{i}") for i in range(12)]) * 3
    )
    shuffle = generator.permutation(len(groups))
    groups, values = groups[shuffle], values[shuffle]

    def statistic(rows):
        return {"mean": float(values[rows].mean())}

    found = score_with_intervals(statistic, len(values), groups=groups.tolist(), resamples=300, seed=4)["mean"]
    drawn, names = np.random.default_rng(4), sorted({*groups.tolist()})
    means = []
    for _ in range(300):
        chosen = [names[k] for k in drawn.integers(0, 12, 12)]
        means.append(np.concatenate([values[groups == name] for name in chosen]).mean())
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))))
    alone = score_with_intervals(statistic, len(values), resamples=300)["mean"]
    assert found.high - found.low > 1.5 * (alone.high - alone.low)  # units of one patient are alike
    one = score_with_intervals(statistic, len(values), groups=["P"] * len(values))["mean"]
    assert one.value == found.value and one.low is None
    each = score_with_intervals(statistic, len(values), groups=[f"{i:03}" for i in range(len(values))], resamples=300)
    assert each["mean"] == alone


def test_evaluate_resamples_groups(digits_adapter, tmp_path):
    for i in range(48):
        picture(i, tmp_path / "data" / f"digit {i % 4}" / f"P{i % 12:02}_{i}.png")
    loaded, data = load_adapter(digits_adapter), str(tmp_path / "data")
    loaded.file.metrics.update(dataset=data, training={"seed": 3, "group": r"P\d+"})
    found = evaluate(loaded, data, resamples=50)
    held = load_images(data, seed=3, group=r"P\d+").validation
    assert sorted(row["image"] for row in found.rows) == sorted(i["path"].rsplit("/", 1)[1] for i in held["image"])
    assert {row["group"] for row in found.rows} == {*held["group"]} and found.split == "validation"
    assert (found.count, found.unit) == (len({*held["group"]}), "group") and len(found.rows) == len(held)
    assert f"{found.count} of them hold {len(held)} images." in "".join(found.notes)
    assert f"Intervals over {found.count} groups are rough" in found.notes[-1]
    assert sum(row["images"] for row in found.per_class) == len(held)
    # Of other data it is not known what belongs together.
    other = class_folders(tmp_path / "other", range(8))
    assert load_images_to_score(other, ["a", "b"], adapter="x", training=Training.from_metrics(loaded.metrics))[
        1
    ].column_names == ["image", "label"]


def test_a_model_that_is_pruned_or_quantised_keeps_to_the_groups_of_its_adapter(digits_adapter, tmp_path):
    for i in range(48):
        picture(i, tmp_path / "data" / f"digit {i % 4}" / f"P{i % 12:02}_{i}.png")
    data = str(tmp_path / "data")
    shutil.copytree(digits_adapter, tmp_path / "adapter")
    noted = {"dataset": data, "training": {"seed": 3, "group": r"P\d+"}}
    (tmp_path / "adapter" / "metrics.json").write_text(json.dumps(noted))
    trained, parts = load_trained(tmp_path / "adapter"), load_images(data, seed=3, group=r"P\d+")
    assert {row["group"] for row in trained.score(data, resamples=2).rows} == {*parts.validation["group"]}
    healed_on = trained.task.load_labelled(trained, data, 100, trained.seed, trained.training)
    assert {*healed_on.view.rows["group"]} == {*parts.train["group"]}
    held = load_batches(trained, data, 100, 3, held_out=True)
    assert sum(len(batch["labels"]) for batch in held) == len(parts.validation)


def test_the_unit_is_called_after_its_column():
    assert count_units(5, "image", ["P1", "P2", "P1", "P1", "P3"], "patient")[:2] == (3, "patient group")
    assert count_units(5, "image", None, "patient") == (5, "image", [])
    assert count_units(2, "scan", ["a", "b"], r"(\d+)_")[1] == "group"


def test_the_group_of_metrics_is_looked_at_before_it_is_used():
    assert Training("data", {"group": "patient"}).group_for("data") == "patient"
    for settings, data in (
        ({"group": "patient"}, "other"),
        ({"group": 3}, "data"),
        ({"group": ""}, "data"),
        ({}, "data"),
    ):
        assert Training("data", settings).group_for(data) is None


def test_a_recipe_notes_its_group(tmp_path):
    """fit writes the task's options into the settings that metrics.json holds."""
    task = ImageTask(dataset=class_folders(tmp_path / "data"), group=r"P\d+")
    training = task.load_parts(2).training
    noted = Training.from_metrics({"dataset": task.dataset, "training": json.loads(json.dumps(training.settings))})
    assert noted.group_for(task.dataset) == task.group and noted.seed == 2


def test_prompts_of_one_group_are_resampled_together(tmp_path):
    rows = [["p0", "a", "X"], ["p0", "b", "Y"], ["p1", "c", "Y"], ["p2", "d", "Z"]] + [
        [f"q{i}", "e", f"G{i}"] for i in range(40)
    ]
    data = write_csv(tmp_path / "d/all.csv", ["prompt", "completion", "patient"], rows)
    training = Training(data, {"seed": 0, "group": "patient"})
    _, scored, _, _ = load_texts_to_score(data, split="all", training=training)
    assert scored["group"][:4] == ["X", "Y", "Y", "Z"]
    for seed in range(6):  # X and Y share a prompt
        held = {*load_texts(data, seed=seed, group="patient").validation["group"]}
        assert ("X" in held) == ("Y" in held)

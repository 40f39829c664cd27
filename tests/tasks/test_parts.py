"""Three parts of the data of every task: one to train on, one that chooses, and a test part that evaluate scores."""

import csv
import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from diffusion_models import write_pipeline
from inlay import ImageTask, InlayError, MaskTask, SequenceTask, TextTask, TextToImageTask, VolumeTask, load_adapter
from inlay.compress.prune.trained import load_trained
from inlay.compress.quantize import load_batches
from inlay.tasks import TASKS
from inlay.tasks.evaluation import Request, Training
from inlay.tasks.image_decoding import open_image
from inlay.tasks.images.data import load_images, load_images_to_score
from inlay.tasks.masks.data import load_masks_to_score
from inlay.tasks.sequences.data import load_sequences_to_score
from inlay.tasks.text.data import group_by_prompt, load_texts_to_score
from inlay.tasks.text_to_image.data import load_captioned_to_score, open_captioned
from inlay.tasks.volumes.data import load_volumes_to_score
from inlay.tasks.volumes.formats import write_volume
from places import SHARED

PARTS = ("train", "validation", "test")
LAYOUTS = {  # examples in each split of the data, and the split that is the test part
    "no splits": ({"": 30}, "validation"),
    "validation": ({"train": 20, "val": 10}, "validation"),
    "test": ({"train": 20, "test": 10}, "test"),
    "validation and test": ({"train": 12, "val": 8, "test": 10}, "test"),
}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module", autouse=True)
def painter(tmp_path_factory):
    """A tiny pipeline in the place of the embedded one."""
    base = write_pipeline(tmp_path_factory.mktemp("pipeline") / "sd")
    ROWS["text-to-image"].options = partial(TextToImageTask, model=str(base))


# Every example stands twice, so that parts could share its content.


def picture(number, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels.tobytes()


def write_images(folder, numbers):
    return [picture(i, folder / "ab"[i % 2] / f"{i}_{copy}.png") for i in numbers for copy in "12"]


def write_table(folder, numbers, header, *rows):
    name = folder.parent / f"{folder.name}.csv" if folder.name in ("train", "val", "test") else folder / "all.csv"
    name.parent.mkdir(parents=True, exist_ok=True)
    written = [row for i in numbers for row in ([cell.format(i, "ab"[i % 2]) for cell in row] for row in rows)]
    with name.open("w", newline="") as file:
        csv.writer(file).writerows([header, *written])
    return [row[0] for row in written]


def write_sequences(folder, numbers):
    return write_table(folder, numbers, ["text", "label"], *[["text {}", "{1}"]] * 2)


def write_texts(folder, numbers):
    return write_table(folder, numbers, ["prompt", "completion"], *[["prompt {}", f"{word} {{}}"] for word in "xy"])


def write_masks(folder, numbers):
    found = [picture(i, folder / "images" / f"{i}_{copy}.png") for i in numbers for copy in "12"]
    (folder / "labels").mkdir()
    for i in numbers:
        for copy in "12":
            Image.fromarray(np.eye(8, dtype=np.uint8)).save(folder / "labels" / f"{i}_{copy}.png")
    return found


def write_captioned(folder, numbers):
    found = [picture(i, folder / f"{i}_{copy}.png") for i in numbers for copy in "12"]
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text("a dog")
    return found


def write_volumes(folder, numbers):
    for i in numbers:
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            write_volume(
                folder / kind / f"case{i}.nii.gz", np.eye(4, dtype=np.uint8)[..., None] * np.ones(4), np.eye(4)
            )
    return [f"case{i}" for i in numbers]


@dataclass
class Row:
    """A task: its options, how its data is written, and what tells examples apart."""

    options: Any
    write: Any
    content: Any
    score: Any  # the rows that evaluate scores


ROWS = {
    "image-classification": Row(
        ImageTask,
        write_images,
        lambda rows: [open_image(image).tobytes() for image in rows["image"]],
        lambda *a, **k: load_images_to_score(*a, ["a", "b"], adapter="x", **k)[1],
    ),
    "text-classification": Row(
        SequenceTask,
        write_sequences,
        lambda rows: rows["text"][:],
        lambda *a, **k: load_sequences_to_score(*a, ["a", "b"], adapter="x", **k)[1],
    ),
    "text-generation": Row(
        TextTask,
        write_texts,
        lambda rows: rows["prompt"][:],
        lambda *a, **k: load_texts_to_score(*a, **k)[1],
    ),
    "mask-generation": Row(
        MaskTask,
        write_masks,
        lambda rows: [open_image(row.image).tobytes() for row in rows],
        lambda *a, **k: load_masks_to_score(*a, **k)[1],
    ),
    "volume-segmentation": Row(
        VolumeTask,
        write_volumes,
        lambda rows: [case.name for case in rows],
        lambda *a, **k: load_volumes_to_score(*a, **k)[1],
    ),
    "text-to-image": Row(
        TextToImageTask,
        write_captioned,
        lambda rows: [open_captioned(row).tobytes() for row in rows],
        lambda *a, **k: load_captioned_to_score(*a, **k)[1],
    ),
}
EVERY = pytest.mark.parametrize("name", ROWS)


def write(row, folder, sizes):
    """Each split with examples of its own; what they hold."""
    found, begin = [], 0
    for split, size in sizes.items():
        found += row.write(folder / split, range(begin, begin + size))
        begin += size
    return found


def test_every_task_is_here():
    assert ROWS.keys() == TASKS.keys()


@EVERY
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_parts_share_nothing_and_cover_the_data(name, layout, tmp_path, caplog):
    (sizes, split), row = LAYOUTS[layout], ROWS[name]
    written = write(row, tmp_path / "data", sizes)
    task = row.options(dataset=str(tmp_path / "data"))
    parts = task.load_parts(3)
    source = parts.data.source
    contents = {part: row.content(getattr(source, part)) for part in PARTS}
    assert not any({*contents[a]} & {*contents[b]} for a in PARTS for b in PARTS if a < b)
    assert Counter(content for part in PARTS for content in contents[part]) == Counter(written)
    assert parts.counts == {part: len(contents[part]) for part in PARTS} and min(parts.counts.values()) >= 1
    assert (len(parts.data.train), len(parts.data.validation)) == (parts.counts["train"], parts.counts["validation"])
    # The test part is what evaluate scores, and what load has as its validation data, where there is no test split.
    assert parts.test_split == split and caplog.text == ""
    scored = row.score(task.dataset, split=parts.test_split, training=parts.training)
    assert row.content(scored) == contents["test"]
    two = task.load(3).source
    if split == "test":
        assert row.content(two.train) == contents["train"] and row.content(two.validation) == contents["validation"]
    else:
        assert row.content(two.validation) == contents["test"]
    if layout == "no splits":
        again, other = (task.load_parts(seed).data.source for seed in (3, 4))
        assert [row.content(getattr(again, part)) for part in PARTS] == list(contents.values())
        assert row.content(other.train) != contents["train"]


@EVERY
def test_two_examples_are_too_few_for_three_parts(name, tmp_path):
    row = ROWS[name]
    write(row, tmp_path / "data", {"": 4 if "classification" in name else 2})  # two of each class
    task = row.options(dataset=str(tmp_path / "data"))
    task.load(0)
    with pytest.raises(InlayError, match=r"too few different .*s for three parts.*; add some, or give it a validation"):
        task.load_parts(0)


FOLDED = pytest.mark.parametrize("name", [name for name in ROWS if name != "text-to-image"])


def fold_options(name, folder, grouped):
    """The options of a task for this data, in which a group, if any, is three or so examples."""
    if not grouped:
        return {}
    if "text" not in name:
        return {"group": r"(\d)\d*[_.]"}
    table = folder / "all.csv"
    header, *rows = list(csv.reader(table.read_text().splitlines()))
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([[*header, "who"], *([*row, row[0].split()[1][0]] for row in rows)])
    return {"group": "who"}


@FOLDED
@pytest.mark.parametrize("grouped", [False, True])
def test_folds_share_nothing_and_cover_the_data(name, grouped, tmp_path):
    row, folder = ROWS[name], tmp_path / "data"
    written = write(row, folder, {"": 30})
    options = fold_options(name, folder, grouped)
    task = row.options(dataset=str(folder), **options)
    usual, found = row.content(task.load(3).source.validation), []
    for fold in range(3 if grouped else task.default_folds):
        folds = {"folds": 3} if grouped else {}
        task = row.options(dataset=str(folder), fold=fold, **folds, **options)
        source = task.load(3).source
        held, left = row.content(source.validation), row.content(source.train)
        assert held and not {*held} & {*left} and Counter(held) + Counter(left) == Counter(written)
        found.append(held)
        training = Training(str(folder), {**asdict(task), "seed": 3})
        assert row.content(row.score(str(folder), training=training)) == held
        parts = task.load_parts(3).data.source  # the fold is the test part, and what chooses is held out of the rest
        assert row.content(parts.test) == held and row.content(parts.validation)
    assert Counter(content for held in found for content in held) == Counter(written)
    assert grouped or found[0] == usual


@FOLDED
def test_folds_that_cannot_be_made(name, tmp_path):
    row = ROWS[name]
    write(row, tmp_path / "few", {"": 4})
    with pytest.raises(InlayError, match=r"there are \d+ .*s, too few for \d+ folds; choose fewer folds"):
        row.options(dataset=str(tmp_path / "few"), fold=0, folds=9).load(0)
    write(row, tmp_path / "own", {"train": 20, "val": 10})
    with pytest.raises(InlayError, match="has a validation split of its own, so it has no folds; leave fold out"):
        row.options(dataset=str(tmp_path / "own"), fold=0).load(0)
    with pytest.raises(InlayError, match="fold must be from 0 to 3, got 4"):
        row.options(fold=4, folds=4)
    with pytest.raises(InlayError, match="folds = 3 needs fold, the one to hold out, from 0 to 2"):
        row.options(folds=3)


def test_what_has_no_folds_says_so(tmp_path):
    (tmp_path / "book.txt").write_text("One. " * 400)
    with pytest.raises(InlayError, match="is running text, of which the end is held out, so it has no folds"):
        TextTask(dataset=str(tmp_path / "book.txt"), fold=1).load(0)
    with pytest.raises(InlayError, match="is streamed, of which one example in twenty is held out, so it has no folds"):
        SequenceTask(dataset="x-*.jsonl", fold=1).load(0)
    with pytest.raises(InlayError, match="images of a subject are too few for folds"):
        TextToImageTask(fold=0)


def test_classes_of_few_examples_in_folds(tmp_path):
    """One of a single example stays in training, one of two or three is held out as often as it has examples."""
    for label, count in {"a": 20, "b": 3, "c": 1}.items():
        for i in range(count):
            picture(1000 * ord(label) + i, tmp_path / "data" / label / f"{i}.png")
    held = []
    for fold in range(5):
        source = ImageTask(dataset=str(tmp_path / "data"), fold=fold).load(0).source
        assert {*source.train["label"]} == {0, 1, 2}
        held += source.validation["label"][:]
    assert Counter(held) == {0: 20, 1: 3}


def test_what_is_fitted_pruned_or_quantised_keeps_to_the_fold(digits_adapter, tmp_path):
    for i in range(40):
        picture(i, tmp_path / "data" / f"digit {i % 4}" / f"{i}.png")
    data = str(tmp_path / "data")
    shutil.copytree(digits_adapter, tmp_path / "adapter")
    noted = {"dataset": data, "training": {"seed": 3, "fold": 2, "folds": 4}}
    (tmp_path / "adapter" / "metrics.json").write_text(json.dumps(noted))
    trained, parts = load_trained(tmp_path / "adapter"), load_images(data, seed=3, validation=1 / 4, fold=2)
    held, left = ([open_image(image).tobytes() for image in rows["image"]] for rows in (parts.validation, parts.train))
    for held_out, expected in ((False, left), (True, held)):
        found = trained.task.load_labelled(trained, data, 100, 0, trained.training, held_out=held_out)
        assert Counter(open_image(image).tobytes() for image in found.view.rows["image"]) == Counter(expected)
    assert sum(len(batch["labels"]) for batch in load_batches(trained, data, 100, 0, held_out=True)) == len(held)
    scored = trained.score(data, resamples=2)
    assert len(scored.rows) == len(held) and "(seed 3, fold 2 of 0 to 3)" in scored.notes[0]


def test_running_text_is_held_out_by_its_end(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "word " * 7 for i in range(200)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    task = TextTask(dataset=str(tmp_path / "book.txt"))
    parts = task.load_parts(0)
    texts = [getattr(parts.data.source, part)["completion"][:] for part in PARTS]
    assert "".join(text for (text,) in texts) == "\n\n".join(paragraphs)
    total = sum(len(text) for (text,) in texts)
    assert [len(text) / total for (text,) in texts] == pytest.approx([0.81, 0.09, 0.1], rel=0.1)
    scored = load_texts_to_score(task.dataset, split=parts.test_split, training=parts.training)[1]
    assert scored["completion"][:] == texts[2] == task.load(0).source.validation["completion"][:]


def test_all_references_of_a_prompt_are_in_one_part(tmp_path):
    write_texts(tmp_path, range(30))
    source = TextTask(dataset=str(tmp_path)).load_parts(0).data.source
    assert all(len(each) == 2 for part in PARTS for each in group_by_prompt(getattr(source, part)).values())


@pytest.mark.parametrize("task", [ImageTask, SequenceTask])
def test_what_stays_in_training_is_said_once(task, tmp_path, caplog):
    """One example with two labels, and a class of one example."""
    if task is ImageTask:
        write_images(tmp_path / "data", range(30))
        for place in ("a", "b", "c"):
            picture(100 + (place == "c"), tmp_path / "data" / place / "more.png")
    else:
        rows = [[f"text {i}", "ab"[i % 2]] for i in range(30)] + [["both", "a"], ["both", "b"], ["one", "c"]]
        (tmp_path / "data").mkdir()
        with (tmp_path / "data/all.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *rows])
    data = task(dataset=str(tmp_path / "data")).load_parts(0).data.source
    assert caplog.text.count("more than one label") == caplog.text.count("stays in training") == 1
    assert 2 in data.train["label"][:]


def test_equal_examples_of_the_datas_own_test_split_are_counted(tmp_path, caplog):
    write_images(tmp_path / "train", range(20)), write_images(tmp_path / "test", range(18, 24))
    ImageTask(dataset=str(tmp_path)).load(0)
    assert not caplog.text  # test data is not looked at
    ImageTask(dataset=str(tmp_path)).load_parts(0)
    assert caplog.text.count("4 of 12 images of test are in training too") == 1


def test_evaluate_scores_the_test_part(digits_adapter, tmp_path):
    for i in range(40):
        picture(i, tmp_path / "data" / f"digit {i % 4}" / f"{i}.png")
    task = ImageTask(dataset=str(tmp_path / "data"))
    parts = task.load_parts(5)
    request = Request(parts.test_split, compare=False, resamples=2, training=parts.training)
    found = TASKS["image-classification"].evaluate(load_adapter(digits_adapter), task.dataset, request)
    expected = {image["path"].rsplit("/", 1)[1] for image in parts.data.source.test["image"]}
    assert {row["image"] for row in found.rows} == expected and found.count == parts.counts["test"] == 8


def test_training_is_what_metrics_json_will_hold(tmp_path):
    """Scoring takes the seed and the options from there."""
    write_images(tmp_path, range(12))
    task = ImageTask(dataset=str(tmp_path), corrupt="skip")
    training = task.load_parts(7).training
    assert training.seed == 7 and training.used(task.dataset)
    assert training.settings == {**asdict(task), "seed": 7} and json.dumps(training.settings)


@pytest.mark.parametrize(
    "own", [{"validation": 30}, {"validation": 10, "train": 20}, {"dev": 10, "val": 9, "train": 20}]
)
def test_splits_of_the_hub_are_named_alike_in_training_and_scoring(own, tmp_path, monkeypatch):
    """A single split is trained on whatever its name; of several for validation one is taken."""
    splits, begin = {}, 0
    for split, size in own.items():
        write_images(tmp_path / split, range(begin, begin + size))
        rows = [{"image": str(path), "label": path.parent.name} for path in sorted((tmp_path / split).glob("*/*.png"))]
        splits[split] = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))
        begin += size
    monkeypatch.setattr("inlay.tasks.images.data.hub_splits", lambda *given: splits)
    task, row = ImageTask(dataset="someone/photos"), ROWS["image-classification"]
    parts = task.load_parts(0)
    scored = row.score(task.dataset, split=parts.test_split, training=parts.training)
    assert row.content(scored) == row.content(parts.data.source.test)
    assert not {*row.content(scored)} & {*row.content(parts.data.source.train)}
    assert row.content(load_images(task.dataset).validation) == row.content(
        row.score(task.dataset, split="validation", training=replace(parts.training, settings={}))
    )


# Real data


def real(path):
    return pytest.param(
        path, marks=pytest.mark.skipif(not (SHARED / path).exists(), reason=f"no {path} next to the repository")
    )


@pytest.mark.parametrize(
    "path",
    [real("flowers5/dev/val"), real("nuclei_dsb2018/dev"), real("hippocampus_msd04/dev"), real("e2e_nlg/devset.csv")],
)
def test_real_data(path):
    name = {
        "flowers5": "image-classification",
        "nuclei_dsb2018": "mask-generation",
        "hippocampus_msd04": "volume-segmentation",
        "e2e_nlg": "text-generation",
    }[path.split("/")[0]]
    row, task = ROWS[name], ROWS[name].options(dataset=str(SHARED / path))
    parts = task.load_parts(0)
    contents = [row.content(getattr(parts.data.source, part)) for part in PARTS]
    print(path, parts.counts)
    assert not any({*a} & {*b} for a, b in zip(contents, contents[1:] + contents[:1], strict=True))

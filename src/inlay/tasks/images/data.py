"""Labelled images: from embedded data, folders, tables and the Hub to what a model takes."""

import glob
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from inlay.errors import BadInput, DamagedFile
from inlay.tasks.classification import LabelledRows, choose_labelled_rows, warn_of_overlaps
from inlay.tasks.evaluation import Split, Training, check_labels, name_groups
from inlay.tasks.folds import FOLDS, Fold
from inlay.tasks.groups import find_groups, relative_paths
from inlay.tasks.image_decoding import SUFFIXES, explain_unreadable
from inlay.tasks.images.checked import check_images
from inlay.tasks.sampling import complete_parts, normalise_label, sort_labels
from inlay.tasks.tables import hub_splits, list_first, read_table

logger = logging.getLogger(__name__)

VALIDATION = ("validation", "val", "valid", "dev")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category")
TABLES = (".parquet", ".csv", ".tsv", ".jsonl")
IMAGE = datasets.Image(decode=False)
# Folders that hold images next to maps or boxes, and no classes.
IMAGE_FOLDERS = {"image", "images", "img", "imgs", "imagestr", "jpegimages"}
TARGET_FOLDERS = {
    *("label", "labels", "labelstr", "mask", "masks", "annotation", "annotations", "segmentation", "segmentations"),
    *("gt", "ground_truth", "groundtruth", "instances", "segmentationclass", "segmentationobject"),
}
MAP_SUFFIXES, SCAN_SUFFIXES = (".png", ".tif", ".tiff", ".bmp"), (".nii", ".nii.gz")


@dataclass(frozen=True)
class ImageData:
    """Labelled images in two or three parts, undecoded: columns `image` ({"bytes", "path"}) and `label` (int).

    Attributes:
        test: The part that chooses nothing; None where none was asked for.
        test_split: The split of the data that `evaluate` finds it under.
    """

    name: str
    train: datasets.Dataset
    validation: datasets.Dataset
    labels: tuple[str, ...]
    test: datasets.Dataset | None = None
    test_split: Split = "test"


def load_images(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    seed: int = 0,
    validation: float = 1 / FOLDS,
    fold: int | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    corrupt: Literal["refuse", "skip"] = "refuse",
    group: str | None = None,
    test: bool = False,
) -> ImageData:
    """Labelled images for training and validation.

    Each image is decoded once, to find those that cannot be and those that are equal; what was found is remembered for
    the next start, until the file changes. Test data is not looked at unless `test` asks for it: it is for `evaluate`.

    Args:
        name: `builtin:digits` or `builtin:shapes`; a folder of class folders, or of train/ and val/ that hold
            them; a .parquet, .csv, .tsv or .jsonl file, or a folder of train.csv and val.csv, with images
            or their paths relative to the file; a Hub dataset id. Class names are text as it is written.
        revision: Branch, tag or commit of a Hub dataset.
        seed: Chooses the images to hold out where the data does not; alike on every machine.
        validation: Share of each class to hold out, between 0 and 1; equal images stay on one side. Data with a
            validation split keeps it: the first of validation, val, valid and dev that has labels.
        fold: Which part of `validation` is held out, from 0; all parts together are the data. None: the first.
        image_column: Column of the images, where it cannot be told.
        label_column: Column of the labels, where it cannot be told.
        corrupt: `skip` leaves out images that cannot be read, with a warning that names them.
        group: Keep together what stands with one value in this column, or what this regular expression finds in the
            paths of files, from the data's folder on: the patient, the slide. The rows then have a column `group`.
        test: Keep a third part that chooses nothing: the data's test split, or else what would be validation without
            this; validation is then held out of the rest.

    Raises:
        InlayError: The data cannot be found or read, or its images, labels and splits make no task.
    """
    name = os.fspath(name)
    part = Fold(validation, fold)
    if corrupt not in ("refuse", "skip"):
        raise BadInput(f"corrupt must be refuse or skip, got {corrupt!r}.")
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own raises for an unknown user
    sources = _read_splits(name, path, revision)
    first = "train" if "train" in sources else next(iter(sources))
    if not len(sources[first]) or (first != "train" and len(sources) > 1):
        sizes = {split: len(rows) for split, rows in sources.items()}
        raise BadInput(f"{name!r} has no rows in a split 'train', but {sizes}; rename one.")
    image, label = _find_columns(sources[first], name, image_column, label_column, group)
    splits = {"train": sources[first]}
    held = _find_validation(sources, first, label)
    if held:
        splits["validation"] = sources[held]
    if test and first != "test" and "test" in sources and _has_labels(sources["test"], label):
        splits["test"] = sources["test"]
    words = {split: _read_words(rows, label, f"split {split!r} of {name!r}") for split, rows in splits.items()}
    _check_classes(words, name)
    feature = sources[first].features[label]
    named = feature.names if isinstance(feature, datasets.ClassLabel) else sort_labels(words["train"])
    labels = list(dict.fromkeys(map(normalise_label, named)))
    parts = {split: _make_rows(rows, image, words[split], labels, path) for split, rows in splits.items()}
    if group is not None:
        _add_groups(parts, splits, group, (image, label), name, path)
    contents = check_readable(parts, name, labels, corrupt)
    made = {split: LabelledRows(rows, contents[split]) for split, rows in parts.items()}
    warn_of_overlaps(made, "image")
    test_split: Split = "test" if "test" in parts or not test else "validation"

    def hold_out(rows: LabelledRows, part: Fold, first: bool) -> tuple[LabelledRows, LabelledRows]:
        return rows.hold_out(labels, part, seed, "image", first=first)

    complete_parts(made, test, part, hold_out, name, name_groups(group) if group else "image")
    tested = made["test"].rows if test else None
    return ImageData(name, made["train"].rows, made["validation"].rows, tuple(labels), tested, test_split)


def load_images_to_score(
    name: str | os.PathLike[str],
    labels: Sequence[str],
    *,
    adapter: str,
    split: Split | None = None,
    training: Training | None = None,
) -> tuple[Split, datasets.Dataset, list[str]]:
    """Labelled images for an adapter that is trained already; unlike for training, one class or one image is enough.

    Args:
        name: As for `load_images`.
        labels: Of the adapter, in the order of its logits. The data may have some of them only, in any order.
        adapter: Its name, for errors.
        split: Which part, as `choose_split` has it; by itself validation, or test where there is only that.
        training: Of the adapter.

    Returns:
        The split, its images with columns as in `ImageData` and labels as indices of `labels`, and notes.

    Raises:
        InlayError: As `load_images`; labels that the adapter does not have; no such split.
    """
    name = os.fspath(name)
    training = training or Training()
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own raises for an unknown user
    sources = {own: rows for own, rows in _read_splits(name, path, None).items() if len(rows)}
    if not sources:
        raise BadInput(f"there are no images in {name!r}; pass data with some.")
    first = "train" if "train" in sources else next(iter(sources))
    group = training.group_for(name)
    image, label = _find_columns(sources[first], name, None, None, group)
    held = _find_validation(sources, first, label)
    splits: dict[str, datasets.Dataset] = {}
    for own, rows in sources.items():
        if own in (first, held) or (own not in VALIDATION and _has_labels(rows, label)):
            only = len(sources) == 1  # then it is what an adapter was trained on, whatever it is called
            splits.setdefault(own if own not in VALIDATION else "train" if only else "validation", rows)
    known = list(map(normalise_label, labels))

    def load(wanted: list[str]) -> LabelledRows:
        words = {own: _read_words(splits[own], label, f"split {own!r} of {name!r}") for own in wanted}
        check_labels(name, sort_labels([word for each in words.values() for word in each]), known, adapter)
        parts = {own: _make_rows(splits[own], image, words[own], known, path) for own in wanted}
        if group is not None:
            _add_groups(parts, splits, group, (image, label), name, path)
        corrupt = "skip" if training.settings.get("corrupt") == "skip" else "refuse"
        contents = check_readable(parts, name, labels, corrupt)
        if not all("group" in rows.column_names for rows in parts.values()):  # known of some only
            parts = {own: rows.select_columns(["image", "label"]) for own, rows in parts.items()}
        rows = datasets.concatenate_datasets(list(parts.values()))
        return LabelledRows(rows, contents[wanted[0]] if len(wanted) == 1 else None)

    scored: Split = "test" if "test" in splits and "validation" not in splits else "validation"
    return choose_labelled_rows(
        name, list(splits), load, labels, wanted=split, scored=scored, training=training, noun="image"
    )


def _read_splits(name: str, path: Path, revision: str | None) -> dict[str, datasets.Dataset]:
    """Every split of a source, with columns of any name."""
    embedded = name.startswith("builtin:")
    if revision is not None and (embedded or path.exists()):
        raise BadInput(f"revision is for a Hub dataset, but {name!r} is local; leave it out.")
    if embedded:
        return {"train": _read_builtin(name)}
    if name and path.exists():
        return _read_tables([path]) if path.is_file() else _read_folder(path)
    return hub_splits(name, revision, "builtin:digits, builtin:shapes, a folder, a table or a Hub dataset")


def _read_builtin(name: str) -> datasets.Dataset:
    images: Any
    if name == "builtin:digits":
        from sklearn.datasets import load_digits

        (grey, ids), labels = load_digits(return_X_y=True), list("0123456789")
        images = (grey.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    elif name == "builtin:shapes":
        from inlay.builtin.shapes import SHAPE_LABELS, generate_shapes

        # Not a seed that pre-training would use: the base has seen none of these.
        (images, ids), labels = generate_shapes(4000, seed=20_000), list(SHAPE_LABELS)
    else:
        raise BadInput(f"unknown data {name!r}; the embedded images are builtin:digits and builtin:shapes.")
    features = datasets.Features({"image": IMAGE, "label": datasets.ClassLabel(names=labels)})
    return datasets.Dataset.from_dict({"image": list(images), "label": ids}, features=features)


def _read_folder(folder: Path) -> dict[str, datasets.Dataset]:
    """Splits of a folder: of class folders, or of tables.

    Walked here, as the imagefolder builder of datasets takes a class called `test` for a split and then drops
    all labels, and caches what a folder held.
    """
    folders, files = _list_visible(folder)
    by_name = {inner.name.lower(): inner for inner in folders}
    # A folder `train` of images is a class: trains next to cars.
    if "train" in by_name and _list_visible(by_name["train"])[0]:
        return {s: _read_class_folders(by_name[s]) for s in ("train", *VALIDATION, "test") if s in by_name}
    tables = [file for file in files if file.suffix.lower() in TABLES]
    # A table called metadata is the Hub's own sign that folders are not classes.
    if tables and (not folders or any(file.stem == "metadata" for file in tables)):
        return _read_tables(tables)
    return {"train": _read_class_folders(folder)}


def _list_visible(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and files in a folder by name, without those that systems hide there."""
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX", "Thumbs.db")))
    return [p for p in entries if p.is_dir()], [p for p in entries if p.is_file()]


def _read_class_folders(folder: Path) -> datasets.Dataset:
    classes, loose = _list_visible(folder)
    _refuse_targets(folder, classes)
    paths, names, wrong = [], [], [] if classes else ["there are none"]
    loose = [file for file in loose if file.suffix.lower() in SUFFIXES]
    for inner in classes:
        deeper, files = _list_visible(inner)
        images = [str(file.absolute()) for file in files if file.suffix.lower() in SUFFIXES]
        if deeper or not images:
            wrong.append(f"{inner.name!r} holds {'folders' if deeper else 'no images'}")
        loose += [file for file in files if file.suffix.lower() not in SUFFIXES]
        paths += images
        names += [inner.name] * len(images)
    if wrong:
        raise BadInput(
            f"{str(folder)!r} must hold class folders of images, but {list_first(wrong)}; pass the folder of the class "
            "folders (or train/ and val/ with them), without empty ones, or pass a table."
        )
    if loose:
        logger.warning("%d files are not used as images of a class: %s.", len(loose), list_first(loose))
    features = datasets.Features({"image": IMAGE, "label": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": paths, "label": names}, features=features)


def _refuse_targets(folder: Path, classes: list[Path]) -> None:
    """Refuse images/ next to labels/: a classifier would learn to tell an image from a map."""
    by_name = {inner.name.lower(): inner for inner in classes}
    images, targets = (sorted(names & by_name.keys()) for names in (IMAGE_FOLDERS, TARGET_FOLDERS))
    if not images or not targets:
        return
    there = f"{by_name[images[0]].name}/ and {by_name[targets[0]].name}/"
    inside = [file.name.lower() for file in by_name[targets[0]].rglob("*") if file.is_file()]
    if any(name.endswith(SCAN_SUFFIXES) for name in inside):
        rest = "scans with label maps: use recipes/spatial_sam.py or load_volumes"
    elif any(name.endswith(MAP_SUFFIXES) for name in inside):
        rest = "images with maps of the objects in them: use recipes/lora_sam.py or load_masks"
    else:
        rest = "images with boxes or the like, for which inlay has no task"
    raise BadInput(
        f"{str(folder)!r} holds {there}, which are not two classes but {rest}. If they are two classes, rename the "
        "folders."
    )


def _read_tables(files: list[Path]) -> dict[str, datasets.Dataset]:
    """Tables by the split that each is called after."""
    found = [re.match(rf"(train|{'|'.join(VALIDATION)}|test)(?![a-z])", file.stem.lower()) for file in files]
    splits: dict[str, list[Path]] = {}
    for file, match in zip(files, found, strict=True):
        splits.setdefault(match[1] if match and files[1:] else "train", []).append(file)
    kinds = {file.suffix.lower() for file in files}
    if not kinds <= set(TABLES) or len(kinds) > 1 or (files[1:] and not all(found)):
        has = list_first([file.name for file in files])
        raise BadInput(
            f"image data is class folders, one table ({', '.join(TABLES)}), or several of a kind named after splits "
            f"(train.csv), but this folder has {has}; pass the one you mean."
        )
    if kinds == {".parquet"}:
        return _read_parquet(splits)
    return {split: datasets.concatenate_datasets(list(map(_read_text_table, parts))) for split, parts in splits.items()}


def _read_text_table(file: Path) -> datasets.Dataset:
    """A table of text, its values as they are written: datasets would read 001 as a number, and a date as a date."""
    table = read_table(file)
    columns = {name: table.column(name) for name in table.names}
    return datasets.Dataset.from_dict({name: _unify_types(values) for name, values in columns.items()})


def _unify_types(values: Sequence[Any]) -> list[Any]:
    """Values of one type as they are, and else as text."""
    kinds = {type(value) for value in values if value is not None}
    return list(values) if len(kinds) <= 1 else [None if value is None else str(value) for value in values]


def _read_parquet(splits: dict[str, list[Path]]) -> dict[str, datasets.Dataset]:
    hidden, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it would log an error that it raises as well
    try:
        # Escaped, as the library takes [ and * in a path for a pattern.
        escaped = {split: [glob.escape(str(file)) for file in files] for split, files in splits.items()}
        return dict(datasets.load_dataset("parquet", data_files=escaped))
    except Exception as error:  # what a reader raises for a bad file is not documented
        names = list_first([file for files in splits.values() for file in files])
        got = explain_unreadable(error.__cause__ or error)
        raise DamagedFile(f"{names} cannot be read as parquet: {got}.") from error
    finally:
        datasets.logging.set_verbosity(level)
        if not hidden:
            datasets.enable_progress_bars()


def _find_columns(
    rows: datasets.Dataset, name: str, image: str | None, label: str | None, group: str | None
) -> tuple[str, str]:
    """The columns of images and of labels: as asked, by type, or by name."""
    kinds = {column: _name_type(feature) for column, feature in rows.features.items()}
    images = [image] if image else [c for c, kind in kinds.items() if kind == "Image"]
    images = images or [c for c, kind in kinds.items() if "binary" in kind or kind == "dict"]
    images = images or [c for c in kinds if str(rows[0][c]).lower().endswith(SUFFIXES)]
    others = [c for c in kinds if c not in images]
    labels = [c for c in others if kinds[c] == "ClassLabel" or c.lower() in LABEL_COLUMNS]
    rest = [c for c in others if c != group]
    labels = [label] if label else labels or (rest if len(rest) == 1 else [])
    for what, found in (("image", images), ("label", labels)):
        if len(found) != 1 or found[0] not in kinds:
            raise BadInput(
                f"{name!r} must have one {what} column, but has {list_first(found) or 'none'} among "
                f"{list_first(list(kinds))}; pass {what}_column."
            )
    return images[0], labels[0]


def _name_type(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def _find_validation(sources: dict[str, datasets.Dataset], first: str, label: str) -> str | None:
    """Which split, besides the one to train on, is for validation."""
    return next((s for s in VALIDATION if s != first and s in sources and _has_labels(sources[s], label)), None)


def _has_labels(rows: datasets.Dataset, label: str) -> bool:
    """False for a competition's test split: no label column, or nothing in it but None or -1."""
    return label in rows.column_names and any(value not in (None, -1) for value in rows[label][:])


def _read_words(rows: datasets.Dataset, label: str, where: str) -> list[str]:
    """The label of each row as a word, in one Unicode form."""
    feature, values = rows.features[label], rows[label][:]
    named = isinstance(feature, datasets.ClassLabel)
    gaps = [i for i, v in enumerate(values) if v is None or v != v or v == "" or (named and v < 0)]
    if gaps:
        got = f"{len(gaps)} rows have none (from 0: {list_first(gaps)})"
        raise BadInput(f"every row of {where} needs a label, but {got}; fill or remove them.")
    if not named and not re.fullmatch(r"(large_)?string|u?int\d+|bool", _name_type(feature)):
        raise BadInput(
            f"labels must be words or whole numbers, but column {label!r} of {where} holds {_name_type(feature)}; "
            "convert it."
        )
    words = (feature.names[v] if named else str(v).lower() if isinstance(v, bool) else str(v) for v in values)
    return [normalise_label(word) for word in words]


def _check_classes(words: dict[str, list[str]], name: str) -> None:
    train = {*words["train"]}
    if len(train) < 2:
        raise BadInput(f"{name!r} has one class, {list_first(list(train))}; a classifier needs at least two.")
    for split, found in words.items():
        unknown = sort_labels(list({*found} - train))
        if unknown:
            raise BadInput(
                f"the classes {list_first(unknown)} of {name!r} occur only in {split}; add training images of them, or "
                "remove them."
            )


def _make_rows(
    rows: datasets.Dataset, image: str, words: Sequence[str], labels: Sequence[str], source: Path
) -> datasets.Dataset:
    """The columns `image` and `label`, a number in `labels`; paths are relative to the source."""
    if "string" in _name_type(rows.features[image]):
        folder = source if source.is_dir() else source.parent
        paths = [path and str((folder / path).absolute()) for path in rows[image][:]]
        rows = datasets.Dataset.from_dict({"image": paths}, features=datasets.Features({"image": IMAGE}))
    else:
        rows = rows.select_columns([image]).rename_columns({image: "image"}).cast_column("image", IMAGE)
    ids = {label: i for i, label in enumerate(labels)}
    return rows.add_column("label", np.array([ids[word] for word in words], np.int64))


def _add_groups(
    parts: dict[str, datasets.Dataset],
    splits: dict[str, datasets.Dataset],
    group: str,
    used: tuple[str, str],
    name: str,
    source: Path,
) -> None:
    """Give the rows of all splits, in place, the column `group`; a split besides training may lack it.

    Args:
        parts: From `_make_rows`.
        splits: The same rows with all their columns.
        group: As in `load_images`.
        used: Columns of images and labels, which are no groups.
        name: Of the data.
        source: Where it is.
    """
    others = {split: [c for c in rows.column_names if c not in used] for split, rows in splits.items()}
    in_column = any(group in columns for columns in others.values())
    folder = source if source.is_dir() else source.parent
    for split, rows in parts.items():
        if in_column and group not in others[split] and split != "train":
            continue
        files = [] if in_column else [image["path"] for image in rows["image"]]
        paths = relative_paths(files, folder) if files and all(files) else None
        parts[split] = rows.add_column(
            "group", find_groups(group, name, others[split], splits[split].__getitem__, paths)
        )


def check_readable(
    parts: dict[str, datasets.Dataset], name: str, labels: Sequence[str], corrupt: str
) -> dict[str, list[str] | None]:
    """Take images that cannot be decoded out of the splits, in place, or refuse them.

    Gives what tells the images of each split from each other; None for embedded data, whose images all differ.

    Raises:
        InlayError: Names those images.
    """
    if name.startswith("builtin:"):
        return dict.fromkeys(parts)
    contents: dict[str, list[str] | None] = {}
    bad: list[str] = []
    lost: set[int] = set()
    checked = check_images(name, parts)
    for split, found in checked.items():
        rows, faults = parts[split], [i for i, one in enumerate(found) if one.fault]
        bad += [f"{rows[i]['image']['path'] or f'row {i} of {split}'} ({found[i].fault})" for i in faults]
        contents[split] = [one.content for one in found if not one.fault]
        if faults:
            parts[split] = rows.select([i for i, one in enumerate(found) if not one.fault])
            lost |= set(rows["label"][:]) - set(parts[split]["label"][:]) if split == "train" else set()
    if not bad:
        return contents
    if corrupt == "refuse":
        count = sum(map(len, checked.values()))
        raise DamagedFile(
            f"{len(bad)} of {count} images in {name!r} cannot be read: {list_first(bad)}; replace them, or "
            "train with corrupt='skip'."
        )
    logger.warning("left out %d images that cannot be read: %s.", len(bad), ", ".join(bad))
    if lost or not all(map(len, parts.values())):
        none = list_first([labels[i] for i in sorted(lost)]) or list_first([s for s in parts if not len(parts[s])])
        raise DamagedFile(f"none of the images of {none} in {name!r} can be read; replace some.")
    return contents

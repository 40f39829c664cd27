"""Labelled pictures: from embedded data, folders, tables and the Hub to what a model takes."""

import glob
import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from inlay.errors import BadInput, DamagedFile
from inlay.tasks.evaluation import Split, Training, check_labels, choose_split, split_note
from inlay.tasks.pictures import decode_image, explain_unreadable
from inlay.tasks.sampling import hold_out_by_class, sort_labels
from inlay.tasks.tables import hub_splits, list_first

logger = logging.getLogger(__name__)

VALIDATION = ("validation", "val", "valid", "dev", "test")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category")
SUFFIXES = tuple(f".{s}" for s in "jpg jpeg jfif png gif bmp webp avif tif tiff ppm pgm".split())  # noqa: SIM905
CSV = {"keep_default_na": False, "na_values": [""]}  # NA, None and null are names of classes, not gaps
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".parquet": ("parquet", {}),
    ".csv": ("csv", CSV),
    ".tsv": ("csv", CSV | {"sep": "\t"}),
    ".jsonl": ("json", {}),
}
PICTURE = datasets.Image(decode=False)


@dataclass(frozen=True)
class ImageData:
    """Labelled pictures in two splits, undecoded: columns `image` ({"bytes", "path"}) and `label` (int)."""

    name: str
    train: datasets.Dataset
    validation: datasets.Dataset
    labels: tuple[str, ...]


def load_images(
    name: str,
    *,
    revision: str | None = None,
    seed: int = 0,
    validation: float = 0.2,
    image_column: str | None = None,
    label_column: str | None = None,
    corrupt: Literal["refuse", "skip"] = "refuse",
) -> ImageData:
    """Labelled pictures for training and validation; each is decoded once, to find those that cannot be.

    Args:
        name: `builtin:digits` or `builtin:shapes`; a folder of class folders, or of train/ and val/ that hold
            them; a .parquet, .csv, .tsv or .jsonl file, or a folder of train.csv and val.csv, with pictures
            or their paths relative to the file; a Hub dataset id.
        revision: Branch, tag or commit of a Hub dataset.
        seed: Chooses the pictures to hold out where the data does not; alike on every machine.
        validation: Share of each class to hold out, between 0 and 1. Data with its own split keeps it: the
            first of validation, val, valid, dev and test that has labels.
        image_column: Column of the pictures, where it cannot be told.
        label_column: Column of the labels, where it cannot be told.
        corrupt: `skip` leaves out pictures that cannot be read, with a warning that names them.

    Raises:
        InlayError: The data cannot be found or read, or its pictures, labels and splits make no task.
    """
    if not 0 < validation < 1 or corrupt not in ("refuse", "skip"):
        raise BadInput(
            f"validation must be a share between 0 and 1, and corrupt refuse or skip, got {validation} and {corrupt!r}."
        )
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own raises for an unknown user
    splits = _splits(name, path, revision)
    first = "train" if "train" in splits else next(iter(splits))
    if not len(splits[first]) or (first != "train" and len(splits) > 1):
        sizes = {split: len(rows) for split, rows in splits.items()}
        raise BadInput(f"{name!r} has no rows in a split 'train', but {sizes}; rename one.")
    image, label = _columns(splits[first], name, image_column, label_column)
    has_labels = (s for s in VALIDATION if s != first and s in splits and _has_labels(splits[s], label))
    chosen = [first, *has_labels][:2]
    words = {split: _words(splits[split], label, f"split {split!r} of {name!r}") for split in chosen}
    _check_classes(words, name)
    feature = splits[first].features[label]
    labels = feature.names if isinstance(feature, datasets.ClassLabel) else sort_labels(words[first])
    base, ids = path if path.is_dir() else path.parent, {word: i for i, word in enumerate(labels)}
    parts = {s: _rows(splits[s], image, [ids[word] for word in words[s]], base) for s in chosen}
    good = list(parts.values()) if name.startswith("builtin:") else _readable(parts, name, labels, corrupt)
    if len(good) == 1:
        held = hold_out_by_class(good[0]["label"][:], labels, validation, seed, "image")
        kept = sorted(set(range(len(good[0]))) - set(held))
        good = [good[0].select(kept), good[0].select(held)]
    return ImageData(name, good[0], good[1], tuple(labels))


def load_images_to_score(
    name: str, labels: Sequence[str], *, adapter: str, split: Split | None = None, training: Training | None = None
) -> tuple[Split, datasets.Dataset, list[str]]:
    """Labelled images for an adapter that is trained already; unlike for training, one class or one image is enough.

    Args:
        name: As for `load_images`.
        labels: Of the adapter, in the order of its logits. The data may have some of them alone, in any order.
        adapter: Its name, for errors.
        split: Which part, as `choose_split` has it.
        training: Of the adapter.

    Returns:
        The split, its images with columns as in `ImageData` and labels as indices of `labels`, and notes.

    Raises:
        InlayError: As `load_images`; labels that the adapter does not have; no such split.
    """
    training = training or Training()
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path's own raises for an unknown user
    splits = {own: rows for own, rows in _splits(name, path, None).items() if len(rows)}
    if not splits:
        raise BadInput(f"there are no images in {name!r}; pass data with some.")
    first = "train" if "train" in splits else next(iter(splits))
    image, label = _columns(splits[first], name, None, None)
    splits = {own: rows for own, rows in splits.items() if own == first or _has_labels(rows, label)}
    chosen = choose_split(name, split, list(splits), "validation", training)
    held = next((own for own in VALIDATION if own in splits and own != first), None)
    wanted = {"train": [first], "validation": [held or first], "test": ["test"], "all": list(splits)}[chosen]
    words = {own: _words(splits[own], label, f"split {own!r} of {name!r}") for own in wanted}
    check_labels(name, sort_labels([word for each in words.values() for word in each]), labels, adapter)
    base, ids = path if path.is_dir() else path.parent, {word: i for i, word in enumerate(labels)}
    parts = {own: _rows(splits[own], image, [ids[word] for word in words[own]], base) for own in wanted}
    if not name.startswith("builtin:"):
        corrupt = "skip" if training.settings.get("corrupt") == "skip" else "refuse"
        parts = dict(zip(parts, _readable(parts, name, labels, corrupt), strict=True))
    rows = datasets.concatenate_datasets(list(parts.values()))
    if held is None and chosen != "all":  # what `load_images` holds out
        out = hold_out_by_class(rows["label"][:], labels, 0.2, training.seed, "image")
        kept = sorted(set(range(len(rows))) - set(out)) if chosen == "train" else out
        rows = rows.select(kept)
    return chosen, rows, split_note(name, chosen, list(splits), training)


def _splits(name: str, path: Path, revision: str | None) -> dict[str, datasets.Dataset]:
    """Every split of a source, with columns of any name."""
    embedded = name.startswith("builtin:")
    if revision is not None and (embedded or path.exists()):
        raise BadInput(f"expected revision with a Hub dataset, but {name!r} is local. Leave revision out.")
    if embedded:
        return {"train": _builtin(name)}
    if name and path.exists():
        return _tables([path]) if path.is_file() else _folder(path)
    return hub_splits(name, revision, "builtin:digits, builtin:shapes, a folder, a table or a Hub dataset")


def _builtin(name: str) -> datasets.Dataset:
    pictures: Any
    if name == "builtin:digits":
        from sklearn.datasets import load_digits

        (grey, ids), labels = load_digits(return_X_y=True), list("0123456789")
        pictures = (grey.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    elif name == "builtin:shapes":
        from inlay.builtin.shapes import SHAPE_LABELS, generate_shapes

        # Not a seed that pre-training would use: the base has seen none of these.
        (pictures, ids), labels = generate_shapes(4000, seed=20_000), list(SHAPE_LABELS)
    else:
        raise BadInput(f"unknown data {name!r}; the embedded images are builtin:digits and builtin:shapes.")
    features = datasets.Features({"image": PICTURE, "label": datasets.ClassLabel(names=labels)})
    return datasets.Dataset.from_dict({"image": list(pictures), "label": ids}, features=features)


def _folder(folder: Path) -> dict[str, datasets.Dataset]:
    """Splits of a folder: of class folders, or of tables.

    Walked here, as the imagefolder builder of datasets takes a class called `test` for a split and then drops
    all labels, and caches what a folder held.
    """
    folders, files = _visible(folder)
    by_name = {inner.name.lower(): inner for inner in folders}
    # A folder `train` of pictures is a class: trains beside cars.
    if "train" in by_name and _visible(by_name["train"])[0]:
        return {s: _class_folders(by_name[s]) for s in ("train", *VALIDATION) if s in by_name}
    tables = [file for file in files if file.suffix.lower() in TABLES]
    # A table called metadata is the Hub's own sign that folders are not classes.
    if tables and (not folders or any(file.stem == "metadata" for file in tables)):
        return _tables(tables)
    return {"train": _class_folders(folder)}


def _visible(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and files in a folder by name, without those that systems hide there."""
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX", "Thumbs.db")))
    return [p for p in entries if p.is_dir()], [p for p in entries if p.is_file()]


def _class_folders(folder: Path) -> datasets.Dataset:
    classes, loose = _visible(folder)
    paths, names, wrong = [], [], [] if classes else ["there are none"]
    loose = [file for file in loose if file.suffix.lower() in SUFFIXES]
    for inner in classes:
        deeper, files = _visible(inner)
        pictures = [str(file.absolute()) for file in files if file.suffix.lower() in SUFFIXES]
        if deeper or not pictures:
            wrong.append(f"{inner.name!r} holds {'folders' if deeper else 'no pictures'}")
        loose += [file for file in files if file.suffix.lower() not in SUFFIXES]
        paths += pictures
        names += [inner.name] * len(pictures)
    if wrong:
        raise BadInput(
            f"expected pictures in class folders in {str(folder)!r}, but {list_first(wrong)}. Pass the folder "
            f"of the class folders (or train/ and val/ with them), without empty ones, or pass a table."
        )
    if loose:
        logger.warning("%d files are not used as pictures of a class: %s.", len(loose), list_first(loose))
    features = datasets.Features({"image": PICTURE, "label": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": paths, "label": names}, features=features)


def _tables(files: list[Path]) -> dict[str, datasets.Dataset]:
    found = [re.match(rf"(train|{'|'.join(VALIDATION)})(?![a-z])", file.stem.lower()) for file in files]
    splits: dict[str, list[str]] = {}
    for file, match in zip(files, found, strict=True):
        # Escaped, as the library takes [ and * in a path for a pattern.
        split = match[1] if match and files[1:] else "train"
        splits.setdefault(split, []).append(glob.escape(str(file)))
    kinds = {file.suffix.lower() for file in files}
    if not kinds <= TABLES.keys() or len(kinds) > 1 or (files[1:] and not all(found)):
        has = list_first([file.name for file in files])
        raise BadInput(
            f"image data is class folders, one table ({', '.join(TABLES)}), or several of a kind named after splits "
            f"(train.csv), but this folder has {has}; pass the one you mean."
        )
    builder, options = TABLES[kinds.pop()]
    hidden, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it would log an error that it raises as well
    try:
        return dict(datasets.load_dataset(builder, data_files=splits, **options))
    except Exception as error:  # what a reader raises for a bad file is not documented
        got = f"{explain_unreadable(error.__cause__ or error)} in {list_first(files)}"
        raise DamagedFile(f"expected a table that reads as {builder}, but {got}. Mend it.") from error
    finally:
        datasets.logging.set_verbosity(level)
        if not hidden:
            datasets.enable_progress_bars()


def _columns(rows: datasets.Dataset, name: str, image: str | None, label: str | None) -> tuple[str, str]:
    """The columns of pictures and of labels: as asked, by type, or by name."""
    kinds = {column: _dtype(feature) for column, feature in rows.features.items()}
    images = [image] if image else [c for c, kind in kinds.items() if kind == "Image"]
    images = images or [c for c, kind in kinds.items() if "binary" in kind or kind == "dict"]
    images = images or [c for c in kinds if str(rows[0][c]).lower().endswith(SUFFIXES)]
    others = [c for c in kinds if c not in images]
    labels = [c for c in others if kinds[c] == "ClassLabel" or c.lower() in LABEL_COLUMNS]
    labels = [label] if label else labels or (others if len(others) == 1 else [])
    for what, found in (("image", images), ("label", labels)):
        if len(found) != 1 or found[0] not in kinds:
            raise BadInput(
                f"{name!r} must have one {what} column, but has {list_first(found) or 'none'} among "
                f"{list_first(list(kinds))}; "
                "pass "
                f"{what}_column."
            )
    return images[0], labels[0]


def _dtype(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def _has_labels(rows: datasets.Dataset, label: str) -> bool:
    """False for a competition's test split: no label column, or nothing in it but None or -1."""
    return label in rows.column_names and any(value not in (None, -1) for value in rows[label][:])


def _words(rows: datasets.Dataset, label: str, where: str) -> list[str]:
    """The label of each row as a word."""
    feature, values = rows.features[label], rows[label][:]
    named = isinstance(feature, datasets.ClassLabel)
    gaps = [i for i, v in enumerate(values) if v is None or v != v or v == "" or (named and v < 0)]
    if gaps:
        got = f"{len(gaps)} rows have none (from 0: {list_first(gaps)})"
        raise BadInput(f"every row of {where} needs a label, but {got}; fill or remove them.")
    if not named and not re.fullmatch(r"(large_)?string|u?int\d+|bool", _dtype(feature)):
        raise BadInput(
            f"labels must be words or whole numbers, but column {label!r} of {where} holds {_dtype(feature)}; "
            "convert it."
        )
    return [feature.names[value] if named else str(value) for value in values]


def _check_classes(words: dict[str, list[str]], name: str) -> None:
    train, *held = map(set, words.values())
    if len(train) < 2:
        raise BadInput(f"{name!r} has one class, {list_first(list(train))}; a classifier needs at least two.")
    unknown = sort_labels(list(set().union(*held) - train))
    if unknown:
        raise BadInput(
            f"the classes {list_first(unknown)} of {name!r} occur only in validation; add training images of them, or "
            "remove them."
        )


def _rows(rows: datasets.Dataset, image: str, ids: list[int], base: Path) -> datasets.Dataset:
    """The columns `image` and `label`."""
    if "string" in _dtype(rows.features[image]):
        paths = [path and str((base / path).absolute()) for path in rows[image][:]]
        rows = datasets.Dataset.from_dict({"image": paths}, features=datasets.Features({"image": PICTURE}))
    else:
        rows = rows.select_columns([image]).rename_columns({image: "image"}).cast_column("image", PICTURE)
    return rows.add_column("label", np.array(ids, np.int64))


def _readable(
    parts: dict[str, datasets.Dataset], name: str, labels: Sequence[str], corrupt: str
) -> list[datasets.Dataset]:
    """The splits without the pictures that cannot be decoded, or an InlayError that names those."""
    faults = {split: _faults(rows, split) for split, rows in parts.items()}
    bad = [fault for found in faults.values() for fault in found.values()]
    if bad and corrupt == "refuse":
        got = f"{len(bad)} of {sum(map(len, parts.values()))} in {name!r} cannot: {list_first(bad)}"
        raise DamagedFile(f"expected readable pictures, but {got}. Replace them, or pass corrupt='skip'.")
    if not bad:
        return list(parts.values())
    logger.warning("left out %d pictures that cannot be read: %s.", len(bad), ", ".join(bad))
    good = [rows.select([i for i in range(len(rows)) if i not in faults[s]]) for s, rows in parts.items()]
    lost = set(next(iter(parts.values()))["label"][:]) - set(good[0]["label"][:])
    if lost or not all(map(len, good)):
        got = f"none of {list_first([labels[i] for i in sorted(lost)]) or 'validation'} can be read"
        raise DamagedFile(f"expected a few bad pictures to skip in {name!r}, but {got}. Replace them.")
    return good


def _faults(rows: datasets.Dataset, split: str, step: int = 32) -> dict[int, str]:
    """By row, the name and the fault of each picture that cannot be decoded."""

    def look(start: int) -> list[tuple[int, str]]:
        found = []
        for i, picture in enumerate(rows[start : start + step]["image"], start):
            try:
                decode_image(picture, draft=True)
            except Exception as error:  # Pillow's readers raise what they please
                name = (picture and picture["path"]) or f"row {i} of {split}"
                found.append((i, f"{name} ({explain_unreadable(error)})"))
        return found

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        return dict(fault for found in pool.map(look, range(0, len(rows), step)) for fault in found)

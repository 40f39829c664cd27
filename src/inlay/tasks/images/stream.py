"""Labelled images that are read from shards as they are needed."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import datasets
import fsspec  # type: ignore[import-untyped]

from inlay.errors import BadInput, DamagedFile
from inlay.tasks.evaluation import Split, Training
from inlay.tasks.image_decoding import explain_unreadable
from inlay.tasks.images.data import IMAGE, LABEL_COLUMNS, check_readable
from inlay.tasks.images.view import Augment, ImageView
from inlay.tasks.sampling import normalise_label
from inlay.tasks.shards import (
    Shards,
    choose_scored,
    find_classes,
    is_held_out,
    open_shards,
    read_classes,
    read_scored,
    write_label,
)
from inlay.tasks.tables import list_first
from inlay.train.stream import BUFFER, Stream

Corrupt = Literal["refuse", "skip"]


@dataclass(frozen=True)
class ImageStream:
    """Labelled images of which the training part is a stream of {"image", "label"}, undecoded.

    Attributes:
        name: Of the data.
        train: To train on, without what is held out.
        validation: Rows as in `ImageData`.
        labels: Class names, by the numbers in `label`.
    """

    name: str
    train: Stream
    validation: datasets.Dataset
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Columns:
    """Where rows have images and labels.

    Attributes:
        image: The column of images.
        label: That of labels.
        keys: Where the label is in a value of that column: of JSON next to an image in a .tar file.
        names: Class names that the data declares, by number.
        group: The column whose values are held out together.
    """

    image: str
    label: str
    keys: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    group: str | None = None

    def read_word(self, row: Mapping[str, Any], place: str) -> str:
        """The label of a row as a word.

        Raises:
            InlayError: There is none, or a number without a name.
        """
        value = row[self.label]
        for key in self.keys:
            value = value[key]
        if value is None or value == "":
            raise BadInput(f"{place} has no label; fill or remove it.")
        if not self.names or isinstance(value, str):
            return write_label(value)
        if not 0 <= value < len(self.names):
            raise BadInput(
                f"{place} has the label {value}, and there are {len(self.names)} class names, from 0 on; add its name."
            )
        return normalise_label(self.names[value])


@dataclass(frozen=True)
class _LabelledRows:
    """Makes {"image", "label"} of rows: of those that are held out, of the others, or of all.

    Attributes:
        columns: Of the rows.
        ids: The number of each label.
        seed: Chooses what is held out.
        held: Whether to give what is held out; None: everything.
    """

    columns: Columns
    ids: Mapping[str, int]
    seed: int
    held: bool | None

    def __call__(self, rows: Sequence[Mapping[str, Any]], places: Sequence[str]) -> list[dict[str, Any]]:
        """The examples that there are in these rows."""
        found = []
        for row, place in zip(rows, places, strict=True):
            image = row[self.columns.image]
            content, path = (image["bytes"], image["path"]) if isinstance(image, dict) else (image, None)
            group = None if self.columns.group is None else str(row[self.columns.group])
            key = content or (path or "").encode() if group is None else group.encode()
            if self.held is not None and is_held_out(key, self.seed) != self.held:
                continue
            word = self.columns.read_word(row, place)
            if word not in self.ids:
                raise BadInput(f"{place} has the label {word!r}, which is none of {list_first(list(self.ids))}.")
            if content is not None:
                path = f"{path} ({place})" if path else place  # only named in messages
            example = {"image": {"bytes": content, "path": path}, "label": self.ids[word]}
            found.append(example if group is None else {**example, "group": group})
        return found


class PreparedImage:
    """Makes an item of `ImageView` of an example of a stream.

    Args:
        processor: As for `ImageView`, like the others.
        augment: Crops and mirror images.
        randaugment: Magnitude.
        mixup: Alpha.
    """

    def __init__(
        self,
        processor: Any,
        augment: Augment,
        *,
        randaugment: int = 0,
        mixup: float = 0.0,
    ) -> None:
        self.view = ImageView([], processor, augment, randaugment=randaugment, mixup=mixup)

    def in_eight_bits(self) -> "PreparedImage":
        """As `ImageView.in_eight_bits`."""
        prepared = copy.copy(self)
        prepared.view = self.view.in_eight_bits()
        return prepared

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Decoded, augmented, and as the base takes it."""
        return self.view.prepare({**example, "image": _fetch(example["image"])})


def load_image_stream(
    name: str,
    *,
    revision: str | None = None,
    seed: int = 0,
    corrupt: Corrupt = "refuse",
    group: str | None = None,
    classes: str | None = None,
    buffer: int | None = None,
) -> ImageStream:
    """Labelled images for training as a stream, and for validation.

    Samples of .tar files have an image and a label next to it: .cls, or `label` in .json. Tables have columns as in
    `load_images`. Without validation shards one image in twenty is held out, by a hash of its bytes, so equal images
    stay on one side, in whatever order they are stored; the first thousand of these are scored.

    Args:
        name: As for `open_shards`.
        revision: Branch, tag or commit of a Hub dataset.
        seed: Chooses what is held out.
        corrupt: Whether images that cannot be read end the run, or are skipped.
        group: Column of what is held out together.
        classes: File of class names, one a line, in the order of their numbers. Default: labels.txt or classes.txt next
            to the shards, the names that the data declares, or all labels of local shards.
        buffer: Rows that are shuffled together; default: 1,000.

    Raises:
        InlayError: As `open_shards`; columns that cannot be told; labels that are none; no image was held out.
    """
    splits = open_shards(name, revision)
    columns, labels = _find_labels(splits["train"], name, group, classes)
    ids = {label: i for i, label in enumerate(labels)}
    own = splits.get("validation")
    rows = splits["train"].rows.select_columns(_used(columns))
    train = Stream(
        rows,
        _LabelledRows(columns, ids, seed, False if own is None else None),
        buffer=buffer or BUFFER,
        corrupt=corrupt,
        names=splits["train"].names,
    )
    validation = _read_scored(own or splits["train"], own is None, columns, ids, seed, name, corrupt)
    return ImageStream(name, train, validation, tuple(labels))


def load_image_stream_to_score(
    name: str, labels: Sequence[str], *, split: Split | None = None, training: Training | None = None
) -> tuple[Split, datasets.Dataset, list[str]]:
    """Labelled images of shards for an adapter that is trained already.

    Args:
        name: As for `open_shards`.
        labels: Of the adapter, in the order of its logits.
        split: validation or test; by itself validation, or test where there is only that.
        training: Of the adapter.

    Returns:
        The split, its rows as in `ImageData`, and notes.

    Raises:
        InlayError: As `load_image_stream`; no such split.
    """
    training = training or Training()
    splits = open_shards(name)
    chosen: Split = split or ("test" if "test" in splits and "validation" not in splits else "validation")
    shards, cut, notes = choose_scored(name, splits, chosen, training)
    columns = _find_columns(shards.rows, name, training.group_for(name))
    columns = _name_numbers(columns, read_classes(shards, None) or labels)
    ids = {normalise_label(label): i for i, label in enumerate(labels)}
    corrupt: Corrupt = "skip" if training.settings.get("corrupt") == "skip" else "refuse"
    rows = _read_scored(shards, cut, columns, ids, training.seed, name, corrupt)
    return chosen, rows, notes


def _find_labels(shards: Shards, name: str, group: str | None, classes: str | None) -> tuple[Columns, list[str]]:
    """The columns of rows to train on, and the class names."""
    columns = _find_columns(shards.rows, name, group)
    names = read_classes(shards, classes) or list(columns.names)
    if names:
        labels = list(dict.fromkeys(map(normalise_label, names)))
        return _name_numbers(columns, names), labels
    labels = find_classes(shards, columns.label, name, columns.keys)
    if len(labels) < 2:
        raise BadInput(f"{name!r} has one class, {list_first(labels)}; a classifier needs at least two.")
    return columns, labels


def _name_numbers(columns: Columns, names: Sequence[str]) -> Columns:
    """With the class that each number means, where the data does not declare it."""
    return columns if columns.names else replace(columns, names=tuple(names))


def _find_columns(rows: datasets.IterableDataset, name: str, group: str | None) -> Columns:
    """The columns of images and of labels, by type or by name."""
    features = {column: kind for column, kind in (rows.features or {}).items() if not column.startswith("__")}
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    images = images or [c for c, feature in features.items() if "binary" in str(getattr(feature, "dtype", ""))]
    inside = {  # of JSON, the label among what it says of an image
        column: [key for key in LABEL_COLUMNS if key in feature]
        for column, feature in features.items()
        if isinstance(feature, dict)
    }
    labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [column for column in features if column.lower() in (*LABEL_COLUMNS, "cls")]
    labels = labels or [column for column, keys in inside.items() if len(keys) == 1]
    for what, found in (("column of images", images), ("column of labels (.cls or .json in .tar files)", labels)):
        if len(found) != 1:
            has = f"{list_first(found) or 'none'} among {list_first(list(features))}"
            raise BadInput(f"{name!r} must have one {what}, but has {has}; rename one.")
    if group is not None and group not in features:
        raise BadInput(
            f"{name!r} has no column {group!r} to keep together; choose one of {list_first(list(features))}."
        )
    feature = features[labels[0]]
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()
    return Columns(images[0], labels[0], tuple(inside.get(labels[0], ())), names, group)


def _used(columns: Columns) -> list[str]:
    return [column for column in (columns.image, columns.label, columns.group) if column is not None]


def _read_scored(
    shards: Shards, cut: bool, columns: Columns, ids: Mapping[str, int], seed: int, name: str, corrupt: Corrupt
) -> datasets.Dataset:
    """Images to score: those of a split, or those that are held out of it."""
    arrange = _LabelledRows(columns, ids, seed, True if cut else None)
    stream = Stream(shards.rows.select_columns(_used(columns)), arrange, names=shards.names)
    found = read_scored(stream, cut, name, "images")
    examples = [{**example, "image": _fetch(example["image"])} for example in found]
    features = {"image": IMAGE, "label": datasets.Value("int64")}
    features |= {} if columns.group is None else {"group": datasets.Value("string")}
    rows = datasets.Dataset.from_dict(
        {column: [example[column] for example in examples] for column in features},
        features=datasets.Features(features),
    )
    parts = {"validation": rows}
    check_readable(parts, name, list(ids), corrupt)
    return parts["validation"]


def _fetch(image: dict[str, Any]) -> dict[str, Any]:
    """An image with its bytes, where it is stored elsewhere.

    Raises:
        InlayError: It cannot be had.
    """
    path = image["path"]
    if image["bytes"] is not None or "://" not in (path or ""):
        return image
    try:
        with fsspec.open(path, "rb") as file:
            return {"bytes": file.read(), "path": path}
    except Exception as error:  # each kind of storage raises its own
        raise DamagedFile(f"{path!r} cannot be read: {explain_unreadable(error)}.") from error

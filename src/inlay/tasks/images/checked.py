"""Each image of a data set is decoded once: which cannot be read, and which are equal. Later starts compare dates only.

What was found stays in the cache of datasets (HF_DATASETS_CACHE, `inlay_images`): for an image file with its size and
date, for a row of a table with those of the table's file. One process decodes, the others wait for what it finds.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from tqdm.auto import tqdm

from inlay.files.atomic import lock_folder, replacing
from inlay.tasks.image_decoding import digest_image, explain_unreadable

AT_ONCE = 32  # images that a thread decodes in a row
COLUMNS = ("place", "date", "content", "width", "height", "fault")


class Checked(NamedTuple):
    """What was found of one image.

    Attributes:
        content: Equal for images of equal pixels; empty where it cannot be read.
        width: In pixels, upright.
        height: In pixels, upright.
        fault: Why it cannot be read, or empty.
    """

    content: str
    width: int
    height: int
    fault: str


def check_images(name: str, parts: Mapping[str, datasets.Dataset]) -> dict[str, list[Checked]]:
    """Decode the images of all splits, but for those that were decoded before and have not changed since.

    Args:
        name: Of the data set; what was found is kept under it.
        parts: By split rows with the column `image`, as in `ImageData`.
    """
    stored = {split: _find_stored(rows) for split, rows in parts.items()}
    fresh: dict[tuple[str, int], Checked] = {}
    with _open_memory(name) as found:
        missing = [
            (split, i)
            for split, each in stored.items()
            for i, one in enumerate(each)
            if one is None or one.place not in found or found[one.place][0] != one.date
        ]
        if missing:
            for (split, i), checked in _decode_missing(parts, missing):
                fresh[split, i] = checked
                if (one := stored[split][i]) is not None:
                    found[one.place] = one.date, checked
    return {
        split: [
            fresh[split, i] if one is None or (split, i) in fresh else found[one.place][1] for i, one in enumerate(each)
        ]
        for split, each in stored.items()
    }


class Stored(NamedTuple):
    """Where an image is stored, and the size and date of that file."""

    place: str
    date: str


def _find_stored(rows: datasets.Dataset) -> list[Stored | None]:
    """None for an image that is nowhere, or in memory only."""
    if rows.cache_files:
        files = [file["filename"] for file in rows.cache_files]
        together = " ".join(filter(None, map(_read_date, files)))
        return [Stored(f"{files[0]} row {i}", together) if together else None for i in range(len(rows))]
    paths = [image["path"] if image["bytes"] is None else None for image in rows["image"][:]]
    return [Stored(path, date) if path and (date := _read_date(path)) else None for path in paths]


def _read_date(path: str) -> str | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - a million Paths take seconds
    except OSError:
        return None
    return f"{status.st_size} {status.st_mtime_ns}"


def _decode_missing(
    parts: Mapping[str, datasets.Dataset], chosen: Sequence[tuple[str, int]]
) -> Iterator[tuple[tuple[str, int], Checked]]:
    def look(start: int) -> list[tuple[tuple[str, int], Checked]]:
        return [((split, i), _check_image(parts[split][i]["image"])) for split, i in chosen[start : start + AT_ONCE]]

    bar = tqdm(total=len(chosen), desc="check images", unit="image", delay=2, disable=None, leave=False)
    pool = ThreadPoolExecutor(min(32, os.cpu_count() or 1))
    try:
        for part in pool.map(look, range(0, len(chosen), AT_ONCE)):
            yield from part
            bar.update(len(part))
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


def _check_image(image: Any) -> Checked:
    try:
        return Checked(*digest_image(image), "")
    except Exception as error:  # Pillow's readers raise what they please
        return Checked("", 0, 0, explain_unreadable(error))


Known = dict[str, tuple[str, Checked]]  # by place the date, and what was found then


@contextmanager
def _open_memory(name: str) -> Iterator[Known]:
    """What is known of a data set; what the block adds is kept. No other process is in such a block at the time."""
    path = Path(datasets.config.HF_DATASETS_CACHE) / "inlay_images"
    whole = str(Path(name).expanduser().resolve()) if Path(name).expanduser().exists() else name
    path = path / f"{hashlib.sha256(whole.encode()).hexdigest()[:32]}.parquet"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(path.parent, os.W_OK)
    except OSError:
        writable = False
    if not writable:  # all that is not known is decoded at each start
        yield _read_memory(path)
        return
    with lock_folder(path):
        found = _read_memory(path)
        before = dict(found)
        try:
            yield found
        finally:
            if found != before:
                with suppress(OSError):  # a full disk costs the next start some time, and nothing else
                    _write_memory(path, found)


def _read_memory(path: Path) -> Known:
    from pyarrow import ArrowException  # type: ignore[import-untyped]
    from pyarrow.parquet import read_table  # type: ignore[import-untyped]

    try:
        columns = read_table(path, columns=list(COLUMNS)).to_pydict()
    except (OSError, ArrowException):  # none yet, or damaged: as if nothing were known
        return {}
    places, dates, *rest = (columns[name] for name in COLUMNS)
    return dict(zip(places, zip(dates, map(Checked._make, zip(*rest, strict=True)), strict=True), strict=True))


def _write_memory(path: Path, found: Known) -> None:
    from pyarrow import table
    from pyarrow.parquet import write_table

    columns = zip(*((place, date, *checked) for place, (date, checked) in found.items()), strict=True)
    with replacing(path) as new:
        write_table(table(dict(zip(COLUMNS, map(list, columns), strict=True))), new)

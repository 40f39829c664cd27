"""Folders that are written whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def writing(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder next to `folder`; when the block ends without an error it takes its place.

    Until the last moment the old content stands, and a kill between the two renames leaves it set aside, from where
    `recover` brings it back. Files are made readable for the group and others, as the umask allows (safetensors writes
    mode 0600). A symbolic link stays one: the folder that it points to is replaced.
    """
    folder = Path(folder).resolve()
    recover(folder)
    new, old = pending_folder(folder), _aside(folder)
    new.mkdir(parents=True)
    try:
        yield new
        make_readable(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        recover(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: str | Path) -> None:
    """Bring back what `writing` had set aside when it was killed between its renames, and drop its unfinished work."""
    folder = Path(folder).resolve()
    old = _aside(folder)
    if old.is_dir():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)
    shutil.rmtree(pending_folder(folder), ignore_errors=True)


def pending_folder(folder: str | Path) -> Path:
    """The folder in which `writing` puts the new content together; a name that no user would give to one of theirs."""
    folder = Path(folder).resolve()
    return folder.with_name(f".{folder.name}.inlay-new")


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.inlay-old")


def make_readable(folder: Path) -> None:
    """Give every file in `folder` the mode that a plain `open` would have given it."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def write_json(path: Path, content: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a name next to a file, with its suffix; when the block ends without an error, it takes the file's place."""
    path = Path(path)
    new = path.with_name(f".inlay-new.{path.name}")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)

"""Atomic writing: a file or folder is written completely or not at all, by one process at a time."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from inlay.errors import BadInput

PENDING_FILE = ".inlay-new."  # prefix of the name of a file that `replacing` has not finished


@contextmanager
def lock_folder(folder: str | Path, *, wait_s: float = -1) -> Iterator[None]:
    """Hold the lock of a folder until the block or the process ends. The folder need not exist.

    Args:
        folder: The folder to lock. The lock is a hidden file next to it, which is deleted at the end.
        wait_s: Seconds to wait while another process holds the lock; -1: wait without limit.

    Raises:
        BadInput: Another process still holds the lock.
    """
    from filelock import FileLock, Timeout  # imported here, as it takes 0.1 s

    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.inlay-lock")
    try:
        lock = FileLock(path).acquire(timeout=wait_s)
    except Timeout:
        raise BadInput(
            f"another process is writing {folder}; wait until it has ended, or choose another folder."
        ) from None
    with lock:
        try:
            yield
        finally:
            # Windows does not delete open files; filelock does not take a deleted file for a lock.
            with suppress(OSError):
                path.unlink()


@contextmanager
def writing(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder next to `folder`, which replaces `folder` when the block ends without an error.

    The old content stays in place until then. If the process is killed between the two renames, the old content is in a
    backup folder, from which `recover` restores it. Another process that writes the same folder waits until this one
    has ended. Files are made readable for the group and others, as the umask allows (safetensors writes mode 0600). A
    symbolic link is kept: the folder that it points to is replaced.
    """
    folder = Path(folder).resolve()
    with lock_folder(folder):
        _recover(folder)
        new, old = pending_folder(folder), _backup_folder(folder)
        new.mkdir()
        try:
            yield new
            make_readable(new)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            _recover(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def recover(folder: str | Path) -> None:
    """Restore the old content if `writing` was killed between its renames, and delete its unfinished folder."""
    with lock_folder(folder):
        _recover(Path(folder).resolve())


def _recover(folder: Path) -> None:
    """`recover` for the process that holds the lock."""
    old = _backup_folder(folder)
    if old.is_dir():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)
    shutil.rmtree(pending_folder(folder), ignore_errors=True)


def pending_folder(folder: str | Path) -> Path:
    """The folder in which `writing` builds the new content. No user would choose such a name."""
    folder = Path(folder).resolve()
    return folder.with_name(f".{folder.name}.inlay-new")


def _backup_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.inlay-old")


def make_readable(folder: Path) -> None:
    """Give everything in `folder` the mode that a plain `open` or `mkdir` would have given it."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a path next to a file, with its suffix; what is written there replaces the file if no error occurs."""
    path = Path(path)
    new = path.with_name(f"{PENDING_FILE}{uuid.uuid4().hex[:8]}.{path.name}")  # two processes may write one file
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)

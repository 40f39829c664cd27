"""Files and folders that are written whole or not at all, by one process at a time."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from inlay.errors import BadInput

PENDING_FILE = ".inlay-new."  # how the name of a file begins that `replacing` has not finished


@contextmanager
def lock_folder(folder: str | Path, *, wait_s: float = -1) -> Iterator[None]:
    """Hold the lock of a folder, which need not exist; it ends with the block, or with the process.

    Args:
        folder: The lock is a hidden file next to it, deleted at the end.
        wait_s: Seconds to wait for another process that holds it; -1: as long as it takes.

    Raises:
        BadInput: Another process still holds it.
    """
    from filelock import FileLock, Timeout  # 0.1 s, which `import inlay` does without

    folder = Path(folder).resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.inlay-lock")
    try:
        lock = FileLock(path).acquire(timeout=wait_s)
    except Timeout:
        raise BadInput(
            f"another process is writing {folder}; wait until it has ended, or give another folder."
        ) from None
    with lock:
        try:
            yield
        finally:
            with suppress(OSError):  # Windows deletes no open file; filelock does not mistake a deleted file for a lock
                path.unlink()


@contextmanager
def writing(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder next to `folder`; when the block ends without an error it takes its place.

    Until the last moment the old content stands, and a kill between the two renames leaves it set aside, from where
    `recover` brings it back. Another process that writes the same folder waits until this one has ended. Files are made
    readable for the group and others, as the umask allows (safetensors writes mode 0600). A symbolic link stays one:
    the folder that it points to is replaced.
    """
    folder = Path(folder).resolve()
    with lock_folder(folder):
        _recover(folder)
        new, old = pending_folder(folder), _aside(folder)
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
    """Bring back what `writing` had set aside when it was killed between its renames, and drop its unfinished work."""
    with lock_folder(folder):
        _recover(Path(folder).resolve())


def _recover(folder: Path) -> None:
    """`recover` by the process that holds the lock."""
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
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a name next to a file, with its suffix; when the block ends without an error, it takes the file's place."""
    path = Path(path)
    new = path.with_name(f"{PENDING_FILE}{uuid.uuid4().hex[:8]}.{path.name}")  # two processes may write one file
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)

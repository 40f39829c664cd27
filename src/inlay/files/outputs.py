"""Whether an output can be written, found out before the work that it is to hold."""

import os
import tempfile
from pathlib import Path

from inlay.errors import BadInput


def check_output_file(path: str | os.PathLike[str]) -> Path:
    """The path of a file, if it can be written: its folder exists and takes new files, and it is no folder itself.

    Raises:
        InlayError: Names the folder, and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"'{path}' is a folder; name a file in it.")
    if not path.absolute().parent.is_dir():
        raise BadInput(f"there is no folder '{path.parent}' for '{path.name}'; make it, or name a folder that exists.")
    _try_to_write(path.absolute().parent, path.name)
    return path


def check_output_folder(path: str | os.PathLike[str]) -> Path:
    """The path of a folder, if it can be made, or replaced: it is no file, and the folder above it takes new ones.

    Raises:
        InlayError: Names the folder, and what is wrong with it.
    """
    path = Path(path).expanduser()
    if path.exists() and not path.is_dir():
        raise BadInput(f"'{path}' is a file; name a folder.")
    above = path.resolve().parent  # where `writing` puts a folder together, and renames it
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise BadInput(f"'{path}' cannot be made, as '{above}' is a file; name another folder.")
    _try_to_write(above, path.name)
    return path


def check_replaceable_folder(path: str | os.PathLike[str], mark: str, what: str) -> Path:
    """The path of a folder, if it can be made, or replaced because it is empty or holds the same kind of thing.

    Args:
        path: Of the folder.
        mark: Name of a file that every folder of this kind has.
        what: The kind, for the message.

    Raises:
        InlayError: It holds something else, or cannot be written.
    """
    path = Path(path).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())) and not (path / mark).is_file():
        raise BadInput(f"{path} exists and is not {what}; give another folder.")
    return check_output_folder(path)


def _try_to_write(folder: Path, name: str) -> None:
    """Make a file with nearly this name, and remove it: rights alone do not tell of a read-only or full disk."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".inlay-new.", suffix=f".{name}"):
            pass
    except OSError as error:
        raise BadInput(
            f"nothing can be written in '{folder}' for '{name[:100]}' ({error.strerror or error}); name another place."
        ) from error

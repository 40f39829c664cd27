"""Where the base of an adapter is, when its name says it no more: a path of another folder or machine."""

from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from inlay.adapters.file import AdapterFile
from inlay.adapters.identity import check_base, identify_base
from inlay.adapters.task import find_task_of_file
from inlay.bases.load import find_size, is_model_folder, read_config
from inlay.errors import BadInput, InlayError
from inlay.tasks.base import load_base

ANCESTORS = 3  # folders above the adapter's own in which its base is looked for


def find_base_next_to(file: AdapterFile) -> Path | None:
    """A base with the recorded name and structure in the adapter's folder or one of those above it; None for none.

    Its weights are compared when it is loaded.
    """
    name = file.base_name
    last = PureWindowsPath(name).name  # takes / and \\ as separators
    folder = file.folder.resolve()
    for place in (folder, *folder.parents[:ANCESTORS]):
        for found in (place / name, place / last) if last else ():
            if _has_structure(file, found):
                return found
    return None


def choose_base_in(file: AdapterFile, folder: str | Path) -> Path:
    """The base of an adapter among the models in a folder, by its structure and the sketch of its weights.

    Raises:
        InlayError: None of them is the one that the adapter was trained on; plain peft saved it, which says nothing of
            its base's weights.
    """
    if not file.record:
        raise BadInput(
            f"plain peft saved adapter {file.name!r}, without a sketch of its base's weights; give the base itself as "
            f"base=, not the folder {str(folder)!r}."
        )
    fitting = [found for found in _models_in(Path(folder).expanduser()) if _has_structure(file, found)]
    for found in fitting:
        try:
            check_base(file, identify_base(load_base(found, task=file.record.get("task"))))
        except InlayError:
            continue
        return found
    raise BadInput(
        f"none of the models in {str(folder)!r} is {file.base_name!r}, on which adapter {file.name!r} was trained "
        f"({len(fitting)} of its structure, each with other weights); give the base itself as base=."
    )


def holds_models(folder: str | Path) -> bool:
    """True for a folder that is no model itself, and has models in it."""
    path = Path(folder).expanduser()
    return path.is_dir() and not is_model_folder(path) and any(True for _ in _models_in(path))


def _models_in(folder: Path) -> Iterator[Path]:
    """Models in a folder, or in the folders in it (user/name); the parts of a pipeline are none."""
    for pattern in ("*/", "*/*/"):
        for path in sorted(folder.glob(pattern)):
            if is_model_folder(path) and not is_model_folder(path.parent):
                yield path


def _has_structure(file: AdapterFile, folder: Path) -> bool:
    """Whether a folder holds a model of the recorded type, blocks and width; of any, where none are recorded."""
    try:
        if not is_model_folder(folder):
            return False
        config: Any = read_config(str(folder), str(folder), None)
        find_task_of_file(file, config)
    except (InlayError, OSError, ValueError):  # a name from anywhere may be no path at all
        return False
    stored = file.record.get("base")
    if stored is None:
        return True
    found = (config.model_type, *find_size(config))
    return found == (stored["model_type"], stored.get("blocks"), stored.get("width"))

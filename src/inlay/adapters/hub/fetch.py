"""An adapter as a folder on this machine, from where its name says that it is."""

from pathlib import Path

from inlay.adapters.file import CONFIG, expand_path
from inlay.adapters.hub.repository import download
from inlay.errors import BadInput, InlayError, Unreachable
from inlay.files.folder_or_hub import refuse_ambiguous

MODEL_CONFIGS = ("config.json", "model_index.json")  # of transformers, and of a pipeline of diffusers


def fetch(path: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter, as `fetch_folder` gives it.

    Raises:
        InlayError: What is on the Hub is no adapter; what `fetch_folder` says.
    """
    found = fetch_folder(path, revision)
    if found != expand_path(path) and not (found / CONFIG).is_file():
        raise BadInput(f"{path} on the Hub is not an adapter: it has no {CONFIG}; one of several is user/name/adapter.")
    return found


def fetch_folder(path: str | Path, revision: str | None = None) -> Path:
    """A local folder as it is; user/name, or user/name/adapter of several, from the Hub or its cache.

    Raises:
        InlayError: A name that means both; a revision of a local folder; neither is there; what `download` finds.
    """
    folder, text = expand_path(path), str(path)
    if folder.exists():
        refuse_ambiguous(text, CONFIG, revision)
        return folder
    local = text.count("/") == 2 and Path(text.partition("/")[0]).is_dir()  # a path of this machine, mistyped
    if local or text.count("/") not in (1, 2) or text.startswith((".", "~", "/")):
        return folder
    user, name, *inside = text.split("/")
    try:
        return download(f"{user}/{name}", revision, *inside)
    except InlayError as error:
        raise Unreachable(f"there is no folder {text!r} here, and as a Hub id it fails: {error}") from None


def fetch_if_adapter(name: str | Path) -> Path | None:
    """The folder of an adapter, as `fetch` gives it; None for a model.

    An embedded base is a model, and so is what has the config of a model and none of an adapter, here or on the Hub.

    Raises:
        InlayError: It is neither; what `fetch` says.
    """
    text, folder = str(name), expand_path(name)
    if text.startswith("builtin:"):
        return None
    if folder.is_dir():
        if (folder / CONFIG).is_file():
            return folder
        if any((folder / config).is_file() for config in MODEL_CONFIGS):
            return None
        raise BadInput(f"{text} is neither an adapter nor a model: it has no {CONFIG} and no {MODEL_CONFIGS[0]}.")
    try:
        found = fetch(name)
    except InlayError:
        if _is_model_on_hub(text):
            return None
        raise
    if not found.exists():
        raise BadInput(f"{text} does not exist; give the folder of an adapter or of a model, or a Hub id.")
    return found


def _is_model_on_hub(name: str) -> bool:
    from inlay.bases.load import read_config, resolve_base  # imports torch, which combining does without

    try:
        read_config(name, resolve_base(name), None)
    except InlayError:
        return False
    return True

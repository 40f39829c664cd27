"""Names that may be a folder or a Hub id: `user/name`."""

from pathlib import Path

from inlay.errors import BadInput


def refuse_ambiguous(name: str, file: str, revision: str | None = None) -> None:
    """Refuse the name of a folder that is also the id of a Hub repository in this machine's cache.

    The Hub itself is not asked, because most folders of that form (`runs/adapter`) have no namesake there. A revision
    means that the Hub's repository is wanted, so it is refused for a folder.

    Args:
        name: Name of an existing folder.
        file: A file that the repository in the cache would have, such as config.json.
        revision: The revision that the user gave, or None.

    Raises:
        BadInput: The name is ambiguous, or a revision was given for a folder.
    """
    if revision is not None:
        raise BadInput(
            f"revision {revision!r} needs a Hub id, but {name!r} is a folder here, which has no revisions; leave the "
            "revision out, or work from another folder to get the Hub's."
        )
    if not _looks_like_hub_id(name):
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, file)
    except HFValidationError:  # no Hub id has this form
        return
    if isinstance(cached, str) and not Path(name).resolve().is_relative_to(Path(cached).parent):
        raise BadInput(
            f"{name!r} is a folder here and a repository from the Hub in the cache; write './{name}' for the folder, "
            "or work from another folder to get the Hub's."
        )


def _looks_like_hub_id(name: str) -> bool:
    """True for `user/name`, which may also be the path of a folder."""
    return name.count("/") == 1 and not name.startswith((".", "~", "/")) and not name.endswith("/")

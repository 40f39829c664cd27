"""Names that could be a folder as well as a Hub id: `user/name`."""

from pathlib import Path

from inlay.errors import BadInput


def refuse_ambiguous(name: str, file: str, revision: str | None = None) -> None:
    """Raise InlayError where a folder stands in the way of what this machine has from the Hub under the same name.

    The Hub is not asked, as most folders of that form (`runs/adapter`) have no namesake there: known is what the cache
    holds. A revision says that the Hub's is meant.

    Args:
        name: Of a folder that exists.
        file: One that the namesake in the cache would have, such as config.json.
        revision: That was asked for.
    """
    if revision is not None:
        raise BadInput(
            f"revision {revision!r} is of a Hub id, but {name!r} is a folder here, which has none; leave the revision "
            "out, or work from another folder to get the Hub's."
        )
    if not _like_hub_id(name):
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


def _like_hub_id(name: str) -> bool:
    """True for `user/name`, which a folder here may have for a name, too."""
    return name.count("/") == 1 and not name.startswith((".", "~", "/")) and not name.endswith("/")

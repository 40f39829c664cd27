"""What is found out about a saved adapter later: a part of its metrics.json, and a section of its card."""

import re
import shutil
from typing import Any

from inlay.adapters.file import CARD, METRICS, ORIGIN, AdapterFile, read_adapter
from inlay.errors import BadInput
from inlay.files.atomic import write_json, writing
from inlay.files.outputs import check_output_folder


def check_writable(file: AdapterFile | None) -> None:
    """Raise InlayError for an adapter that is not in a folder of one's own; None: it is on the Hub only."""
    if file is None or (file.origin and not (file.folder / ORIGIN).is_file()):
        name = "it" if file is None else repr(file.name)
        raise BadInput(f"notes are written into a folder of your own, and {name} is on the Hub; `inlay pull` first.")
    check_output_folder(file.folder)


def write_note(file: AdapterFile, key: str, value: Any, name: str, section: str) -> None:
    """Put `value` into metrics.json under `key`, and a section into the card, in the place of an earlier one.

    The folder is replaced whole or stays as it was; weights and config are those of before.

    Args:
        file: From `read_adapter`.
        key: In metrics.json.
        value: As JSON takes it.
        name: Tells the section from others.
        section: Markdown, with its heading.

    Raises:
        InlayError: No adapter, or one in the Hub's cache.
    """
    check_writable(file)
    card = file.folder / CARD
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {file.name}\n"
    with writing(file.folder) as new:
        shutil.copytree(file.folder, new, symlinks=True, dirs_exist_ok=True)
        for path in (new / CARD, new / METRICS):  # a link would lead the new content to where the old one is
            path.unlink(missing_ok=True)
        write_json(new / METRICS, {**file.metrics, key: value})
        (new / CARD).write_text(put_section(text, name, section), encoding="utf-8")
        read_adapter(new)


def put_section(card: str, name: str, section: str) -> str:
    """A card with this section, in the place of an earlier one of that name, else before the costs or at the end."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    section = mark_section(name, section)
    if begin in card and end in card:
        before, _, rest = card.partition(begin)
        return before + section + rest.partition(end)[2]
    at = re.search(r"^## Cost$", card, re.MULTILINE)
    if at is None:
        return f"{card.rstrip()}\n\n{section}\n"
    return f"{card[: at.start()]}{section}\n\n{card[at.start() :]}"


def mark_section(name: str, section: str) -> str:
    """A section between the comments by which it is found again."""
    return f"<!-- {name} -->\n{section}\n<!-- end of {name} -->"

"""The reference has an entry for every public name, and no other command of the package is left out of the guides."""

import re

import typer

import inlay
from inlay.cli import app as cli
from places import ROOT

PAGES = list((ROOT / "docs").rglob("*.md"))


def entries():
    """`inlay.combine` names the package, so the function stands there as `inlay.combine.combine`."""
    return re.findall(
        r"^::: inlay\.(?:combine\.(?=combine$))?(\w+)$", "\n".join(page.read_text() for page in PAGES), re.MULTILINE
    )


def test_every_public_name_has_one_entry():
    assert sorted(entries()) == sorted(inlay.__all__)


def test_every_public_name_is_in_the_list_of_the_reference():
    index = (ROOT / "docs" / "reference" / "index.md").read_text()
    assert [name for name in inlay.__all__ if f"`{name}`" not in index] == []


def test_every_verb_is_used_in_a_guide():
    text = "\n".join(page.read_text() for page in PAGES)
    verbs = typer.main.get_command(cli.app).commands
    assert [verb for verb in verbs if f"inlay {verb}" not in text] == []

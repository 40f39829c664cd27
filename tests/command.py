"""The `inlay` command in the tests' own process."""

import sys

import peft  # noqa: F401 - imported, it keeps `inlay predict` from hiding bitsandbytes from the tests that follow
import pytest

from inlay.cli import app as cli


def run(capsys, monkeypatch, *arguments):
    """Exit status, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["inlay", *map(str, arguments)])
    with pytest.raises(SystemExit) as status:
        cli.main()
    out, err = capsys.readouterr()
    return int(status.value.code or 0), out, err

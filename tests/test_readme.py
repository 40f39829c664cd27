"""What the README says of the code is what the code says."""

import shlex
import shutil
import sys

import pytest

from inlay.cli import app as cli
from inlay.methods import METHODS
from places import ROOT


def test_the_table_of_methods_is_that_of_the_code():
    text = (ROOT / "README.md").read_text()
    for name, method in METHODS.items():
        cells = [name, method.paper, method.attaches, method.width, "yes" if method.merges else "no"]
        assert f"| {' | '.join([*cells, ', '.join(method.bases)])} |" in text


def test_the_commands_of_the_local_hub_run(monkeypatch, capsys, tmp_path):
    """Those that need no connection, as they stand there, beside a copy of adapters_hub."""
    shutil.copytree(ROOT / "adapters_hub", tmp_path / "adapters_hub")
    monkeypatch.chdir(tmp_path)
    section = (ROOT / "README.md").read_text().split("## Push, pull, search")[1]
    commands = section.split("```bash\n")[1].split("```")[0].splitlines()
    for command in commands:
        monkeypatch.setattr(sys, "argv", shlex.split(command, comments=True))
        with pytest.raises(SystemExit) as status:
            cli.main()
        out = capsys.readouterr().out
        assert not status.value.code
        assert "digits-lora-vit-tiny" in out or "would go to you/digits" in out
    assert len(commands) == 4

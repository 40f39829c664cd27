"""The verb `inlay serve`: what it sets before torch is imported."""

import os

from command import run
from inlay.serve.server import run as server
from serve.banked import VIT


def test_threads_that_wait_leave_their_cores_to_others(capsys, monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(server, "run_server", lambda *given, **options: found.append(os.environ["OMP_WAIT_POLICY"]))
    for own in (None, "ACTIVE"):
        monkeypatch.setenv("OMP_WAIT_POLICY", own or "")
        if own is None:
            monkeypatch.delenv("OMP_WAIT_POLICY")
        run(capsys, monkeypatch, "serve", VIT, tmp_path)
    assert found == ["PASSIVE", "ACTIVE"], "what a user has set stays"

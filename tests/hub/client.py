"""This process as a client of a small Hub: online, logged in, with a cache of its own; waiting takes no time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants, hf_api

from hub.server import Hub

TOKEN = "hf_" + "a" * 34  # ann's


@contextmanager
def online(cache: Path) -> Iterator[Hub]:
    with Hub() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "HF_HUB_OFFLINE": False,
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(cache / "token"),
        }.items():
            patch.setattr(constants, name, value)
        patch.setattr(hf_api.api, "endpoint", server.url)  # of the functions without a client, which peft calls
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setattr(time, "sleep", lambda seconds: None)
        close_session()
        yield server
        close_session()

"""Services with clients, for the tests of a server's operation."""

import io
from contextlib import contextmanager

import numpy as np
from fastapi.testclient import TestClient
from PIL import Image

from inlay import Bank
from inlay.serve.server.app import make_app
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.service import Service
from serve.banked import VIT


@contextmanager
def open_client(folder, budget_mb=None, base=VIT, **options):
    """A client of a service of these adapters; options of `make_app` and of ServiceConfig."""
    own = {key: options.pop(key) for key in ("api_key", "watched", "loading") if key in options}
    service = Service(Bank(base, folder, skip_unfit=True, budget_mb=budget_mb), ServiceConfig(**options))
    with TestClient(make_app(service, **own), raise_server_exceptions=False) as client:
        yield client


def png(seed=0, side=40):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def ask(client, name, image=None, **more):
    return client.post("/v1/classify", data={"model": name}, files={"image": image or png()}, **more)

"""Requests that are malformed in any way: an answer that says so, never a failure, nothing that stays behind."""

import io
import json
import threading
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from transformers import ViTImageProcessorPil

from inlay import Bank
from inlay.errors import InlayError
from inlay.serve.server.answers import LONGEST_MESSAGE, make_error
from inlay.serve.server.app import make_app
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.service import Service
from inlay.tasks.images.serving import ImageServing
from inlay.tasks.serving import Limits, ServedAdapter
from serve.banked import VIT, pair
from serve.server.live import listen
from serve.server.mutated_requests import Attempt, make_attempt, send

ATTEMPTS = 60


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = pair(VIT, "lora", tmp_path_factory.mktemp("served"))
    return make_app(Service(Bank(VIT, folder), ServiceConfig(threads=2)))


def count_open():
    """Files, sockets and threads of this process."""
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")  # Pillow, of its files
def test_malformed_requests_are_refused_and_leave_nothing_behind(app, caplog):
    before = count_open()
    with listen(app) as address:
        whole = send(address, Attempt("health", "/health", method="GET"))
        statuses = Counter()
        for seed in range(ATTEMPTS):
            attempt = make_attempt(seed, ["a", "b"])
            status = send(address, attempt)
            assert status is None or status < 500, f"{attempt.what} got {status}"
            statuses[status] += 1
        assert whole == send(address, Attempt("health", "/health", method="GET")) == 200
    assert statuses[400] > ATTEMPTS / 3 and statuses[200] and statuses[404]
    assert not [record for record in caplog.records if record.name.startswith("inlay")], "a client's mistake is no news"
    files, threads = count_open()
    assert files <= before[0] and threads == before[1]


def test_an_error_repeats_nothing_that_json_cannot_hold_and_is_short():
    error = json.loads(make_error("/v1/classify", 404, "unknown adapter '\ud800" + "/a" * 30_000_000).body)["error"]
    assert error["message"].startswith("unknown adapter '?") and len(error["message"]) <= LONGEST_MESSAGE
    assert len(json.loads(make_error("/v2/models/x", 400, "x" * 9999).body)["error"]) == LONGEST_MESSAGE


def test_a_line_of_pixels_is_not_made_an_image_of_gigabytes():
    """Of 20,000 x 1 pixels a processor that keeps the form makes 4,480,000 x 224."""
    file = io.BytesIO()
    Image.new("RGB", (20_000, 1)).save(file, "PNG")
    processor = ViTImageProcessorPil(size={"shortest_edge": 224})
    with pytest.raises(
        InlayError, match=r"the image has 20000 x 1 pixels, and the processor of this adapter makes 224 x 4,480,000"
    ):
        ImageServing().read({"image": file.getvalue()}, ServedAdapter("a", processor), Limits())

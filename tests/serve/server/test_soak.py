"""Every answer is the adapter's own, whatever comes and goes meanwhile; benchmarks/serve_soak.py asks 10,000 times."""

import asyncio
import threading

import pytest

from inlay import Bank
from inlay.serve.server.app import make_app
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.service import Service
from serve.banked import GPT2, VIT, save
from serve.server.live import listen
from serve.server.soak import MISFIT, Soak, find_truth, make_versions

REQUESTS = 120


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("versions")
    return make_versions(folder, 3), save(GPT2, ("lora", 2), folder / MISFIT)


def test_every_answer_is_the_adapters_own_while_adapters_come_and_go(versions):
    folders, misfit = versions
    truth = find_truth(folders, images=3)
    served = {f"adapter{i}": folder for i, folder in enumerate(folders)}
    size = Bank(VIT, served, check_golden=False).bytes / 4
    bank = Bank(
        VIT, {**served, MISFIT: misfit}, budget_mb=2.5 * size / 1e6, check_golden=False
    )  # all but one or two are in memory
    service = Service(bank, ServiceConfig(max_batch=8, threads=2))
    before = threading.active_count()

    async def change(name, folder):
        await (asyncio.to_thread(bank.add, folder, name) if folder else asyncio.to_thread(bank.remove, name))

    with listen(make_app(service)) as (host, port, *_):
        soak = Soak(f"http://{host}:{port}", truth, served, change)
        asyncio.run(soak.run(REQUESTS))
    assert not soak.wrong, soak.wrong[:5]
    counts = soak.counts
    assert counts["200"] > REQUESTS / 2 and counts["404"] and counts["left"]
    assert counts["added"] and counts["removed"] and counts["replaced"]
    assert threading.active_count() == before

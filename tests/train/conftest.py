"""Training tests share a small program, `train_job.py`: imported, forked, or started on its own."""

import gc
import multiprocessing
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models on shared cores: two threads that wait for each other take 50 times longer."""
    import torch
    import train_job  # noqa: F401 - the slow imports

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # every fit ends with a collection, which looks through all that was imported otherwise
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def environment():
    """For processes that train: one thread each, no network, no GPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def forked(environment):
    """Start `train_job.py ARGUMENTS` in a process forked from a server that has done the slow imports."""
    from train_job import start

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["inlay.train.loop", "inlay.cli.recipe", "peft", "transformers.hf_argparser"])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"):
            patch.setenv(name, environment[name])
        multiprocessing.forkserver.ensure_running()

    begun = []

    def begin(arguments):
        process = context.Process(target=start, args=([str(a) for a in arguments],))
        process.start()
        begun.append(process)
        return process

    yield begin
    for process in begun:
        process.kill()

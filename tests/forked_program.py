"""A program that runs in a process forked from a server, which has done the slow imports."""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

# All that the programs of the tests import and that takes long.
IMPORTS = ["inlay.train.loop", "inlay.cli.recipe", "inlay.tasks.images.data", "peft", "transformers.hf_argparser"]

PATIENCE_S = 120


def run(argv: list[str], environment: Mapping[str, str], said: Path) -> None:
    """What `python ARGV` does with these variables more; its output goes to the file `said`."""
    with said.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    multiprocessing.set_start_method("fork", force=True)  # as in a program; here workers would come from a server too
    gc.freeze()  # what was imported before the fork is not looked through again
    os.environ.update(environment)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def finish(process: multiprocessing.Process) -> str:
    """Wait for a program that must succeed, and give what it said."""
    process.join(PATIENCE_S)
    said = process.said.read_text()
    assert process.exitcode == 0, said
    return said


def two_ranks() -> list[dict[str, str]]:
    """What a launcher says to each of two processes on a CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    return [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]

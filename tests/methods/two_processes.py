"""Run by test_contract.py: DDP over two gloo processes, without find_unused_parameters, against one process."""

import os
import sys

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.nn.parallel import DistributedDataParallel


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def work(rank, folder):
    from inlay.methods import METHODS
    from methods.bases import OURS, adapted, batch

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    x, y = batch("vit")["pixel_values"], torch.tensor([0, 1, 2, 3])
    for method in [name for name in OURS if "vision" in METHODS[name].bases]:
        model = adapted(method, "vit").train()
        expected = gradients(model, model(pixel_values=x, labels=y).loss)
        wrapped = DistributedDataParallel(model)
        for _ in range(2):  # the second forward fails where the first one left parameters unused
            mine = slice(2 * rank, 2 * rank + 2)
            found = gradients(wrapped, wrapped(pixel_values=x[mine], labels=y[mine]).loss)
        assert expected.keys() == found.keys()
        for name in expected:
            assert (expected[name] - found[name]).abs().max() < 1e-5, (method, name)
    dist.barrier()
    os._exit(0)  # a DDP module that outlives its process group can wait for ever, GIL in hand, for gloo's thread


if __name__ == "__main__":
    multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)

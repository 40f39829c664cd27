"""Run by test_contract.py, python two_processes.py RANK FOLDER: DDP over two gloo processes, without
find_unused_parameters, against one process."""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def squared_mean(output, field):
    """Of one tensor, or of all levels of a pyramid."""
    value = getattr(output, field)
    levels = value if isinstance(value, tuple) else (value,)
    return torch.cat([level.flatten(1) for level in levels], 1).square().mean()


def agree(what, model, inputs, field, rank):
    """Half of a batch each gives the gradients of all of it."""
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = gradients(model, squared_mean(model(**inputs), field))
    wrapped = DistributedDataParallel(model)
    half = len(next(iter(inputs.values()))) // 2
    mine = {key: value[half * rank : half * (rank + 1)] for key, value in inputs.items()}
    for _ in range(2):  # the second forward fails where the first one left parameters unused
        found = gradients(wrapped, squared_mean(wrapped(**mine), field))
    assert expected.keys() == found.keys()
    for name in expected:
        assert (expected[name] - found[name]).abs().max() < 1e-5 * (1 + expected[name].abs().max()), (what, name)


def work(rank, folder):
    from peft import get_peft_model

    from inlay import PartialConfig
    from methods.bases import OTHERS, OURS, adapted, batch, build_other, pairs

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for method, base in pairs(OURS):
        field = {"sam": "last_hidden_state", "sam2": "fpn_hidden_states"}.get(base, "logits")
        agree(f"{method} on {base}", adapted(method, base), batch(base), field, rank)
    for name, field in OTHERS.items():
        inputs = batch("gpt2" if name.startswith(("Bert", "GPT2")) else "vit")
        for settings in ({}, {"train": "norm"}):
            model = get_peft_model(build_other(name), PartialConfig(**settings))
            agree(f"{settings} on {name}", model, inputs, field, rank)
    dist.barrier()
    os._exit(0)  # a DDP module that outlives its process group can wait for ever, GIL in hand, for gloo's thread


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])

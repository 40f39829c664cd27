"""CPU time and memory of volumetric SAM beside the published architecture in its plain form, both with random weights.

    python tests/benchmarks/spatial_speed.py [--edge 128] [--repeats 1] [--threads 1]
    python tests/benchmarks/spatial_speed.py --edge 64 --tasks train --ways plain plain-stored stored default
    python tests/benchmarks/spatial_speed.py --edge 48 --tasks train --ways stored blocks default --steps 3 --repeats 3
    python tests/benchmarks/spatial_speed.py --edge 128 --tasks plan --ways plain plain-stored default stored

SAM ViT-B, a crop of edge³ voxels, two classes. Each row is a process of its own, rows take turns:

    plain         3DSAM-adapter as published: 512 slices enlarged, attention with a bias and a mask, its decoder
    plain-bf16    the same in bfloat16: by autocast in training, with weights in bfloat16 in inference
    plain-stored  training of `plain` with nothing recomputed, as the published code trains
    reference     the same encoder from `SpatialAdapterConfig(reference=True)`, the folds of this package, our decoder
    default       what this package does by default, with two rounds of clicks in a training step
    bf16          the same as `inlay segment --dtype auto` computes, or as a recipe trains with `--precision bf16`
    blocks        training of `default` with the blocks recomputed only, and not the necks and the decoder
    stored        training of `default` with nothing recomputed

Inference is one forward without gradients; `click` is a further click on the encoded volume. A training step is
forward, backward and AdamW, with gradient checkpointing: ours as `--gradient_checkpointing` switches it on, and in
`plain` blocks, necks, heads and last convolutions of the decoder. All have the same loss and batch 1. `plain` answers
once in a step, ours three times: without a prompt, and to two rounds of simulated clicks. Memory is the peak resident
size above that of the loaded model; `plan` is the peak that `plan_memory` predicts, weights included. The task `plan`
computes nothing else, so that it needs no memory.
With `--steps`, `later_cpu_s` is the median of the steps after the first one, which pays for memory and kernels.
Rows of earlier runs stay in the file; `machines` says where and when each was measured.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `methods.volumes`, where the tests have the published encoder
RESULTS = Path(__file__).parent / "results" / "spatial_speed.json"
WAYS = ("plain", "default", "plain-bf16", "bf16")
CLASSES = ["a", "b"]


def new_model(way, edge, **vision):
    """A ViT-B SAM with the adapter, or the published architecture around it; nothing is recomputed yet."""
    from peft import get_peft_model
    from transformers import SamConfig, SamModel

    from inlay import SpatialAdapterConfig

    torch.manual_seed(0)
    config = SamConfig(vision_config={"initializer_range": 0.02, **vision})
    model = SamModel(config).requires_grad_(False)
    plain = way.startswith("plain")
    own = SpatialAdapterConfig(classes=CLASSES, reference=plain or way == "reference", depth_rows=edge // 4)
    adapted = get_peft_model(model, own)
    return PublishedModel(adapted.get_base_model(), own) if plain else adapted


class PublishedModel(nn.Module):
    """The published architecture, formula by formula, with the weights of a SAM that holds the adapter.

    Its decoder has four heads of two 3x3x3 convolutions, enlarged, beside the scan, two more, enlarged: as FLOPs, with
    one click.
    """

    def __init__(self, adapted, config):
        super().__init__()

        def convolution(inputs, outputs):
            return nn.Sequential(nn.Conv3d(inputs, outputs, 3, padding=1), nn.InstanceNorm3d(outputs), nn.GELU())

        self.encoder, self.config, self.recomputes = adapted.vision_encoder, config, False
        self.heads = nn.ModuleList(nn.Sequential(convolution(256, 128), convolution(128, 128)) for _ in range(4))
        self.last = nn.Sequential(convolution(513, 128), nn.Conv3d(128, len(CLASSES) + 1, 3, padding=1))
        self.attention = nn.MultiheadAttention(256, 8, batch_first=True)
        self.queries = nn.Parameter(torch.randn(1, 10, 256))

    def forward(self, pixel_values, labels=None):
        """Logits at the size of the volume, and the loss where there are labels."""
        from inlay.methods.spatial.sam import VolumeOutput, dice_cross_entropy
        from methods.volumes import call, published_levels

        run = partial(checkpoint, use_reentrant=False) if self.recomputes else call
        parts = self.encoder.inlay_spatial3d_encoder["default"]
        levels = published_levels(self.encoder, parts, self.config, pixel_values, run)
        image = levels[-1].flatten(2).transpose(1, 2)
        prompted = image + self.attention(image, self.queries, self.queries, need_weights=False)[0]
        levels = [*levels[:-1], prompted.transpose(1, 2).view_as(levels[-1])]
        found = [run(head, x) for head, x in zip(self.heads, levels, strict=True)]
        up = [F.interpolate(x, scale_factor=2, mode="trilinear") for x in found]
        size = up[0].shape[2:]
        x = torch.cat([*up, F.interpolate(pixel_values, size=size, mode="trilinear")], dim=1)
        logits = F.interpolate(run(self.last, x), size=pixel_values.shape[2:], mode="trilinear")
        return VolumeOutput(loss=None if labels is None else dice_cross_entropy(logits, labels), logits=logits)


def recompute(model, way):
    """Switch gradient checkpointing on, as far as this way goes."""
    from inlay.methods.spatial.decoder import Convolution, VolumeDecoder
    from inlay.methods.spatial.encoder import Neck3d
    from inlay.train.launch import enable_checkpointing

    if isinstance(model, PublishedModel):
        model.recomputes = way != "plain-stored"
    elif way != "stored":
        enable_checkpointing(model)
        if way == "blocks":
            for module in model.modules():
                if isinstance(module, Convolution | Neck3d | VolumeDecoder):
                    module.gradient_checkpointing = False


class Peak(threading.Thread):
    """The largest resident size while it runs, sampled every 5 ms, in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_size, self.top, self.stopped = _resident(), 0, False
        self.start()

    def run(self):
        """Sample."""
        while not self.stopped:
            self.top = max(self.top, _resident())
            time.sleep(0.005)

    def stop(self):
        """The peak above the size at the start."""
        self.stopped = True
        self.join()
        return self.top - self.start_size


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds():
    """Of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def take_steps(model, batch, bf16, steps):
    """CPU seconds of each training step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    taken = []
    for _ in range(steps):
        begun = cpu_seconds()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(cpu_seconds() - begun)
    return taken


def infer(model, volume):
    """CPU seconds of an answer, and where the model keeps the encoded volume, of the answer to a further click."""
    begun = cpu_seconds()
    volume = volume.to(next(model.parameters()).dtype)
    if isinstance(model, PublishedModel):
        model(pixel_values=volume)
        return {"cpu_s": cpu_seconds() - begun}
    point = torch.tensor([[[volume.shape[-1] / 2] * 3]])
    output = model(pixel_values=volume, input_points=point)
    ended = cpu_seconds()
    model(image_embeddings=output.image_embeddings, input_points=point, input_masks=output.logits)
    return {"cpu_s": ended - begun, "click_cpu_s": cpu_seconds() - ended}


def run(way, task, edge, threads, steps):
    """One row: seconds of CPU, and bytes."""
    from inlay.measure.memory import plan_memory

    torch.set_num_threads(threads)
    model, bf16 = new_model(way, edge), way.endswith("bf16")
    volume = torch.randn(1, 1, edge, edge, edge)
    batch = {"pixel_values": volume, "labels": (volume[:, 0] > 1).long() + (volume[:, 0] > 2).long()}
    row = {}
    if task != "infer":
        model.train()
        recompute(model, way)
        row["plan_gb"] = plan_memory(model, batch, precision="bf16" if bf16 else "no").peak / 1e9
    elif bf16:
        model.to(torch.bfloat16)
    peak = Peak()
    if task == "train":
        taken = take_steps(model, batch, bf16, steps)
        row["cpu_s"] = taken[0]
        if taken[1:]:
            row["later_cpu_s"] = statistics.median(taken[1:])
    elif task == "infer":
        model.eval()
        with torch.inference_mode():
            row |= infer(model, volume)
    if task != "plan":
        row["peak_gb"] = peak.stop() / 1e9
    print(json.dumps(row))


def main():
    """All rows, by turns; the results are written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edge", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1, help="training steps of each process")
    parser.add_argument("--tasks", nargs="+", default=["infer", "train"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--one", nargs=2, help="internal: way and task")
    args = parser.parse_args()
    if args.one:
        run(*args.one, args.edge, args.threads, args.steps)
        return
    from machine import describe_machine

    path = RESULTS.with_stem(f"{RESULTS.stem}_{args.edge}")
    earlier = json.loads(path.read_text()) if path.is_file() else {"all": {}, "machines": {}}
    found, machines, measured = earlier["all"], earlier["machines"], set()
    for _ in range(args.repeats):
        for task in args.tasks:
            for way in args.ways:
                command = [sys.executable, __file__, "--one", way, task, "--edge", str(args.edge)]
                command += ["--threads", str(args.threads), "--steps", str(args.steps)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(f"{task} {way}: failed ({(done.stderr.strip().splitlines() or ['killed'])[-1]})")
                    continue
                name = f"{task} {way}"
                if name not in measured:  # those of an earlier run make room
                    found[name], machines[name] = [], describe_machine() | {"threads": args.threads}
                    measured.add(name)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(name, found[name][-1], flush=True)
                rows = {
                    name: {key: round(statistics.median(row[key] for row in each), 3) for key in each[0]}
                    for name, each in found.items()
                }
                result = {
                    "edge": args.edge,
                    "machines": machines,
                    "rows": rows,
                    "all": found,
                }
                path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

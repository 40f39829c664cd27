"""CPU time and memory of volumetric SAM beside the published architecture in its plain form, both with random weights.

    python tests/benchmarks/spatial_speed.py [--edge 128] [--repeats 1] [--threads 1]
    python tests/benchmarks/spatial_speed.py --edge 48 --tasks train --ways stored blocks default --steps 3 --repeats 3

SAM ViT-B, a crop of edge³ voxels, two classes. Each row is a process of its own, rows take turns:

    plain       3DSAM-adapter as published: 512 slices enlarged, attention with a bias and a mask, its decoder
    reference   the same encoder from `SpatialAdapterConfig(reference=True)`, the folds of this package, our decoder
    default     what this package does by default, with two rounds of clicks in a training step
    bf16        the same as `inlay segment --dtype auto` computes, or as a recipe trains with `--precision bf16`
    blocks      training of `default` with the blocks recomputed only, and not the necks and the decoder
    stored      training of `default` with nothing recomputed

Inference is one forward without gradients; `click` is a further click on the encoded volume. A training step is
forward, backward and AdamW, with gradient checkpointing: ours as `--gradient_checkpointing` switches it on, and in
`plain` blocks, heads and last convolutions of the decoder. `plain` answers once in a step, ours three times. Memory is
the peak resident size above that of the loaded model; `plan` is the peak that `plan_memory` predicts, weights included.
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
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "spatial_speed.json"
WAYS = ("plain", "default", "bf16")


def new_model(way, edge, **vision):
    """A ViT-B SAM with the adapter."""
    import torch
    from peft import get_peft_model
    from transformers import SamConfig, SamModel

    from inlay import SpatialAdapterConfig

    torch.manual_seed(0)
    config = SamConfig(vision_config={"initializer_range": 0.02, **vision})
    model = SamModel(config).requires_grad_(False)
    published = way in ("plain", "reference")
    own = SpatialAdapterConfig(classes=["a", "b"], reference=published, depth_rows=edge // 4)
    return get_peft_model(model, own), own


class PublishedDecoder:
    """Four heads of two 3x3x3 convolutions, enlarged, beside the scan, two more, enlarged: as FLOPs, with one click."""

    def __init__(self, classes):
        import torch
        from torch import nn

        def convolution(inputs, outputs):
            return nn.Sequential(nn.Conv3d(inputs, outputs, 3, padding=1), nn.InstanceNorm3d(outputs), nn.GELU())

        self.heads = nn.ModuleList(nn.Sequential(convolution(256, 128), convolution(128, 128)) for _ in range(4))
        self.last = nn.Sequential(convolution(513, 128), nn.Conv3d(128, classes + 1, 3, padding=1))
        self.attention = nn.MultiheadAttention(256, 8, batch_first=True)
        self.queries = nn.Parameter(torch.randn(1, 10, 256))
        self.recompute = lambda module, x: module(x)

    def parameters(self):
        """All of them."""
        return [*self.heads.parameters(), *self.last.parameters(), *self.attention.parameters(), self.queries]

    def __call__(self, levels, volume):
        """Logits at the size of the volume."""
        import torch
        from torch.nn import functional as F

        image = levels[-1].flatten(2).transpose(1, 2)
        prompted = image + self.attention(image, self.queries, self.queries, need_weights=False)[0]
        levels = [*levels[:-1], prompted.transpose(1, 2).view_as(levels[-1])]
        found = [self.recompute(head, x) for head, x in zip(self.heads, levels, strict=True)]
        up = [F.interpolate(x, scale_factor=2, mode="trilinear") for x in found]
        size = up[0].shape[2:]
        x = torch.cat([*up, F.interpolate(volume, size=size, mode="trilinear")], dim=1)
        return F.interpolate(self.recompute(self.last, x), size=volume.shape[2:], mode="trilinear")


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


def take_steps(model, decoder, plain, batch, bf16, steps):
    """CPU seconds of each training step; `plain` answers in the place of the model, through the published decoder."""
    import torch

    from inlay.methods.spatial.sam import dice_cross_entropy

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters + decoder.parameters() if plain else parameters)
    taken = []
    for _ in range(steps):
        begun = cpu_seconds()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = None if plain else model(**batch)
        loss = dice_cross_entropy(plain(), batch["labels"]) if output is None else output.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(cpu_seconds() - begun)
    return taken


def run(way, task, edge, threads, steps):
    """One row: seconds of CPU, and bytes."""
    import torch
    from torch.utils.checkpoint import checkpoint

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from inlay.measure.memory import plan_memory
    from inlay.methods.spatial.decoder import Convolution, VolumeDecoder
    from inlay.methods.spatial.encoder import Neck3d
    from inlay.train.launch import enable_checkpointing
    from methods import volumes as published

    torch.set_num_threads(threads)
    model, config = new_model(way, edge)
    volume = torch.randn(1, 1, edge, edge, edge)
    labels = (volume[:, 0] > 1).long() + (volume[:, 0] > 2).long()
    encoder = model.get_base_model().vision_encoder
    parts, decoder = encoder.inlay_spatial3d_encoder["default"], PublishedDecoder(2)
    rows = {}
    if task == "train":
        model.train()
        if way not in ("plain", "blocks"):
            precision = "bf16" if way == "bf16" else "no"
            batch = {"pixel_values": volume, "labels": labels}
            planned = plan_memory(model, batch, gradient_checkpointing=way != "stored", precision=precision)
            rows["plan_gb"] = planned.peak / 1e9
        if way != "stored":
            enable_checkpointing(model)
        if way == "blocks":
            for module in model.modules():
                if isinstance(module, Convolution | Neck3d | VolumeDecoder):
                    module.gradient_checkpointing = False
        block = published.published_block
        published.published_block = lambda *a, **k: checkpoint(block, *a, use_reentrant=False, **k)
        decoder.recompute = lambda *a: checkpoint(*a, use_reentrant=False)
    elif way == "bf16":
        model.to(torch.bfloat16)

    def plain():
        return decoder(published.published_levels(encoder, parts, config, volume), volume)

    peak, begun = Peak(), cpu_seconds()
    if task == "train":
        answer = plain if way == "plain" else None
        taken = take_steps(model, decoder, answer, {"pixel_values": volume, "labels": labels}, way == "bf16", steps)
        rows["cpu_s"] = taken[0]
        if taken[1:]:
            rows["later_cpu_s"] = statistics.median(taken[1:])
    else:
        model.eval()
        point = torch.tensor([[[edge / 2] * 3]])
        with torch.inference_mode():
            pixels = volume.to(next(model.parameters()).dtype)
            output = plain() if way == "plain" else model(pixel_values=pixels, input_points=point)
            if way != "plain":
                rows["cpu_s"], begun = cpu_seconds() - begun, cpu_seconds()
                model(image_embeddings=output.image_embeddings, input_points=point, input_masks=output.logits)
                rows["click_cpu_s"] = cpu_seconds() - begun
    rows.setdefault("cpu_s", cpu_seconds() - begun)
    rows["peak_gb"] = peak.stop() / 1e9
    print(json.dumps(rows))


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

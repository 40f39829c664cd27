"""Heads with an atlas of 32 structures: what the 3D spatial adapter learns of them, and in how much memory.

    python tests/benchmarks/scan_atlas.py [--steps 300] [--ways spatial unet] [--seed 0]

`builtin:atlas`: 15 heads of 165 x 198 x 168 voxels of 1 mm, 12 for training, 3 held out. 28 of the 32 structures are
pairs that differ by their side only; 15 structures are smaller than a ten-thousandth of the scan. Training is
at 2 mm, on one crop of 64 x 64 x 64 voxels a step with augmentation and without mirroring, by the loss of the product
and the loop of hippocampus.py (AdamW, warm-up, cosine, clipped gradients). Whole scans are scored at their own 1 mm:

    spatial    builtin:sam-tiny with the spatial adapter, without prompts
    unet       MONAI's BasicUNet from scratch

A structure counts as found where the Dice of its mask is above 0.3. `side` is the share of the voxels in a found pair
that have the right side. Memory is the most that the process held, scans included; each way runs in its own.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from hippocampus import RATES, RESULTS, cpu_seconds
from machine import describe_machine
from torch import nn

CROP, SPACING_MM = (64, 64, 64), (2.0, 2.0, 2.0)
HEADS, HELD_OUT = 15, 3
SMALL = 1e-4  # share of a scan's voxels
FOUND = 0.3  # Dice above which a structure is found
CHILD = "SCAN_ATLAS_CHILD"  # set in the process of one way
WAYS = {"spatial": "3D spatial adapter", "unet": "MONAI's `BasicUNet`"}
PATH = RESULTS / "scan_atlas.json"


def make(way, labels):
    """A model in train mode."""
    if way == "unet":
        from monai.networks.nets import BasicUNet

        return UNetLogits(BasicUNet(spatial_dims=3, in_channels=1, out_channels=len(labels) + 1))
    from peft import get_peft_model

    from inlay import SpatialAdapterConfig, load_base

    base = load_base("builtin:sam-tiny")
    return get_peft_model(base, SpatialAdapterConfig.fitted(base, labels, CROP, SPACING_MM, prompts=False))


class UNetLogits(nn.Module):
    """Logits as the adapter gives them, of windows of any size."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels=None):
        """An object with `logits`, and with `loss` where there are labels."""
        from inlay.methods.spatial.sam import VolumeOutput, dice_cross_entropy

        logits = self.model(pixel_values)
        return VolumeOutput(loss=None if labels is None else dice_cross_entropy(logits, labels), logits=logits)


def train(model, way, view, steps):
    """CPU seconds of training."""
    from inlay.tasks.volumes.view import collate_volumes

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATES[way], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * 0.5 * (1 + np.cos(np.pi * step / steps))
    )
    begun, losses = cpu_seconds(), []
    for step in range(1, steps + 1):
        loss = model(**collate_volumes([view[random.randrange(len(view))]])).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"{step}: loss {np.mean(losses[-20:]):.3f}, {cpu_seconds() - begun:.0f} CPU s", flush=True)
    return cpu_seconds() - begun


@torch.inference_mode()
def find_mask(model, processor, case):
    """The mask (X, Y, Z) of a scan on its own grid, from overlapping windows at 2 mm."""
    from inlay.tasks.volumes.loss import WholeVolume
    from inlay.tasks.volumes.view import VolumeView, collate_volumes

    view = VolumeView([case], processor)
    found = WholeVolume(CROP, overlap=0.5, windows=1)(model, collate_volumes([view[0]]))
    return processor.back(found.classes[0].numpy(), view.scan(0))


def score(model, processor, cases, labels):
    """Means over the held-out scans, and the Dice of each structure."""
    from inlay.tasks.volumes.scores import dice_of, overlap

    dice, shares, sides = [], [], []
    for case in cases:
        found, true = find_mask(model.eval(), processor, case), case.label
        counts = overlap(*(torch.from_numpy(mask.astype(np.int16))[None] for mask in (found, true)), len(labels))
        dice.append(dice_of(counts.numpy())[0])
        shares.append(counts[0, :, 2].numpy() / true.size)
        for left, name in enumerate(labels, 1):
            if name.startswith("left") and dice[-1][left - 1] > FOUND:
                other = labels.index(name.replace("left", "right")) + 1
                right, wrong = ((np.isin(found, k) & (true == left)).sum() for k in (left, other))
                sides.append(right / (right + wrong))
    dice, shares = np.mean(dice, axis=0), np.mean(shares, axis=0)
    small = shares < SMALL
    return {
        "dice": round(float(dice.mean()), 4),
        "dice_small": round(float(dice[small].mean()), 4),
        "found": int((dice > FOUND).sum()),
        "found_small": int((dice[small] > FOUND).sum()),
        "small": int(small.sum()),
        "right_side": round(float(np.mean(sides)), 4) if sides else None,
        "each": {name: round(float(value), 3) for name, value in zip(labels, dice, strict=True)},
    }


def run(way, seed, steps, save):
    """Train and score one model."""
    from inlay import save_adapter
    from inlay.builtin.atlas import LABELS, generate_heads
    from inlay.tasks.volumes.data import Case
    from inlay.tasks.volumes.scan import VolumeProcessor
    from inlay.tasks.volumes.view import VolumeView

    torch.set_num_threads(1)
    cases = [Case(head.name, head.image, head.label, head.affine) for head in generate_heads(HEADS)]
    processor = VolumeProcessor(SPACING_MM, CROP)
    torch.manual_seed(seed)
    random.seed(seed)
    model = make(way, LABELS).train()
    seconds = train(model, way, VolumeView(cases[HELD_OUT:], processor, training=True), steps)
    if way == "spatial" and save:
        save_adapter(model.eval(), save, processor=processor)
    scores = score(model, processor, cases[:HELD_OUT], LABELS)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"steps": steps, "train_cpu_s": round(seconds, 1), "memory_gb": round(most, 2), "trained": trained, **scores}


def table(rows):
    """Markdown."""
    lines = [
        "| model | steps | Dice | found | small ones found | right side | CPU s to train | memory, GB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        side = "" if row["right_side"] is None else f"{row['right_side']:.1%}"
        lines.append(
            f"| {WAYS[name.split()[0]]} | {row['steps']} | {row['dice']:.3f} | {row['found']} of {len(row['each'])} | "
            f"{row['found_small']} of {row['small']} | {side} | {row['train_cpu_s']:.0f} | {row['memory_gb']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main():
    """All ways, each in a process of its own; a run that is in the result file with as many steps is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--save", type=Path, help="Keep the adapter in this folder.")
    args = parser.parse_args()
    if os.environ.get(CHILD):
        print(json.dumps(run(args.ways[0], args.seed, args.steps, args.save)))
        return
    rows = json.loads(PATH.read_text())["rows"] if PATH.is_file() else {}
    for way in args.ways:
        name = f"{way} {args.seed}"
        if rows.get(name, {}).get("steps") == args.steps:
            continue
        command = [sys.executable, __file__, "--ways", way, "--seed", str(args.seed), "--steps", str(args.steps)]
        command += ["--save", str(args.save)] if args.save else []
        lines = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, CHILD: "1"}) as child:
            for line in child.stdout:
                lines.append(line)
                print(line, end="", flush=True)
        if child.returncode:
            sys.exit(f"{way} ended with {child.returncode}")
        rows[name] = json.loads(lines[-1])
        PATH.write_text(
            json.dumps({"rows": rows, "machine": describe_machine("monai")}, indent=2, sort_keys=True) + "\n"
        )
        PATH.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()

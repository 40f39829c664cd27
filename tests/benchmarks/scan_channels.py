"""Scans whose classes no channel tells by itself: the adapter with both channels, with each, and with their mean.

    python tests/benchmarks/scan_channels.py [--steps 240] [--seeds 0 1 2]

`builtin:channels`: 48 scans, of which 38 are for training and 10 are held out. A ball is of the class "alike" where it
is brighter, or darker, than the tissue in both channels, and "opposite" where it is brighter in one and darker in the
other. All ways have equal data and the same loop (AdamW, warm-up, cosine, clipped gradients; 2 crops of 24 x 24 x 24
voxels a step with augmentation), start from `builtin:sam-tiny`, and are scored without prompts on whole scans by mean
Dice over the held-out scans.
"""

import argparse
import json
import random
import resource
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from torch import nn

RESULTS = Path(__file__).parent / "results" / "scan_channels.json"
WAYS = {"both": "both channels", "first": "the first", "second": "the second", "mean": "their mean"}
CROP = (24, 24, 24)
RATE = 4e-3


def reduce_channels(case, way):
    """The case as one way of training sees it."""
    if way == "both":
        return case
    if way == "mean":  # of channels that are normalised by themselves: each has a scale of its own
        standard = [(channel - channel.mean()) / channel.std() for channel in case.image]
        return replace(case, image=np.mean(standard, axis=0), channels=())
    return replace(case, image=case.image[("first", "second").index(way)], channels=())


def run(way, seed, steps):
    """Train and score one model."""
    from peft import get_peft_model

    from inlay import SpatialAdapterConfig, load_base
    from inlay.tasks.volumes.data import load_volumes
    from inlay.tasks.volumes.loss import WholeVolume
    from inlay.tasks.volumes.scan import VolumeProcessor
    from inlay.tasks.volumes.scores import dice_of
    from inlay.tasks.volumes.view import VolumeView, collate_volumes

    data = load_volumes("builtin:channels")  # the split is the same for all seeds
    channels = tuple(data.channels) if way == "both" else ()
    processor = VolumeProcessor((1.0, 1.0, 1.0), CROP, channels=channels)
    train, held_out = ([reduce_channels(case, way) for case in part] for part in (data.train, data.validation))
    view, scored = VolumeView(train, processor, training=True), VolumeView(held_out, processor)
    torch.manual_seed(seed)
    random.seed(seed)
    base = load_base("builtin:sam-tiny")
    config = SpatialAdapterConfig.fitted(
        base, data.labels, CROP, processor.spacing_mm, channels=channels, prompts=False
    )
    model = get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * 0.5 * (1 + np.cos(np.pi * step / steps))
    )
    begun, losses = cpu_seconds(), []
    for _ in range(steps):
        batch = collate_volumes([view[random.randrange(len(view))] for _ in range(2)])
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    used = cpu_seconds() - begun
    model.eval()
    whole = WholeVolume(CROP)
    with torch.inference_mode():
        batches = [collate_volumes([scored[i]]) for i in range(len(scored))]
        found = [dice_of(whole.answers(whole(model, batch), batch)[0].numpy())[0] for batch in batches]
    return {
        "dice": [round(float(value), 4) for value in np.mean(found, axis=0)],
        "train_cpu_s": round(used, 1),
        "loss": round(float(np.mean(losses[-20:])), 4),
        "trained": sum(p.numel() for p in trained),
    }


def cpu_seconds():
    """Of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def table(rows):
    """Markdown: mean Dice on the held-out scans, its standard deviation over the seeds, and that of each class."""
    lines = ["| channels | Dice | alike | opposite | CPU s to train |", "|---|---:|---:|---:|---:|"]
    for way, title in WAYS.items():
        found = [row for name, row in rows.items() if name.split()[0] == way]
        if not found:
            continue
        cells = []
        for values in (
            [statistics.mean(row["dice"]) for row in found],
            *zip(*(row["dice"] for row in found), strict=True),
        ):
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        seconds = statistics.mean(row["train_cpu_s"] for row in found)
        lines.append(f"| {title} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main():
    """All ways and seeds; results are written after each, and kept where they are there already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": {}}
    for seed in args.seeds:
        for way in WAYS:
            name = f"{way} {seed}"
            if name in result["rows"]:
                continue
            result["rows"][name] = run(way, seed, args.steps)
            result |= {"steps": args.steps, "machine": describe_machine("monai")}
            RESULTS.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
            RESULTS.with_suffix(".md").write_text(table(result["rows"]))
            print(name, result["rows"][name], flush=True)
    print(RESULTS.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()

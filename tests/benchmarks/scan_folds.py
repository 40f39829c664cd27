"""Five folds of real MR scans: the 3D spatial adapter next to MONAI's BasicUNet, by equal steps and by equal CPU time.

    python tests/benchmarks/scan_folds.py [--steps 240] [--folds 0 1 2 3 4] [--seeds 0] [--ways spatial unet unet_time]

Medical Segmentation Decathlon, hippocampus, the 60 scans of `dev`: in each fold 48 are trained on and 12 held out.
Loop, crops, rates and models are those of hippocampus.py. `unet_time` is the U-Net trained for as many steps as fit
into the CPU time of the adapter; what a step of each costs is measured by turns just before, so that the speed and load
of the machine are the same for both. Whole scans are scored on the grid of the model without prompts, by `score_case`.
A run that is in the result file is kept.
"""

import argparse
import json
import random
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from hippocampus import CROP, RATES, RESULTS, answer, cpu_seconds, loss_of, new_model
from machine import describe_machine
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from places import SHARED

LABELS = ["anterior", "posterior"]
WAYS = {
    "spatial": "3D spatial adapter",
    "unet": "MONAI's `BasicUNet`, equal steps",
    "unet_time": "MONAI's `BasicUNet`, equal CPU time",
}
SCORES = {"dice": "Dice", "nsd": "surface Dice, 1 mm", "hd95_mm": "HD95, mm"}


def train(way, view, seed, steps):
    """A trained model, and its CPU seconds."""
    torch.manual_seed(seed)
    random.seed(seed)
    model = new_model(way).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATES[way], weight_decay=0.0)
    begun = cpu_seconds()
    for step in range(steps):
        rate = RATES[way] * min(1, (step + 1) / 20) * 0.5 * (1 + np.cos(np.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss_of(way, model, draw_batch(view)).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model, cpu_seconds() - begun


def draw_batch(view):
    """Crops of two scans drawn at random."""
    from inlay.tasks.volumes.view import collate_volumes

    return collate_volumes([view[random.randrange(len(view))] for _ in range(2)])


def measure_step(view, rounds=10):
    """CPU seconds of forward and backward of the adapter and of the U-Net on the same crops by turns, medians."""
    models = {way: new_model(way).train() for way in ("spatial", "unet")}
    seconds = {way: [] for way in models}
    for _ in range(rounds):
        batch = draw_batch(view)
        for way, model in models.items():
            begun = cpu_seconds()
            loss_of(way, model, batch).backward()
            seconds[way].append(cpu_seconds() - begun)
    return {way: statistics.median(values) for way, values in seconds.items()}


@torch.inference_mode()
def score(way, model, view):
    """Means over cases and classes."""
    from inlay.tasks.volumes.scores import score_case, summarise

    model.eval()
    rows = []
    for i in range(len(view)):
        scan = view.scan(i)
        labels = scan.labels.long()
        found = answer(way, model, scan.image[None], labels[None], "none")
        rows += score_case(found, labels, LABELS, scan.spacing_mm, case=scan.name)
    means = summarise(rows)
    return {name: means[name] for name in SCORES}


def run(way, fold, seed, steps, folder):
    """Train and score one model."""
    from inlay.tasks.volumes.data import load_volumes
    from inlay.tasks.volumes.scan import VolumeProcessor
    from inlay.tasks.volumes.view import VolumeView

    data = load_volumes(str(folder), labels=LABELS, fold=fold)
    processor = VolumeProcessor.fitted(data, CROP)
    view = VolumeView(data.train, processor, training=True)
    measured = {}
    if way == "unet_time":
        cost = measure_step(view)
        steps = round(steps * cost["spatial"] / cost["unet"])
        measured = {"step_cpu_s": cost}
    model, used = train(way.removesuffix("_time"), view, seed, steps)
    scores = score(way.removesuffix("_time"), model, VolumeView(data.validation, processor))
    return {"way": way, "fold": fold, "seed": seed, "steps": steps, "train_cpu_s": round(used, 1), **measured, **scores}


def table(rows):
    """Markdown: means and standard deviations over the folds with the first seed, and over seeds on the first fold."""
    first = rows[0]
    groups = {"folds": [row for row in rows if row["seed"] == first["seed"]]}
    groups[f"seeds on fold {first['fold']}"] = [row for row in rows if row["fold"] == first["fold"]]
    lines = [f"| way | over | {' | '.join(SCORES.values())} | steps |", f"|---|---|{'---:|' * 4}"]
    for over, group in groups.items():
        for way, title in WAYS.items():
            found = [row for row in group if row["way"] == way]
            if len(found) > 1:
                cells = [describe_spread([row[name] for row in found]) for name in SCORES]
                steps = statistics.mean(row["steps"] for row in found)
                lines.append(f"| {title} | {len(found)} {over} | {' | '.join(cells)} | {steps:.0f} |")
    return "\n".join(lines) + "\n"


def describe_spread(values):
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def main():
    """All folds, seeds and ways; the result file is written after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--out", default="scan_folds")
    args = parser.parse_args()
    folder = SHARED / "hippocampus_msd04" / "dev"
    if not folder.is_dir():
        sys.exit(f"there are no scans at {folder}; see the Medical Segmentation Decathlon, task 4")
    torch.set_num_threads(1)
    path = RESULTS / f"{args.out}.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else {}
    for seed in args.seeds:
        for fold in args.folds:
            for way in args.ways:
                name = f"{way} fold {fold} seed {seed}"
                if name in rows:
                    continue
                rows[name] = run(way, fold, seed, args.steps, folder) | {"machine": describe_machine("monai")}
                result = {"rows": rows, "steps": args.steps}
                path.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
                path.with_suffix(".md").write_text(table(list(rows.values())))
                print(name, rows[name], flush=True)
    print(table(list(rows.values())))


if __name__ == "__main__":
    main()

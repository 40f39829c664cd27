"""Five folds of real MR scans: the 3D spatial adapter next to MONAI's BasicUNet, by equal steps and by equal CPU time.

    python tests/benchmarks/scan_folds.py [--steps 240] [--folds 0 1 2 3 4] [--seeds 0] [--ways spatial unet unet_time]

Medical Segmentation Decathlon, hippocampus, the 60 scans of `dev`: in each fold 48 are trained on and 12 held out.
Loop, crops, rates and models are those of hippocampus.py. `unet_time` is the U-Net trained until it has used the CPU
seconds of `spatial` on the same fold and seed; its learning rate falls with the time used. Whole scans are scored on
the model's grid without prompts, by `score_case`. A run that is in the result file is kept.
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


def train(way, view, seed, steps, seconds):
    """A trained model, its steps and CPU seconds; it ends after `steps`, or after `seconds` where these are given."""
    from inlay.tasks.volumes.view import collate_volumes

    torch.manual_seed(seed)
    random.seed(seed)
    model = new_model(way).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATES[way], weight_decay=0.0)
    begun, step, done = cpu_seconds(), 0, 0.0  # done: share of the run
    while done < 1:
        rate = RATES[way] * min(1, (step + 1) / 20) * 0.5 * (1 + np.cos(np.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss_of(way, model, collate_volumes([view[random.randrange(len(view))] for _ in range(2)])).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        done = step / steps if seconds is None else (cpu_seconds() - begun) / seconds
    return model, step, cpu_seconds() - begun


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


def run(way, fold, seed, steps, folder, seconds):
    """Train and score one model."""
    from inlay.tasks.volumes.data import load_volumes
    from inlay.tasks.volumes.scan import VolumeProcessor
    from inlay.tasks.volumes.view import VolumeView

    data = load_volumes(str(folder), labels=LABELS, fold=fold)
    processor = VolumeProcessor.fitted(data, CROP)
    kind = way.removesuffix("_time")
    model, taken, used = train(kind, VolumeView(data.train, processor, training=True), seed, steps, seconds)
    scores = score(kind, model, VolumeView(data.validation, processor))
    return {"way": way, "fold": fold, "seed": seed, "steps": taken, "train_cpu_s": round(used, 1), **scores}


def table(rows):
    """Markdown: the mean over all runs of a way, and its standard deviation."""
    lines = [f"| way | runs | {' | '.join(SCORES.values())} | steps | CPU s |", f"|---|---:|{'---:|' * 5}"]
    for way, title in WAYS.items():
        found = [row for row in rows if row["way"] == way]
        if found:
            cells = []
            for name in SCORES:
                values = [row[name] for row in found]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}")
            steps, seconds = (statistics.mean(row[key] for row in found) for key in ("steps", "train_cpu_s"))
            lines.append(f"| {title} | {len(found)} | {' | '.join(cells)} | {steps:.0f} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


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
                name, spatial = f"{way} fold {fold} seed {seed}", rows.get(f"spatial fold {fold} seed {seed}")
                if name in rows:
                    continue
                if way == "unet_time" and spatial is None:
                    sys.exit(f"{name} takes the CPU time of spatial; run that first")
                seconds = spatial["train_cpu_s"] if way == "unet_time" else None
                rows[name] = run(way, fold, seed, args.steps, folder, seconds)
                result = {"rows": rows, "steps": args.steps, "machine": describe_machine("monai")}
                path.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
                path.with_suffix(".md").write_text(table(rows.values()))
                print(name, rows[name], flush=True)
    print(table(rows.values()))


if __name__ == "__main__":
    main()

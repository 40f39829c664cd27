"""What the 3D spatial adapter learns by: the loss of the product beside others, on two classes and on 32.

    python tests/benchmarks/scan_losses.py [--data atlas hippocampus] [--losses plain weighted focal deep] [--seeds 0 1]

    plain      Dice and cross-entropy of all voxels alike, as in nnU-Net
    weighted   that of the product: in the cross-entropy a class counts the more, the rarer and the less found it is
    focal      Dice and focal loss, gamma 2 (Lin et al. 2017, arXiv:1708.02002)
    deep       weighted, with deep supervision: half of the same loss is of a layer at half size (its own 1x1x1
               convolution, every second voxel of the labels), as in nnU-Net

`hippocampus`: 36 of the 48 scans that scan_folds.py trains on in its fold 0, 12 others of them are scored, crops and
rate as there, 240 steps. Its held-out scans have no part, so that this may choose settings.
`atlas`: `builtin:atlas` at 3 mm, 8 heads, 3 others scored, crops of 48 x 56 x 48, without prompts, 120 steps.
Two crops a step, mean Dice of whole scans without prompts. A run that is in the result file is kept.
"""

import argparse
import importlib
import itertools
import json
import random
import statistics
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from hippocampus import RATES, RESULTS, cpu_seconds, new_model
from hippocampus_clicks import load_split
from machine import describe_machine
from scan_folds import draw_batch
from torch import nn
from torch.nn import functional as F

ATLAS_CROP, ATLAS_MM, HEADS = (48, 56, 48), 3.0, 8
STEPS = {"hippocampus": 240, "atlas": 120}
LOSSES = ("plain", "weighted", "focal", "deep")


def plain(logits, labels, gamma=0.0):
    """Soft Dice and cross-entropy, or focal loss where gamma is not 0."""
    classes = logits.shape[1] - 1
    logs = logits.float().log_softmax(1)
    found = F.nll_loss(logs, labels, ignore_index=-1, reduction="none")
    counted = labels >= 0
    if gamma:
        found = found * (1 - (-found).exp()) ** gamma
    entropy = found.sum() / counted.sum().clamp(min=1)
    wanted = F.one_hot(labels.clamp(min=0), classes + 1).movedim(-1, 1)[:, 1:] * counted[:, None]
    shares = logs[:, 1:].exp() * counted[:, None]
    both, everything = (shares * wanted).flatten(2).sum(-1), (shares + wanted).flatten(2).sum(-1)
    return (entropy + 1 - ((2 * both + 1) / (everything + 1)).mean()) / 2


class DeepSupervision(nn.Module):
    """A model whose loss is half of a layer of its decoder, at half size."""

    def __init__(self, model, layer, classes):
        super().__init__()
        self.model, self.score = model, nn.Conv3d(layer[0].out_channels, classes + 1, 1)
        self.seen = []
        layer.register_forward_hook(lambda _, inputs, output: self.seen.append(output))

    def forward(self, pixel_values, labels):
        """The output, with that loss."""
        from inlay.methods.spatial.sam import dice_cross_entropy

        self.seen.clear()
        output = self.model(pixel_values=pixel_values, labels=labels)
        coarse = [self.score(x) for x in self.seen]
        small = F.interpolate(labels[:, None].float(), size=coarse[0].shape[2:], mode="nearest")[:, 0].long()
        if self.training:
            output.loss = output.loss / 2 + torch.stack([dice_cross_entropy(x, small) for x in coarse]).mean() / 2
        return output


def load(data):
    """Cases to train on, cases to score, the processor and the names of the classes."""
    from inlay.builtin.atlas import LABELS, generate_heads
    from inlay.tasks.volumes.data import Case
    from inlay.tasks.volumes.scan import VolumeProcessor

    if data == "hippocampus":
        return *load_split("development"), ("anterior", "posterior")
    cases = [Case(head.name, head.image, head.label, head.affine) for head in generate_heads(HEADS + 3)]
    return cases[:HEADS], cases[HEADS:], VolumeProcessor((ATLAS_MM,) * 3, ATLAS_CROP), LABELS


def make(data, labels, loss):
    """A model to train."""
    from peft import get_peft_model

    from inlay import SpatialAdapterConfig, load_base

    if data == "hippocampus":
        model = new_model("spatial")
    else:
        base = load_base("builtin:sam-tiny")
        config = SpatialAdapterConfig.fitted(base, labels, ATLAS_CROP, (ATLAS_MM,) * 3, prompts=False)
        model = get_peft_model(base, config)
    if loss != "deep":
        return model
    layer = next(module.refine[1] for module in model.modules() if hasattr(module, "refine"))
    return DeepSupervision(model, layer, len(labels))


def run(data, loss, seed):
    """Train and score one model."""
    from inlay.tasks.volumes.view import VolumeView

    sam = importlib.import_module("inlay.methods.spatial.sam")
    cases, held, processor, labels = load(data)
    view, steps, rate = VolumeView(cases, processor, training=True), STEPS[data], RATES["spatial"]
    torch.manual_seed(seed)
    random.seed(seed)
    model = make(data, labels, loss).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * 0.5 * (1 + np.cos(np.pi * step / steps))
    )
    other = {"plain": plain, "focal": partial(plain, gamma=2.0)}.get(loss, sam.dice_cross_entropy)
    begun = cpu_seconds()
    with patch.object(sam, "dice_cross_entropy", other):
        for _ in range(steps):
            model(**draw_batch(view)).loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    used = cpu_seconds() - begun
    return {"dice": score(model, VolumeView(held, processor)), "train_cpu_s": round(used, 1)}


@torch.inference_mode()
def score(model, view):
    """Mean Dice of each class over whole scans."""
    from inlay.tasks.volumes.loss import WholeVolume
    from inlay.tasks.volumes.scores import dice_of
    from inlay.tasks.volumes.view import collate_volumes

    model.eval()
    whole = WholeVolume(view.processor.crop)
    batches = [collate_volumes([view[i]]) for i in range(len(view))]
    found = [dice_of(whole.answers(whole(model, batch), batch)[0].numpy())[0] for batch in batches]
    return [round(float(value), 4) for value in np.mean(found, axis=0)]


def table(rows):
    """Markdown: mean Dice and its standard deviation over the seeds, and how many classes are found at all."""
    lines = [
        "| data | loss | seeds | Dice | classes with a Dice above 0.3 | CPU s to train |",
        "|---|---|---:|---:|---|---:|",
    ]
    for data in STEPS:
        for loss in LOSSES:
            found = [row for name, row in rows.items() if name.split()[:2] == [data, loss]]
            if not found:
                continue
            means = [statistics.mean(row["dice"]) for row in found]
            spread = f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""
            classes = ", ".join(f"{sum(dice > 0.3 for dice in row['dice'])} of {len(row['dice'])}" for row in found)
            seconds = statistics.mean(row["train_cpu_s"] for row in found)
            lines.append(
                f"| {data} | {loss} | {len(found)} | {statistics.mean(means):.3f}{spread} | {classes} | {seconds:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main():
    """All data, losses and seeds; results are written after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "scan_losses.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else {}
    for data, seed, loss in itertools.product(args.data, args.seeds, args.losses):
        name = f"{data} {loss} {seed}"
        if name in rows:
            continue
        rows[name] = run(data, loss, seed)
        result = {"rows": rows, "steps": STEPS, "machine": describe_machine("monai")}
        path.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
        path.with_suffix(".md").write_text(table(rows))
        print(name, rows[name], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()

"""Volumetric SAM on real MR scans beside SAM slice by slice, a 3D U-Net, and itself without its depth convolution.

    python tests/benchmarks/hippocampus.py [--steps 240] [--seeds 0 1 2] [--ways spatial slices unet flat]

Medical Segmentation Decathlon, hippocampus: 48 scans for training, 12 held out, two classes. All ways have equal data
and the same loop (AdamW, warm-up, cosine, clipped gradients; random crops of 32 x 48 x 32 voxels with augmentation) for
equally many steps, and are scored on whole scans by mean Dice over cases and classes:

    spatial   builtin:sam-tiny with the 3D spatial adapter, 2 crops a step, clicks simulated
    flat      the same without the depth-wise convolution in its bottlenecks (kernel=1)
    slices    builtin:sam-tiny on axial slices of such crops (16 a step: about the same time), LoRA r=8 in its encoder,
              its mask decoder trained, a mask per class as in SAMed (Zhang & Liu 2023, arXiv:2304.13785)
    unet      MONAI's BasicUNet from scratch, 2 crops a step

Scored are no prompt; 1 and 10 random points in each class (`slices`: in every slice that shows the class, as a slice
knows nothing of the others: many more clicks); and 10 clicks a user would give, one in each class, then where the
answer is most wrong. A U-Net takes no clicks. hippocampus_clicks.py scores other users, one prompt at a time.
"""

import argparse
import json
import random
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from machine import describe_machine
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from places import SHARED

RESULTS = Path(__file__).parent / "results"
WAYS = {
    "spatial": "3D spatial adapter",
    "flat": "the same without its depth convolution (`kernel=1`)",
    "slices": "SAM slice by slice, LoRA (points in every slice)",
    "unet": "MONAI's `BasicUNet` from scratch",
}
CROP = (32, 48, 32)
RATES = {"spatial": 4e-3, "flat": 4e-3, "slices": 2e-3, "unet": 2e-3}
CLASSES = 2


class Slices(nn.Module):
    """SAM with LoRA on axial slices; logits (B, 3, D, H, W) of volumes (B, 1, D, H, W)."""

    def __init__(self):
        super().__init__()
        from peft import LoraConfig, get_peft_model

        from inlay import load_base

        base = load_base("builtin:sam-tiny")
        targets = [n for n, m in base.vision_encoder.named_modules() if isinstance(m, nn.Linear) and "layers." in n]
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=[f"vision_encoder.{n}" for n in targets],
            modules_to_save=["mask_decoder"],
        )
        self.sam, self.side = get_peft_model(base, config), base.config.vision_config.image_size

    def pictures(self, volume):
        """Slices (B · D, 3, side, side), grey, as large as they go, and how much larger they are."""
        flat = volume.transpose(1, 2).flatten(0, 1)
        by = self.side / max(flat.shape[2:])
        size = [min(self.side, round(n * by)) for n in flat.shape[2:]]
        flat = F.interpolate(flat, size=size, mode="bilinear")
        return F.pad(flat, (0, self.side - size[1], 0, self.side - size[0])).expand(-1, 3, -1, -1), size

    def forward(self, volume, points=None, labels=None):
        """Points (B · D, K, N, 2) as x, y in pixels of the pictures and labels (B · D, K, N): one prompt a class."""
        pictures, size = self.pictures(volume)
        said = {} if points is None else {"input_points": points, "input_labels": labels}
        masks = self.sam(pixel_values=pictures, **said).pred_masks  # N P 3 h w
        if points is None:
            logits = masks[:, 0]
        else:
            logits = torch.stack([masks[:, :, 0].mean(1), masks[:, 0, 1], masks[:, 1, 2]], dim=1)
        logits = F.interpolate(logits, size=(self.side, self.side), mode="bilinear")[..., : size[0], : size[1]]
        logits = F.interpolate(logits, size=volume.shape[3:], mode="bilinear")
        return logits.unflatten(0, (len(volume), -1)).transpose(1, 2)

    def prompts(self, labels, count):
        """Random points of each class, in each slice that shows it."""
        flat = labels.flatten(0, 1)
        by = self.side / max(flat.shape[1:])
        points = torch.zeros(len(flat), CLASSES, count, 2)
        said = torch.full((len(flat), CLASSES, count), -10)
        for i, picture in enumerate(flat):
            for k in range(CLASSES):
                where = (picture == k + 1).nonzero().float()
                if len(where):
                    chosen = where[torch.randint(len(where), (count,))]
                    points[i, k], said[i, k] = (chosen.flip(-1) + 0.5) * by, 1
        return points, said


def new_model(way):
    """A model in train mode that gives a loss for a batch of crops, and its trainable parameters."""
    if way == "unet":
        from monai.networks.nets import BasicUNet

        return BasicUNet(spatial_dims=3, in_channels=1, out_channels=CLASSES + 1)
    if way == "slices":
        return Slices()
    from peft import get_peft_model

    from inlay import SpatialAdapterConfig, load_base

    own = {"enlarge": 2, "enlarge_depth": 2, "patch_depth": 8, "depth_rows": 8, "window": 4}
    config = SpatialAdapterConfig(classes=["anterior", "posterior"], kernel=3 if way == "spatial" else 1, **own)
    return get_peft_model(load_base("builtin:sam-tiny"), config)


def loss_of(way, model, batch):
    """Dice and cross-entropy on a batch of crops."""
    from inlay.methods.spatial.sam import dice_cross_entropy

    volume, labels = batch["pixel_values"], batch["labels"]
    if way in ("spatial", "flat"):
        return model(**batch).loss
    if way == "unet":
        return dice_cross_entropy(model(volume), labels)
    chosen = torch.randperm(volume.shape[2])[: 16 // len(volume)].sort().values
    volume, labels = volume[:, :, chosen], labels[:, chosen]
    said = model.prompts(labels, random.randint(1, 3)) if random.random() < 0.5 else (None, None)
    return dice_cross_entropy(model(volume, *said), labels)


def answer(way, model, volume, labels, mode):
    """Label map (D, H, W) of a whole scan under one way of prompting; None where there is none."""
    from inlay.methods.spatial.prompts import clicks_in_objects, clicks_on_errors

    count = int(mode.split()[0]) if mode != "none" else 0
    if way == "unet":
        if count:
            return None
        pad = [(-n) % 16 for n in volume.shape[2:]]
        wide = F.pad(volume, (0, pad[2], 0, pad[1], 0, pad[0]))
        d, h, w = volume.shape[2:]
        return model(wide)[..., :d, :h, :w].argmax(1)[0]
    if way == "slices":
        if "clicks" in mode:
            return None
        said = model.prompts(labels, count) if count else (None, None)
        return model(volume, *said).argmax(1)[0]
    points, said = clicks_in_objects(labels, 1 if "clicks" in mode else max(1, count), CLASSES)
    points, said = (points, said) if count else (points[:, :0], said[:, :0])
    shares = windows(model, volume, points[0], said[0])
    for _ in range(count - CLASSES if "clicks" in mode else 0):
        more, named = clicks_on_errors(shares, labels, 1)
        points, said = torch.cat([points, more], 1), torch.cat([said, named], 1)
        shares = windows(model, volume, points[0], said[0])
    return shares.argmax(1)[0]


def windows(model, volume, points, said):
    """Probabilities (1, 3, D, H, W) as `inlay segment` finds them: in windows, each with the clicks in it."""
    from tqdm import tqdm

    from inlay.tasks.volumes.scan import PADDING
    from inlay.tasks.volumes.windows import ScanPrompts, probabilities, slide

    there = said >= 0
    prompts = ScanPrompts(points[there].float(), said[there], torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))
    lacking = [max(0, side - n) for side, n in zip(CROP, volume.shape[2:], strict=True)]
    pad = [n for n in reversed(lacking) for n in (0, n)]
    image = F.pad(volume[0], pad, value=PADDING)
    shares = torch.zeros(1, CLASSES + 1, *image.shape[1:])
    predict = partial(probabilities, model)
    for first, values in slide(predict, image, CROP, prompts, overlap=0.5, batch_size=4, bar=tqdm(disable=True)):
        shares[0, :, first : first + values.shape[1]] = values
    d, h, w = volume.shape[2:]
    return shares[:, :, :d, :h, :w]


MODES = {
    "none": "no prompt",
    "1 point": "1 point per class",
    "10 points": "10 points per class",
    "10 clicks": "10 clicks on errors",
}


@torch.inference_mode()
def score(way, model, view, seed):
    """Mean Dice over cases and classes for each way of prompting."""
    from inlay.tasks.volumes.scores import dice_of, overlap

    model.eval()
    torch.manual_seed(seed)
    found = {mode: [] for mode in MODES}
    for i in range(len(view)):
        volume, labels = view[i]["pixel_values"][None], view[i]["labels"][None]
        for mode in MODES:
            said = answer(way, model, volume, labels, mode)
            if said is not None:
                found[mode].append(dice_of(overlap(said[None], labels, CLASSES).numpy()).mean())
    return {mode: float(np.mean(values)) for mode, values in found.items() if values}


def cpu_seconds():
    """Of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def run(way, seed, steps, folder):
    """Train and score one model."""
    from inlay.tasks.volumes.data import load_volumes
    from inlay.tasks.volumes.scan import VolumeProcessor
    from inlay.tasks.volumes.view import VolumeView, collate_volumes

    data = load_volumes(str(folder), labels=["anterior", "posterior"])  # the split is the same for all seeds
    processor = VolumeProcessor.fitted(data, CROP)
    view, held_out = VolumeView(data.train, processor, training=True), VolumeView(data.validation, processor)
    torch.manual_seed(seed)
    random.seed(seed)
    model = new_model(way).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATES[way], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * 0.5 * (1 + np.cos(np.pi * step / steps))
    )
    begun, losses = cpu_seconds(), []
    for _ in range(steps):
        batch = collate_volumes([view[random.randrange(len(view))] for _ in range(2)])
        loss = loss_of(way, model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    row = {"train_cpu_s": round(cpu_seconds() - begun, 1), "loss": round(float(np.mean(losses[-20:])), 4)}
    sizes = {"trained": sum(p.numel() for p in trained), "parameters": sum(p.numel() for p in model.parameters())}
    return {**row, **sizes, "dice": score(way, model, held_out, 1000 + seed)}


def table(rows):
    """Markdown: mean Dice on the held-out scans and its standard deviation over the seeds."""
    lines = [
        f"| way | trained | {' | '.join(MODES.values())} | CPU s to train |",
        f"|---|---:|{'---:|' * (len(MODES) + 1)}",
    ]
    for way, title in WAYS.items():
        found = [row for name, row in rows.items() if name.split()[0] == way]
        if not found:
            continue
        cells = []
        for mode in MODES:
            values = [row["dice"][mode] for row in found if mode in row["dice"]]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        seconds = statistics.mean(row["train_cpu_s"] for row in found)
        lines.append(f"| {title} | {found[0]['trained'] / 1e6:.2f} M | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main():
    """All ways and seeds; results are written after each, and kept where they are there already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--out", default="hippocampus")
    args = parser.parse_args()
    folder = SHARED / "hippocampus_msd04" / "dev"
    if not folder.is_dir():
        sys.exit(f"there are no scans at {folder}; see the Medical Segmentation Decathlon, task 4")
    torch.set_num_threads(1)
    path = RESULTS / f"{args.out}.json"
    for seed in args.seeds:
        for way in args.ways:
            result = json.loads(path.read_text()) if path.is_file() else {"rows": {}}
            name = f"{way} {seed}"
            if name in result["rows"]:
                continue
            begun = time.time()
            row = run(way, seed, args.steps, folder)
            result = json.loads(path.read_text()) if path.is_file() else {"rows": {}}  # others may have written
            result["rows"][name] = row
            result |= {"steps": args.steps, "machine": describe_machine("monai")}
            path.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
            path.with_suffix(".md").write_text(table(result["rows"]))
            print(name, row, f"{time.time() - begun:.0f} s", flush=True)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()

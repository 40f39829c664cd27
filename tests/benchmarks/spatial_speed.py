"""CPU time and memory of volumetric SAM beside the published architecture in its plain form, both with random weights.

    python tests/benchmarks/spatial_speed.py [--edge 128] [--rounds 1] [--threads 2]

SAM ViT-B, a crop of edge³ voxels, two classes. Each row is a process of its own, rows take turns:

    plain       3DSAM-adapter as published: 512 slices enlarged, attention with a bias and a mask, its decoder
    reference   the same encoder from `SpatialAdapterConfig(reference=True)`, the folds of this package, our decoder
    default     what this package does by default

Inference is one forward without gradients; the second of `click` is a further click on the encoded volume. A training
step is forward, backward and AdamW; `plain` has its activations checkpointed per block at 128³, as it would need more
than this machine has otherwise. Memory is the peak resident size above that of the loaded model.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "spatial_speed.json"
WAYS = ("plain", "reference", "default")


def new_model(way, edge):
    """A ViT-B SAM with the adapter."""
    import torch
    from peft import get_peft_model
    from transformers import SamConfig, SamModel

    from inlay import SpatialAdapterConfig

    torch.manual_seed(0)
    config = SamConfig(vision_config={"initializer_range": 0.02})
    model = SamModel(config).requires_grad_(False)
    own = SpatialAdapterConfig(classes=["a", "b"], reference=way != "default", rounds=1, depth_rows=edge // 4)
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
        up = [F.interpolate(h(x), scale_factor=2, mode="trilinear") for h, x in zip(self.heads, levels, strict=True)]
        size = up[0].shape[2:]
        x = torch.cat([*up, F.interpolate(volume, size=size, mode="trilinear")], dim=1)
        return F.interpolate(self.last(x), size=volume.shape[2:], mode="trilinear")


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


def run(way, task, edge, threads):
    """One row: seconds of CPU, and bytes."""
    import torch
    from torch.utils.checkpoint import checkpoint

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from inlay.methods.spatial.sam import dice_cross_entropy
    from inlay.train.launch import enable_checkpointing
    from methods import volumes as published

    torch.set_num_threads(threads)
    model, config = new_model(way, edge)
    volume = torch.randn(1, 1, edge, edge, edge)
    labels = (volume[:, 0] > 1).long() + (volume[:, 0] > 2).long()
    encoder = model.get_base_model().vision_encoder
    parts, decoder = encoder.inlay_spatial3d_encoder["default"], PublishedDecoder(2)
    if task == "train" and (way != "plain" or edge > 64):
        enable_checkpointing(model)
        block = published.published_block
        published.published_block = lambda *a, **k: checkpoint(block, *a, use_reentrant=False, **k)

    def plain():
        return decoder(published.published_levels(encoder, parts, config, volume), volume)

    rows = {}
    peak, begun = Peak(), cpu_seconds()
    if task == "train":
        parameters = [p for p in model.parameters() if p.requires_grad] + decoder.parameters()
        optimizer = torch.optim.AdamW(parameters)
        model.train()
        loss = dice_cross_entropy(plain(), labels) if way == "plain" else model(pixel_values=volume, labels=labels).loss
        loss.backward()
        optimizer.step()
    else:
        model.eval()
        point = torch.tensor([[[edge / 2] * 3]])
        with torch.inference_mode():
            output = plain() if way == "plain" else model(pixel_values=volume, input_points=point)
            if way != "plain":
                rows["cpu_s"], begun = cpu_seconds() - begun, cpu_seconds()
                model(image_embeddings=output.image_embeddings, input_points=point, input_masks=output.logits)
                rows["click_cpu_s"] = cpu_seconds() - begun
    rows.setdefault("cpu_s", cpu_seconds() - begun)
    rows["peak_gb"] = peak.stop() / 1e9
    print(json.dumps(rows))


def main():
    """All rows, by turns, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edge", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", default=["infer", "train"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--one", nargs=2, help="internal: way and task")
    args = parser.parse_args()
    if args.one:
        run(*args.one, args.edge, args.threads)
        return
    import torch
    import transformers

    rows = {}
    for _ in range(args.rounds):
        for task in args.tasks:
            for way in args.ways:
                command = [sys.executable, __file__, "--one", way, task, "--edge", str(args.edge)]
                done = subprocess.run([*command, "--threads", str(args.threads)], capture_output=True, text=True)
                if done.returncode:
                    print(f"{task} {way}: failed ({(done.stderr.strip().splitlines() or ['killed'])[-1]})")
                    continue
                rows.setdefault(f"{task} {way}", []).append(json.loads(done.stdout.splitlines()[-1]))
                print(task, way, rows[f"{task} {way}"][-1], flush=True)
    medians = {
        name: {key: round(statistics.median(row[key] for row in found), 3) for key in found[0]}
        for name, found in rows.items()
    }
    result = {
        "edge": args.edge,
        "threads": args.threads,
        "rounds": args.rounds,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": medians,
        "all": rows,
    }
    path = RESULTS.with_stem(f"{RESULTS.stem}_{args.edge}")
    stored = json.loads(path.read_text()) if path.is_file() else {}
    result["rows"] = {**stored.get("rows", {}), **medians}
    result["all"] = {**stored.get("all", {}), **rows}
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(medians, indent=2))


if __name__ == "__main__":
    main()

"""Peak memory of `segment` on a large scan, from a NIfTI file to a NIfTI mask, with a predictor that costs nothing.

    python tests/benchmarks/segment_memory.py                        # 512 x 512 x 600 voxels; minutes, 6 GB of memory
    python tests/benchmarks/segment_memory.py --shape 96 96 120 --crop 32 32 32

Each case runs in a process of its own, whose resident memory is read before and at its highest (getrusage). It is given
in float32 copies of the scan too. The cases: the scan already in memory; the whole way from file to file; the same with
a model's grid of twice the spacing; and MONAI's sliding_window_inference with the scan in memory, for comparison.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from torch import nn

RESULTS = Path(__file__).parent / "results" / "segment_memory.json"
CASES = {
    "memory": "the scan already in memory",
    "file": "from file to file",
    "resampled": "from file to file, at twice the spacing",
    "monai": "MONAI's `sliding_window_inference`, the scan in memory",
}
LABELS = ["bright", "dark"]


class Threshold(nn.Module):
    """Logits of background and two classes from each voxel alone."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(1.0))

    def forward(self, pixel_values: torch.Tensor) -> Any:
        """B 1 d h w to B 3 d h w."""
        return SimpleNamespace(logits=torch.cat([self.level.expand_as(pixel_values), pixel_values, -pixel_values], 1))


def write_scan(path: Path, shape: tuple[int, int, int]) -> None:
    """Smooth noise, 16 bits, in voxels of 0.8 x 0.8 x 1.0 mm; plane by plane, so that it takes no memory."""
    import nibabel

    generator, small = np.random.default_rng(0), tuple(-(-n // 8) for n in shape)
    coarse = generator.normal(0, 300, small).astype(np.int16)
    voxels = np.repeat(np.repeat(np.repeat(coarse, 8, 0), 8, 1), 8, 2)[: shape[0], : shape[1], : shape[2]]
    nibabel.Nifti1Image(voxels, np.diag([-0.8, -0.8, 1.0, 1.0])).to_filename(path)


def peak() -> int:
    """Highest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(case: str, path: Path, shape: tuple[int, int, int], crop: tuple[int, int, int], results: Any) -> None:
    """Run one case, and put what it took into `results`."""
    from monai.inferers import sliding_window_inference

    from inlay import segment
    from inlay.tasks.volumes.scan import Scan, VolumeProcessor

    torch.set_num_threads(1)
    spacing = (2.0, 1.6, 1.6) if case == "resampled" else None
    adapter: Any = SimpleNamespace(
        model=Threshold().eval(), processor=VolumeProcessor(spacing, crop), labels=LABELS, file=None
    )
    scan: Any = path
    before, begun, reading = peak(), time.perf_counter(), None
    if case in ("memory", "monai"):
        image = torch.randn(1, *shape[::-1], generator=torch.Generator().manual_seed(0))
        scan = Scan("scan", image, None, (1.0, 0.8, 0.8), np.diag([-0.8, -0.8, 1.0, 1.0]), shape)
    else:
        adapter.processor.read(path)
        reading = peak() - before
    if case == "monai":
        with torch.inference_mode():
            logits = sliding_window_inference(
                scan.image[None], crop, 1, lambda x: adapter.model(x).logits.softmax(1), 0.5, mode="gaussian"
            )
            logits[0].argmax(0).byte()
    else:
        segment(adapter, scan, progress=False).save(path.with_name(f"{case}.nii.gz"))
    results[case] = {"peak": peak() - before, "reading": reading, "seconds": round(time.perf_counter() - begun, 1)}


def write_table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| way | peak memory, GB | seconds |", "|---|---:|---:|"]
    lines += [
        f"| {title} | {rows[case]['peak'] / 1e9:.1f} | {rows[case]['seconds']:.0f} |" for case, title in CASES.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all cases, print a table, write it for the default shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 600), help="X Y Z")
    parser.add_argument("--crop", type=int, nargs=3, default=(128, 128, 128), help="D H W")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    shape, crop, context = tuple(arguments.shape), tuple(arguments.crop), multiprocessing.get_context("spawn")
    copy = 4 * int(np.prod(shape))
    with tempfile.TemporaryDirectory() as folder, context.Manager() as manager:
        path, results = Path(folder) / "scan.nii.gz", manager.dict()
        write_scan(path, shape)
        for case in arguments.cases:
            process = context.Process(target=measure, args=(case, path, shape, crop, results))
            process.start()
            process.join()
            row = results.get(case) or {"peak": None}
            if row["peak"] is None:
                print(f"{case:10} failed with exit code {process.exitcode}")
                continue
            reading = f", reading alone {row['reading'] / 1e6:,.0f} MB" if row["reading"] else ""
            print(
                f"{case:10} {row['peak'] / 1e6:9,.0f} MB = {row['peak'] / copy:.2f} copies of the scan "
                f"({row['seconds']:.0f} s{reading})",
                flush=True,
            )
        rows = dict(results)
    if set(rows) == set(CASES) and shape == (512, 512, 600):
        found = {"machine": describe_machine("monai"), "shape": shape, "crop": crop, "copy": copy, "cases": rows}
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")
        RESULTS.with_suffix(".md").write_text(write_table(rows))


if __name__ == "__main__":
    main()

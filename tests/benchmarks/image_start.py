"""How long `load_images` takes at the first start, which decodes every image, and at the second, which compares dates.

    python tests/benchmarks/image_start.py --images 4000             # generated JPEGs
    python tests/benchmarks/image_start.py FOLDER                   # class folders of your own

Each start is a process of its own with a cache of its own, so nothing stays in memory between the two.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from machine import describe_machine
from PIL import Image

RESULTS = Path(__file__).parent / "results" / "image_start.json"
START = """
import json, os, sys, time
import datasets
from inlay.tasks.images.data import load_images
begin, used = time.perf_counter(), time.process_time()
data = load_images(sys.argv[1])
print(json.dumps([time.perf_counter() - begin, time.process_time() - used, len(data.train) + len(data.validation)]))
"""


def draw_photos(folder: Path, count: int) -> Path:
    """JPEGs of 500 x 375 pixels, smooth as photos are, in two class folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
        inner = folder / ("cat", "dog")[i % 2]
        inner.mkdir(parents=True, exist_ok=True)
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(inner / f"{i:06}.jpg", quality=90)
    return folder


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=4000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or draw_photos(Path(temporary) / "photos", asked.images)
        environment = {**os.environ, "HF_DATASETS_CACHE": f"{temporary}/cache"}
        starts = []
        for _ in range(2):
            said = subprocess.run(
                [sys.executable, "-c", START, str(folder)], env=environment, capture_output=True, text=True, check=True
            )
            seconds, cpu, count = json.loads(said.stdout.splitlines()[-1])
            starts.append({"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "images": count})
    ratio = starts[0]["cpu_seconds"] / starts[1]["cpu_seconds"]
    found = {"first": starts[0], "second": starts[1], "cpu_ratio": round(ratio, 1)}
    found["machine"] = describe_machine("datasets", "pillow")
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

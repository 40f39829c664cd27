"""What a step costs on a stream of ten thousand to ten million images, and what reading costs next to a plain loader.

    python tests/benchmarks/stream_scale.py [--rounds 3] [--steps 200] [--threads 1]

The shards are .tar files of 10,000 JPEGs. Ten of them are written; a larger set has each of these under many names, so
that what is opened, ordered and read is what ten million images would be, on a disk of 1 GB.

Every size is measured in a process of its own, the sizes in turn, round by round. Time is CPU time of all threads of
that process. Memory is the peak of its resident set, less that of the process before the data is opened.
"""

import argparse
import io
import json
import math
import multiprocessing
import resource
import statistics
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from machine import describe_machine, tell_machine
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from inlay import TrainConfig, fit, head_modules, load_base, load_processor, lora_targets
from inlay.study.report.canvas import GRID, INK, MUTED, Canvas, Line, Point, Text
from inlay.tasks.images.stream import PreparedImage, load_image_stream
from inlay.train.stream import StreamCollate, StreamItems, StreamLoader, StreamSampler

HERE = Path(__file__).parent
RESULTS, FIGURE = HERE / "results", HERE.parents[1] / "docs" / "assets" / "stream_scale.png"
SHARD, WRITTEN = 10_000, 10
COUNTS = (10_000, 100_000, 1_000_000, 10_000_000)
COMPARED = 1_000_000
BATCH, WARM_UP, CLASSES = 32, 32, 10
COLOURS = ("#d55e00", "#0072b2")  # after Okabe & Ito 2008


def write_shards(folder: Path) -> None:
    """Ten shards; no two images are equal, as a JPEG may be followed by anything."""
    generator = np.random.default_rng(0)
    photos = []
    for _ in range(64):
        file = io.BytesIO()
        coarse = Image.fromarray(generator.integers(0, 255, (12, 16, 3), np.uint8))
        coarse.resize((160, 120), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        photos.append(file.getvalue())
    for shard in range(WRITTEN):
        with tarfile.open(folder / f"written-{shard}.tar", "w") as archive:
            for i in range(SHARD):
                number = shard * SHARD + i
                members = {"jpg": photos[number % 64] + number.to_bytes(8, "big"), "cls": b"%d" % (number % CLASSES)}
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"{number:06}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def name_shards(folder: Path, count: int) -> str:
    """A data set of so many images: shards that are links to those written."""
    inner = folder / str(count)
    inner.mkdir(exist_ok=True)
    for shard in range(count // SHARD):
        (inner / f"train-{shard:05}.tar").symlink_to(folder / f"written-{shard % WRITTEN}.tar")
    (inner / "labels.txt").write_text("\n".join(f"class {i}" for i in range(CLASSES)))
    return f"{inner}/train-*.tar"


def measure_stream(name: str, steps: int) -> dict[str, float]:
    """Reading, decoding and batching only."""
    before, used = peak_mb(), time.process_time()
    data = load_image_stream(name)
    start = time.process_time() - used
    stream = prepare(data.train)
    sampler = StreamSampler(stream, BATCH, WARM_UP + steps, 0)
    batches = DataLoader(StreamItems(stream, 0), batch_sampler=sampler, collate_fn=StreamCollate(None))
    cost = time_batches(StreamLoader(batches, sampler, torch.device("cpu")), steps)
    return {"start_cpu_s": start, "read_cpu_ms": cost, "read_mb": peak_mb() - before}


def measure_plain(name: str, steps: int) -> dict[str, float]:
    """The same images by datasets and a DataLoader, with their own shuffle buffer: what one would write by hand."""
    before = peak_mb()
    rows = datasets.load_dataset("webdataset", data_files=name, split="train", streaming=True)
    rows = rows.cast_column("jpg", datasets.Image(decode=False)).shuffle(seed=0, buffer_size=1000)
    item = PreparedImage(load_processor("builtin:vit-tiny"), "crop")

    def collate(found: list[dict[str, Any]]) -> Any:
        return default_collate([item({"image": row["jpg"], "label": row["cls"]}) for row in found])

    cost = time_batches(DataLoader(rows, batch_size=BATCH, collate_fn=collate), steps)
    return {"plain_cpu_ms": cost, "plain_mb": peak_mb() - before}


def measure_fit(name: str, steps: int) -> dict[str, float]:
    """A run of `fit`, without its evaluation: CPU time of a step."""
    data = load_image_stream(name)
    before = peak_mb()
    model = load_base("builtin:vit-tiny", labels=data.labels)
    config = LoraConfig(r=8, target_modules=lora_targets(model), modules_to_save=head_modules(model))
    at: list[float] = []

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        at.append(time.process_time())
        return default_collate(items)

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainConfig(folder, steps=WARM_UP + steps, batch_size=BATCH, workers=0, eval_every=10**6)
        fit(get_peft_model(model, config), prepare(data.train), None, settings, collate=collate)
    return {"fit_cpu_ms": 1000 * (at[-1] - at[WARM_UP]) / (len(at) - 1 - WARM_UP), "fit_mb": peak_mb() - before}


def prepare(stream: Any) -> Any:
    """A stream with the augmentation of the recipes."""
    return replace(stream, prepare=PreparedImage(load_processor("builtin:vit-tiny"), "crop"))


def time_batches(batches: Any, steps: int) -> float:
    """CPU milliseconds of a batch, after those of the warm-up, over whole blocks of rows."""
    for i, _ in enumerate(batches):
        if i == WARM_UP:
            begun = time.process_time()
        if i == WARM_UP + steps - 1:
            break
    return 1000 * (time.process_time() - begun) / (steps - 1)


def peak_mb() -> float:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def run_apart(measure: Any, *arguments: Any) -> dict[str, float]:
    """What a function finds in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def work() -> None:
        there.send(measure(*arguments))

    process = context.Process(target=work)
    process.start()
    there.close()
    found: dict[str, float] = here.recv()
    process.join()
    return found


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    datasets.disable_progress_bars()
    found: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_shards(folder)
        names = {count: name_shards(folder, count) for count in COUNTS}
        for turn in range(asked.rounds):
            for count in COUNTS:
                row = run_apart(measure_stream, names[count], asked.steps)
                row |= run_apart(measure_fit, names[count], asked.steps // 2)
                row |= run_apart(measure_plain, names[count], asked.steps) if count == COMPARED else {}
                found[count].append(row)
                print(turn, count, {key: round(value, 1) for key, value in row.items()}, flush=True)
    report(found, asked)


def report(found: dict[int, list[dict[str, float]]], asked: argparse.Namespace) -> None:
    """The results as JSON, as a table, and as a figure."""
    rows = [
        {"images": count, **{key: summarise([one[key] for one in rounds]) for key in rounds[0]}}
        for count, rounds in found.items()
    ]
    ratios = [one["read_cpu_ms"] / one["plain_cpu_ms"] for one in found[COMPARED]]
    machine = describe_machine("datasets") | {"threads": asked.threads}
    about = {"rounds": asked.rounds, "steps": asked.steps, "batch": BATCH}
    result = {"machine": machine, "about": about, "rows": rows, "stream_to_plain_cpu": summarise(ratios)}
    (RESULTS / "stream_scale.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        "| images | shards | start, CPU s | reading a batch, CPU ms | its memory, MB | step of `fit`, CPU ms |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [show(row[key]) for key in ("start_cpu_s", "read_cpu_ms", "read_mb", "fit_cpu_ms")]
        lines.append(f"| {row['images']:,} | {row['images'] // SHARD:,} | {' | '.join(cells)} |")
    plain = next(row for row in rows if row["images"] == COMPARED)
    ratio = result["stream_to_plain_cpu"]
    lines += [
        "",
        f"A plain loader of datasets and torch with the same shuffle buffer, over {COMPARED:,} images: "
        f"{show(plain['plain_cpu_ms'])} CPU ms a batch and {show(plain['plain_mb'])} MB; the stream takes "
        f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) of its time. Medians and ranges of "
        f"{asked.rounds} rounds, batches of {BATCH} JPEGs of 160 x 120 pixels. {tell_machine(machine)}.",
    ]
    (RESULTS / "stream_scale.md").write_text("\n".join(lines) + "\n")
    draw(rows).save(FIGURE)


def summarise(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def show(value: dict[str, float]) -> str:
    """Median and range in words."""
    return f"{value['median']:.1f} ({value['low']:.1f} to {value['high']:.1f})"


def draw(rows: list[dict[str, Any]]) -> Image.Image:
    """Time and memory by the number of images."""
    top, bottom, panel, gap, left = 120, 420, 380, 140, 90
    canvas = Canvas(left + 2 * panel + gap + 40, 500, "What a step costs by the number of images in the data")
    first, last = (math.log10(count) for count in (COUNTS[0], COUNTS[-1]))
    panels = (
        ("CPU ms of a step", (("fit_cpu_ms", "fit"), ("read_cpu_ms", "reading only"))),
        ("peak memory in MB", (("fit_mb", "fit, the data open"), ("read_mb", "reading only"))),
    )
    for number, (title, series) in enumerate(panels):
        x0 = left + number * (panel + gap)
        largest = max(row[key]["high"] for row in rows for key, _ in series)
        unit = 10 ** math.floor(math.log10(largest))
        end = math.ceil(largest / unit) * unit

        def place(count: int, value: float, x0: int = x0, end: float = end) -> Point:
            at = (math.log10(count) - first) / (last - first)
            return x0 + at * panel, bottom - value / end * (bottom - top)

        canvas.add(Text((x0 - 50, 34), title, 22, bold=True))
        for share in (0, 0.5, 1):
            start = place(COUNTS[0], share * end)
            canvas.add(Line([start, place(COUNTS[-1], share * end)], GRID, 1.5))
            canvas.add(Text((start[0] - 12, start[1]), f"{share * end:g}", 15, INK, "end"))
        for count in COUNTS:
            canvas.add(Text((place(count, 0)[0], bottom + 22), f"{count:,}", 15, INK, "middle"))
        canvas.add(Text((x0 + panel / 2, bottom + 52), "images", 17, INK, "middle"))
        x = x0 - 50.0
        for (key, name), colour in zip(series, COLOURS, strict=False):
            canvas.add(Line([(x, 70), (x + 28, 70)], colour, 4), Text((x + 36, 70), name, 17, MUTED))
            x += 220
            canvas.add(Line([place(row["images"], row[key]["median"]) for row in rows], colour, 3))
            for row in rows:
                canvas.add(Line([place(row["images"], row[key][side]) for side in ("low", "high")], colour, 2))
    return canvas.to_image()


if __name__ == "__main__":
    main()

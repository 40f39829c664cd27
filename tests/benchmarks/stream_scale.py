"""What a step costs on a stream of ten thousand to ten million images, and what reading costs next to a plain loader.

    python tests/benchmarks/stream_scale.py [--rounds 3] [--steps 32] [--threads 1]

The shards are .tar files of 10,000 JPEGs. Ten of them are written; a larger set has each of these under many names, so
that what is opened, ordered and read is what ten million images would be, on a disk of 1 GB.

Time is CPU time of all threads of one process, in which the sizes and the plain loader take turns, window by window: a
window is `steps` steps, each a batch that is read, decoded and augmented, and forward, backward and update of a LoRA.
Memory is the peak of the resident set of a process of its own, less that
before the data is opened.
"""

import argparse
import io
import json
import multiprocessing
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
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

from inlay import head_modules, load_base, load_processor, lora_targets
from inlay.tasks.canvas import GRID, INK, MUTED, Canvas, Line, Point, Text
from inlay.tasks.images.stream import PreparedImage, load_image_stream
from inlay.train.stream import StreamCollate, StreamItems, StreamLoader, StreamSampler

HERE = Path(__file__).parent
RESULTS, FIGURE = HERE / "results", HERE.parents[1] / "docs" / "assets" / "stream_scale.png"
SHARD, WRITTEN = 10_000, 10
COUNTS = (10_000, 100_000, 1_000_000, 10_000_000)
COMPARED = 1_000_000
PLAIN = "plain"
BATCH, CLASSES = 32, 10
COLOURS = ("#d55e00", "#0072b2")  # after Okabe & Ito 2008

Batches = Iterator[dict[str, torch.Tensor]]


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
    inner.mkdir()
    for shard in range(count // SHARD):
        (inner / f"train-{shard:05}.tar").symlink_to(folder / f"written-{shard % WRITTEN}.tar")
    (inner / "labels.txt").write_text("\n".join(f"class {i}" for i in range(CLASSES)))
    return f"{inner}/train-*.tar"


def open_stream(name: str) -> Batches:
    """Batches as `fit` reads them, with the augmentation of the recipes."""
    stream = replace(load_image_stream(name).train, prepare=PreparedImage(load_processor("builtin:vit-tiny"), "crop"))
    sampler = StreamSampler(stream, BATCH, 10**6, 0)
    batches = DataLoader(StreamItems(stream, 0), batch_sampler=sampler, collate_fn=StreamCollate(None))
    return iter(StreamLoader(batches, sampler))


def open_plain(name: str) -> Batches:
    """The same by datasets and a DataLoader, with their own shuffle buffer: what one would write by hand."""
    rows = datasets.load_dataset("webdataset", data_files=name, split="train", streaming=True)
    rows = rows.cast_column("jpg", datasets.Image(decode=False)).shuffle(seed=0, buffer_size=1000)
    prepare = PreparedImage(load_processor("builtin:vit-tiny"), "crop")

    def collate(found: list[dict[str, Any]]) -> Any:
        return default_collate([prepare({"image": row["jpg"], "label": row["cls"]}) for row in found])

    return iter(DataLoader(rows, batch_size=BATCH, collate_fn=collate))


class Steps:
    """Steps of a LoRA on a tiny ViT."""

    def __init__(self) -> None:
        base = load_base("builtin:vit-tiny", labels=[f"class {i}" for i in range(CLASSES)])
        config = LoraConfig(r=8, target_modules=lora_targets(base), modules_to_save=head_modules(base))
        self.model = get_peft_model(base, config).train()
        self.optimizer = torch.optim.AdamW(p for p in self.model.parameters() if p.requires_grad)

    def take(self, batch: dict[str, torch.Tensor]) -> None:
        """One of them."""
        self.model(**batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def time_window(batches: Batches, steps: int, model: Steps) -> dict[str, float]:
    """CPU milliseconds of a step, and of fetching its batch."""
    reading, begun = 0.0, time.process_time()
    for _ in range(steps):
        at = time.process_time()
        batch = next(batches)
        reading += time.process_time() - at
        model.take(batch)
    return {"step_ms": 1000 * (time.process_time() - begun) / steps, "read_ms": 1000 * reading / steps}


def measure_memory(name: str, steps: int) -> dict[str, float]:
    """Peak of a process that opens a stream and reads, and the CPU time until it is open."""
    before, begun = peak_mb(), time.process_time()
    batches = open_stream(name)
    opened = time.process_time() - begun
    for _ in range(2 * steps):
        next(batches)
    return {"open_s": opened, "memory_mb": peak_mb() - before}


def peak_mb() -> float:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def run_apart(measure: Any, *arguments: Any) -> dict[str, float]:
    """What a function finds in a process of its own."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=lambda: there.send(measure(*arguments)))
    process.start()
    there.close()
    found: dict[str, float] = here.recv()
    process.join()
    return found


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_shards(folder)
        names = {str(count): name_shards(folder, count) for count in COUNTS}
        memory = {count: run_apart(measure_memory, name, asked.steps) for count, name in names.items()}
        print(json.dumps(memory), flush=True)
        opened = {count: open_stream(name) for count, name in names.items()}
        opened[PLAIN] = open_plain(names[str(COMPARED)])
        windows: dict[str, list[dict[str, float]]] = {name: [] for name in opened}
        model = Steps()
        for turn in range(asked.rounds + 1):
            for name, batches in opened.items():
                found = time_window(batches, asked.steps, model)
                print(turn, name, {key: round(value, 1) for key, value in found.items()}, flush=True)
                if turn:  # the first fills buffers
                    windows[name].append(found)
    report(memory, windows, asked)


def report(
    memory: dict[str, dict[str, float]], windows: dict[str, list[dict[str, float]]], asked: argparse.Namespace
) -> None:
    """The results as JSON, as a table, and as a figure."""
    machine = describe_machine("datasets") | {"threads": asked.threads}
    costs = {
        name: {key: summarise([window[key] for window in found]) for key in ("step_ms", "read_ms")}
        for name, found in windows.items()
    }
    pairs = {key: zip(windows[str(COMPARED)], windows[PLAIN], strict=True) for key in ("step_ms", "read_ms")}
    ratios = {key: summarise([own[key] / plain[key] for own, plain in found]) for key, found in pairs.items()}
    rows = [{"images": count, **memory[str(count)], **costs[str(count)]} for count in COUNTS]
    about = {"rounds": asked.rounds, "steps": asked.steps, "batch": BATCH}
    result = {"machine": machine, "about": about, "rows": rows, "plain": costs[PLAIN], "ratio_to_plain": ratios}
    (RESULTS / "stream_scale.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        "| images | shards | step, CPU ms | of which fetching the batch | peak memory, MB | opening the data, CPU s |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['images']:,} | {row['images'] // SHARD:,} | {show(row['step_ms'])} | {show(row['read_ms'])} | "
            f"{row['memory_mb']:.0f} | {row['open_s']:.1f} |"
        )
    lines += [
        f"| {COMPARED:,}, plain loader | {COMPARED // SHARD:,} | {show(costs[PLAIN]['step_ms'])} | "
        f"{show(costs[PLAIN]['read_ms'])} | | |",
        "",
        f"Next to the plain loader of datasets and torch, with the same shuffle buffer, a step takes "
        f"{show(ratios['step_ms'], 2)} of the time. The thread of a stream reads while the model computes, too, which "
        f"counts to the step and not to fetching. Medians and ranges of {asked.rounds} windows of {asked.steps} steps; "
        f"batches of {BATCH} JPEGs of 160 x 120 pixels. {tell_machine(machine)}.",
    ]
    (RESULTS / "stream_scale.md").write_text("\n".join(lines) + "\n")
    FIGURE.parent.mkdir(exist_ok=True)
    draw(rows).save(FIGURE)


def summarise(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def show(value: dict[str, float], digits: int = 1) -> str:
    """Median and range in words."""
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


def draw(rows: list[dict[str, Any]]) -> Image.Image:
    """Time and memory by the number of images."""
    top, bottom, panel, gap, left = 110, 400, 380, 130, 90
    canvas = Canvas(left + 2 * panel + gap + 50, 480, "What a step costs by the number of images in the data")
    panels: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
        ("CPU ms of a step of 32 images", (("step_ms", "step"), ("read_ms", "of which fetching the batch"))),
        ("peak memory of the stream, MB", (("memory_mb", "stream"),)),
    )
    for number, (title, series) in enumerate(panels):
        x0 = left + number * (panel + gap)
        spans = {
            key: [row[key] if isinstance(row[key], dict) else summarise([row[key]]) for row in rows]
            for key, _ in series
        }
        largest = max(span["high"] for found in spans.values() for span in found)
        end = next(e for e in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if e >= largest)

        def place(column: int, value: float, x0: int = x0, end: int = end) -> Point:
            return x0 + column / (len(rows) - 1) * panel, bottom - value / end * (bottom - top)

        canvas.add(Text((x0 - 50, 30), title, 20, bold=True))
        for share in (0, 0.5, 1):
            start = place(0, share * end)
            canvas.add(Line([start, place(len(rows) - 1, share * end)], GRID, 1.5))
            canvas.add(Text((start[0] - 12, start[1]), f"{share * end:g}", 15, INK, "end"))
        for column, row in enumerate(rows):
            canvas.add(Text((place(column, 0)[0], bottom + 22), f"{row['images']:,}", 15, INK, "middle"))
        canvas.add(Text((x0 + panel / 2, bottom + 52), "images in the data", 16, INK, "middle"))
        x = x0 - 50.0
        for (key, name), colour in zip(series, COLOURS, strict=False):
            canvas.add(Line([(x, 66), (x + 28, 66)], colour, 4), Text((x + 36, 66), name, 16, MUTED))
            x += 130
            canvas.add(Line([place(column, span["median"]) for column, span in enumerate(spans[key])], colour, 3))
            for column, span in enumerate(spans[key]):
                canvas.add(Line([place(column, span["low"]), place(column, span["high"])], colour, 2))
    return canvas.to_image()


if __name__ == "__main__":
    main()

"""What a GPU makes of training, memory, volumes, a bank and images, next to other ways, in twice under ten minutes.

    python tests/benchmarks/gpu.py                   # parts of training; results in results/gpu.{json,md}
    python tests/benchmarks/gpu.py --parts use       # the other parts, into the same files
    python tests/benchmarks/gpu.py --parts memory volumes --out FOLDER
    python tests/benchmarks/gpu.py --smoke           # every part in tiny sizes on the CPU, where there is no GPU

    training
    fit         steps per second of `fit`, transformers.Trainer and a bare loop: LoRA of rank 8 on a ViT-B/16 and on a
                GPT-2, with TF32 and in bfloat16
    memory      LoRA on a random Llama of 1 billion parameters in bfloat16, in 8 and in 4 bits (NF4): the peak that
                `plan_memory` predicts, the peak of torch's allocator, steps per second
    syncs       how often a step waits for the GPU, by torch's sync debug mode and by the profiler
    attention   training steps with each implementation of attention
    shards      FSDP2 with one process, and with two on the same GPU where a backend allows that
    compile     the part `fit` in bfloat16, each loop with its own setting for torch.compile

    use
    volumes     training step and inference of the 3D adapter on SAM ViT-B, 128 voxels a side, next to the published
                architecture
    bank        a batch whose rows have different adapters: bank, peft, separate batches
    serve       `inlay serve` under many clients, each with an adapter of its own: in batches and one by one
    images      JPEGs from disk to the GPU, images per second, and how many a training takes

Each part is a process of its own with a limit of time. Its rows are stored as they come, and the same command goes on
with the parts that are not whole. A row that fails holds the reason. Ways take turns, round by round; times are those
of CUDA events, after a warm-up; figures are medians, and ratios those within a round, with their range.
"""

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

from inlay.files.atomic import write_json

RESULTS = Path(__file__).parent / "results"
SECONDS = 570  # of all parts together
SEED, RATE = 0, 1e-3
Row = dict[str, Any]
Ways = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Size:
    """How much is measured: in full, or for a trial of the code on a CPU."""

    device: str = "cuda"
    rounds: int = 2
    steps: int = 30
    warmup: int = 8
    workers: int = 4
    vit: tuple[int, int, int, int] = (768, 12, 224, 64)  # width, blocks, pixels a side, images in a batch
    gpt2: tuple[int, int, int, int] = (768, 12, 512, 16)  # width, blocks, tokens, texts in a batch
    llama: tuple[int, int, int, int] = (2048, 16, 512, 8)
    vocabulary: int = 32_000
    edge: int = 128
    sam: tuple[tuple[str, int], ...] = ()  # settings of SAM's encoder; none: those of ViT-B
    bank: tuple[str, int, int, tuple[int, ...]] = ("base", 12, 64, (1, 4, 16, 64))  # size, blocks, rows, adapters
    images: int = 1024
    loaders: tuple[int, ...] = (0, 2, 4, 8, 16)


TRIAL = Size(
    device="cpu",
    rounds=1,
    steps=4,
    warmup=1,
    workers=0,
    vit=(32, 2, 32, 4),
    gpt2=(32, 2, 16, 4),
    llama=(64, 2, 16, 2),
    vocabulary=256,
    edge=32,
    sam=(("hidden_size", 48), ("num_attention_heads", 4), ("mlp_dim", 64)),
    bank=("tiny", 2, 4, (1, 4)),
    images=8,
    loaders=(0, 1),
)


# ---- models, batches and time


def build_vit(size: Size, **more: Any) -> tuple[Any, dict[str, Any]]:
    """A ViT with random weights and LoRA, on the CPU, and 2 batches."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    width, blocks, side, rows = size.vit
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=max(1, width // 64),
        image_size=side,
        patch_size=16,
        num_labels=10,
    )
    torch.manual_seed(SEED)
    model = add_lora(ViTForImageClassification._from_config(config, **more))
    return model, {"pixel_values": torch.randn(2 * rows, 3, side, side), "labels": torch.arange(2 * rows) % 10}


def build_gpt2(size: Size, **more: Any) -> tuple[Any, dict[str, Any]]:
    """A GPT-2 with random weights and LoRA, on the CPU, and 2 batches."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    width, blocks, tokens, rows = size.gpt2
    config = GPT2Config(
        vocab_size=size.vocabulary,
        n_positions=tokens,
        n_embd=width,
        n_layer=blocks,
        n_head=max(1, width // 64),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    torch.manual_seed(SEED)
    model = add_lora(GPT2LMHeadModel._from_config(config, **more))
    text = torch.randint(size.vocabulary, (2 * rows, tokens))
    return model, {"input_ids": text, "labels": text.clone()}


MODELS = {"ViT-B/16": build_vit, "GPT-2": build_gpt2}


def add_lora(model: Any) -> Any:
    """LoRA of rank 8 on all linear layers."""
    from peft import LoraConfig, get_peft_model

    from inlay.bases.sites import lora_targets

    model.requires_grad_(False)
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=lora_targets(model)))


def take_rows(batch: dict[str, Any], count: int, device: str) -> dict[str, Any]:
    """The first rows, on the device."""
    return {key: value[:count].to(device) for key, value in batch.items()}


class StepClock:
    """When the optimiser steps of a block ended, on the device's own clock, without waiting for the device."""

    def __init__(self, device: str) -> None:
        self.device, self.marks = device, []

    def __enter__(self) -> "StepClock":
        from torch.optim.optimizer import register_optimizer_step_post_hook

        self.hook = register_optimizer_step_post_hook(lambda *_: self.marks.append(mark_time(self.device)))
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()

    def steps_per_second(self, warmup: int) -> float:
        """Of the steps after the first ones."""
        return (len(self.marks) - warmup) / seconds_between(self.marks[warmup - 1], self.marks[-1])


def mark_time(device: str) -> Any:
    """A CUDA event in the stream of work, or the time."""
    import torch

    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Any, end: Any) -> float:
    """Of two marks; waits for the later one."""
    if isinstance(begin, float):
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def take_turns(ways: Ways, size: Size, calls: int = 1) -> dict[str, list[float]]:
    """Seconds of a call of each way, round by round in a rotating order, after one call that is not timed."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for call in ways.values():
        call()
    for i in range(max(size.rounds, 1 if size.device == "cpu" else 5)):
        for name in order[i % len(order) :] + order[: i % len(order)]:
            begin = mark_time(size.device)
            for _ in range(calls):
                ways[name]()
            taken[name].append(seconds_between(begin, mark_time(size.device)) / calls)
    return taken


def give_ratios(name: str, values: list[float], others: list[float]) -> Row:
    """The median ratio within a round, and its range."""
    ratios = sorted(a / b for a, b in zip(values, others, strict=True))
    return {name: round(statistics.median(ratios), 4), f"{name}, range": [round(ratios[0], 4), round(ratios[-1], 4)]}


def measure_memory(device: str, call: Callable[[], Any]) -> float | None:
    """The peak of torch's allocator in a call, weights included, in GB; None on a CPU."""
    import torch

    if device == "cpu":
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round(torch.cuda.max_memory_allocated() / 1e9, 3)


def measure(row: Row, call: Callable[[], Row]) -> Row:
    """The row with what is found, or with the reason why nothing is; what the call held is freed."""
    import torch

    try:
        return row | call()
    except Exception as error:
        return row | {"failed": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"}
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def autocast(size: Size, precision: str) -> Any:
    """What accelerate and Trainer do for bf16."""
    import torch

    return torch.autocast(size.device, torch.bfloat16) if precision == "bf16" else nullcontext()


# ---- fit, a bare loop and Trainer


class Examples:
    """A data set that repeats the rows of some batches, so that a loop is timed and not a decoder."""

    def __init__(self, batches: dict[str, Any], count: int) -> None:
        self.batches, self.count, self.rows = batches, count, len(batches["labels"])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: value[index % self.rows] for key, value in self.batches.items()}


@dataclass(frozen=True)
class Training:
    """What the three loops have in common."""

    batch: int
    steps: int
    precision: str  # TF32 or bf16
    compiled: bool = False


def train_bare(model: Any, examples: Any, training: Training, size: Size) -> float:
    """The loop that one would write by hand, which reads its loss once, at the end."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import get_scheduler

    from inlay.train.sampler import SeededDataset, SeededSampler

    model.to(size.device).train()
    if training.compiled:
        model.compile()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    scheduler = get_scheduler("cosine", optimizer, round(0.1 * training.steps), training.steps)
    loader = DataLoader(
        SeededDataset(examples, SEED),
        batch_sampler=SeededSampler(len(examples), training.batch, training.steps, SEED),
        num_workers=size.workers,
        pin_memory=size.device == "cuda",
    )
    for item in loader:
        inputs = {key: value.to(size.device, non_blocking=True) for key, value in item.items()}
        with autocast(size, training.precision):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return loss.item()


def train_by_fit(model: Any, examples: Any, training: Training, size: Size) -> float:
    """`fit` at its defaults."""
    from inlay import TrainConfig, fit

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            output_dir=f"{folder}/run",
            epochs=training.steps * training.batch / len(examples),
            batch_size=training.batch,
            learning_rate=RATE,
            precision="bf16" if training.precision == "bf16" else "no",
            compile=training.compiled,
            eval_every=training.steps,
            seed=SEED,
            workers=size.workers,
        )
        fit(model, examples, None, config)
        lines = (Path(folder) / "run" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines][-1]


def train_by_trainer(model: Any, examples: Any, training: Training, size: Size) -> float:
    """`transformers.Trainer` with the same settings, which logs every tenth step."""
    from transformers import Trainer, TrainingArguments, trainer_callback

    # its arguments write variables that accelerate would read in the next run
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ):
        arguments = TrainingArguments(
            folder,
            max_steps=training.steps,
            per_device_train_batch_size=training.batch,
            learning_rate=RATE,
            weight_decay=0.0,
            lr_scheduler_type="cosine",
            warmup_steps=round(0.1 * training.steps),
            max_grad_norm=1.0,
            bf16=training.precision == "bf16",
            torch_compile=training.compiled,
            save_strategy="no",
            report_to="none",
            logging_steps=10,
            disable_tqdm=True,
            dataloader_num_workers=size.workers,
            use_cpu=size.device == "cpu",
            seed=SEED,
        )
        run = Trainer(model=model, args=arguments, train_dataset=examples)
        run.pop_callback(trainer_callback.PrinterCallback)
        return run.train().training_loss


LOOPS = {"bare": train_bare, "fit": train_by_fit, "Trainer": train_by_trainer}


def run_loop(loop: str, name: str, precision: str, size: Size, steps: int, compiled: bool = False) -> tuple[Any, float]:
    """The clock and the last loss of a run on a new model."""
    model, batches = MODELS[name](size)
    rows = len(batches["labels"]) // 2
    training = Training(rows, steps, precision, compiled)
    with StepClock(size.device) as clock:
        loss = LOOPS[loop](model, Examples(batches, rows * steps), training, size)
    return clock, loss


def compare_loops(name: str, precision: str, size: Size, rounds: int, compiled: bool = False) -> Row:
    """Steps per second of the three loops, in turn."""
    speeds: dict[str, list[float]] = {loop: [] for loop in LOOPS}
    losses = {}
    order = list(LOOPS)
    for i in range(rounds):
        for loop in order[i % 3 :] + order[: i % 3]:
            clock, losses[loop] = run_loop(loop, name, precision, size, size.warmup + size.steps, compiled)
            speeds[loop].append(clock.steps_per_second(size.warmup))
    row: Row = {f"{loop}, steps/s": round(statistics.median(values), 2) for loop, values in speeds.items()}
    for other in ("bare", "Trainer"):
        row |= give_ratios(f"fit / {other}", speeds["fit"], speeds[other])
    return row | {"difference of last losses, fit and bare": abs(losses["fit"] - losses["bare"])}


def part_fit(size: Size) -> Iterator[Row]:
    for name in MODELS:
        for precision in ("TF32", "bf16"):
            row = {"model": name, "precision": precision}
            yield measure(row, lambda name=name, p=precision: compare_loops(name, p, size, size.rounds))


def part_compile(size: Size) -> Iterator[Row]:
    for name in reversed(MODELS):
        row = {"model": name, "precision": "bf16", "rounds": 1}
        yield measure(row, lambda name=name: compare_loops(name, "bf16", size, 1, compiled=True))


# ---- memory


def save_llama(folder: Path, size: Size) -> Path:
    """A Llama with random weights in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    width, blocks, tokens, _ = size.llama
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=blocks,
        num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 256),
        max_position_embeddings=tokens,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(SEED)
    with torch.device(size.device):
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def train_llama(folder: Path, quantize: str | None, checkpointing: bool, size: Size) -> Row:
    """Predicted peak, measured peak of the same step, and peak and speed of `fit`."""
    import torch

    from inlay import TrainConfig, fit, load_base
    from inlay.measure.memory import measure_peak, plan_memory, step_options

    _, _, tokens, rows = size.llama
    model = add_lora(load_base(folder, dtype="bfloat16", quantize=quantize, device=size.device))
    text = torch.randint(size.vocabulary, (rows, tokens))
    batch = {"input_ids": text, "attention_mask": torch.ones_like(text), "labels": text.clone()}
    steps = size.warmup + size.steps // 2
    with tempfile.TemporaryDirectory() as run:
        config = TrainConfig(
            output_dir=f"{run}/run",
            epochs=steps,
            batch_size=rows,
            learning_rate=RATE,
            precision="bf16",
            gradient_checkpointing=checkpointing,
            eval_every=steps,
            workers=0,
        )
        begun = time.perf_counter()
        planned = plan_memory(model, batch, **step_options(config)).peak
        row: Row = {"predicted, GB": round(planned / 1e9, 4), "planning, s": round(time.perf_counter() - begun, 2)}
        peak = measure_peak(model, batch, **step_options(config))
        row |= {"measured, GB": round(peak / 1e9, 4), "predicted / measured": round(planned / peak, 4)}
        with StepClock(size.device) as clock:
            allocated = measure_memory(size.device, lambda: fit(model, Examples(batch, rows), None, config))
        speed = clock.steps_per_second(size.warmup)
    return row | {"in fit, GB": allocated, "steps/s": round(speed, 2), "tokens/s": round(speed * rows * tokens)}


def part_memory(size: Size) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as where:
        folder = save_llama(Path(where) / "llama", size)
        for bits, checkpointing in ((None, False), ("8bit", False), ("4bit", False), (None, True), ("4bit", True)):
            row = {"base": bits or "bfloat16", "gradient checkpointing": checkpointing}
            yield measure(row, lambda b=bits, c=checkpointing: train_llama(folder, b, c, size))


# ---- volumes


def prepare_volumes(way: str, task: str, precision: str, size: Size) -> Callable[[], Any]:
    """A training step, or an inference, of the published architecture (`plain`) or of ours (`default`)."""
    import torch
    from spatial_speed import new_model, recompute

    model = new_model(way, size.edge, **dict(size.sam)).to(size.device)
    volume = torch.randn(1, 1, size.edge, size.edge, size.edge, device=size.device)
    if task == "inference":
        model.eval()
        if way != "plain" and precision == "bf16":  # as `--dtype bfloat16`
            model.to(torch.bfloat16)
        inputs = {"pixel_values": volume.to(next(model.parameters()).dtype)}
        if way != "plain":
            inputs["input_points"] = torch.full((1, 1, 3), size.edge / 2, device=size.device)
        return torch.inference_mode()(lambda: model(**inputs))
    model.train()
    recompute(model, way)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    batch = {"pixel_values": volume, "labels": (volume[:, 0] > 1).long() + (volume[:, 0] > 2).long()}

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_volumes(way: str, task: str, precision: str, size: Size) -> Row:
    """Milliseconds and memory of one architecture; each has the GPU for itself, so that its peak is its own."""
    call = prepare_volumes(way, task, precision, size)
    converted = task == "inference" and way != "plain"

    def run() -> None:
        with autocast(size, "TF32" if converted else precision):
            call()

    memory = measure_memory(size.device, run)
    times = take_turns({way: run}, size)[way]
    low, high = min(times), max(times)
    return {
        "ms": round(1e3 * statistics.median(times), 2),
        "range": [round(1e3 * low, 2), round(1e3 * high, 2)],
        "peak, GB": memory,
    }


def part_volumes(size: Size) -> Iterator[Row]:
    titles = {"plain": "published", "default": "inlay"}
    for task in ("inference", "training"):
        for precision in ("TF32", "bf16"):
            for way, title in titles.items():
                row = {"task": task, "precision": precision, "architecture": title, "edge": size.edge}
                yield measure(row, lambda w=way, t=task, p=precision: time_volumes(w, t, p, size))


# ---- bank


def part_bank(size: Size) -> Iterator[Row]:
    import bank
    import torch

    kind, blocks, rows, counts = size.bank
    with tempfile.TemporaryDirectory() as where:
        base = bank.make_base(Path(where) / "base", kind, blocks)
        folder = bank.make_adapters(base, "lora", Path(where) / "lora", max(counts))
        side = bank.SIZES[kind]["image_size"]
        batch = {"pixel_values": torch.randn(rows, 3, side, side, device=size.device)}
        ways, _ = bank.make_ways(base, folder, batch, counts)
        with torch.inference_mode():
            taken = take_turns(ways, size)
    plain = taken.pop("plain")
    yield {"way": "plain", "blocks": blocks, "rows": rows, "ms": round(1e3 * statistics.median(plain), 2)}
    for name, times in taken.items():
        way, _, count = name.partition(" ")
        row = {"way": way, "adapters": int(count or 1), "ms": round(1e3 * statistics.median(times), 2)}
        yield row | give_ratios("to the plain base", times, plain)


# ---- the server


def load_server(base: Path, folder: Path, options: tuple[str, ...], size: Size) -> Row:
    """What a server does under as many clients as a batch of the part `bank` has rows."""
    import bank
    from server_process import serve

    from inlay.serve.load import run_load
    from inlay.serve.load_config import LoadConfig

    kind, _, clients, counts = size.bank
    settings = {"kind": "image", "side": bank.SIZES[kind]["image_size"], "clients": clients}
    config = LoadConfig(**settings, requests=16 * clients, warm_up=2 * clients)
    with serve(str(base), [folder], *options) as server:
        (found,) = run_load(server.url, config, [str(i) for i in range(max(counts))])["loads"]
    latencies = {f"{p}, ms": round(found["latency_ms"][p], 2) for p in ("p50", "p99")}
    return {"requests/s": round(found["per_second"], 1), **latencies, "statuses": json.dumps(found["statuses"])}


def part_serve(size: Size) -> Iterator[Row]:
    import bank

    kind, blocks, clients, counts = size.bank
    with tempfile.TemporaryDirectory() as where:
        base = bank.make_base(Path(where) / "base", kind, blocks)
        folder = bank.make_adapters(base, "lora", Path(where) / "lora", max(counts))
        for dtype, way in (("bfloat16", "in batches"), ("bfloat16", "one by one"), ("float32", "in batches")):
            options = ("--dtype", dtype, *(("--max-batch", "1") if way == "one by one" else ()))
            row = {"way": way, "dtype": dtype, "adapters": max(counts), "clients": clients}
            yield measure(row, lambda o=options: load_server(base, folder, o, size))


# ---- images


def deliver_images(view: Any, workers: int, size: Size) -> float:
    """Images per second from the files to the device, once what the workers had prepared at the start is used up."""
    import torch
    from torch.utils.data import DataLoader

    from inlay.train.sampler import SeededDataset, SeededSampler

    batch = min(size.vit[3], len(view) // 2)
    prepared, timed = 2 * workers + 1, max(8, 4 * workers)
    order = SeededSampler(len(view), batch, prepared + timed, SEED)
    data = SeededDataset(view, SEED)
    loader = DataLoader(data, batch_sampler=order, num_workers=workers, pin_memory=size.device == "cuda")
    begun = 0.0
    for i, item in enumerate(loader, 1):
        item["pixel_values"].to(size.device, non_blocking=True)
        if i == prepared:
            begun = time.perf_counter()
    if size.device == "cuda":
        torch.cuda.synchronize()
    return timed * batch / (time.perf_counter() - begun)


def part_images(size: Size) -> Iterator[Row]:
    from image_start import draw_photos
    from transformers import ViTImageProcessorPil

    from inlay import ImageView, load_images

    _, _, side, batch = size.vit
    steps = size.warmup + size.steps

    def need() -> Row:
        clock, _ = run_loop("bare", "ViT-B/16", "bf16", size, steps)
        return {"images/s": round(clock.steps_per_second(size.warmup) * batch, 1)}

    yield measure({"way": "needed by a bare loop in bf16, ViT-B/16, LoRA"}, need)
    with tempfile.TemporaryDirectory() as where:
        os.environ["HF_DATASETS_CACHE"] = f"{where}/cache"
        data = load_images(str(draw_photos(Path(where) / "photos", size.images)))
        view = ImageView(data.train, ViTImageProcessorPil(size={"height": side, "width": side}), "crop-flip")
        for workers in size.loaders:
            row = {"way": "delivered, crop-flip", "workers": workers, "cores": os.cpu_count()}
            yield measure(row, lambda w=workers: {"images/s": round(deliver_images(view, w, size), 1)})

        def train_from_files() -> Row:
            model, _ = build_vit(size)
            with StepClock(size.device) as clock:
                train_by_fit(model, view, Training(batch, steps, "bf16"), size)
            return {"images/s": round(clock.steps_per_second(size.warmup) * batch, 1)}

        yield measure({"way": "fit in bf16 from the files", "workers": size.workers}, train_from_files)


# ---- host synchronisations


def count_syncs(loop: str, steps: int, size: Size) -> dict[str, int]:
    """Of a whole run: warnings of torch's sync debug mode, and the calls that the profiler saw."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    named = ("aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize")
    gpu = size.device == "cuda"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if gpu:
            torch.cuda.set_sync_debug_mode("warn")
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
            run_loop(loop, "GPT-2", "bf16", size, steps)
        if gpu:
            torch.cuda.set_sync_debug_mode("default")
    counts = {event.key: event.count for event in profiler.key_averages() if event.key in named}
    warned = sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)
    return {"sync debug mode": warned} | {name: counts.get(name, 0) for name in named}


def part_syncs(size: Size) -> Iterator[Row]:
    few, many = (10, 20) if size.device == "cuda" else (2, 4)

    def per_step(loop: str) -> Row:
        short, long = (count_syncs(loop, steps, size) for steps in (few, many))
        return {f"{name}, a step": round((long[name] - short[name]) / (many - few), 3) for name in long}

    count_syncs("bare", few, size)  # what happens once in a process
    for loop in LOOPS:
        yield measure({"loop": loop}, lambda loop=loop: per_step(loop))


# ---- attention


def part_attention(size: Size) -> Iterator[Row]:
    import torch

    def time_steps(name: str, attention: str) -> Row:
        model, batches = MODELS[name](size, attn_implementation=attention)
        model.to(size.device).train()
        batch = take_rows(batches, len(batches["labels"]) // 2, size.device)

        def step() -> None:
            with torch.autocast(size.device, torch.bfloat16):
                loss = model(**batch).loss
            loss.backward()
            model.zero_grad()

        memory = measure_memory(size.device, step)
        times = take_turns({attention: step}, size, calls=5)[attention]
        return {"ms": round(1e3 * statistics.median(times), 2), "peak, GB": memory}

    for name in MODELS:
        for attention in ("eager", "sdpa", "flash_attention_2"):
            yield measure({"model": name, "attention": attention}, lambda n=name, a=attention: time_steps(n, a))


# ---- shards


def train_shards(rank: int, world: int, backend: str, where: str, size: Size) -> None:
    """One process of a training under FSDP2; the first one writes what it found."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    address = f"file://{where}/store"
    dist.init_process_group(backend, address, timedelta(seconds=20), world_size=world, rank=rank)
    model, batches = build_gpt2(size)
    model.to(size.device).train()
    batch = take_rows(batches, len(batches["labels"]) // 2, size.device)
    mesh = dist.init_device_mesh(size.device, (world,))
    for block in model.get_base_model().transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    losses = []

    def train() -> None:
        for _ in range(size.warmup + size.steps // 2):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())

    with StepClock(size.device) as clock:
        memory = measure_memory(size.device, train)
    whole = sum(parameter.full_tensor().double().sum().item() for parameter in trained)  # on all ranks
    if rank == 0:
        found = {"steps/s": round(clock.steps_per_second(size.warmup), 2), "peak of a process, GB": memory}
        found |= {"last loss": round(losses[-1].item(), 6), "sum of the adapter's weights": round(whole, 6)}
        write_json(Path(where) / "found.json", found)
    dist.destroy_process_group()


def spawn_shards(world: int, backend: str, size: Size) -> Row:
    """What the processes found; both have the first GPU."""
    import torch.multiprocessing as multiprocessing

    with tempfile.TemporaryDirectory() as where:
        multiprocessing.spawn(train_shards, (world, backend, where, size), nprocs=world)
        return json.loads((Path(where) / "found.json").read_text())


def train_recipe(size: Size) -> Row:
    """A recipe under FSDP2 with one process, from the launcher to an adapter that loads with its golden output."""
    from inlay import load_adapter

    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    settings = {"version": "2", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": "false"}
    sharded = ["--use_fsdp", *(word for key, value in settings.items() for word in (f"--fsdp_{key}", value))]
    recipe = str(Path(__file__).parents[2] / "recipes" / "lora_vit.py")
    with tempfile.TemporaryDirectory() as where:
        command = [*launch, *(sharded if size.device == "cuda" else ["--cpu"]), recipe, "--output_dir", f"{where}/run"]
        begun = time.perf_counter()
        ended = subprocess.run([*command, "--epochs", "0.5", "--workers", "0"], capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError((ended.stderr.strip().splitlines() or ["no reason given"])[-1])
        load_adapter(Path(where) / "run" / "adapter", device=size.device)
        return {"seconds with start and end": round(time.perf_counter() - begun, 1), "adapter loads": True}


def part_shards(size: Size) -> Iterator[Row]:
    own = "nccl" if size.device == "cuda" else "gloo"
    # NCCL refuses two processes on one GPU; gloo takes tensors on a GPU through the host, where it has the collective
    for world, backend in ((1, own), (2, "gloo"), *([(2, "nccl")] if own == "nccl" else [])):
        row = {"processes on one device": world, "backend": backend, "model": "GPT-2"}
        yield measure(row, lambda w=world, b=backend: spawn_shards(w, b, size))
    yield measure({"processes on one device": 1, "model": "recipes/lora_vit.py"}, lambda: train_recipe(size))


# ---- the parts, each in a process of its own

PARTS: dict[str, tuple[Callable[[Size], Iterator[Row]], int]] = {  # with the most seconds that it may take
    "fit": (part_fit, 150),
    "memory": (part_memory, 90),
    "syncs": (part_syncs, 50),
    "attention": (part_attention, 40),
    "shards": (part_shards, 80),
    "compile": (part_compile, 90),
    "volumes": (part_volumes, 70),
    "bank": (part_bank, 60),
    "serve": (part_serve, 90),
    "images": (part_images, 60),
}
HALVES = {  # each takes at most SECONDS
    "training": ["fit", "memory", "syncs", "attention", "shards", "compile"],
    "use": ["volumes", "bank", "serve", "images"],
}
MARK = "row of results: "


def run_part(name: str, smoke: bool) -> None:
    """In the process of the part: print the machine, then each row as soon as it is there."""
    size = TRIAL if smoke else Size()
    if smoke:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1"}
    import torch
    import transformers
    from machine import describe_machine

    if not smoke and not torch.cuda.is_available():
        sys.exit("this torch sees no GPU; --smoke tries the code on the CPU")
    transformers.utils.logging.set_verbosity_error()
    torch.set_float32_matmul_precision("high")  # TF32
    print(MARK + json.dumps(describe_machine("accelerate", "bitsandbytes", device=size.device)), flush=True)
    for row in PARTS[name][0](size):
        print(MARK + json.dumps(row), flush=True)


def follow_part(name: str, command: list[str], limit: float, store: Callable[[str, dict[str, Any]], None]) -> None:
    """Run a part, store each of its rows, and end it when its time is up, with all that it started."""
    found: dict[str, Any] = {"state": "broken off", "rows": []}
    begun = time.perf_counter()
    stopped = threading.Event()
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stderr=errors, **pipes) as process,
    ):

        def stop() -> None:
            stopped.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            for line in process.stdout or ():
                if not line.startswith(MARK):
                    continue
                row = json.loads(line.removeprefix(MARK))
                if "machine" in found:
                    found["rows"].append(row)
                else:
                    found["machine"] = row
                found["seconds"] = round(time.perf_counter() - begun, 1)
                store(name, found)
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1][:300]
    found["seconds"] = round(time.perf_counter() - begun, 1)
    if stopped.is_set():
        found["state"] = f"stopped after {limit:.0f} s"
    else:
        found["state"] = "whole" if code == 0 else f"failed: {last or f'exit code {code}'}"
    store(name, found)


def format_value(value: Any) -> str:
    """A cell of a table."""
    if isinstance(value, list):
        return " to ".join(map(format_value, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/")


def write_tables(parts: dict[str, Any]) -> str:
    """A table for each part, with its state, its time and its machine."""
    from machine import tell_machine

    texts = []
    for name in (name for name in PARTS if name in parts):
        found = parts[name]
        columns = list(dict.fromkeys(key for row in found["rows"] for key in row))
        machine = f" {tell_machine(found['machine'])}." if "machine" in found else ""
        lines = [f"**{name}**: {found['state']}, {found['seconds']:.0f} s.{machine}"]
        if columns:
            lines += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(format_value(row.get(key)) for key in columns)} |" for row in found["rows"]]
        texts.append("\n".join(lines))
    return "\n\n".join(texts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=[*HALVES, *PARTS],
        help="Names of parts, or of a half of them; default: training, and with --smoke all.",
    )
    parser.add_argument(
        "--seconds", type=float, help=f"Of all parts together; default: {SECONDS}, and with --smoke an hour."
    )
    parser.add_argument("--out", type=Path, help="Folder of the results; default: tests/benchmarks/results.")
    parser.add_argument("--again", action="store_true", help="Measure parts that are whole again.")
    parser.add_argument("--smoke", action="store_true", help="Tiny sizes on the CPU; results in runs/gpu_smoke.")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    asked = given.parts or (list(HALVES) if given.smoke else ["training"])
    names = dict.fromkeys(name for part in asked for name in HALVES.get(part, [part]))
    if given.one:
        return run_part(given.one, given.smoke)
    out = given.out or (Path("runs/gpu_smoke") if given.smoke else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "gpu.json"
    stored = json.loads(path.read_text()) if path.is_file() else {"parts": {}}

    def store(name: str, found: dict[str, Any]) -> None:
        stored["parts"][name] = found
        write_json(path, stored)
        path.with_suffix(".md").write_text(write_tables(stored["parts"]))

    end = time.perf_counter() + (given.seconds or (3600 if given.smoke else SECONDS))
    for name in names:
        left = end - time.perf_counter()
        if stored["parts"].get(name, {}).get("state") == "whole" and not given.again:
            print(f"{name}: there already")
        elif left < 15:
            print(f"{name}: no time left; the same command goes on")
        else:
            command = [sys.executable, __file__, "--one", name, *(["--smoke"] if given.smoke else [])]
            follow_part(name, command, min(left, PARTS[name][1]) if not given.smoke else left, store)
            print(f"{name}: {stored['parts'][name]['state']}, {stored['parts'][name]['seconds']:.0f} s", flush=True)
    print(path.with_suffix(".md").read_text() if path.is_file() else "nothing was measured")
    return None


if __name__ == "__main__":
    main()

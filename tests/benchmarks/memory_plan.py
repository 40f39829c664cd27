"""Predicted peak of a training step (`plan_memory`) beside the peak that is measured.

    python tests/benchmarks/memory_plan.py [--device cpu] [--cases vit gpt2 llama mobilenet]
    python tests/benchmarks/memory_plan.py --cases sam --name memory_plan_scans

Two measurements: `measured`, the step of `measure_peak`, in which the profiler counts tensors (on a GPU CUDA's
allocator does), and `fit`, three steps of the real `fit` under the profiler, with its data set, CPU only. Both count
tensors; the process takes more, as malloc keeps some of what is freed.

The GPT-2 is random (d 128, 4 blocks, 50,257 tokens); ViT, Llama and MobileNetV2 have real weights. Bases that are not
on this machine are left out, and named.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import describe_machine
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from inlay import TrainConfig, fit
from inlay.bases.load import BUILTIN
from inlay.measure import footprint
from inlay.measure.memory import measure_peak, plan_memory
from inlay.methods import METHODS
from inlay.tasks import TASKS
from inlay.tasks.base import load_base
from inlay.tasks.task import PlannedData
from inlay.tasks.text.loss import NextToken

sys.path.insert(0, str(Path(__file__).parents[1]))
from places import SHARED

RESULTS = Path(__file__).parent / "results"
LLAMA, MOBILENET = SHARED / "lm_stories260K_llama" / "hf", SHARED / "mobilenet_imagenet" / "hf" / "mobilenet_v2_1.0_224"
TINY = BUILTIN / "gpt2-tiny"
WIDTH = 8
Batch = dict[str, torch.Tensor]


class Rows(Dataset):
    """Three batches' worth of rows."""

    def __init__(self, batch: Batch) -> None:
        self.batch = {name: torch.cat([value] * 3) for name, value in batch.items()}

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, i: int) -> Batch:
        return {name: value[i] for name, value in self.batch.items()}


def pictures(rows: int, side: int, channels: int) -> Batch:
    """Random pictures of five classes."""
    return {"pixel_values": torch.randn(rows, channels, side, side), "labels": torch.arange(rows) % 5}


def tokens(vocabulary: int, rows: int = 16, length: int = 64, padding: int = 0, prompt: int = 0) -> Batch:
    """Random texts, all but the first of which are padded; without labels for the prompt."""
    text = torch.randint(3, vocabulary, (rows, length))
    mask, labels = torch.ones_like(text), text.clone()
    mask[1:, length - padding :], labels[1:, length - padding :], labels[:, :prompt] = 0, -100, -100
    return {"input_ids": text, "attention_mask": mask, "labels": labels}


def vit(method: str) -> tuple[Any, Batch]:
    """The embedded ViT, batch 32."""
    model = load_base("builtin:vit-tiny", labels=list("abcde"))
    return METHODS[method].adapt(model, WIDTH), pictures(32, model.config.image_size, model.config.num_channels)


def mobilenet(method: str) -> tuple[Any, Batch]:
    """MobileNetV2 with ImageNet weights, batch 8."""
    return METHODS[method].adapt(load_base(MOBILENET, labels=list("abcde")), WIDTH), pictures(8, 224, 3)


def scans(rows: int, **size: Any) -> tuple[Any, Batch]:
    """The embedded SAM with the spatial adapter, for scans of a size."""
    task = TASKS["volume-segmentation"]
    base = load_base("builtin:sam-tiny", task=task.name)
    config = task.fit_planned(METHODS["spatial"].make_config(base, WIDTH), base, PlannedData(**size))
    model = METHODS["spatial"].attach(base, config)
    batch, _ = task.planned_batch(base, rows, 0, 0, size["crop"])
    return model, batch | {"labels": torch.randint(0, size.get("labels", 1) + 1, batch["labels"].shape)}


def gpt2(method: str, bits: int | None = None, **text: int) -> tuple[Any, Batch]:
    """The random GPT-2, in 8 or 4 bits too."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=4, n_head=4))
    if bits:
        how = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4")
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.float32)
        lora = LoraConfig(r=WIDTH, target_modules=["c_attn", "c_proj", "c_fc"])
        return get_peft_model(model.requires_grad_(False), lora), tokens(50257, **text)
    return METHODS[method].adapt(model.requires_grad_(False), WIDTH), tokens(50257, **text)


def language_model(folder: Path, method: str, **text: int) -> tuple[Any, Batch]:
    """A trained language model from a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    return METHODS[method].adapt(model, WIDTH), tokens(model.config.vocab_size, **text)


def cases() -> dict[str, tuple[Callable[[], tuple[Any, Batch]], dict[str, Any]]]:
    """Name: how to build model and batch, and the settings of training."""
    found: dict[str, Any] = {}
    for method in ("lora", "bottleneck", "visual-prompt", "attention-prefix", "full"):
        found[f"vit-tiny 32, {method}"] = (lambda m=method: vit(m), {})
    found["vit-tiny 32, lora, checkpointing"] = (lambda: vit("lora"), {"gradient_checkpointing": True})
    for method in ("lora", "bottleneck", "prompt", "prefix", "attention-prefix", "partial", "full"):
        found[f"gpt2 16x64, {method}"] = (lambda m=method: gpt2(m), {})
    for method in ("lora", "full"):
        for name, settings in (
            ("checkpointing", {"gradient_checkpointing": True}),
            ("8-bit AdamW", {"optimizer": "adamw8bit"}),
            ("bf16", {"precision": "bf16"}),
            ("4 pieces", {"accumulate": 4}),
        ):
            found[f"gpt2 16x64, {method}, {name}"] = (lambda m=method: gpt2(m), settings)
    found["gpt2 1x8, full, 8-bit AdamW"] = (lambda: gpt2("full", rows=1, length=8), {"optimizer": "adamw8bit"})
    found["gpt2 16x64 padded, lora, loss on completions"] = (
        lambda: gpt2("lora", padding=20, prompt=24), {"loss": NextToken()},
    )  # fmt: skip
    for bits in (8, 4):
        found[f"gpt2 16x64 in {bits} bits, lora"] = (lambda b=bits: gpt2("lora", b), {})
        found[f"gpt2 1x8 in {bits} bits, lora"] = (lambda b=bits: gpt2("lora", b, rows=1, length=8), {})
    for name, folder in (("gpt2-tiny", TINY), ("llama stories260K", LLAMA)):
        for method in ("lora", "prefix", "full"):
            found[f"{name} 16x64, {method}"] = (lambda f=folder, m=method: language_model(f, m), {})
        found[f"{name} 16x64, lora, checkpointing"] = (
            lambda f=folder: language_model(f, "lora"), {"gradient_checkpointing": True},
        )  # fmt: skip
        found[f"{name} 16x64 padded, lora"] = (lambda f=folder: language_model(f, "lora", padding=20), {})
    for method in ("lora", "full"):
        found[f"mobilenet-v2 8x224, {method}"] = (lambda m=method: mobilenet(m), {})
    for name, rows, size, settings in (
        ("1x32x40x40", 1, {"crop": (32, 40, 40)}, {}),
        ("2x32x40x40", 2, {"crop": (32, 40, 40)}, {}),
        ("2x32x40x40, 4 channels, 32 classes", 2, {"crop": (32, 40, 40), "channels": 4, "labels": 32}, {}),
        ("1x64x64x64, checkpointing", 1, {"crop": (64, 64, 64)}, {"gradient_checkpointing": True}),
        ("2x16x64x64 of 5 mm slices", 2, {"crop": (16, 64, 64), "spacing_mm": (5.0, 1.0, 1.0)}, {}),
    ):
        found[f"sam-tiny scans {name}, spatial"] = (lambda r=rows, s=size: scans(r, **s), settings)
    missing = {"gpt2-tiny": TINY, "llama": LLAMA, "mobilenet": MOBILENET}
    for name, folder in missing.items():
        if not (folder / "config.json").is_file():
            found = {case: value for case, value in found.items() if not case.startswith(name)}
    return found


def fit_peak(model: Any, batch: Batch, settings: dict[str, Any]) -> int:
    """Peak bytes of tensors in three steps of `fit`, with the weights that were there before."""
    settings, weights = {"precision": "no", **settings}, footprint(model).bytes_total
    loss = settings.pop("loss", None)
    activities, rows, data = [ProfilerActivity.CPU], len(batch["labels"]), Rows(batch)
    with tempfile.TemporaryDirectory() as folder, profile(activities=activities, profile_memory=True) as seen:
        config = TrainConfig(output_dir=f"{folder}/run", epochs=1, batch_size=rows, workers=0, **settings)
        fit(model, data, None, config, loss=loss)
    alive = peak = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return weights + peak


def one(name: str, device: str) -> dict[str, Any]:
    """A row of the table."""
    model, batch, settings = ready(name)
    model = model.to(device)
    begun = time.perf_counter()
    plan = plan_memory(model, batch, **settings)
    seconds = time.perf_counter() - begun
    row: dict[str, Any] = {"parts": {part: value for part, value in vars(plan).items() if isinstance(value, int)}}
    row |= {"line": str(plan), "plan_seconds": round(seconds, 2), "predicted": plan.peak}
    row["measured"] = measure_peak(model, batch, **settings)
    row["ratio"] = round(plan.peak / row["measured"], 4)
    if device == "cpu":
        row["fit"] = fit_peak(model, batch, settings)
    return row


def ready(name: str) -> tuple[Any, Batch, dict[str, Any]]:
    """Model, batch and settings of a case."""
    torch.manual_seed(0)
    build, settings = cases()[name]
    return *build(), settings


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    machine = result["machine"]
    lines = [
        f"Predicted and measured peak of a training step, {machine['device']}, {machine['date']}, "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        + f". Width {WIDTH}. `tests/benchmarks/memory_plan.py` says what is measured.",
        "",
        "| base, batch, method, setting | predicted, MB | measured, MB | predicted / measured | in `fit`, MB "
        "| planning, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in result["cases"].items():
        cells = [f"{row['predicted'] / 1e6:.2f}", f"{row['measured'] / 1e6:.2f}", f"{row['ratio']:.3f}"]
        cells += [f"{row['fit'] / 1e6:.2f}" if "fit" in row else "", f"{row['plan_seconds']:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cases", nargs="+", default=[""], help="How their names begin; default: all.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="memory_plan", help="Of the files with the results.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for folder in (TINY, LLAMA, MOBILENET):
        if not (folder / "config.json").is_file():
            print(f"left out, as it is not here: {folder.name}", file=sys.stderr)
    rows = {}
    for name in cases():
        if not rows:
            model, batch, settings = ready(name)
            plan_memory(model, batch, **settings)  # imports
        if name.startswith(tuple(arguments.cases)):
            rows[name] = one(name, arguments.device)
            print(f"{name}: {rows[name]['ratio']}  {rows[name]['line']}", file=sys.stderr, flush=True)
    ratios = [row["ratio"] for row in rows.values()]
    result = {
        "cases": rows,
        "smallest_ratio": min(ratios),
        "largest_ratio": max(ratios),
        "machine": describe_machine("bitsandbytes", device=arguments.device),
    }
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / f"{arguments.name}.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()

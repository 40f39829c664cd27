"""What a base in 8 bits changes: the training loss of LoRA on builtin:gpt2-tiny, beside that on the base in float32.

    python tests/benchmarks/eight_bit_gpt2.py [--steps 200] [--seeds 0 1 2]

Both learn builtin:restaurants with the same batches from the same start (rank 8, 8 pairs a step, at the rate of
METHODS). Given is the mean training loss over all steps and over the last tenth, and what the quantised weights hold.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate.utils import set_seed
from machine import describe_machine

from inlay import NextToken, TextProcessor, TextView, TrainConfig, fit, load_base, load_texts, load_tokenizer
from inlay.bases.quantize import Quantize
from inlay.measure.footprint import describe_quantized
from inlay.methods import METHODS

RESULTS = Path(__file__).parent / "results" / "eight_bit_gpt2"
BASE, BATCH = "builtin:gpt2-tiny", 8


def losses(seed: int, views: tuple[TextView, TextView], steps: int, quantize: Quantize | None) -> list[float]:
    """The training loss of each step."""
    set_seed(seed)
    model = METHODS["lora"].adapt(load_base(BASE, quantize=quantize), 8)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            f"{folder}/run", epochs=steps * BATCH / len(views[0]), batch_size=BATCH,
            learning_rate=METHODS["lora"].learning_rate, eval_every=steps, seed=seed, workers=0,
        )  # fmt: skip
        fit(model, views[0], None, config, collate=views[0].collate, loss=NextToken())
        lines = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").open()]
    found = [line["loss"] for line in lines if "gradient_norm" in line]
    assert len(found) == steps
    return found


def main() -> None:
    """Train all, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    data = load_texts("builtin:restaurants")
    processor = TextProcessor(load_tokenizer(BASE), separator=data.separator)
    views = TextView(data.train, processor), TextView(data.validation, processor)
    rows = []
    for seed in arguments.seeds:
        whole, bits = (losses(seed, views, arguments.steps, quantize) for quantize in (None, "8bit"))
        parts = {"all steps": slice(None), "last tenth": slice(-(arguments.steps // 10), None)}
        rows.append({"seed": seed, "first": [whole[0], bits[0]]})
        for name, part in parts.items():
            rows[-1][name] = [statistics.mean(whole[part]), statistics.mean(bits[part])]
        print(rows[-1], flush=True)
    lines = [
        "| seed | mean of all steps, float32 | 8 bits | | last tenth, float32 | 8 bits | |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [f"{a:.4f} | {b:.4f} | {b / a - 1:+.2%}" for a, b in (row["all steps"], row["last tenth"])]
        lines.append(f"| {row['seed']} | {' | '.join(cells)} |")
    text = "\n\n".join(
        [
            "# LoRA on builtin:gpt2-tiny in float32 and in 8 bits",
            f"{arguments.steps} steps of {BATCH} pairs of builtin:restaurants, rank 8; the same batches and the same "
            f"start. {describe_quantized(load_base(BASE, quantize='8bit'))}. {platform.machine()} cpu, "
            + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
            + f", {time.strftime('%Y-%m-%d')}, load average {os.getloadavg()[1]:.1f}.",
            "\n".join(lines),
        ]
    )
    RESULTS.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    found = {"machine": describe_machine("bitsandbytes"), "steps": arguments.steps, "rows": rows}
    RESULTS.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

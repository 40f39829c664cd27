"""Ways to tune a small Llama with real weights on a new domain, and what an 8-bit base changes.

    python tests/benchmarks/stories260k.py [--steps 150] [--seeds 0 1 2]

The base, stories260K (260,032 parameters, trained on TinyStories; ../shared/data/lm_stories260K_llama), learns tiny
Shakespeare (../shared/data/tinyshakespeare) in blocks of 128 of its own tokens. Given are the loss per token on the
last tenth of the text, before and after; the base's weights are compared, bit for bit, before and after. Then LoRA on
the base in float32 and in 8 bits, with the same batches: the mean training loss of the last tenth of the steps.
"""

import argparse
import hashlib
import json
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import set_seed
from machine import describe_machine

from inlay import NextToken, TextProcessor, TextView, TrainConfig, fit, load_base, load_texts, load_tokenizer
from inlay.measure import footprint
from inlay.methods import METHODS
from inlay.methods._peft import base_modules

sys.path.insert(0, str(Path(__file__).parents[1]))
from places import SHARED

RESULTS = Path(__file__).parent / "results" / "stories260k"
BASE, DATA = SHARED / "lm_stories260K_llama" / "hf", SHARED / "tinyshakespeare" / "input.txt.gz"
RATES = {"lora": 1e-2, "attention-prefix": 5e-2, "prompt": 5e-2, "bottleneck": 1e-2}


def digest(model: torch.nn.Module) -> str:
    """Of the frozen weights of a base, with an adapter in it or without."""
    found = hashlib.sha256()
    for name, module in base_modules(model):
        for key, value in module._parameters.items():
            if value is not None and not value.requires_grad:
                found.update(f"{name}.{key}".encode() + value.detach().numpy().tobytes())
    return found.hexdigest()


def loss_of(model: torch.nn.Module, view: TextView) -> float:
    """Mean loss per token."""
    model.eval()
    with torch.no_grad():
        batches = [view.collate([view[i] for i in range(k, min(k + 32, len(view)))]) for k in range(0, len(view), 32)]
        each = [(NextToken()(model, b).loss.item(), NextToken().weight(b)) for b in batches]
    return sum(loss * weight for loss, weight in each) / sum(weight for _, weight in each)


class Run:
    """One method on the base: loss before and after, training losses, and whether the base is untouched."""

    def __init__(self, method: str, seed: int, views: tuple[TextView, TextView], steps: int, **options: Any) -> None:
        set_seed(seed)
        model = METHODS[method].adapt(load_base(BASE, **options), 8)
        before = None if options else digest(model)
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                f"{folder}/run", epochs=steps * 16 / len(views[0]), batch_size=16, learning_rate=RATES[method],
                eval_every=steps, seed=seed, workers=0,
            )  # fmt: skip
            result = fit(model, *views, config, collate=views[0].collate, loss=NextToken())
            lines = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").open()]
        losses = [line["loss"] for line in lines if "gradient_norm" in line]
        self.after, self.trained = result.metrics["loss"], footprint(model).trainable
        self.training = statistics.mean(losses[-len(losses) // 10 :])
        assert before is None or digest(model) == before, f"{method} has changed the base"


def main() -> None:
    """Run all, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as the figures were measured
    data = load_texts(str(DATA))
    processor = TextProcessor(load_tokenizer(BASE), separator="", max_length=128)
    views = TextView(data.train, processor, block=True), TextView(data.validation, processor, block=True)
    before = loss_of(load_base(BASE), views[1])
    rows, lines = [], ["| method | trained parameters | learning rate | loss | lower by |", "|---|---:|---:|---:|---:|"]
    for method, rate in RATES.items():
        runs = [Run(method, seed, views, arguments.steps) for seed in arguments.seeds]
        after = [run.after for run in runs]
        rows.append({"method": method, "trained": runs[0].trained, "rate": rate, "before": before, "after": after})
        mean, spread = statistics.mean(after), statistics.stdev(after) if after[1:] else 0.0
        lines.append(f"| {method} | {runs[0].trained:,} | {rate:g} | {mean:.3f} ± {spread:.3f} | {before - mean:.3f} |")
        print(lines[-1], flush=True)
    pairs = [[Run("lora", seed, views, arguments.steps, **o).training for o in ({}, {"quantize": "8bit"})]
             for seed in arguments.seeds]  # fmt: skip
    text = "\n\n".join(
        [
            "# stories260K on tiny Shakespeare",
            f"{arguments.steps} steps of 16 blocks of 128 tokens, width 8, seeds {arguments.seeds}; before: "
            f"{before:.3f}. The base's weights are the same bit for bit afterwards. CPU, torch {torch.__version__}, "
            f"transformers {transformers.__version__}, Python {platform.python_version()}.",
            "\n".join(lines),
            "LoRA's training loss on a base in float32 and in 8 bits, by seed: "
            + ", ".join(f"{whole:.4f} and {bits:.4f} ({bits / whole - 1:+.2%})" for whole, bits in pairs)
            + ".",
        ]
    )
    RESULTS.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    found = {"machine": describe_machine("bitsandbytes"), "rows": rows, "float32 and 8 bits": pairs}
    RESULTS.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""What merging loses of an adapter, by how the weights are stored: inlay.merge beside peft's merging as they are held.

    python tests/benchmarks/merge_error.py [--std 0.03]

Adapters with random numbers on the embedded bases. `error` is ‖merged - unmerged‖ / ‖unmerged - base‖ over the
outputs, 1 when merging loses as much as the adapter adds. `plainly` is peft's merge_and_unload into a base held in that
form, against the unmerged adapter on the same base.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine

from inlay import (
    METHODS,
    TextProcessor,
    load_adapter,
    load_base,
    load_processor,
    load_tokenizer,
    merge,
    save_adapter,
)
from inlay.combine.merge import compute_outputs
from inlay.methods._peft import layers_disabled

RESULTS = Path(__file__).parent / "results" / "merge_error"
STORED: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "8bit": {"quantize": "8bit"},
    "4bit": {"quantize": "4bit"},
    "4bit as float16": {"quantize": "4bit", "dtype": "float16"},
}
PLAINLY: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "8bit": {"quantize": "8bit"},
    "4bit": {"quantize": "4bit"},
}


def make(base: str, method: str, std: float, folder: Path) -> Path:
    torch.manual_seed(0)
    model = METHODS[method].adapt(load_base(base), 8)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    text = "gpt2" in base
    processor = TextProcessor(load_tokenizer(base), max_length=64) if text else load_processor(base)
    return save_adapter(model, folder, processor=processor)


def inputs(base: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if "gpt2" in base:
        ids = torch.randint(2000, (4, 32), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"pixel_values": torch.randn(8, 3, 32, 32, generator=generator)}


def plainly(adapter: Path, batch: dict[str, torch.Tensor], held: dict[str, Any]) -> float:
    """The error of peft's own merging into weights held so, in their own arithmetic."""
    model = load_adapter(adapter, **held).model
    kind = next(p.dtype for p in model.parameters() if p.is_floating_point())
    batch = {key: value.to(kind) if value.is_floating_point() else value for key, value in batch.items()}
    with layers_disabled(model):
        base = compute_outputs(model, batch)
    unmerged = compute_outputs(model, batch)
    merged = compute_outputs(model.merge_and_unload(safe_merge=True), batch)
    return float((merged - unmerged).norm() / (unmerged - base).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--std", type=float, default=0.03)
    std = parser.parse_args().std
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for base in ("builtin:vit-tiny", "builtin:gpt2-tiny"):
        for method in ("lora", "dora", "ia3", "bottleneck-linear", "partial"):
            with tempfile.TemporaryDirectory() as where:
                adapter, batch = make(base, method, std, Path(where) / "adapter"), inputs(base)
                row: dict[str, Any] = {"base": base, "method": method}
                for stored, how in STORED.items():
                    report = merge(adapter, Path(where) / "merged", inputs=batch, limit=float("inf"), **how)
                    row["effect"] = row.get("effect") or round(report.effect, 4)
                    row[stored] = float(f"{report.error:.2g}")
                for held, how in PLAINLY.items():
                    try:
                        row[f"plainly {held}"] = float(f"{plainly(adapter, batch, how):.2g}")
                    except (ValueError, NotImplementedError):
                        row[f"plainly {held}"] = None  # no such adapter on such a base
                rows.append(row)
                print(row)
    found = {"machine": describe_machine("bitsandbytes"), "std": std, "rows": rows}
    RESULTS.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join("-" if row[c] is None else str(row[c]) for c in columns) + " |" for row in rows]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

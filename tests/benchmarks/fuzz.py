"""Load 1,000 mutated adapters, and judge each: it may be refused in one sentence, or give the original's output.

    python tests/benchmarks/fuzz.py

Each case is a saved adapter with something changed by a seed (tests/adapters/mutations.py): bits, header, tensors,
config, record, names and files; as damage leaves it (raw), with checksums made anew (signed), or in a folder that says
nothing of what it was (plain), which may then load as another adapter, but never as verified. Memory is what the
process holds at most beyond what it held before, under a limit of 1 GB of address space more; time is of the slowest
case.
"""

import json
import logging
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from machine import describe_machine
from peft import LoraConfig, get_peft_model

from adapters.mutations import run
from inlay import load_base, load_processor, save_adapter
from inlay.bases.sites import head_modules, lora_targets
from inlay.files.atomic import write_json

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
CASES, MORE = 1000, 10**9
LABELS = ["cat", "dog", "emu", "fox", "gnu"]


def save_one(folder: Path) -> torch.nn.Module:
    """A LoRA adapter of the embedded ViT with a head, as if trained."""
    torch.manual_seed(0)
    base = load_base("builtin:vit-tiny", labels=LABELS)
    config = LoraConfig(r=4, target_modules=lora_targets(base), modules_to_save=head_modules(base))
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.copy_(torch.randn_like(value) * (0.05 if "lora_" in name else 0.2))
    metrics = {"validation": {"accuracy": 0.9}, "dataset": "builtin:digits"}
    save_adapter(model, folder, processor=load_processor("builtin:vit-tiny"), metrics=metrics)
    return model


def memory() -> tuple[int, int]:
    """Address space now, and the most that was resident, in bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run the cases and write the results; exit status 1 if one is judged wrong."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))

    def outputs(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(pixel_values=pixels).logits

    verdicts: dict[str, Counter[str]] = {"raw": Counter(), "signed": Counter(), "plain": Counter()}
    wrong, slowest = [], (0.0, "")
    with tempfile.TemporaryDirectory() as work:
        model = save_one(Path(work) / "zoo")
        expected = outputs(model)
        space, before = memory()
        resource.setrlimit(resource.RLIMIT_AS, (space + MORE, resource.RLIM_INFINITY))
        for seed in range(CASES):
            started = time.process_time()
            try:
                said, verdict = run(seed, Path(work) / "zoo", Path(work), expected, outputs, base=new_base)
                verdicts[said.split(":")[0]][verdict] += 1
            except AssertionError as error:
                said = str(error)
                wrong.append(said)
            slowest = max(slowest, (time.process_time() - started, said))
    found = {
        "machine": describe_machine(),
        "cases": CASES,
        "wrong": wrong,
        "verdicts": {how: dict(counts) for how, counts in verdicts.items()},
        "most_memory_mb": round((memory()[1] - before) / 1e6, 1),
        "slowest_cpu_s": round(slowest[0], 2),
        "slowest": slowest[1][:100],
    }
    write_json(RESULTS, found)
    print(json.dumps(found, indent=2))
    sys.exit(bool(wrong))


def new_base() -> torch.nn.Module:
    """For folders that name no labels."""
    return load_base("builtin:vit-tiny", labels=LABELS)


if __name__ == "__main__":
    main()

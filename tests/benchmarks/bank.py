"""Time of a batch whose rows have different adapters, and of loading and choosing them: inlay's Bank beside peft.

    python tests/benchmarks/bank.py [--size base|tiny] [--blocks 12] [--rounds 3] [--parts forward methods load]
    python tests/benchmarks/bank.py --parts forward --rows 64 --counts 1 4 16 64

A ViT with random weights, LoRA r=8 on q and v, a batch with 1 to 200 adapters in it:

    plain       the base only
    merged      one adapter in its weights
    bank        Bank, all adapters resident (as many as the largest of --counts)
    peft        the same adapters in one PeftModel, `adapter_names`
    separate    one forward for each adapter's rows

`methods` times other methods in a bank with 1 and with 64 adapters in the batch. `load` takes 200 adapters from disk by
a bank (without the check of the golden output, a forward each), by 200 calls of peft's load_adapter and by inlay's
(its mean, times 200), and chooses other ones. Ways take
turns, round by round; figures are CPU time, the ratio within a round. A part that is measured again replaces what was
there of it.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from machine import describe_machine
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from inlay import Bank, load_adapter, load_base, load_processor, save_adapter
from inlay.adapters.file import CARD, CONFIG, WEIGHTS, read_adapter
from inlay.bases.sites import lora_targets
from inlay.files.tensor_header import sign
from inlay.methods import METHODS

RESULTS = Path(__file__).parent / "results" / "bank"
TIMED = ("bottleneck", "bottleneck-parallel", "attention-prefix", "visual-prompt", "ia3", "bias", "norm")
COUNTS, BATCH, ALL = (1, 4, 16, 64, 200), 64, 200
WAYS = {"bank": "bank", "peft": "peft's `adapter_names`", "separate": "separate batches, one for each adapter"}
SIZES = {
    "base": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224},
    "tiny": {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 3, "image_size": 32, "patch_size": 4},
}


def make_base(folder: Path, size: str, blocks: int) -> str:
    torch.manual_seed(0)
    config = ViTConfig(**SIZES[size], num_hidden_layers=blocks, num_labels=10)
    ViTForImageClassification(config).save_pretrained(folder)
    side = {"height": config.image_size, "width": config.image_size}
    ViTImageProcessorPil(size=side).save_pretrained(folder)
    return str(folder)


def make_adapters(base: str, method: str, folder: Path, count: int) -> Path:
    """One saved as it should be; the others are it with other numbers, and without a golden output."""
    torch.manual_seed(1)
    model = load_base(base)
    targets = lora_targets(model, "attention")
    config = LoraConfig(r=8, target_modules=targets) if method == "lora" else METHODS[method].config(model, 16)
    first = save_adapter(get_peft_model(model, config), folder / "0", processor=load_processor(base))
    record = {**read_adapter(first).record, "golden": []}
    metadata = {"format": "pt", "inlay": json.dumps(record, separators=(",", ":"), ensure_ascii=False)}
    weights = load_file(first / WEIGHTS)
    for i in range(count):
        copy = folder / str(i)
        copy.mkdir(exist_ok=True)
        if i:
            for name in (CONFIG, CARD):
                (copy / name).write_bytes((first / name).read_bytes())
        drawn = {key: torch.randn_like(value) * 0.02 for key, value in weights.items()}
        (copy / WEIGHTS).write_bytes(sign(to_bytes(drawn, metadata)))
    return folder


def names(count: int, rows: int = BATCH) -> list[str]:
    """Which adapter each row has: as many as there are rows at most, in an order that is no order."""
    return [str(i * 37 % count) for i in range(rows)]


def seconds(call: Callable[[], Any]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def take_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for i in range(rounds):
        for name in order[i % len(order) :] + order[: i % len(order)]:
            taken[name].append(seconds(ways[name]))
    return taken


def ratio(taken: dict[str, list[float]], name: str, to: str) -> float:
    return round(statistics.median(a / b for a, b in zip(taken[name], taken[to], strict=True)), 3)


@torch.no_grad()
def make_ways(
    base: str, folder: Path, batch: dict[str, torch.Tensor], counts: Sequence[int]
) -> tuple[dict[str, Callable[[], Any]], Bank]:
    """Each way to compute the batch, by its name and number of adapters, on the device of the batch; and the bank."""
    rows, device = len(batch["pixel_values"]), str(batch["pixel_values"].device)
    resident = [folder / str(i) for i in range(max(counts))]
    bank, plain = Bank(base, resident, check_golden=False, device=device), load_base(base, device=device).eval()
    merged = load_adapter(folder / "1", device=device).merge().model
    mixed = PeftModel.from_pretrained(load_base(base), folder / "0", adapter_name="a0")
    for i in range(1, len(resident)):  # peft's own way takes minutes: an empty one, then the numbers
        mixed.add_adapter(f"a{i}", mixed.peft_config["a0"], low_cpu_mem_usage=True)
        peft.set_peft_model_state_dict(mixed, load_file(folder / str(i) / WEIGHTS), f"a{i}", low_cpu_mem_usage=True)
    mixed.to(device).eval()

    def separate(chosen: list[str]) -> None:
        for name in dict.fromkeys(chosen):
            own = [i for i, other in enumerate(chosen) if other == name]
            bank({key: value[own] for key, value in batch.items()}, [name] * len(own))

    ways: dict[str, Callable[[], Any]] = {"plain": lambda: plain(**batch), "merged": lambda: merged(**batch)}
    for n in counts:
        chosen = names(n, rows)
        ways[f"bank {n}"] = lambda chosen=chosen: bank(batch, chosen)
        ways[f"peft {n}"] = lambda chosen=chosen: mixed(**batch, adapter_names=[f"a{name}" for name in chosen])
        ways[f"separate {n}"] = lambda chosen=chosen: separate(chosen)
    found, wanted = (ways[f"{way} {max(counts)}"]().logits for way in ("bank", "peft"))
    tolerance = 1e-4 if device == "cpu" else 1e-2  # a GPU may multiply in TF32
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max(), "bank and peft do not agree"
    return ways, bank


@torch.no_grad()
def forward(
    base: str, folder: Path, batch: dict[str, torch.Tensor], rounds: int, counts: Sequence[int]
) -> dict[str, Any]:
    ways, bank = make_ways(base, folder, batch, counts)  # which runs the bank and peft once
    take_turns({"plain": ways["plain"]}, 1)  # warm-up
    taken = take_turns(ways, rounds)
    plain = taken.pop("plain")
    ratios = {name: sorted(a / b for a, b in zip(times, plain, strict=True)) for name, times in taken.items()}
    return {
        "rows": len(batch["pixel_values"]),
        "plain_cpu_seconds": round(statistics.median(plain), 3),
        "ratio_to_plain": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "spread": {name: [round(values[0], 3), round(values[-1], 3)] for name, values in ratios.items()},
        "bank_mb": round(bank.bytes / 1e6, 1),
    }


def write_table(found: dict[str, Any]) -> str:
    """Ratios of a batch to the plain base, by the number of adapters in it."""
    ratios, spread = found["ratio_to_plain"], found["spread"]
    counts = [name.split()[1] for name in ratios if name.startswith("bank ")]
    lines = ["| adapters in the batch | " + " | ".join(counts) + " |", "|---|" + "---:|" * len(counts)]
    for way, title in WAYS.items():
        cells = []
        for name in (f"{way} {n}" for n in counts):
            low, high = spread[name]
            cells.append(f"{ratios[name]:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@torch.no_grad()
def methods(base: str, folder: Path, batch: dict[str, torch.Tensor], rounds: int) -> dict[str, Any]:
    found = {}
    for method in TIMED:
        bank = Bank(base, make_adapters(base, method, folder / method, BATCH), check_golden=False)
        ways = {"one": lambda bank=bank: bank(batch, names(1)), "64": lambda bank=bank: bank(batch, names(64))}
        ways["plain"] = lambda bank=bank: bank(batch, [None] * BATCH)
        take_turns(ways, 1)
        taken = take_turns(ways, rounds)
        found[method] = {"64_to_one": ratio(taken, "64", "one"), "one_to_plain": ratio(taken, "one", "plain")}
    return found


def load(base: str, folder: Path) -> dict[str, Any]:
    model = load_base(base)
    made: list[Bank] = []
    by_bank = seconds(lambda: made.append(Bank(model, folder, check_golden=False)))
    bank, bare = made[0], load_base(base)
    empty = seconds(lambda: Bank(bare))

    def one() -> None:
        load_adapter(folder / "7", whole).model.unload()

    whole = load_base(base)
    one()
    by_inlay = statistics.mean(seconds(one) for _ in range(3))
    mixed = PeftModel.from_pretrained(load_base(base), folder / "0", adapter_name="a0")

    def by_calls() -> None:
        for i in range(1, ALL):
            mixed.load_adapter(folder / str(i), f"a{i}")

    by_peft = seconds(by_calls)

    def choose(i: int) -> None:
        with bank.rows(names(200)[i:] + names(200)[:i]):
            pass

    return {
        "bank_cpu_seconds": round(by_bank, 3),
        "of_which_the_base": round(empty, 3),
        "peft_load_adapter_cpu_seconds": round(by_peft, 1),
        "inlay_load_adapter_cpu_seconds": round(by_inlay * ALL, 1),
        "peft_over_bank": round(by_peft / by_bank, 1),
        "inlay_over_bank": round(by_inlay * ALL / by_bank, 1),
        "mb_on_disk": round(sum(path.stat().st_size for path in folder.glob(f"*/{WEIGHTS}")) / 1e6, 1),
        "bank_choose_ms": round(1e3 * statistics.mean(seconds(lambda i=i: choose(i)) for i in range(50)), 3),
        "peft_set_adapter_ms": round(
            1e3 * statistics.mean(seconds(lambda: mixed.set_adapter("a7")) for _ in range(5)), 1
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=BATCH, help="Of the batch of the part forward.")
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS, help="Adapters in that batch.")
    parser.add_argument(
        "--parts", nargs="+", choices=["forward", "methods", "load"], default=["forward", "methods", "load"]
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    side = SIZES[arguments.size]["image_size"]
    batch = {"pixel_values": torch.randn(BATCH, 3, side, side, generator=torch.Generator().manual_seed(0))}
    stored = RESULTS.with_suffix(".json")
    result = json.loads(stored.read_text()) if stored.is_file() else {}
    with tempfile.TemporaryDirectory() as where:
        base = make_base(Path(where) / "base", arguments.size, arguments.blocks)
        count = ALL if "load" in arguments.parts else max(arguments.counts)
        folder = make_adapters(base, "lora", Path(where) / "lora", count)
        for part in arguments.parts:
            if part == "load":
                found = load(base, folder)
            elif part == "methods":
                found = methods(base, folder, batch, arguments.rounds)
            else:
                first = {key: value[: arguments.rows] for key, value in batch.items()}
                found = forward(base, folder, first, arguments.rounds, arguments.counts)
                if arguments.size == "base":
                    RESULTS.with_suffix(".md").write_text(write_table(found))
            found |= {"size": arguments.size, "blocks": arguments.blocks, "rounds": arguments.rounds}
            found["machine"] = describe_machine()
            result[f"{part} {arguments.size}"] = found
            print(part, json.dumps(found, indent=2))
    stored.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Texts of several adapters at the same time: the server's continuous batching next to `generate`.

    python tests/benchmarks/serve_text.py [--blocks 12] [--adapters 8] [--texts 4] [--rounds 3] [--device cuda]

A GPT-2 of the width of GPT-2 small with random weights, LoRA r=8 on the attention. Each adapter gets prompts of 8 to
64 tokens, which it continues by 8 to 64 tokens:

    served        the server's loop, all texts in one batch that they join and leave
    separate      Bank.generate, a batch for each adapter, which lasts as long as its longest text
    mixed         Bank.generate, one batch of all, which lasts as long as its longest text
    one by one    Bank.generate for each text

Ways take turns, round by round; tokens a second count the tokens that were asked for. `wait` is how long a text of 8
tokens takes that comes while one of 256 is written: by the loop, behind `Bank.generate`, which has the bank until it is
done, and by itself.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine, tell_machine
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from inlay import Bank, TextProcessor, load_base, load_tokenizer, save_adapter
from inlay.bases.sites import lora_targets
from inlay.serve.server.config import ServiceConfig
from inlay.serve.server.service import Service

RESULTS = Path(__file__).parent / "results" / "serve_text"
LONG, SHORT = 256, 8
SETTINGS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def make_base(folder: Path, blocks: int) -> str:
    """With the tokenizer of the embedded GPT-2, whose tokens are among those of GPT-2 small's vocabulary."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=blocks, eos_token_id=None)).save_pretrained(folder)
    load_tokenizer("builtin:gpt2-tiny").save_pretrained(folder)
    return str(folder)


def make_adapters(base: str, folder: Path, count: int) -> Path:
    model = load_base(base)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=lora_targets(model, "attention")))
    processor = TextProcessor(load_tokenizer(base))
    for i in range(count):
        torch.manual_seed(i + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.02)
        save_adapter(model, folder / str(i), processor=processor)
    return folder


def draw_texts(adapters: int, texts: int) -> list[tuple[str, list[int], int]]:
    """Adapter, prompt and number of new tokens of each text, in an order that is no order."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for i in torch.randperm(adapters * texts, generator=generator).tolist():
        length, count = torch.randint(8, 65, (2,), generator=generator).tolist()
        prompt = torch.randint(0, 2000, (length,), generator=generator).tolist()
        drawn.append((str(i % adapters), prompt, count))
    return drawn


def write_by_generate(bank: Bank, texts: Sequence[tuple[str, list[int], int]]) -> list[list[int]]:
    """One batch, padded on the left."""
    longest, most = max(len(prompt) for _, prompt, _ in texts), max(count for *_, count in texts)
    device = bank.model.device
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for _, prompt, _ in texts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for _, prompt, _ in texts], device=device)
    names = [name for name, *_ in texts]
    found = bank.generate({"input_ids": ids, "attention_mask": mask}, names, max_new_tokens=most, **SETTINGS)
    return [row[longest : longest + count].tolist() for row, (*_, count) in zip(found, texts, strict=True)]


def write_by_server(service: Service, texts: Sequence[tuple[str, list[int], int]]) -> list[int]:
    async def write(name: str, prompt: list[int], count: int) -> int:
        stream = await service.write(name, {"input_ids": prompt, "max_tokens": count})
        return (await stream.read_all()).tokens

    async def write_all() -> list[int]:
        return await asyncio.gather(*(write(*text) for text in texts))

    return asyncio.run(write_all())


def make_ways(
    bank: Bank, service: Service, texts: Sequence[tuple[str, list[int], int]]
) -> dict[str, Callable[[], Any]]:
    groups: dict[str, list[tuple[str, list[int], int]]] = {}
    for text in texts:
        groups.setdefault(text[0], []).append(text)
    return {
        "served": lambda: write_by_server(service, texts),
        "separate": lambda: [write_by_generate(bank, group) for group in groups.values()],
        "mixed": lambda: write_by_generate(bank, texts),
        "one by one": lambda: [write_by_generate(bank, [text]) for text in texts],
    }


def take_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """CPU and wall seconds of each way, by round."""
    taken: dict[str, dict[str, list[float]]] = {name: {"cpu_s": [], "wall_s": []} for name in ways}
    order = list(ways)
    for i in range(rounds):
        for name in order[i % len(order) :] + order[: i % len(order)]:
            cpu, wall = time.process_time(), time.perf_counter()
            ways[name]()
            taken[name]["wall_s"].append(time.perf_counter() - wall)
            taken[name]["cpu_s"].append(time.process_time() - cpu)
            print(name, f"{taken[name]['wall_s'][-1]:.1f} s", flush=True)
    return taken


def measure_wait(bank: Bank, service: Service, rounds: int) -> dict[str, list[float]]:
    """Wall seconds of a short text in three situations."""
    long, short = ("0", [5] * 16, LONG), ("1", [7] * 16, SHORT)
    found: dict[str, list[float]] = {"alone": [], "served": [], "behind": []}

    async def write_short_behind_long() -> float:
        running = await service.write("0", {"input_ids": long[1], "max_tokens": LONG})
        begun = time.perf_counter()
        stream = await service.write("1", {"input_ids": short[1], "max_tokens": SHORT})
        await stream.read_all()
        taken = time.perf_counter() - begun
        running.close()
        return taken

    for _ in range(rounds):
        begun = time.perf_counter()
        write_by_server(service, [short])
        found["alone"].append(time.perf_counter() - begun)
        found["served"].append(asyncio.run(write_short_behind_long()))
        thread = threading.Thread(target=write_by_generate, args=(bank, [long]))
        thread.start()
        time.sleep(0.1)
        begun = time.perf_counter()
        write_by_generate(bank, [short])
        found["behind"].append(time.perf_counter() - begun)
        thread.join()
    return found


def summarise(taken: dict[str, dict[str, list[float]]], tokens: int) -> dict[str, Any]:
    served = taken["served"]
    return {
        name: {
            "tokens_per_s": round(tokens / statistics.median(times["wall_s"]), 1),
            "tokens_per_cpu_s": round(tokens / statistics.median(times["cpu_s"]), 1),
            **{key: [round(each, 2) for each in sorted(values)] for key, values in times.items()},
            **{
                f"{key.partition('_')[0]}_ratio": round(
                    statistics.median(a / b for a, b in zip(values, served[key], strict=True)), 2
                )
                for key, values in times.items()
            },
        }
        for name, times in taken.items()
    }


def write_table(found: dict[str, Any]) -> str:
    labels = {
        "served": "server: texts join and leave",
        "mixed": "`Bank.generate`, one batch of all",
        "separate": "`Bank.generate`, a batch for each adapter",
        "one by one": "`Bank.generate`, one by one",
    }
    lines = ["| way | tokens per CPU second | CPU time | wall time |", "|---|---|---|---|"]
    for name, label in labels.items():
        one = found["ways"][name]
        lines.append(f"| {label} | {one['tokens_per_cpu_s']} | {one['cpu_ratio']} | {one['wall_ratio']} |")
    wait = {name: statistics.median(values) for name, values in found["wait_s"].items()}
    lines += [
        "",
        f"Median of {found['rounds']} rounds; times relative to the server's. {found['texts']} texts of "
        f"{found['adapters']} adapters, {found['tokens']} tokens, {found['blocks']} blocks.",
        "",
        f"A text of {SHORT} tokens while one of {LONG} is written: {wait['served']:.2f} s by the server, "
        f"{wait['behind']:.2f} s behind `Bank.generate`, {wait['alone']:.2f} s by itself.",
        "",
        tell_machine(found["machine"]) + f"; load average {found['machine']['load_average']}",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "base", given.blocks)
        adapters = make_adapters(base, Path(folder) / "adapters", given.adapters)
        bank = Bank(base, adapters, device=given.device)
        service = Service(bank, ServiceConfig())
        service.start()
        texts = draw_texts(given.adapters, given.texts)
        tokens = sum(count for *_, count in texts)
        ways = make_ways(bank, service, texts)
        assert sum(write_by_server(service, texts)) == tokens, "a text met an end token"  # and warm-up
        taken = take_turns(ways, given.rounds)
        wait = measure_wait(bank, service, given.rounds)
        service.stop()
    found = {
        "machine": describe_machine(device=given.device),
        "blocks": given.blocks,
        "adapters": given.adapters,
        "texts": len(texts),
        "tokens": tokens,
        "rounds": given.rounds,
        "ways": summarise(taken, tokens),
        "wait_s": {name: [round(each, 3) for each in sorted(values)] for name, values in wait.items()},
    }
    given.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(write_table(found))
    print(write_table(found))


if __name__ == "__main__":
    main()

"""What a step on texts takes: logits in chunks, packed rows, the code of attention, and the making of tokens.

    python tests/benchmarks/text_memory.py [--rounds 5] [--threads 1]

Packed rows and tokens are measured on ../shared/data/e2e_nlg/devset.csv. All ways take turns in one process, round by
round; figures are medians of CPU seconds, with the smallest and the largest.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from machine import describe_machine
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput

from inlay import NextToken, TextProcessor, TextView, load_base, load_texts
from inlay.bases.processors import load_tokenizer
from inlay.measure.memory import measure_peak, plan_memory
from inlay.tasks.text import chunked_logits
from inlay.tasks.text import loss as loss_module
from inlay.tasks.text.packing import PackedView
from inlay.train.sampler import SeededDataset, SeededSampler

sys.path.insert(0, str(Path(__file__).parents[1]))

from places import SHARED

RESULTS = Path(__file__).parent / "results" / "text_memory.json"
E2E = SHARED / "e2e_nlg" / "devset.csv"
Way = Callable[[], object]


def take_turns(ways: dict[str, Way], rounds: int) -> dict[str, dict[str, float]]:
    """CPU seconds of each way, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for round_ in range(rounds + 1):
        for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
            begun = time.process_time()
            ways[name]()
            if round_:
                seconds[name].append(time.process_time() - begun)
    return {
        name: {"cpu_s": round(statistics.median(found), 3), "min": round(min(found), 3), "max": round(max(found), 3)}
        for name, found in seconds.items()
    }


def lora(base: Any) -> nn.Module:
    return get_peft_model(base, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).train()


class TorchChunks(NextToken):
    """What torch offers: a head that is one plain linear layer, without adapters, scale, soft cap or smoothing."""

    def __call__(self, model: Any, batch: dict[str, Any]) -> CausalLMOutput:
        inner = model.get_base_model()
        states = inner.transformer(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
        options = nn.LinearCrossEntropyOptions()
        states, labels = states[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        weight = inner.lm_head.weight
        return CausalLMOutput(loss=nn.functional.linear_cross_entropy(states, weight, labels, options=options))


def set_chunk(size: int) -> None:
    chunked_logits.CHUNK = loss_module.CHUNK = size


def measure_head(vocabulary: int, prompt: int, rounds: int) -> dict[str, Any]:
    """A step of two blocks of GPT-2's width on 4 texts of 256 tokens, of which the prompt is not learned."""
    size = {"vocab_size": vocabulary, "n_embd": 768, "n_layer": 2, "n_head": 12, "n_positions": 256}
    model = lora(GPT2LMHeadModel(GPT2Config(**size)))
    ids = torch.randint(1, vocabulary, (4, 256), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, own in enumerate(labels):
        own[: (prompt + row) if prompt else 0] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    default = chunked_logits.CHUNK
    losses = {"all at once": (NextToken(), 2**60), "in chunks": (NextToken(), default)}
    if hasattr(nn.functional, "linear_cross_entropy"):
        losses["torch.linear_cross_entropy"] = (TorchChunks(), default)

    def step(name: str) -> None:
        loss, chunk = losses[name]
        set_chunk(chunk)
        loss(model, batch).loss.backward()
        model.zero_grad()

    found: dict[str, Any] = take_turns({name: lambda name=name: step(name) for name in losses}, rounds)
    for name, (loss, chunk) in losses.items():
        set_chunk(chunk)
        found[name]["peak_mb"] = round(measure_peak(model, batch, loss=loss) / 1e6)
        if name in ("all at once", "in chunks"):
            found[name]["planned_mb"] = round(plan_memory(model, batch, loss=loss).peak / 1e6)
    set_chunk(default)
    return found


def measure_packing(rounds: int) -> dict[str, Any]:
    """Steps of LoRA on the embedded GPT-2 with about as many tokens each: batches of one length, at random, packed."""
    data = load_texts(str(E2E))
    processor = TextProcessor(load_tokenizer("builtin:gpt2-tiny"), separator=data.separator)
    view = TextView(data.train.select(range(1024)), processor)
    packed = PackedView(view, processor.max_length)
    model, loss = lora(load_base("builtin:gpt2-tiny")), NextToken()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    steps, rows = 8, 8
    texts = round(rows * len(view) / len(packed))
    tokens: dict[str, int] = {}

    def run(name: str, own: Any, size: int, lengths: Any) -> None:
        order = SeededSampler(len(own), size, steps, seed=0, lengths=lengths)
        count = 0
        for batch in DataLoader(SeededDataset(own, 0), batch_sampler=order, collate_fn=own.collate):
            loss(model, batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            count += int((batch["labels"] != -100).sum())
        tokens[name] = count

    found: dict[str, Any] = take_turns(
        {
            "grouped by length": lambda: run("grouped by length", view, texts, view.lengths),
            "at random": lambda: run("at random", view, texts, None),
            "packed": lambda: run("packed", packed, rows, packed.lengths),
        },
        rounds,
    )
    for name, row in found.items():
        row["learned_tokens_per_cpu_s"] = round(tokens[name] / row["cpu_s"])
    return {"texts_in_a_step": texts, "packed_rows_in_a_step": rows, "packed": packed.report, **found}


def measure_attention(rounds: int) -> dict[str, Any]:
    """Forward and backward of LoRA on 8 texts of 256 tokens."""
    ids = torch.randint(1, 2048, (8, 256), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    models = {kind: lora(load_base("builtin:gpt2-tiny", attention=kind)) for kind in ("sdpa", "eager")}

    def step(kind: str) -> None:
        NextToken()(models[kind], batch).loss.backward()
        models[kind].zero_grad()

    found: dict[str, Any] = take_turns({kind: lambda kind=kind: step(kind) for kind in models}, rounds)
    for kind, model in models.items():
        found[kind]["peak_mb"] = round(measure_peak(model, batch, loss=NextToken()) / 1e6)
    return found


def measure_tokens(rounds: int) -> dict[str, Any]:
    """Prompts and completions of E2E as tokens and labels: `TextView`, and datasets.map of the same tokenizer."""
    data = load_texts(str(E2E))
    tokenizer = load_tokenizer("builtin:gpt2-tiny")
    processor = TextProcessor(tokenizer, separator=data.separator)
    datasets.disable_caching()
    datasets.disable_progress_bars()

    def encode(rows: dict[str, Any]) -> dict[str, Any]:
        prompts = tokenizer([prompt + "\n" for prompt in rows["prompt"]])["input_ids"]
        completions = tokenizer(rows["completion"])["input_ids"]
        pairs = list(zip(prompts, completions, strict=True))
        return {
            "input_ids": [[*p, *c, tokenizer.eos_token_id] for p, c in pairs],
            "labels": [[-100] * len(p) + [*c, tokenizer.eos_token_id] for p, c in pairs],
        }

    def use_map() -> None:
        data.train.map(encode, batched=True, remove_columns=data.train.column_names, keep_in_memory=True)

    found: dict[str, Any] = take_turns(
        {"TextView": lambda: TextView(data.train, processor), "datasets.map": use_map}, rounds
    )
    return {"pairs": len(data.train), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "head": {
            f"{vocabulary:,} tokens, {'all' if not prompt else 'half'} learned": measure_head(
                vocabulary, prompt, arguments.rounds
            )
            for vocabulary, prompt in ((50_257, 0), (50_257, 126), (128_256, 0))
        },
        "attention": measure_attention(arguments.rounds),
    }
    if E2E.is_file():
        result |= {"packing": measure_packing(arguments.rounds), "tokens": measure_tokens(arguments.rounds)}
    result |= {"rounds": arguments.rounds, "machine": describe_machine("datasets")}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    lines = [
        "| what | way | CPU s (min to max) | peak MB | planned MB | learned tokens a CPU s |",
        "|---|---|---|---|---|---|",
    ]
    groups = {**{f"head, {k}": v for k, v in result["head"].items()}}
    groups |= {k: result[k] for k in ("attention", "packing", "tokens") if k in result}
    for group, ways in groups.items():
        for way, row in ways.items():
            if isinstance(row, dict):
                more = [str(row.get(k, "-")) for k in ("peak_mb", "planned_mb", "learned_tokens_per_cpu_s")]
                lines.append(
                    f"| {group} | {way} | {row['cpu_s']} ({row['min']} to {row['max']}) | {' | '.join(more)} |"
                )
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

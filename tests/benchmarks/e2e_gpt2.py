"""Ways to tune a GPT-2 on the E2E task (Novikova et al. 2017) at equal steps: BLEU, ROUGE-L, time and memory.

    python tests/benchmarks/e2e_gpt2.py [--steps 300] [--seeds 0 1 2] [--folder runs/e2e]

Needs ../shared/data/e2e_nlg (42,061 training pairs, devset.csv) and ../shared/data/gpt2_tokenizer. The base is a GPT-2
of 4 blocks of width 128 with the real vocabulary of 50,257 tokens, pre-trained here on pairs of half the restaurants
and four of the seven cuisines; the methods are tuned on the other pairs, and write for the 547 meaning representations
in devset.csv. It is no pre-trained GPT-2: look at how the methods compare, not at how their figures compare with those
of papers. The training text is tokenised in its archive; `plain` undoes that, exactly but for doubled spaces
(`--check` compares the archive's development set with devset.csv). A run that is broken off goes on when started again.
"""

import argparse
import csv
import platform
import re
import statistics
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from machine import describe_machine
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from inlay import (
    Comparison,
    Decoding,
    NextToken,
    TextProcessor,
    TextTask,
    TextView,
    TrainConfig,
    compare,
    fit,
    judge,
    load_base,
    load_texts,
)
from inlay.files.atomic import write_json, writing
from inlay.methods import METHODS
from inlay.study.report import save_comparison, write_markdown_table

sys.path.insert(0, str(Path(__file__).parents[1]))
from places import SHARED

RESULTS = Path(__file__).parent / "results" / "e2e_gpt2"
UNSEEN_FOOD = {"Japanese", "Indian", "Chinese"}
RATES = {
    "lora": 5e-3,
    "attention-prefix": 3e-2,
    "prompt": 5e-2,
    "bottleneck": 5e-3,
    "partial": 2e-3,
    "full": 1e-3,
}
SLOTS = {"customerrating": "customer rating"}
# Hu et al. 2021, arXiv:2106.09685, table 3: GPT-2 medium on E2E, BLEU.
PAPER = {"full": 68.2, "adapter (0.37 M)": 66.3, "prefix": 69.7, "LoRA": 70.4}
LENGTH = 128  # tokens; 0.1 % of the pairs are longer


def plain(text: str) -> str:
    """Undo the tokenisation of the archive."""
    text = re.sub(r" ([.,;:!?)%])", r"\1", text)
    text = re.sub(r"([(£$#]) ", r"\1", text)
    text = re.sub(r" ?([-/]) ?", r"\1", text)
    text = re.sub(r" ?' ?(s|t|re|ve|ll|d|m)\b", r"'\1", text)
    return re.sub(r"s ' ", "s' ", text).strip()


def read(archive: Path, split: str) -> list[tuple[dict[str, str], str]]:
    """Meaning representations, as slots and values, and their texts."""
    with tarfile.open(archive) as tar:
        sources, texts = (
            tar.extractfile(f"e2e_aligned/{name}.txt").read().decode().splitlines()  # type: ignore[union-attr]
            for name in (f"src_{split}", split)
        )
    slots = (dict(re.findall(r"__start_(\w+)__ (.*?) __end_", line)) for line in sources)
    return [(mr, plain(line.split(" <eos>")[0])) for mr, line in zip(slots, texts, strict=True)]


def write(path: Path, rows: list[tuple[dict[str, str], str]]) -> None:
    """A csv of mr and ref, as the E2E challenge writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("mr", "ref"))
        for mr, text in rows:
            writer.writerow((", ".join(f"{SLOTS.get(k, k)}[{v.replace('£ ', '£')}]" for k, v in mr.items()), text))


def prepare(data: Path, folder: Path) -> None:
    """Split the training pairs into those of the base and those of the methods."""
    rows = read(next(data.glob("train_valid_aligned/*.tar.gz")), "train")
    names = set(sorted({mr["name"] for mr, _ in rows})[::2])
    seen = [row for row in rows if row[0]["name"] in names and row[0].get("food") not in UNSEEN_FOOD]
    rest = [row for row in rows if row[0]["name"] not in names or row[0].get("food") in UNSEEN_FOOD]
    meanings = sorted({tuple(mr.items()) for mr, _ in rest})
    held_out = set(meanings[:: len(meanings) // 60])
    write(folder / "seen" / "train.csv", seen[:-500])
    write(folder / "seen" / "validation.csv", seen[-500:])
    write(folder / "rest" / "train.csv", [row for row in rest if tuple(row[0].items()) not in held_out])
    write(folder / "rest" / "validation.csv", [row for row in rest if tuple(row[0].items()) in held_out])
    (folder / "rest" / "test.csv").write_bytes((data / "devset.csv").read_bytes())


def pretrain(folder: Path, tokenizer: Path, steps: int) -> None:
    """The base, from random weights."""
    torch.manual_seed(0)
    words = GPT2TokenizerFast(vocab=str(tokenizer / "vocab.json"), merges=str(tokenizer / "merges.txt"))
    words.model_max_length = LENGTH
    model = GPT2LMHeadModel(GPT2Config(n_embd=128, n_layer=4, n_head=4, n_positions=256))
    processor, data = TextProcessor(words), load_texts(str(folder / "seen"))
    examples, held_out = TextView(data.train, processor), TextView(data.validation, processor)
    config = TrainConfig(
        str(folder / "pretraining"), epochs=steps * 32 / len(examples), learning_rate=3e-3, weight_decay=0.01, workers=0
    )
    fit(model, examples, held_out, config, collate=examples.collate, loss=NextToken())
    with writing(folder / "base") as new:
        model.save_pretrained(str(new))
        words.save_pretrained(str(new))


def time_steps(base: Path, data: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step of each method, on the same batches by turns in one process."""
    processor = TextProcessor(AutoTokenizer.from_pretrained(base))
    view, loss = TextView(load_texts(str(data)).train, processor), NextToken()
    steppers: dict[str, Callable[[int], float]] = {}
    for name in arguments.methods:
        model = METHODS[name].adapt(load_base(base), arguments.width).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)

        def step(k: int, model: torch.nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> float:
            batch = view.collate([view[i] for i in range(k * arguments.batch_size, (k + 1) * arguments.batch_size)])
            begun = time.perf_counter()
            loss(model, batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - begun

        steppers[name] = step
    rounds = [{name: step(k) for name, step in steppers.items()} for k in range(13)]
    return {name: statistics.median(each[name] for each in rounds[1:]) for name in steppers}


def report(comparison: Comparison, untuned: dict[str, float], arguments: argparse.Namespace) -> str:
    """The table, with what a paper reports beside it."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    scores = ", ".join(f"{name} {value:.1f}" for name, value in untuned.items())
    theirs = ", ".join(f"{name} {bleu}" for name, bleu in PAPER.items())
    paragraphs = [
        "# Tuning a small GPT-2 on E2E",
        f"{arguments.steps} steps of {arguments.batch_size} pairs, seeds {arguments.seeds}, width {arguments.width}, "
        "greedy; devset.csv (547 meaning representations, 4,672 references); CPU, "
        f"{torch.get_num_threads()} thread(s), {versions}. Written by `tests/benchmarks/e2e_gpt2.py`.",
        write_markdown_table(comparison),
        f"The base before tuning: {scores}. It has not seen some names and cuisines; their words have untrained "
        "embeddings, which full tuning alone changes. Steps were timed by turns, 12 of each method.",
        "As reported by Hu et al. 2021 (arXiv:2106.09685, table 3), not measured here: GPT-2 medium (355 M parameters, "
        f"real pre-training, 5 epochs, 10 beams, the challenge's own script and test set), BLEU: {theirs}.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def main() -> None:
    """Prepare, pre-train, compare, write down."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/e2e"))
    parser.add_argument("--base_steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--check", action="store_true", help="Compare `plain` with the development set, and stop.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as the figures were measured
    data, folder = SHARED / "e2e_nlg", arguments.folder
    if arguments.check:
        with (data / "devset.csv").open(encoding="utf-8-sig") as file:
            wanted = [" ".join(row["ref"].split()) for row in csv.DictReader(file)]
        found = [text for _, text in read(next(data.glob("train_valid_aligned/*.tar.gz")), "valid")]
        print(f"{sum(a == b for a, b in zip(wanted, found, strict=True))} of {len(wanted)} texts are equal")
        return
    if not (folder / "rest" / "test.csv").exists():
        prepare(data, folder)
    if not (folder / "base").exists():
        pretrain(folder, SHARED / "gpt2_tokenizer", arguments.base_steps)
    processor = TextProcessor(AutoTokenizer.from_pretrained(folder / "base"))
    untuned = judge(
        AutoModelForCausalLM.from_pretrained(folder / "base").eval(),
        processor,
        load_texts(str(folder / "rest")),
        Decoding(),
    )
    assert untuned is not None
    print(f"the base before tuning: {untuned}", flush=True)
    comparison = compare(
        TextTask(str(folder / "base"), str(folder / "rest")),
        TrainConfig(str(folder / "runs"), batch_size=arguments.batch_size, eval_every=arguments.steps, workers=0),
        methods=arguments.methods,
        learning_rates={name: [RATES[name]] for name in arguments.methods},
        seeds=arguments.seeds,
        width=arguments.width,
        steps=arguments.steps,
    )
    seconds = time_steps(folder / "base", folder / "rest", arguments)
    rows = [replace(row, costs={**row.costs, "steps_per_second": 1 / seconds[row.method]}) for row in comparison.rows]
    comparison = replace(comparison, base="gpt2-e2e", data="e2e_nlg", rows=rows)
    save_comparison(comparison, folder / "report")
    text = report(comparison, untuned.total, arguments)
    write_json(RESULTS.with_suffix(".json"), {"machine": describe_machine(), **comparison.to_dict()})
    RESULTS.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

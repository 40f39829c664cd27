"""Training step of a bottleneck adapter on a ViT-base-sized model: inlay beside the library `adapters`.

    python -m venv VENV && VENV/bin/pip install adapters torch==2.13.0
    python tests/benchmarks/bottleneck_vs_adapters.py --adapters_python VENV/bin/python [--rounds 5] [--steps 3]

The library pins its own transformers, so each side is a child process with its own Python. In a round both are started
afresh and take turns, step by step, so that a machine that slows down slows both; the figure is the ratio in a round.
A step is forward, backward and AdamW on 8 random pictures of 224 x 224, base and head frozen, float32, width 64, relu.
Both sides get the same weights, filled by name, and must give the same losses, or the run stops: the adapter is the
same. Start-up and the first step are outside the timed part.

Memory is measured twice: the peak of the resident set above what it was with the model built, and the peak of the
tensors that one step allocates (profiler). The file is what each side's own save writes, as safetensors.

Variants: `double`, after attention and MLP (Houlsby et al. 2019, arXiv:1902.00751); `single`, after the MLP only. The
library's SeqBnConfig is another adapter (it adds the block's residual to the input), so both use DoubleSeqBnConfig.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "bottleneck_vs_adapters.json"
SIDES = ("inlay", "adapters")
VARIANTS = {"double": ["attention", "mlp"], "single": ["mlp"]}
WIDTH, HIDDEN, BATCH, RATE = 64, 768, 8, 1e-4
NAMES = [  # the parameters of both sides under one name
    (r"^base_model\.model\.|base_layer\.|\.default\b", ""),
    (r"encoder\.layer\.", "layers."),
    (r"attention\.attention\.(query|key|value)", lambda m: f"attention.{m[1][0]}_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"attention_adapters\.adapters\.bench\.adapter_(down|up)(\.0)?", r"attention.o_proj.\1"),
    (r"output\.output_adapters\.adapters\.bench\.adapter_(down|up)(\.0)?", r"mlp.fc2.\1"),
    (r"(\d)\.output\.dense", r"\1.mlp.fc2"),
]


def one_name(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def named(model: Any) -> dict[str, Any]:
    """The weights of a side under one name each; inlay holds both matrices of a site in one tensor, and both biases."""
    found = {}
    for name, value in model.named_parameters():
        site, _, part = one_name(name).rpartition(".inlay_bottleneck_")
        if part == "weight":
            found |= {f"{site}.down.weight": value[0], f"{site}.up.weight": value[1].T}
        elif part == "bias":
            found |= {f"{site}.down.bias": value[:WIDTH], f"{site}.up.bias": value[WIDTH:]}
        else:
            found[one_name(name)] = value
    return found


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS is the resident set now, VmHWM its peak since the last reset."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def build(side: str, variant: str) -> Any:
    """The ViT with its adapter; only the adapter is trainable, and every weight is filled by its name."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    sites = VARIANTS[variant]
    model = ViTForImageClassification(ViTConfig())
    if side == "inlay":
        from peft import get_peft_model

        from inlay.methods.bottleneck import BottleneckConfig

        model = get_peft_model(model, BottleneckConfig(width=WIDTH, sites=sites, placement="serial", activation="relu"))
    else:
        import adapters

        adapters.init(model)
        config = adapters.DoubleSeqBnConfig(
            mh_adapter="attention" in sites, reduction_factor=HIDDEN / WIDTH, non_linearity="relu"
        )
        model.add_adapter("bench", config=config)
        model.train_adapter("bench")
        model.classifier.requires_grad_(False)
    with torch.no_grad():
        for name, value in named(model).items():
            draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            mean = 1.0 if re.search(r"norm.*weight", name) else 0.0
            value.copy_(torch.empty(value.shape).normal_(mean, 0.02, generator=draw))
    return model.train()


def tensor_peak(step: Any) -> int:
    """Bytes of tensors alive at the peak of one step, above those alive before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def save(side: str, model: Any) -> tuple[int, int]:
    """Bytes of the weights' file and of all files that the side's own save writes."""
    with tempfile.TemporaryDirectory() as folder:
        if side == "inlay":
            model.save_pretrained(folder)
        else:
            model.save_adapter(folder, "bench", with_head=False, use_safetensors=True)
        sizes = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
    return max(sizes), sum(sizes)


def child(side: str, variant: str, threads: int) -> None:
    """One side: answers `step` and `end` on stdin with a line of JSON each."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what the libraries print must not mix with the answers
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = build(side, variant)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=RATE, weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randn(BATCH, 3, 224, 224, generator=draw)
    labels = torch.arange(BATCH) % 2

    def step() -> float:
        loss = model(pixel_values=pictures, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if side == "adapters":
        versions["adapters"] = sys.modules["adapters"].__version__
    else:
        versions["peft"] = sys.modules["peft"].__version__
    built = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    answer(
        names=sorted(name for name, value in named(model).items() if value.requires_grad),
        parameters=sum(p.numel() for p in trainable),
        trainable_bytes=sum(p.numel() * p.element_size() for p in trainable),
        attention=model.config._attn_implementation,
        versions=versions,
    )
    for line in sys.stdin:
        if line.strip() == "step":
            wall, cpu = time.perf_counter(), time.process_time()
            loss = step()
            answer(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu, loss=loss)
        else:
            peak = memory("VmHWM")
            weights, folder = save(side, model)
            answer(
                rss_peak=peak,
                rss_above_model=peak - built,
                tensor_peak=tensor_peak(step),
                file_bytes=weights,
                folder_bytes=folder,
            )
            return


class Child:
    """The driver's end of one side."""

    def __init__(self, python: str, side: str, variant: str, threads: int) -> None:
        command = [python, __file__, "--side", side, "--variants", variant, "--threads", str(threads)]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "OMP_NUM_THREADS": str(threads),
        }
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}: its message is above")
        return json.loads(line)

    def ask(self, word: str) -> dict[str, Any]:
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self.answer()


def one_round(pythons: dict[str, str], variant: str, steps: int, threads: int, order: tuple[str, ...]) -> dict:
    """Both sides afresh, one warm-up step each, then `steps` steps each in turn."""
    sides = {side: Child(pythons[side], side, variant, threads) for side in order}
    result = {side: sides[side].answer() for side in order}
    runs: dict[str, list] = {side: [] for side in order}
    for _ in range(steps + 1):
        for side in order:
            runs[side].append(sides[side].ask("step"))
    for side in order:
        result[side] |= sides[side].ask("end")
        result[side]["loss"] = [run["loss"] for run in runs[side]]
        for key in ("seconds", "cpu_seconds"):
            result[side][key] = [run[key] for run in runs[side][1:]]
    ours, theirs = (result[side] for side in SIDES)
    if ours.pop("names") != theirs.pop("names") or ours["parameters"] != theirs["parameters"]:
        raise RuntimeError(f"not the same parameters: {ours['parameters']} and {theirs['parameters']}")
    if max(abs(a - b) for a, b in zip(ours["loss"], theirs["loss"], strict=True)) > 1e-3:
        raise RuntimeError(f"not the same adapter: losses {ours['loss']} and {theirs['loss']}")
    return result


def spread(values: list[float]) -> dict[str, float]:
    middle = statistics.median(values)
    return {"median": round(middle, 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def summary(rounds: list[dict]) -> dict[str, Any]:
    def ratio(key: str) -> dict[str, float]:
        def value(side: dict) -> float:
            return statistics.median(side[key]) if isinstance(side[key], list) else side[key]

        return spread([value(r["inlay"]) / value(r["adapters"]) for r in rounds])

    result: dict[str, Any] = {"rounds": len(rounds)}
    for side in SIDES:
        runs, last = [r[side] for r in rounds], rounds[-1][side]
        result[side] = {key: spread([s for run in runs for s in run[key]]) for key in ("seconds", "cpu_seconds")}
        for key in ("rss_peak", "rss_above_model", "tensor_peak"):
            result[side][key + "_mb"] = spread([run[key] / 1e6 for run in runs])
        for key in ("parameters", "trainable_bytes", "file_bytes", "folder_bytes", "loss", "attention", "versions"):
            result[side][key] = last[key]
        result[side]["file_above_trainable_bytes"] = last["file_bytes"] - last["trainable_bytes"]
    keys = ("seconds", "cpu_seconds", "rss_above_model", "rss_peak", "tensor_peak", "file_bytes")
    result["inlay_over_adapters"] = {key: ratio(key) for key in keys}
    return result


def table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"Bottleneck of width {WIDTH} on a ViT-base-sized model, training step, batch {BATCH}, "
        f"{machine['threads']} threads, {machine['cpu']}, {machine['date']}.",
        "Median (min to max); the ratio is taken within a round.",
        "",
    ]
    for variant in result["variants"]:
        figures = result["variants"][variant]
        ours, theirs, ratios = figures["inlay"], figures["adapters"], figures["inlay_over_adapters"]
        lines += [f"| {variant} | inlay | adapters | inlay / adapters |", "|---|---|---|---|"]
        for label, key, of in (
            ("step, s", "seconds", "seconds"),
            ("step, CPU s", "cpu_seconds", "cpu_seconds"),
            ("peak RSS above the model, MB", "rss_above_model_mb", "rss_above_model"),
            ("peak RSS, MB", "rss_peak_mb", "rss_peak"),
            ("peak of a step's tensors, MB", "tensor_peak_mb", "tensor_peak"),
            ("weights' file, bytes", "file_bytes", "file_bytes"),
            ("file above trainable bytes", "file_above_trainable_bytes", None),
            ("trainable parameters", "parameters", None),
        ):
            cells = [
                "{median:.6g} ({min:.6g} to {max:.6g})".format(**v) if isinstance(v, dict) else f"{v:,}"
                for v in (ours[key], theirs[key])
            ]
            cells.append("{median:.3f} ({min:.3f} to {max:.3f})".format(**ratios[of]) if of else "")
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("")
    for side in SIDES:
        lines.append(f"{side}: " + ", ".join(f"{k} {v}" for k, v in figures[side]["versions"].items()) + ".  ")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--adapters_python", help="Python of an environment with the library `adapters`.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="Timed steps of each side in a round.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        return child(arguments.side, arguments.variants[0], arguments.threads)
    if not arguments.adapters_python:
        parser.error("--adapters_python is required: the Python of an environment with the library `adapters`")
    from machine import describe_machine

    pythons = {"inlay": sys.executable, "adapters": arguments.adapters_python}
    result: dict[str, Any] = {
        "machine": describe_machine() | {"threads": arguments.threads},
        "batch": BATCH,
        "width": WIDTH,
        "variants": {},
    }
    for variant in arguments.variants:
        rounds = []
        for round_ in range(arguments.rounds):
            order = SIDES if round_ % 2 == 0 else SIDES[::-1]
            rounds.append(one_round(pythons, variant, arguments.steps, arguments.threads, order))
            times = {side: [round(s, 2) for s in rounds[-1][side]["seconds"]] for side in SIDES}
            print(f"{variant} {round_ + 1}/{arguments.rounds}", times, file=sys.stderr, flush=True)
        result["variants"][variant] = summary(rounds)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text(table(result))
    print(table(result))
    return None


if __name__ == "__main__":
    main()

"""What the options of `fit` that cost or save time do to a step: CPU time with the option over that without it.

    python tests/benchmarks/fit_options.py [--rounds 5] [--threads 1] [--cases ...]

Both take turns in one process, round by round; the figure is the ratio of the CPU times of a step within a round, and
the largest difference of the trained weights tells what the option changes. TF32, paged moments and the reads of
`read_every` are matters of a GPU, and are not measured on a CPU.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from fit_speed import CLASSES, SIZES, FitWatch, Items, Size, new_model
from machine import describe_machine, tell_machine
from peft import LoraConfig, get_peft_model

from inlay import TrainConfig, fit, load_base
from inlay.bases.sites import head_modules, lora_targets

RESULTS = Path(__file__).parent / "results" / "fit_options.json"
MOBILENET = Path(__file__).parents[3] / "shared" / "data" / "mobilenet_imagenet" / "hf" / "mobilenet_v2_1.0_224"


def mobilenet(name: str) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        set_seed(0)
        model = load_base(name, labels=[str(i) for i in range(CLASSES)], dtype="float32")
        targets, head = lora_targets(model), head_modules(model)
        return get_peft_model(model, LoraConfig(r=4, target_modules=targets, modules_to_save=head))

    return make


# name: (model, images, option and its value)
CASES: dict[str, tuple[Callable[[], torch.nn.Module], Size, dict[str, Any]]] = {
    "ema, vit-tiny": (lambda: new_model(SIZES["tiny"]), SIZES["tiny"], {"ema": 0.999}),
    "compile, vit-tiny": (lambda: new_model(SIZES["tiny"]), SIZES["tiny"], {"compile": True}),
    "channels_last, mobilenet-tiny": (
        mobilenet("builtin:mobilenet-tiny"),
        Size(0, 0, 0, 32, 0, 32, 8),
        {"channels_last": True},
    ),
    "channels_last, MobileNetV2 at 224": (
        mobilenet(str(MOBILENET)),
        Size(0, 0, 0, 224, 0, 4, 4),
        {"channels_last": True},
    ),
}


def take_steps(
    make: Callable[[], torch.nn.Module], size: Size, items: Items, option: dict[str, Any]
) -> tuple[Any, ...]:
    """CPU seconds of a step, and the trained weights."""
    model = make()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            output_dir=folder + "/run",
            epochs=size.steps * size.batch / len(items),
            batch_size=size.batch,
            learning_rate=2e-3,
            workers=0,
            eval_every=size.steps,
            precision="no",
            **option,
        )
        watch = FitWatch()
        fit(model, items, None, config, callback=watch)
    return watch.cpu / size.steps, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def predict(make: Callable[[], torch.nn.Module], items: Items, size: Size, ordered: bool) -> float:
    """CPU seconds of a forward pass."""
    model = make().eval()
    batch = torch.stack([item["pixel_values"] for item in items.items[: size.batch]])
    if ordered:
        for parameter in model.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        model(pixel_values=batch)
        begun = time.process_time()
        for _ in range(3):
            model(pixel_values=batch)
    return (time.process_time() - begun) / 3


def measure(name: str, rounds: int) -> dict[str, Any]:
    make, size, option = CASES[name]
    items = Items(size, 2 * size.batch)
    ratios, inference, plain = [], [], []
    for round_ in range(rounds + 1):
        without, weights = take_steps(make, size, items, {})
        with_, others = take_steps(make, size, items, option)
        if round_:  # the first one warms up, and compiles
            plain.append(without)
            ratios.append(with_ / without)
        if "channels_last" in option:
            both = [predict(make, items, size, ordered) for ordered in (False, True)]
            inference.append(both[1] / both[0])
    found = {
        "rounds": rounds,
        "cpu_ms_without": round(1e3 * statistics.median(plain), 2),
        "time_with_over_without": spread(ratios),
        "largest_difference_of_a_weight": max(float((weights[n] - others[n]).abs().max()) for n in weights),
    }
    return found | ({"inference_with_over_without": spread(inference)} if inference else {})


def spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def write_table(result: dict[str, Any]) -> str:
    lines = [
        f"{tell_machine(result['machine'])}. Median (smallest to largest) of the rounds.",
        "",
        "| option | rounds | without, ms | with / without | inference | largest difference of a weight |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["cases"].items():
        shown = [
            "{median:.2f} ({min:.2f} to {max:.2f})".format(**row[key]) if key in row else ""
            for key in ("time_with_over_without", "inference_with_over_without")
        ]
        difference = f"{row['largest_difference_of_a_weight']:.0e}"
        lines.append(f"| {name} | {row['rounds']} | {row['cpu_ms_without']} | {shown[0]} | {shown[1]} | {difference} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = [name for name in arguments.cases if "224" not in name or MOBILENET.exists()]
    result: dict[str, Any] = {
        "cases": {},
        "machine": describe_machine("accelerate"),
    }
    for name in cases:
        result["cases"][name] = measure(name, arguments.rounds)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
        RESULTS.with_suffix(".md").write_text(write_table(result))
    print(write_table(result))


if __name__ == "__main__":
    main()

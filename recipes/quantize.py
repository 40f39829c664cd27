"""Quantise a trained adapter to 8 bits where that pays on this machine, and compare before and after.

    python recipes/quantize.py                                   # the adapter of adapters_hub, on digits
    python recipes/quantize.py --source runs/lora_vit/adapter --dataset folder_of_class_folders --max_drop 0.005

Every mode is timed and judged on held-out examples first; the fastest that keeps the answers is written, and nothing
where none pays. `inlay quantize` does the same.
"""

from dataclasses import dataclass
from pathlib import Path

from inlay import option, run_recipe


@dataclass
class Quantization:
    """What is quantised, and what it may lose."""

    source: str = option("adapters_hub/digits-lora-vit-tiny", "Folder of an adapter or a model, or its Hub id.")
    dataset: str = option("builtin:digits", "Labelled data: training examples calibrate, held-out ones judge.")
    mode: str = option("auto", "auto, dynamic, static, bfloat16, torchao, or a mode by its name.")
    max_drop: float = option(0.01, "Largest drop of accuracy.", least=0, most=1)
    min_agreement: float = option(0.95, "Least share of answers that stay the same.", least=0, most=1)
    output_dir: str = option("runs/quantize", "Folder for both models.")


def main(quantization: Quantization) -> None:
    """Export, quantise, compare."""
    from inlay import evaluate, export, load_exported, quantize

    out = Path(quantization.output_dir)

    # 1. before: the adapter merged into its base, as a graph in float32
    export(quantization.source, out / "float32")

    # 2. quantise: the table of all modes is printed before one is chosen
    made = quantize(
        quantization.source,
        out / "quantized",
        calibrate=quantization.dataset,
        mode=quantization.mode,
        max_drop=quantization.max_drop,
        min_agreement=quantization.min_agreement,
        show=print,
    )

    # 3. load both, each checked by its golden output
    models = {name: load_exported(out / name) for name in ("float32", "quantized")}

    # 4. score both on all held-out examples
    accuracy = {name: evaluate(model, quantization.dataset).scores["accuracy"] for name, model in models.items()}

    # 5. compare; latencies are those of the probe, which took them by turns
    latency = {row["mode"]: row["latency_ms"] for row in made.probe["rows"]}
    for name, model in models.items():
        megabytes = model.file.bytes / 1e6
        print(f"{model.mode:<24}{latency[model.mode]:>8.3f} ms{megabytes:>8.2f} MB  accuracy {accuracy[name]}")
    print(f"saved {out / 'quantized'}")


if __name__ == "__main__":
    run_recipe(main, Quantization())

"""Prune an adapted image classifier to half its multiply-accumulates, heal it by a small LoRA, and save it.

    python recipes/prune_heal_vit.py                                          # the adapter of adapters_hub, on digits
    python recipes/prune_heal_vit.py --model runs/lora_vit/adapter --dataset FOLDER --target macs=0.3
    python recipes/prune_heal_vit.py --criterion thinet --scope local         # loads with transformers only

The model is a folder of a model or of an adapter, which is folded into its base: ViT, DeiT, DINOv2, GPT-2, BERT, Llama,
MobileNetV2, SqueezeNet or ShuffleNet, each with the data of its task.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import option, run_recipe


@dataclass
class Pruning:
    """What is pruned, and how."""

    model: str = option("adapters_hub/digits-lora-vit-tiny", "Folder of a model or of an adapter.")
    dataset: str = option("builtin:digits", "Labelled data of the model's task, as the other recipes take it.")
    target: str = option("macs=0.5", "macs, params or latency, as a share of what the model has.")
    criterion: Literal["taylor", "activation", "thinet", "apoz", "batchnorm", "l1", "l2", "random"] = option(
        "taylor", "What tells which units matter."
    )
    scope: Literal["global", "local"] = option("global", "Layers compete for units, or each keeps the same share.")
    compensate: bool = option(True, "Fit the next layer by least squares.")
    examples: int = option(256, "Training examples that the criterion looks at.", least=1)


@dataclass
class Healing:
    """The LoRA that heals it: Hu et al. 2021, arXiv:2106.09685."""

    share: float = option(0.05, "Of the pruned model's parameters.", above=0, most=1)
    steps: int = option(60, "Optimiser steps.", least=1)
    batch_size: int = option(32, "Examples in a step.", least=1)
    output_dir: str = option("runs/prune_heal_vit", "Folder of the run and of the model.")


def main(pruning: Pruning, healing: Healing) -> Path:
    """Load, prune, heal, measure, save."""
    from inlay import PruneReport, heal, load_trained, prune, save_pruned

    # 1. the trained model: an adapter is folded into its base
    dense = load_trained(pruning.model)

    # 2. leave out the units that matter least, until the target is met
    pruned = prune(
        dense,
        pruning.dataset,
        target=pruning.target,
        criterion=pruning.criterion,
        scope=pruning.scope,
        compensate=pruning.compensate,
        examples=pruning.examples,
    )

    # 3. heal: a LoRA on every layer, merged when it is trained
    run = Path(healing.output_dir)
    healed = heal(
        pruned.trained,
        pruning.dataset,
        share=healing.share,
        steps=healing.steps,
        batch_size=healing.batch_size,
        output_dir=run / "lora",
    )

    # 4. measure, on what training does not use
    scores = {
        name: model.score(pruning.dataset)
        for name, model in (("dense", dense), ("pruned", pruned.trained), ("healed", healed.trained))
    }

    # 5. save
    report = PruneReport(pruned.facts, pruned.kept, scores, healed.facts)
    folder = save_pruned(healed.trained, run / "model", report)
    print(report.summary(folder))
    return folder


if __name__ == "__main__":
    run_recipe(main, Pruning(), Healing())

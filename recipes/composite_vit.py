"""Fine-tune an image classifier with several methods in one adapter, then measure and save it.

    accelerate launch recipes/composite_vit.py                        # mix and match: prefix and parallel bottleneck
    accelerate launch recipes/composite_vit.py --methods lora prompt
    accelerate launch recipes/composite_vit.py --methods lora prefix bottleneck --width 4

The methods are trained together and saved in one file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import ImageTask, TrainConfig, option, run_recipe


@dataclass
class Composite:
    """Several methods together; mix and match (MAM): He et al. 2021, arXiv:2110.04366, section 4.6."""

    methods: list[Literal["lora", "prefix", "bottleneck", "prompt"]] = option(
        ["prefix", "bottleneck"], "Two or more methods; the bottleneck is parallel to the MLP."
    )
    width: int = option(8, "Rank, bottleneck size, prefix and prompt length.", least=1)


def main(method: Composite, task: ImageTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import LoraConfig, get_peft_model

    from inlay import (
        AttentionPrefixConfig,
        BottleneckConfig,
        CompositeConfig,
        VisualPromptConfig,
        head_modules,
        lora_targets,
        save_adapter,
    )

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the adapter and the new head are trainable
    width = method.width
    parts = {
        "lora": LoraConfig(r=width, lora_alpha=2 * width, target_modules=lora_targets(model)),
        "prefix": AttentionPrefixConfig(length=width),
        "bottleneck": BottleneckConfig(width=width, sites=["mlp"], placement="parallel", scale=4.0),
        "prompt": VisualPromptConfig(length=width),
    }
    config = CompositeConfig(parts=[parts[name] for name in method.methods], modules_to_save=head_modules(model))
    model = get_peft_model(model, config)

    # 3. train
    result = task.fit(model, data, train, method)

    # 4. measure
    report = task.report(model, data, result)

    # 5. save
    folder = Path(train.output_dir) / "adapter"
    save_adapter(model, folder, processor=data.processor, metrics=report.metrics)
    report.announce(folder)
    return folder


if __name__ == "__main__":
    run_recipe(main, Composite(), ImageTask(), TrainConfig(output_dir="runs/composite_vit", embedded_rate=1e-2))

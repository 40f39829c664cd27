"""Fine-tune an image classifier with visual prompts, then measure and save the adapter.

    accelerate launch recipes/prompt_vit.py                           # embedded base and data, no download
    accelerate launch recipes/prompt_vit.py --depth shallow --length 50
    accelerate launch recipes/prompt_vit.py --model facebook/dinov2-small --dataset FOLDER --length 20

Deep prompts enter every block, shallow ones the first. The base is a ViT-like encoder: ViT, DeiT, DINOv2, CLIP.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import ImageTask, TrainConfig, option, run_recipe


@dataclass
class VisualPrompt:
    """Visual prompt tuning (VPT): Jia et al. 2022, arXiv:2203.12119."""

    length: int = option(10, "Prompt length: tokens in each block that has prompts.", least=1)
    depth: Literal["deep", "shallow"] = option("deep", "Prompts in every block, or in the first only.")
    dropout: float = option(0.0, "Dropout on the prompts.", least=0, below=1)


def main(method: VisualPrompt, task: ImageTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import get_peft_model

    from inlay import VisualPromptConfig, head_modules, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the prompts and the new head are trainable
    config = VisualPromptConfig(
        length=method.length,
        deep=method.depth == "deep",
        dropout=method.dropout,
        modules_to_save=head_modules(model),
    )
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
    run_recipe(main, VisualPrompt(), ImageTask(), TrainConfig(output_dir="runs/prompt_vit", embedded_rate=3e-2))

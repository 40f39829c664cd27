"""Fine-tune an image classifier with LoRA, then measure and save the adapter.

    accelerate launch recipes/lora_vit.py                             # embedded base and data, no download
    accelerate launch recipes/lora_vit.py --model google/vit-base-patch16-224-in21k --dataset FOLDER --augment crop-flip
    accelerate launch recipes/lora_vit.py --model facebook/dinov2-small --quantize 8bit --optimizer adamw8bit

The base is any image classifier of transformers: ViT, DeiT, DINOv2 and Swin get LoRA on their linear layers,
convolutional networks as in lora_squeezenet.py. For another method of peft change `config`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import ImageTask, TrainConfig, option, run_recipe


@dataclass
class Lora:
    """LoRA: Hu et al. 2021, arXiv:2106.09685."""

    rank: int = option(8, "Rank r of the update B·A.", least=1)
    alpha: int = option(16, "Scale of the update: alpha / r.", least=1)
    dropout: float = option(0.0, "Dropout on the input of A.", least=0, below=1)
    sites: Literal["all", "attention"] = option(
        "all", "Every linear layer (in a convolutional network every convolution without groups), or q and v."
    )


def main(method: Lora, task: ImageTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import LoraConfig, get_peft_model

    from inlay import head_modules, lora_targets, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the adapter and the new head are trainable
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=lora_targets(model, method.sites),
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
    run_recipe(main, Lora(), ImageTask(), TrainConfig(output_dir="runs/lora_vit"))

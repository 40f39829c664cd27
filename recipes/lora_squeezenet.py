"""Fine-tune a convolutional classifier with LoRA, then measure and save the adapter.

    accelerate launch recipes/lora_squeezenet.py                      # embedded base and data, no download
    accelerate launch recipes/lora_squeezenet.py --model microsoft/resnet-18 --dataset FOLDER --augment crop-flip
    accelerate launch recipes/lora_squeezenet.py --model FOLDER --rank 4    # what `inlay import` made of torchvision's

LoRA on a k x k convolution is one of k x k to r channels and a point-wise one back. It stands next to every convolution
behind the stem that is not in groups, so that the file is one of plain peft and the update merges. lora_mobilenet.py
takes networks of grouped and depth-wise convolutions.
"""

from dataclasses import dataclass
from pathlib import Path

from inlay import ImageTask, TrainConfig, option, run_recipe


@dataclass
class Lora:
    """LoRA: Hu et al. 2021, arXiv:2106.09685."""

    rank: int = option(8, "Rank r of the update B·A.", least=1)
    alpha: int = option(16, "Scale of the update: alpha / r.", least=1)
    dropout: float = option(0.0, "Dropout on the input of A.", least=0, below=1)


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
        target_modules=lora_targets(model),
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
    train = TrainConfig(output_dir="runs/lora_squeezenet", embedded_rate=3e-3)
    run_recipe(main, Lora(), ImageTask(model="builtin:squeezenet-tiny"), train)

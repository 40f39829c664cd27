"""Fine-tune a network of depth-wise and grouped convolutions with LoRA, then measure and save the adapter.

    accelerate launch recipes/lora_mobilenet.py                       # embedded base and data, no download
    accelerate launch recipes/lora_mobilenet.py --model google/mobilenet_v2_1.0_224 --dataset FOLDER
    accelerate launch recipes/lora_mobilenet.py --model facebook/regnet-y-040 --rank 2

Every layer but the head is adapted, and the weight itself is changed: each group of a convolution by factors of its
own, a depth-wise convolution, whose factors would be larger than it, by its whole difference. It merges exactly.
lora_squeezenet.py trains plain LoRA of peft, next to convolutions without groups.
"""

from dataclasses import dataclass
from pathlib import Path

from inlay import ImageTask, TrainConfig, option, run_recipe


@dataclass
class ConvLora:
    """LoRA on convolutions: Yeh et al. 2023, arXiv:2309.14859."""

    rank: int = option(8, "Rank r of the update of each group.", least=1)
    scale: float = option(2.0, "Factor of the update B·A: alpha / r of LoRA.", above=0)


def main(method: ConvLora, task: ImageTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import get_peft_model

    from inlay import ConvLoraConfig, head_modules, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the adapter and the new head are trainable
    config = ConvLoraConfig(r=method.rank, scale=method.scale, modules_to_save=head_modules(model))
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
    train = TrainConfig(output_dir="runs/lora_mobilenet", embedded_rate=3e-3)
    run_recipe(main, ConvLora(), ImageTask(model="builtin:mobilenet-tiny"), train)

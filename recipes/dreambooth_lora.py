"""Teach a text-to-image pipeline a subject from a few images of it with LoRA, then measure and save the adapter.

    accelerate launch recipes/dreambooth_lora.py                      # embedded base and subject, no download
    accelerate launch recipes/dreambooth_lora.py --validation_prompt "a photo of sks dog on sand" "a dog on sand"
    accelerate launch recipes/dreambooth_lora.py --model stabilityai/stable-diffusion-xl-base-1.0 --dataset FOLDER \
        --prompt "a photo of sks dog" --class_prompt "a photo of a dog" --precision bf16 --gradient_checkpointing

FOLDER holds 4 to 6 images of the subject; the prompt names it by a word that the base does not know, sks, and by its
class. With --class_prompt the base paints images of the class first, which are learned next to the subject, so that
other dogs stay what they are. DreamBooth: Ruiz et al. 2023, arXiv:2208.12242.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import TextToImageTask, TrainConfig, option, run_recipe


@dataclass
class Lora:
    """LoRA: Hu et al. 2021, arXiv:2106.09685."""

    rank: int = option(8, "Rank r of the update B·A.", least=1)
    alpha: int = option(16, "Scale of the update: alpha / r.", least=1)
    dropout: float = option(0.0, "Dropout on the input of A.", least=0, below=1)
    sites: Literal["all", "attention"] = option(
        "all", "Every linear layer and 1x1 convolution in the blocks of the denoiser, or their attention only."
    )
    convolutions: bool = option(False, "Adapt the convolutions of its blocks too.")
    text_encoder: bool = option(False, "Adapt the attention of the text encoders too.")


def main(method: Lora, task: TextToImageTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import LoraConfig, get_peft_model

    from inlay import pipeline_targets, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the adapter is trainable
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=pipeline_targets(
            model, method.sites, convolutions=method.convolutions, text_encoders=method.text_encoder
        ),
    )
    model = get_peft_model(model, config)

    # 3. train, with images of the class and samples on the way where asked for
    result = task.fit(model, data, train, method)

    # 4. measure
    report = task.report(model, data, result)

    # 5. save
    folder = Path(train.output_dir) / "adapter"
    save_adapter(model, folder, processor=data.processor, metrics=report.metrics)
    report.announce(folder)
    return folder


if __name__ == "__main__":
    run_recipe(
        main,
        Lora(),
        TextToImageTask(),
        TrainConfig(output_dir="runs/dreambooth_lora", epochs=200, batch_size=4, eval_every=100),
    )

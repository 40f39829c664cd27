"""Teach SAM your kind of objects with LoRA, from images and label maps, then measure and save the adapter.

    accelerate launch recipes/lora_sam.py                             # embedded base and data, no download
    accelerate launch recipes/lora_sam.py --model facebook/sam-vit-base --dataset FOLDER --where decoder
    accelerate launch recipes/lora_sam.py --dataset FOLDER --crop 256 --meaning classes

FOLDER has images/ and labels/ with equal file names. A label is a map of 8 or 16 bits in which every object has its own
number (with `--meaning classes`, every class). SAM: Kirillov et al. 2023, arXiv:2304.02643.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import MaskTask, TrainConfig, option, run_recipe


@dataclass
class Lora:
    """LoRA: Hu et al. 2021, arXiv:2106.09685."""

    rank: int = option(8, "Rank r of the update B·A.", least=1)
    alpha: int = option(16, "Scale of the update: alpha / r.", least=1)
    dropout: float = option(0.0, "Dropout on the input of A.", least=0, below=1)
    where: Literal["encoder", "decoder", "both"] = option(
        "both", "Part of SAM to adapt: the image encoder, the mask decoder or both."
    )


def main(method: Lora, task: MaskTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import LoraConfig, get_peft_model

    from inlay import sam_targets, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the adapter is trainable
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=sam_targets(model, "linear", method.where),
    )
    model = get_peft_model(model, config)

    # 3. train, on points and boxes in turn
    result = task.fit(model, data, train, method)

    # 4. measure, compared with the base
    report = task.report(model, data, result)

    # 5. save
    folder = Path(train.output_dir) / "adapter"
    save_adapter(model, folder, processor=data.processor, metrics=report.metrics)
    report.announce(folder)
    return folder


if __name__ == "__main__":
    run_recipe(
        main, Lora(), MaskTask(), TrainConfig(output_dir="runs/lora_sam", epochs=8, batch_size=8, eval_start=True)
    )

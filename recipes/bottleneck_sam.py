"""Teach SAM your kind of objects with bottleneck adapters, then measure and save them.

    accelerate launch recipes/bottleneck_sam.py                       # embedded base and data, no download
    accelerate launch recipes/bottleneck_sam.py --model facebook/sam-vit-base --dataset FOLDER --where encoder

FOLDER has images/ and labels/ with equal file names. A label is a map of 8 or 16 bits in which every object has its own
number (with `--meaning classes`, every class). SAM: Kirillov et al. 2023, arXiv:2304.02643.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import MaskTask, TrainConfig, option, run_recipe


@dataclass
class Bottleneck:
    """Bottleneck adapters after attention and MLP: Houlsby et al. 2019, arXiv:1902.00751."""

    width: int = option(8, "Bottleneck size.", least=1)
    activation: str = option("relu", "Activation function, by its name in transformers, or none.")
    dropout: float = option(0.0, "Dropout on the bottleneck.", least=0, below=1)
    scale: float = option(1.0, "Scale of the adapter's output.")
    where: Literal["encoder", "decoder", "both"] = option(
        "both", "Part of SAM to adapt: the image encoder, the mask decoder or both."
    )


def main(method: Bottleneck, task: MaskTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import get_peft_model

    from inlay import BottleneckConfig, sam_targets, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the adapter is trainable
    config = BottleneckConfig(
        width=method.width,
        activation=None if method.activation == "none" else method.activation,
        dropout=method.dropout,
        scale=method.scale,
        target_modules=sam_targets(model, "output", method.where),
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
        main,
        Bottleneck(),
        MaskTask(),
        TrainConfig(output_dir="runs/bottleneck_sam", epochs=8, batch_size=8, eval_start=True),
    )

"""Teach SAM your kind of objects with a prefix in every attention, then measure and save it.

    accelerate launch recipes/prefix_sam.py                           # embedded base and data, no download
    accelerate launch recipes/prefix_sam.py --model facebook/sam-vit-base --dataset FOLDER --where encoder --length 32

Learned keys and values are put in front of those of each window's tokens and of the decoder's tokens.

FOLDER has images/ and labels/ with equal file names. A label is a map of 8 or 16 bits in which every object has its own
number (with `--meaning classes`, every class). SAM: Kirillov et al. 2023, arXiv:2304.02643.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import MaskTask, TrainConfig, option, run_recipe


@dataclass
class Prefix:
    """A prefix in every attention: Li & Liang 2021, arXiv:2101.00190."""

    length: int = option(8, "Prefix length: keys and values in each attention.", least=1)
    projection: int | None = option(
        None, "Hidden size of an MLP that computes the prefix during training; default: none.", least=1
    )
    where: Literal["encoder", "decoder", "both"] = option(
        "both", "Part of SAM to adapt: the image encoder, the mask decoder or both."
    )


def main(method: Prefix, task: MaskTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import get_peft_model

    from inlay import AttentionPrefixConfig, sam_targets, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the prefix is trainable
    config = AttentionPrefixConfig(
        length=method.length,
        projection=method.projection,
        target_modules=sam_targets(model, "attention", method.where),
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
        main, Prefix(), MaskTask(), TrainConfig(output_dir="runs/prefix_sam", epochs=8, batch_size=8, eval_start=True)
    )

"""Fine-tune parts of SAM for your kind of objects, then measure and save the difference from the base.

    accelerate launch recipes/partial_sam.py                          # embedded base and data, no download
    accelerate launch recipes/partial_sam.py --model facebook/sam-vit-base --dataset FOLDER --where decoder
    accelerate launch recipes/partial_sam.py --where decoder --quantize 8bit    # the frozen encoder in 8 bits

The last block and the neck of the encoder are trained, and nearly all of the decoder.

FOLDER has images/ and labels/ with equal file names. A label is a map of 8 or 16 bits in which every object has its own
number (with `--meaning classes`, every class). SAM: Kirillov et al. 2023, arXiv:2304.02643.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import MaskTask, TrainConfig, Unsupported, option, run_recipe


@dataclass
class Partial:
    """Partial fine-tuning, stored as a task vector: Ilharco et al. 2023, arXiv:2212.04089."""

    where: Literal["encoder", "decoder", "both"] = option(
        "both", "Part of SAM to adapt: the image encoder, the mask decoder or both."
    )


def main(method: Partial, task: MaskTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import get_peft_model

    from inlay import PartialConfig, sam_targets, save_adapter

    if task.quantize and method.where != "decoder":
        raise Unsupported("weights in 8 or 4 bits cannot be trained; leave --quantize out, or train --where decoder.")

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the chosen weights are trainable
    config = PartialConfig(target_modules=sam_targets(model, "block", method.where))
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
        main, Partial(), MaskTask(), TrainConfig(output_dir="runs/partial_sam", epochs=8, batch_size=8, eval_start=True)
    )

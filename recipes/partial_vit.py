"""Fine-tune the last blocks of an image classifier, or its biases or norms, and save the difference from the base.

    accelerate launch recipes/partial_vit.py                          # the last block of the embedded base
    accelerate launch recipes/partial_vit.py --train_what bias        # BitFit, in every block
    accelerate launch recipes/partial_vit.py --last 2 --augment none --cache_frozen memory

With `--cache_frozen` the frozen blocks run once per image and their output is stored. BitFit: Ben Zaken et al. 2022,
arXiv:2106.10199.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import ImageTask, TrainConfig, Unsupported, option, run_recipe


@dataclass
class Partial:
    """Partial fine-tuning, stored as a task vector: Ilharco et al. 2023, arXiv:2212.04089."""

    last: int | None = option(
        None, "Number of last blocks to train; default: 1, or every block for bias and norm.", least=1
    )
    train_what: Literal["all", "bias", "norm"] = option(
        "all", "All weights of these blocks, their biases or their norms."
    )


def main(method: Partial, task: ImageTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import get_peft_model

    from inlay import PartialConfig, head_modules, save_adapter

    if task.quantize and method.train_what == "all":
        raise Unsupported("weights in 8 or 4 bits cannot be trained; leave --quantize out, or --train_what bias.")

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the chosen weights and the new head are trainable
    last = 1 if method.last is None and method.train_what == "all" else method.last
    config = PartialConfig(last=last, train=method.train_what, modules_to_save=head_modules(model))
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
    run_recipe(main, Partial(), ImageTask(), TrainConfig(output_dir="runs/partial_vit", embedded_rate=3e-3))

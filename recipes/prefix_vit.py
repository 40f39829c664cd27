"""Fine-tune an image classifier with a prefix in every attention, then measure and save the adapter.

    accelerate launch recipes/prefix_vit.py                           # embedded base and data, no download
    accelerate launch recipes/prefix_vit.py --length 32 --projection 64
    accelerate launch recipes/prefix_vit.py --model FOLDER --dataset FOLDER --quantize 8bit --optimizer adamw8bit

Learned keys and values are put in front of those of the image's tokens. With `--projection` an MLP computes them during
training; the file holds the keys and values only.
"""

from dataclasses import dataclass
from pathlib import Path

from inlay import ImageTask, TrainConfig, option, run_recipe


@dataclass
class Prefix:
    """A prefix in every attention: Li & Liang 2021, arXiv:2101.00190."""

    length: int = option(16, "Prefix length: keys and values in each block.", least=1)
    projection: int | None = option(
        None, "Hidden size of an MLP that computes the prefix during training; default: none.", least=1
    )


def main(method: Prefix, task: ImageTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import get_peft_model

    from inlay import AttentionPrefixConfig, head_modules, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the prefix and the new head are trainable
    config = AttentionPrefixConfig(
        length=method.length, projection=method.projection, modules_to_save=head_modules(model)
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
    run_recipe(main, Prefix(), ImageTask(), TrainConfig(output_dir="runs/prefix_vit", embedded_rate=5e-2))

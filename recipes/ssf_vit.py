"""Fine-tune an image classifier with SSF, then measure and save the adapter.

    accelerate launch recipes/ssf_vit.py                              # embedded base and data, no download
    accelerate launch recipes/ssf_vit.py --model google/vit-base-patch16-224-in21k --dataset FOLDER --augment crop-flip
    accelerate launch recipes/ssf_vit.py --model microsoft/resnet-50 --dataset FOLDER --learning_rate 3e-3

Every linear layer, convolution and norm gets a scale and a shift per feature. `inlay merge` folds them into the weights
and biases of the base, so that they cost nothing when the model is used.
"""

from dataclasses import dataclass
from pathlib import Path

from inlay import ImageTask, TrainConfig, option, run_recipe


@dataclass
class Ssf:
    """SSF: Lian et al. 2022, arXiv:2210.08823."""

    add_biases: bool = option(False, "Shift also behind modules that have no bias; such a merged model keeps no shift.")


def main(method: Ssf, task: ImageTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import get_peft_model

    from inlay import SsfConfig, head_modules, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the adapter and the new head are trainable
    config = SsfConfig(add_biases=method.add_biases, modules_to_save=head_modules(model))
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
    run_recipe(main, Ssf(), ImageTask(), TrainConfig(output_dir="runs/ssf_vit", embedded_rate=3e-2))

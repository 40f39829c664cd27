"""Fine-tune an image classifier with bottleneck adapters, then measure and save the adapter.

    accelerate launch recipes/bottleneck_vit.py                       # embedded base and data, no download
    accelerate launch recipes/bottleneck_vit.py --placement parallel --sites mlp --scale 0.1    # AdaptFormer
    accelerate launch recipes/bottleneck_vit.py --activation none     # linear: merges into the weights, no latency

After the MLP only (`--sites mlp`): Pfeiffer et al. 2020, arXiv:2005.00052; parallel: He et al. 2021, arXiv:2110.04366;
linear: Luo et al. 2023, arXiv:2302.08106.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import ImageTask, TrainConfig, option, run_recipe


@dataclass
class Bottleneck:
    """Bottleneck adapters, serial after attention and MLP: Houlsby et al. 2019, arXiv:1902.00751."""

    width: int = option(8, "Bottleneck size.", least=1)
    sites: list[Literal["attention", "mlp"]] = option(["attention", "mlp"], "attention, mlp or both.")
    placement: Literal["serial", "parallel"] = option(
        "serial", "serial: on the sublayer's output; parallel: next to the sublayer, on its input."
    )
    activation: str = option("relu", "Activation function, by its name in transformers, or none.")
    dropout: float = option(0.0, "Dropout on the bottleneck.", least=0, below=1)
    scale: float = option(1.0, "Scale of the adapter's output.")


def main(method: Bottleneck, task: ImageTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import get_peft_model

    from inlay import BottleneckConfig, head_modules, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the adapter and the new head are trainable
    config = BottleneckConfig(
        width=method.width,
        sites=[*method.sites],
        placement=method.placement,
        activation=None if method.activation == "none" else method.activation,
        dropout=method.dropout,
        scale=method.scale,
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
    run_recipe(main, Bottleneck(), ImageTask(), TrainConfig(output_dir="runs/bottleneck_vit", embedded_rate=1e-2))

"""Fine-tune a convolutional classifier with Conv-Adapter, then measure and save the adapter.

    accelerate launch recipes/conv_adapter_squeezenet.py              # embedded base and data, no download
    accelerate launch recipes/conv_adapter_squeezenet.py --model google/mobilenet_v2_1.0_224 --dataset FOLDER
    accelerate launch recipes/conv_adapter_squeezenet.py --model microsoft/resnet-50 --placement residual_parallel

Next to every convolution of more than 1x1 stands a bottleneck of two: a depth-wise one of the same size and stride, and
a point-wise one. The base is any convolutional network of transformers, or SqueezeNet and ShuffleNet of inlay.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import ImageTask, TrainConfig, option, run_recipe


@dataclass
class ConvAdapter:
    """Conv-Adapter: Chen et al. 2022, arXiv:2208.07463."""

    width: int = option(8, "Channels of the bottleneck.", least=1)
    placement: Literal["conv_parallel", "conv_sequential", "residual_parallel", "residual_sequential"] = option(
        "conv_parallel", "Next to each convolution or behind it; next to each residual block or behind it."
    )
    activation: str = option("relu", "Activation function, by its name in transformers.")


def main(method: ConvAdapter, task: ImageTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import get_peft_model

    from inlay import ConvAdapterConfig, head_modules, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the adapter and the new head are trainable
    config = ConvAdapterConfig(
        width=method.width,
        placement=method.placement,
        activation=method.activation,
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
    train = TrainConfig(output_dir="runs/conv_adapter_squeezenet", embedded_rate=1e-2)
    run_recipe(main, ConvAdapter(), ImageTask(model="builtin:squeezenet-tiny"), train)

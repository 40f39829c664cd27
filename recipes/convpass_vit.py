"""Fine-tune an image classifier with convolutional bypasses, then measure and save the adapter.

    accelerate launch recipes/convpass_vit.py                         # embedded base and data, no download
    accelerate launch recipes/convpass_vit.py --model google/vit-base-patch16-224-in21k --dataset FOLDER --dropout 0.1
    accelerate launch recipes/convpass_vit.py --sites attention       # only next to attention: ConvPass-attn

A bypass is a 1x1, a 3x3 and a 1x1 convolution over the grid of the patches, which a vision transformer does not know
of: it helps most where the data is small. ViT, DeiT, DINOv2, CLIP and SigLIP have such a grid.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import ImageTask, TrainConfig, option, run_recipe


@dataclass
class ConvPass:
    """Convolutional bypasses: Jie & Deng 2022, arXiv:2207.07039."""

    width: int = option(8, "Channels of the bypass.", least=1)
    sites: list[Literal["attention", "mlp"]] = option(["attention", "mlp"], "attention, mlp or both.")
    activation: str = option("quick_gelu", "Activation function, by its name in transformers.")
    dropout: float = option(0.0, "Dropout on the channels; 0.1 in the authors' code.", least=0, below=1)
    scale: float = option(1.0, "Scale of the bypass's output.")


def main(method: ConvPass, task: ImageTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import get_peft_model

    from inlay import ConvPassConfig, head_modules, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the adapter and the new head are trainable
    config = ConvPassConfig(
        width=method.width,
        sites=[*method.sites],
        activation=method.activation,
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
    run_recipe(main, ConvPass(), ImageTask(), TrainConfig(output_dir="runs/convpass_vit", embedded_rate=1e-2))

"""Fine-tune a language model with bottleneck adapters, then measure and save them.

    accelerate launch recipes/bottleneck_gpt2.py                      # embedded base and data, no download
    accelerate launch recipes/bottleneck_gpt2.py --sites mlp --placement parallel
    accelerate launch recipes/bottleneck_gpt2.py --model FOLDER --dataset pairs.jsonl --quantize 8bit

After the MLP only (`--sites mlp`): Pfeiffer et al. 2020, arXiv:2005.00052; parallel: He et al. 2021, arXiv:2110.04366.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import Decoding, TextTask, TrainConfig, option, run_recipe


@dataclass
class Bottleneck:
    """Bottleneck adapters, serial after attention and MLP: Houlsby et al. 2019, arXiv:1902.00751."""

    width: int = option(16, "Bottleneck size.", least=1)
    sites: list[Literal["attention", "mlp"]] = option(["attention", "mlp"], "attention, mlp or both.")
    placement: Literal["serial", "parallel"] = option(
        "serial", "serial: on the sublayer's output; parallel: next to the sublayer, on its input."
    )
    activation: str = option("relu", "Activation function, by its name in transformers, or none.")
    dropout: float = option(0.0, "Dropout on the bottleneck.", least=0, below=1)
    scale: float | None = option(None, "Scale of the adapter's output; default: 1, or 4 if parallel.")


def main(method: Bottleneck, task: TextTask, train: TrainConfig, decoding: Decoding) -> Path:
    """Train, measure, save."""
    from peft import get_peft_model

    from inlay import BottleneckConfig, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the adapter is trainable
    usual = 4.0 if method.placement == "parallel" else 1.0  # He et al. 2021, section 4.5
    config = BottleneckConfig(
        width=method.width,
        sites=[*method.sites],
        placement=method.placement,
        activation=None if method.activation == "none" else method.activation,
        dropout=method.dropout,
        scale=usual if method.scale is None else method.scale,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)

    # 3. train
    decoding.check(model, data.source)
    result = task.fit(model, data, train, method)

    # 4. measure: the loss, and the texts for prompts that it has not seen
    report = task.report(model, data, result, decoding)

    # 5. save
    folder = Path(train.output_dir) / "adapter"
    save_adapter(model, folder, processor=data.processor, metrics=report.metrics)
    report.announce(folder)
    return folder


if __name__ == "__main__":
    run_recipe(
        main,
        Bottleneck(),
        TextTask(),
        TrainConfig(output_dir="runs/bottleneck_gpt2", epochs=3, embedded_rate=5e-3, workers=0),
        Decoding(),
    )

"""Fine-tune a part of a language model: its last blocks, its biases or its norms; then measure and save the change.

    accelerate launch recipes/partial_gpt2.py                         # the last block; embedded base and data
    accelerate launch recipes/partial_gpt2.py --train_what bias --learning_rate 1e-2
    accelerate launch recipes/partial_gpt2.py --model FOLDER --dataset pairs.jsonl --last 2

The file holds the difference from the base. Biases only: BitFit, Ben Zaken et al. 2022, arXiv:2106.10199.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import Decoding, TextTask, TrainConfig, Unsupported, option, run_recipe


@dataclass
class Partial:
    """Partial fine-tuning, stored as a task vector: Ilharco et al. 2023, arXiv:2212.04089."""

    last: int | None = option(
        None, "Number of last blocks to train; default: 1, or every block for bias and norm.", least=1
    )
    train_what: Literal["all", "bias", "norm"] = option(
        "all", "All weights of these blocks, their biases or their norms."
    )


def main(method: Partial, task: TextTask, train: TrainConfig, decoding: Decoding) -> Path:
    """Train, measure, save."""
    from peft import get_peft_model

    from inlay import PartialConfig, save_adapter

    if task.quantize and method.train_what == "all":
        raise Unsupported("weights in 8 or 4 bits cannot be trained; leave --quantize out, or --train_what bias.")

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the chosen weights are trainable
    last = 1 if method.last is None and method.train_what == "all" else method.last
    config = PartialConfig(last=last, train=method.train_what, task_type="CAUSAL_LM")
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
        Partial(),
        TextTask(),
        TrainConfig(output_dir="runs/partial_gpt2", epochs=3, embedded_rate=2e-3, workers=0),
        Decoding(),
    )

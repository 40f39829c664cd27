"""Fine-tune a language model with a prefix in every attention, then measure and save it.

    accelerate launch recipes/prefix_gpt2.py                          # embedded base and data, no download
    accelerate launch recipes/prefix_gpt2.py --length 32 --projection 64
    accelerate launch recipes/prefix_gpt2.py --model FOLDER --dataset pairs.jsonl --gradient_checkpointing

Learned keys and values are put in front of those of the text. With `--projection` an MLP computes them during training;
the file holds the keys and values only.
"""

from dataclasses import dataclass
from pathlib import Path

from inlay import Decoding, TextTask, TrainConfig, option, run_recipe


@dataclass
class Prefix:
    """A prefix in every attention: Li & Liang 2021, arXiv:2101.00190."""

    length: int = option(16, "Prefix length: keys and values in each block.", least=1)
    projection: int | None = option(
        None, "Hidden size of an MLP that computes the prefix during training; default: none.", least=1
    )


def main(method: Prefix, task: TextTask, train: TrainConfig, decoding: Decoding) -> Path:
    """Train, measure, save."""
    from peft import get_peft_model

    from inlay import AttentionPrefixConfig, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the prefix is trainable
    config = AttentionPrefixConfig(length=method.length, projection=method.projection, task_type="CAUSAL_LM")
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
        Prefix(),
        TextTask(),
        TrainConfig(output_dir="runs/prefix_gpt2", epochs=3, embedded_rate=3e-2, workers=0),
        Decoding(),
    )

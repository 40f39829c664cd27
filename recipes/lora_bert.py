"""Fine-tune a text classifier with LoRA, then measure and save the adapter.

    accelerate launch recipes/lora_bert.py                            # embedded base and data, no download
    accelerate launch recipes/lora_bert.py --model bert-base-uncased --dataset glue.csv --learning_rate 5e-4
    accelerate launch recipes/lora_bert.py --model answerdotai/ModernBERT-base --dataset pairs.jsonl --quantize 8bit

The base is any text classifier of transformers: BERT, RoBERTa, DistilBERT, ModernBERT, and with a new head GPT-2, Llama
and similar models. A table has one column of texts, or two for pairs, and one of labels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import SequenceTask, TrainConfig, option, run_recipe


@dataclass
class Lora:
    """LoRA: Hu et al. 2021, arXiv:2106.09685."""

    rank: int = option(8, "Rank r of the update B·A.", least=1)
    alpha: int = option(16, "Scale of the update: alpha / r.", least=1)
    dropout: float = option(0.0, "Dropout on the input of A.", least=0, below=1)
    sites: Literal["all", "attention"] = option("all", "Every linear layer, or q and v.")


def main(method: Lora, task: SequenceTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import LoraConfig, get_peft_model

    from inlay import head_modules, lora_targets, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the adapter and the new head are trainable
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=lora_targets(model, method.sites),
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
    run_recipe(main, Lora(), SequenceTask(), TrainConfig(output_dir="runs/lora_bert", workers=0))

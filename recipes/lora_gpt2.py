"""Fine-tune a language model with LoRA, then measure and save the adapter.

    accelerate launch recipes/lora_gpt2.py                            # embedded base and data, no download
    accelerate launch recipes/lora_gpt2.py --model openai-community/gpt2 --dataset e2e/ --label_smoothing 0.1
    accelerate launch recipes/lora_gpt2.py --model FOLDER --dataset chats.jsonl --quantize 4bit --optimizer adamw8bit

The base is any causal language model of transformers: GPT-2, Llama, Qwen, Mistral ... The loss counts completions only,
or every token of running text (.txt). The paper's set-up on E2E is `--model openai-community/gpt2-medium --rank 4
--alpha 32 --sites attention --epochs 5 --batch_size 8 --learning_rate 2e-4 --weight_decay 0.01 --schedule linear
--label_smoothing 0.1 --beams 10 --length_penalty 0.9 --no_repeat_ngram 4`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import Decoding, TextTask, TrainConfig, option, run_recipe


@dataclass
class Lora:
    """LoRA: Hu et al. 2021, arXiv:2106.09685."""

    rank: int = option(8, "Rank r of the update B·A.", least=1)
    alpha: int = option(16, "Scale of the update: alpha / r.", least=1)
    dropout: float = option(0.0, "Dropout on the input of A.", least=0, below=1)
    sites: Literal["all", "attention"] = option("all", "Every linear layer, or q and v.")


def main(method: Lora, task: TextTask, train: TrainConfig, decoding: Decoding) -> Path:
    """Train, measure, save."""
    from peft import LoraConfig, get_peft_model

    from inlay import lora_targets, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the adapter is trainable
    config = LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules=lora_targets(model, method.sites),
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
        Lora(),
        TextTask(),
        TrainConfig(output_dir="runs/lora_gpt2", epochs=3, embedded_rate=1e-2, workers=0),
        Decoding(max_new_tokens=96),
    )

"""Fine-tune a language model with learned tokens in front of its input, then measure and save them.

    accelerate launch recipes/prompt_gpt2.py                          # embedded base and data, no download
    accelerate launch recipes/prompt_gpt2.py --init text --init_text "Describe the restaurant in full sentences:"
    accelerate launch recipes/prompt_gpt2.py --model FOLDER --dataset pairs.jsonl --quantize 4bit

The prompt takes positions: with --length 20 a base with 1,024 positions reads texts of 1,004 tokens. Tokens that start
as words of the vocabulary or of a text learn faster than random ones.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inlay import BadInput, Decoding, TextTask, TrainConfig, option, run_recipe


@dataclass
class Prompt:
    """Prompt tuning (peft's): Lester et al. 2021, arXiv:2104.08691."""

    length: int = option(20, "Prompt length in tokens.", least=1)
    init: Literal["random", "vocabulary", "text"] = option(
        "vocabulary", "Start from N(0, 1), from random tokens of the vocabulary, or from init_text."
    )
    init_text: str = option(
        "Describe it in full sentences:", "Text to start from, repeated or cut to the length of the prompt."
    )

    def __post_init__(self) -> None:
        if self.init == "text" and not self.init_text.strip():
            raise BadInput("init_text is empty, but init is text; set init_text.")


def main(method: Prompt, task: TextTask, train: TrainConfig, decoding: Decoding) -> Path:
    """Train, measure, save."""
    from peft import PromptTuningConfig, get_peft_model

    from inlay import save_adapter

    # 1. data and frozen base
    data = task.load(train.seed, virtual_tokens=method.length)
    model = task.base(data)

    # 2. method: only the prompt is trainable
    from_text = method.init == "text"
    config = PromptTuningConfig(
        num_virtual_tokens=method.length,
        prompt_tuning_init={"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}[method.init],
        prompt_tuning_init_text=method.init_text if from_text else None,
        tokenizer_name_or_path=data.processor.tokenizer.name_or_path if from_text else None,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    # saved with the adapter, so it must not be a path of this machine
    config.tokenizer_name_or_path = task.model if from_text else None

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
        Prompt(),
        TextTask(),
        TrainConfig(output_dir="runs/prompt_gpt2", epochs=3, embedded_rate=5e-2, workers=0),
        Decoding(),
    )

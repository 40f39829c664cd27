"""Teach SAM your kind of objects with visual prompts in its image encoder, then measure and save them.

    accelerate launch recipes/prompt_sam.py                           # embedded base and data, no download
    accelerate launch recipes/prompt_sam.py --model facebook/sam-vit-base --dataset FOLDER --length 20

The prompts are tokens that every window of every attention layer sees.

FOLDER has images/ and labels/ with equal file names. A label is a map of 8 or 16 bits in which every object has its own
number (with `--meaning classes`, every class). SAM: Kirillov et al. 2023, arXiv:2304.02643.
"""

from dataclasses import dataclass
from pathlib import Path

from inlay import MaskTask, TrainConfig, option, run_recipe


@dataclass
class VisualPrompt:
    """Visual prompt tuning (VPT), deep: Jia et al. 2022, arXiv:2203.12119."""

    length: int = option(10, "Prompt length: tokens in each attention.", least=1)
    dropout: float = option(0.0, "Dropout on the prompts.", least=0, below=1)


def main(method: VisualPrompt, task: MaskTask, train: TrainConfig) -> Path:
    """Train, measure, save."""
    from peft import get_peft_model

    from inlay import VisualPromptConfig, save_adapter

    # 1. data and frozen base
    data = task.load(train.seed)
    model = task.base(data)

    # 2. method: only the prompts are trainable
    config = VisualPromptConfig(length=method.length, dropout=method.dropout)
    model = get_peft_model(model, config)

    # 3. train, on points and boxes in turn
    result = task.fit(model, data, train, method)

    # 4. measure, compared with the base
    report = task.report(model, data, result)

    # 5. save
    folder = Path(train.output_dir) / "adapter"
    save_adapter(model, folder, processor=data.processor, metrics=report.metrics)
    report.announce(folder)
    return folder


if __name__ == "__main__":
    run_recipe(
        main,
        VisualPrompt(),
        MaskTask(),
        TrainConfig(output_dir="runs/prompt_sam", epochs=8, batch_size=8, eval_start=True, embedded_rate=3e-2),
    )

"""Fine-tune a part of a language model: its last blocks, its biases or its norms; then measure and save the change.

    accelerate launch recipes/partial_gpt2.py                         # the last block; embedded base and data
    accelerate launch recipes/partial_gpt2.py --train_what bias --learning_rate 1e-2
    accelerate launch recipes/partial_gpt2.py --model FOLDER --dataset pairs.jsonl --last 2

The file holds the difference to the base (a task vector: Ilharco et al. 2023, arXiv:2212.04089). Biases alone: BitFit,
Ben Zaken et al. 2022, arXiv:2106.10199. Weights of a base in 8 or 4 bits cannot be trained; LoRA can.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from inlay import Decoding, TrainConfig, run_recipe


@dataclass
class Recipe:
    """What is adapted, and how."""

    model: str = field(default="builtin:gpt2-tiny", metadata={"help": "Embedded base, local folder or Hub id."})
    dataset: str = field(
        default="builtin:restaurants",
        metadata={"help": "Embedded data, .csv, .jsonl, .parquet or .txt file, folder of them, or Hub id."},
    )
    last: int | None = field(
        default=None, metadata={"help": "Train the last so many blocks; default: 1, or every block for bias and norm."}
    )
    train_what: Literal["all", "bias", "norm"] = field(
        default="all", metadata={"help": "All weights of the chosen blocks, their biases or their norms."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest example in tokens; default: what the base reads."}
    )
    over_long: Literal["cut", "drop", "refuse"] = field(
        default="cut", metadata={"help": "What becomes of examples longer than max_length."}
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Of the training loss, 0 to 1."})


def main(recipe: Recipe, train: TrainConfig, decoding: Decoding) -> Path:
    """Train, measure, save."""
    from accelerate import PartialState
    from accelerate.utils import set_seed
    from peft import get_peft_model

    from inlay import (
        NextToken,
        PartialConfig,
        TextProcessor,
        TextView,
        fit,
        judge,
        load_base,
        load_texts,
        load_tokenizer,
        save_adapter,
    )
    from inlay.measure import cost
    from inlay.measure.memory import describe_memory

    # 1. data and frozen base
    set_seed(train.seed)
    data = load_texts(recipe.dataset, seed=train.seed)
    model = load_base(recipe.model)
    processor = TextProcessor(
        load_tokenizer(recipe.model), separator=data.separator, chat=data.chat, max_length=recipe.max_length
    )
    examples = TextView(data.train, processor, over_long=recipe.over_long, block=data.plain)
    held_out = TextView(data.validation, processor, over_long=recipe.over_long, block=data.plain)
    PartialState().print(f"train: {examples.report}\nvalidation: {held_out.report}")

    # 2. method: only the chosen weights are trainable
    last = 1 if recipe.last is None and recipe.train_what == "all" else recipe.last
    model = get_peft_model(model, PartialConfig(last=last, train=recipe.train_what, task_type="CAUSAL_LM"))

    # 3. train
    decoding.check(model, data)
    loss = NextToken(recipe.label_smoothing)
    PartialState().print(describe_memory(model, examples, train, collate=examples.collate, loss=loss))
    result = fit(model, examples, held_out, train, collate=examples.collate, loss=loss, settings=asdict(recipe))

    # 4. measure: what it writes for prompts it has not seen, against all their references (of the test split, if any)
    scores = judge(model, processor, data, decoding)
    written, perplexity = scores.total if scores else {}, math.exp(result.metrics["loss"])
    metrics = {
        "validation": {**result.metrics, "perplexity": perplexity, **({} if data.test else written)},
        "test": written if data.test else None,
        "dataset": data.name,
        "history": result.history,
        "cost": cost(model, {"input_ids": held_out[0]["input_ids"][None, :-1]}),  # 1 T, without the end
        "training": {
            **asdict(recipe),
            **train.identity(),
            "steps": result.steps,
            "seconds": round(result.seconds, 1),
        },
        "decoding": asdict(decoding),
        "by_prompt": scores and scores.by_prompt,
    }

    # 5. save
    folder = save_adapter(model, Path(train.output_dir) / "adapter", processor=processor, metrics=metrics)
    said = f"perplexity {perplexity:.2f} at step {result.best_step}"
    PartialState().print(f"{said}, {scores}; saved {folder}" if scores else f"{said}; saved {folder}")
    return folder


if __name__ == "__main__":
    run_recipe(
        main, Recipe(), TrainConfig(output_dir="runs/partial_gpt2", epochs=3, learning_rate=2e-3, workers=0), Decoding()
    )

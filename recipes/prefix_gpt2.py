"""Fine-tune a language model with a prefix in every attention, then measure and save it.

    accelerate launch recipes/prefix_gpt2.py                          # embedded base and data, no download
    accelerate launch recipes/prefix_gpt2.py --length 32 --projection 64
    accelerate launch recipes/prefix_gpt2.py --model FOLDER --dataset pairs.jsonl --gradient_checkpointing

Learned keys and values in front of those of the text: Li & Liang 2021, arXiv:2101.00190. With `--projection` an MLP
makes them while training; the file holds keys and values alone.
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
    length: int = field(default=16, metadata={"help": "Prefix length: keys and values in each block."})
    projection: int | None = field(
        default=None, metadata={"help": "Hidden size of an MLP that makes the prefix while training; default: none."}
    )
    quantize: Literal["8bit", "4bit"] | None = field(
        default=None, metadata={"help": "Hold the frozen base in 8 or 4 bits (bitsandbytes)."}
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
        AttentionPrefixConfig,
        NextToken,
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
    from inlay.measure.footprint import describe_quantized
    from inlay.measure.memory import describe_memory

    # 1. data and frozen base
    set_seed(train.seed)
    data = load_texts(recipe.dataset, seed=train.seed)
    model = load_base(recipe.model, quantize=recipe.quantize)
    processor = TextProcessor(
        load_tokenizer(recipe.model), separator=data.separator, chat=data.chat, max_length=recipe.max_length
    )
    examples = TextView(data.train, processor, over_long=recipe.over_long, block=data.plain)
    held_out = TextView(data.validation, processor, over_long=recipe.over_long, block=data.plain)
    PartialState().print(f"train: {examples.report}\nvalidation: {held_out.report}")
    if recipe.quantize:
        PartialState().print(describe_quantized(model))

    # 2. method: only the prefix is trainable
    method = AttentionPrefixConfig(length=recipe.length, projection=recipe.projection, task_type="CAUSAL_LM")
    model = get_peft_model(model, method)

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
        main, Recipe(), TrainConfig(output_dir="runs/prefix_gpt2", epochs=3, learning_rate=3e-2, workers=0), Decoding()
    )

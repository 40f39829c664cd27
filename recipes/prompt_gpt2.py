"""Fine-tune a language model with learned tokens in front of its input, then measure and save them.

    accelerate launch recipes/prompt_gpt2.py                          # embedded base and data, no download
    accelerate launch recipes/prompt_gpt2.py --init text --init_text "Describe the restaurant in full sentences:"
    accelerate launch recipes/prompt_gpt2.py --model FOLDER --dataset pairs.jsonl --quantize 4bit

Prompt tuning: Lester et al. 2021, arXiv:2104.08691 (peft's). It takes positions: with --length 20 a base of 1,024 reads
texts of 1,004 tokens. Tokens that start as words of the vocabulary or of a text learn faster than random ones.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from inlay import Decoding, InlayError, TrainConfig, run_recipe


@dataclass
class Recipe:
    """What is adapted, and how."""

    model: str = field(default="builtin:gpt2-tiny", metadata={"help": "Embedded base, local folder or Hub id."})
    dataset: str = field(
        default="builtin:restaurants",
        metadata={"help": "Embedded data, .csv, .jsonl, .parquet or .txt file, folder of them, or Hub id."},
    )
    length: int = field(default=20, metadata={"help": "Prompt length in tokens."})
    init: Literal["random", "vocabulary", "text"] = field(
        default="vocabulary", metadata={"help": "Start from N(0, 1), from random words, or from init_text."}
    )
    init_text: str = field(
        default="Describe it in full sentences:", metadata={"help": "Repeated or cut to the length of the prompt."}
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

    def __post_init__(self) -> None:
        if self.length < 1:
            raise InlayError(f"length must be at least 1, got {self.length}.")
        if self.init == "text" and not self.init_text.strip():
            raise InlayError("expected a text for the prompt to start from, but init_text is empty. Give one.")


def main(recipe: Recipe, train: TrainConfig, decoding: Decoding) -> Path:
    """Train, measure, save."""
    from accelerate import PartialState
    from accelerate.utils import set_seed
    from peft import PromptTuningConfig, get_peft_model

    from inlay import (
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
    from inlay.bases.load import resolve_base
    from inlay.measure import cost
    from inlay.measure.footprint import describe_quantized
    from inlay.measure.memory import describe_memory

    # 1. data and frozen base
    set_seed(train.seed)
    data = load_texts(recipe.dataset, seed=train.seed)
    model = load_base(recipe.model, quantize=recipe.quantize)
    tokenizer = load_tokenizer(recipe.model)
    if recipe.length > tokenizer.model_max_length // 2:
        got = f"a length of {recipe.length}"
        raise InlayError(
            f"expected at most half of the base's {tokenizer.model_max_length} positions, but got {got}; lower it."
        )
    tokenizer.model_max_length -= recipe.length  # the prompt takes positions
    processor = TextProcessor(tokenizer, separator=data.separator, chat=data.chat, max_length=recipe.max_length)
    examples = TextView(data.train, processor, over_long=recipe.over_long, block=data.plain)
    held_out = TextView(data.validation, processor, over_long=recipe.over_long, block=data.plain)
    PartialState().print(f"train: {examples.report}\nvalidation: {held_out.report}")
    if recipe.quantize:
        PartialState().print(describe_quantized(model))

    # 2. method: only the prompt is trainable
    start = {"random": "RANDOM", "vocabulary": "SAMPLE_VOCAB", "text": "TEXT"}[recipe.init]
    text = {"prompt_tuning_init_text": recipe.init_text, "tokenizer_name_or_path": resolve_base(recipe.model)}
    method = PromptTuningConfig(
        num_virtual_tokens=recipe.length,
        prompt_tuning_init=start,
        task_type="CAUSAL_LM",
        **(text if recipe.init == "text" else {}),
    )
    model = get_peft_model(model, method)
    method.tokenizer_name_or_path = recipe.model if recipe.init == "text" else None

    # 3. train
    decoding.check(model, data)
    loss = NextToken()
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
        main, Recipe(), TrainConfig(output_dir="runs/prompt_gpt2", epochs=3, learning_rate=5e-2, workers=0), Decoding()
    )

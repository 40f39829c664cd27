"""Text generation: a prompt is continued by a completion."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from inlay.tasks.golden import golden_tokens
from inlay.tasks.task import Answer, LabelledBatches, Option, Record, Task
from inlay.tasks.text.vocabulary import token_ids, vocabulary_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inlay.tasks.adapter import Adapter
    from inlay.tasks.evaluation import Evaluation, Request, Training
    from inlay.tasks.options import TaskOptions
    from inlay.tasks.serving import Answering
    from inlay.train.losses import Loss


class TextGeneration(Task):
    """Bases are causal language models: all that AutoModelForCausalLM loads, but for encoders that it could mask."""

    name = "text-generation"
    auto_class = "AutoModelForCausalLM"
    base_noun = "a language model"
    hub_tag = "text-generation"
    base_kinds = ("text",)
    peft_task_type = "CAUSAL_LM"
    function = "generate"
    main_score = "perplexity"
    smaller_is_better = True
    limits = "What it writes can be fluent and wrong; check it before others rely on it."
    usage = (
        'from inlay import generate, load_adapter\n\nadapter = load_adapter("FOLDER")\n'
        'print(generate(adapter.model, adapter.processor, ["a prompt"]))'
    )
    inputs = "prompts, to continue"
    token_inputs = ("input_ids", "attention_mask", "position_ids")
    own_data: ClassVar[Mapping[str, str]] = {"builtin:gpt2-tiny": "builtin:descriptions"}
    own_examples = 64
    forgotten = "text_loss"
    options: ClassVar[Mapping[str, Option]] = {
        "max_new_tokens": Option(int, "Longest text, in tokens.", 64),
        "beams": Option(int, "Beams of the search.", 1),
        "temperature": Option(float, "Of sampling; 0: no sampling.", 0.0),
    }

    def takes_base(self, config: Any) -> bool:
        return self.could_take_base(config) and not _is_for_sequences(config)

    def could_take_base(self, config: Any) -> bool:
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

        if type(config) not in AutoModelForCausalLM._model_mapping or getattr(config, "is_encoder_decoder", False):
            return False
        return type(config) not in AutoModelForMaskedLM._model_mapping or getattr(config, "is_decoder", False)

    def takes_processor(self, processor: Any) -> bool:
        from inlay.tasks.text.processor import TextProcessor

        return isinstance(processor, TextProcessor)

    def load_processor(self, base_name: str, settings: Record | None) -> Any:
        from inlay.bases.processors import load_tokenizer
        from inlay.tasks.text.processor import TextProcessor

        tokenizer = load_tokenizer(base_name)
        return TextProcessor.from_dict(settings, tokenizer) if settings else TextProcessor(tokenizer)

    def save_processor(self, processor: Any, folder: Any) -> None:
        processor.tokenizer.save_pretrained(folder)

    def golden_inputs(self, model: nn.Module, processor: Any) -> dict[str, Any]:
        import torch

        ids = golden_tokens(len(processor.tokenizer), vocabulary_of(model))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}

    def golden_values(self, output: Any, count: int) -> Tensor:
        """Logits of the token that follows, evenly spaced over the vocabulary."""
        logits = output.logits[:, -1]
        return logits[:, :: max(1, logits.shape[-1] // count)].flatten()[:count]

    def random_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        import torch

        length = min(32, processor.max_length)
        tokens = min(len(processor.tokenizer), vocabulary_of(model))
        ids = torch.randint(tokens, (4, length), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def graph_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        """With positions, where the model takes them: those of a prompt that is padded on the left begin behind it."""
        import inspect

        import torch

        inputs = self.random_inputs(model, processor)
        if "position_ids" in inspect.signature(model.forward).parameters:
            rows, length = inputs["input_ids"].shape
            inputs["position_ids"] = torch.arange(length).expand(rows, length).contiguous()
        return inputs

    def training_options(self) -> type[TaskOptions]:
        from inlay.tasks.text.options import TextTask

        return TextTask

    def find_main_score(self, scores: Mapping[str, float]) -> float:
        return math.exp(min(scores["loss"], 700))  # of a diverged run it would be too large for a float

    def load_labelled(
        self,
        adapter: Adapter,
        data: str,
        count: int,
        seed: int,
        training: Training,
        *,
        held_out: bool = False,
    ) -> LabelledBatches:
        """Of running text, blocks of half of what the base reads, which leaves room for a learned prompt."""
        import numpy as np
        from torch.utils.data import Subset

        from inlay.tasks.text.data import load_texts
        from inlay.tasks.text.loss import NextToken
        from inlay.tasks.text.processor import TextProcessor
        from inlay.tasks.text.view import TextView

        texts, processor = load_texts(data, **training.split_options(data)), adapter.processor
        rows = texts.validation if held_out else texts.train
        if texts.plain:
            half = TextProcessor(processor.tokenizer, separator="", max_length=processor.max_length // 2)
            view = TextView(rows, half, block=True)
            picked = np.random.default_rng(seed).permutation(len(view))[:count]
            return LabelledBatches(Subset(view, picked.tolist()), view.collate, NextToken(), rows=8)
        view = TextView(rows.shuffle(seed=seed).select(range(min(count, len(rows)))), processor)
        return LabelledBatches(view, view.collate, NextToken(), rows=8)

    def score_batches(self, model: Callable[..., Any], batches: Sequence[dict[str, Tensor]], loss: Loss) -> float:
        """Minus the mean loss of a token, in nats."""
        weights = [loss.weight(batch) for batch in batches]
        losses = [float(loss(model, batch).loss) for batch in batches]
        return -sum(w * each for w, each in zip(weights, losses, strict=True)) / sum(weights)

    def classify_batch(self, model: Callable[..., Any], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The next token, after each token that is learned."""
        import torch

        from inlay.tasks.text.chunked_logits import read_logits

        found = read_logits(model, batch, lambda logits, labels: (logits.argmax(-1), labels))
        predicted, true = zip(*found, strict=True)
        return torch.cat(predicted), torch.cat(true)

    def planned_batch(
        self, base: Any, rows: int, length: int, added: int, crop: Sequence[int] | None = None
    ) -> tuple[dict[str, Tensor], Loss | None]:
        """Texts of which every token is learned; a prompt adds tokens to each."""
        import torch

        from inlay.tasks.text.loss import NextToken

        ids = token_ids(base.config, rows, length, added)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, NextToken()

    def prepare(self, inputs: Sequence[str], options: Mapping[str, Any]) -> Callable[[Adapter], Answer]:
        from inlay.tasks.text.generate import Decoding, generate

        decoding = Decoding(**options)

        def answer(adapter: Adapter) -> Answer:
            texts = generate(adapter.model, adapter.processor, inputs, decoding)
            rows = [{"prompt": prompt, "text": text} for prompt, text in zip(inputs, texts, strict=True)]
            return Answer(texts, rows)

        return answer

    def evaluate(self, adapter: Adapter, data: str, request: Request) -> Evaluation:
        from inlay.tasks.text.evaluate import evaluate

        return evaluate(adapter, data, request)

    def serving(self) -> Answering:
        from inlay.tasks.text.serving import TextServing

        return TextServing()

    def describe_inputs(self, record: Record) -> list[str]:
        settings = record["preprocessing"]
        read = f"Prompt and completion had at most {settings['max_length']} tokens of the base's tokenizer."
        if settings.get("chat"):
            return [
                "Prompts",
                "Prompts are conversations, written with the base's chat template; a single text is what a user "
                f"says first, and what the adapter adds is the assistant's answer. {read}",
            ]
        separator = json.dumps(settings["separator"])
        return ["Prompts", f"A prompt is followed by `{separator}` in front of its completion. {read}"]


def _is_for_sequences(config: Any) -> bool:
    """A decoder that was saved with a head over whole sequences, such as GPT2ForSequenceClassification."""
    return any("ForSequenceClassification" in name for name in getattr(config, "architectures", None) or [])

"""The options of a language model's task, and the steps of its recipes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from inlay.errors import BadInput, Unsupported
from inlay.options import option
from inlay.tasks.folds import PROMPT_FOLDS
from inlay.tasks.options import Parts, Report, StreamOptions, TaskData, describe_run
from inlay.tasks.text.vocabulary import check_vocabulary, vocabulary_of

if TYPE_CHECKING:
    from torch import nn

    from inlay.tasks.text.data import TextData
    from inlay.tasks.text.generate import Decoding
    from inlay.train.config import TrainConfig
    from inlay.train.loop import FitResult


@dataclass
class TextTask(StreamOptions):
    """The language model: its base, its texts, and how they become examples."""

    default_folds: ClassVar[int] = PROMPT_FOLDS
    model: str = option("builtin:gpt2-tiny", "Embedded base, local folder or Hub id.")
    dataset: str = option(
        "builtin:restaurants", "Embedded data, .csv, .jsonl, .parquet or .txt file, folder of them, shards, or Hub id."
    )
    max_length: int | None = option(None, "Longest example in tokens; default: what the base reads.", least=2)
    over_long: Literal["cut", "drop", "refuse"] = option("cut", "What becomes of examples longer than max_length.")
    pack: bool = option(
        False,
        "Fill rows of max_length tokens with several examples, each read as if alone; batch_size then counts rows.",
    )
    label_smoothing: float = option(0.0, "Of the training loss, 0 to 1.", least=0, most=1)

    def load(self, seed: int, virtual_tokens: int = 0, *, test: bool = False) -> TaskData:
        """Prompts and completions of both splits as tokens, as `TaskOptions.load` says.

        Args:
            seed: As there.
            virtual_tokens: Positions of the base that the method takes for itself, at most half of them.
            test: As there.
        """
        from accelerate import PartialState
        from accelerate.utils import set_seed

        from inlay.bases.processors import load_tokenizer
        from inlay.tasks.text.data import load_texts
        from inlay.tasks.text.loss import NextToken
        from inlay.tasks.text.packing import PackedView
        from inlay.tasks.text.processor import TextProcessor
        from inlay.tasks.text.stream import load_text_stream, stream_examples
        from inlay.tasks.text.view import TextView

        set_seed(seed)
        with self.offering_embedded_base():
            tokenizer = load_tokenizer(self.model)
        streamed = self.is_streamed(test)
        if streamed:
            data: TextData = load_text_stream(self.dataset, seed=seed, group=self.group, buffer=self.shuffle_buffer)
        else:
            data = load_texts(self.dataset, seed=seed, test=test, **self.split)
        if virtual_tokens > tokenizer.model_max_length // 2:
            raise BadInput(
                f"a prompt may take half of the base's {tokenizer.model_max_length} positions, got a length of "
                f"{virtual_tokens}; lower it."
            )
        tokenizer.model_max_length -= virtual_tokens
        processor = TextProcessor(tokenizer, separator=data.separator, chat=data.chat, max_length=self.max_length)
        if self.pack and data.plain:
            raise BadInput(f"{self.dataset!r} is running text, whose blocks are full already; leave pack out.")
        examples: Any
        if streamed:
            examples = stream_examples(
                data.train, processor, over_long=self.over_long, block=data.plain, pack=self.pack
            )
        else:
            examples = TextView(data.train, processor, over_long=self.over_long, block=data.plain)
            examples = PackedView(examples, processor.max_length) if self.pack else examples
        held_out = TextView(data.validation, processor, over_long=self.over_long, block=data.plain)
        PartialState().print(f"train: {examples.report}\nvalidation: {held_out.report}")
        return TaskData(
            data,
            examples,
            held_out,
            processor,
            metrics=[],
            collate=held_out.collate,
            loss=NextToken(self.label_smoothing),
            example=lambda: {"input_ids": held_out[0]["input_ids"][None, :-1]},  # 1 T, without the end
        )

    def load_parts(self, seed: int = 0) -> Parts:
        """As `TaskOptions.load_parts`, without packed rows: methods of a study get the same batches."""
        if self.pack:
            raise Unsupported(
                "a study compares methods of which some cannot be trained on packed rows; leave pack out."
            )
        return super().load_parts(seed)

    def base(self, data: TaskData) -> Any:
        """The frozen base; an encoder, which writes no text, is refused, and so are tokens that it does not know."""
        from inlay.tasks.base import load_base
        from inlay.train.stream import Stream

        base = load_base(self.model, task="text-generation", quantize=self.quantize, attention=self.attention)
        streamed = isinstance(data.train, Stream)  # then what is held out stands for the tokens of both parts
        for view in (data.validation,) if streamed else (data.train, data.validation):
            check_vocabulary(self.model, int(view.tokens.max()), vocabulary_of(base))
        return self._announced(base)

    def fit_method(self, config: Any, model: nn.Module, data: TaskData) -> Any:
        """A learned prompt takes positions of the base; those that are left must hold the longest example."""
        from inlay.methods._peft import count_virtual_tokens
        from inlay.train.stream import Stream

        added, most = count_virtual_tokens(config), data.processor.tokenizer.model_max_length
        if isinstance(data.train, Stream):
            longest = data.processor.max_length
        else:
            longest = max(int(max(view.lengths)) for view in (data.train, data.validation))
        if added and added + longest > most:
            raise Unsupported(
                f"{self.model} reads {most} tokens, which do not hold a prompt of {added} and the longest example of "
                f"{longest}; pass a smaller width, or max_length {most - added}."
            )
        return config

    def fit(self, model: nn.Module, data: TaskData, train: TrainConfig, method: Any) -> FitResult:
        """As `TaskOptions.fit`; a model that reads packed texts otherwise than single ones is refused."""
        from inlay.tasks.text.packing import check_packing

        if self.pack:
            check_packing(model, self.model)
        return super().fit(model, data, train, method)

    def report(self, model: nn.Module, data: TaskData, result: FitResult, decoding: Decoding) -> Report:
        """Perplexity, what the model writes for prompts that it has not seen, cost and settings.

        The texts are scored against all their references: those of the test split, if there is one.
        """
        from inlay.tasks.text.generate import judge

        scores = judge(model, data.processor, data.source, decoding)
        written, perplexity = scores.total if scores else {}, math.exp(result.metrics["loss"])
        tested = data.source.test is not None
        metrics = describe_run(model, data, result)
        metrics["validation"] = {**result.metrics, "perplexity": perplexity, **({} if tested else written)}
        metrics["test"] = written if tested else None
        metrics["decoding"] = asdict(decoding)
        metrics["by_prompt"] = scores and scores.by_prompt
        summary = f"perplexity {perplexity:.2f} at step {result.best_step}"
        return Report(metrics, f"{summary}, {scores}" if scores else summary)

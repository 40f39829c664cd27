"""The options of a classifier of texts, and the steps of its recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inlay.options import option
from inlay.tasks.options import Report, StreamOptions, TaskData, describe_run
from inlay.tasks.text.vocabulary import check_vocabulary, vocabulary_of

if TYPE_CHECKING:
    from torch import nn

    from inlay.tasks.sequences.data import SequenceData
    from inlay.tasks.sequences.stream import SequenceStream
    from inlay.tasks.sequences.view import SequenceView
    from inlay.train.loop import FitResult
    from inlay.train.stream import Stream


@dataclass
class SequenceTask(StreamOptions):
    """The classifier: its base, its texts, and how they become examples."""

    model: str = option("builtin:gpt2-tiny", "Embedded base, local folder or Hub id.")
    dataset: str = option(
        "builtin:families", "Embedded data, .csv, .tsv, .jsonl or .parquet file, folder of them, shards, or Hub id."
    )
    max_length: int | None = option(None, "Longest example in tokens; default: what the base reads.", least=4)
    classes: str | None = option(
        None, "File of the class names of streamed data, one a line; default: labels.txt next to the shards."
    )
    label_smoothing: float = option(0.0, "Of the training loss, 0 to 1.", least=0, most=1)

    def load(self, seed: int, *, test: bool = False) -> TaskData:
        """Labelled texts of both splits as tokens, as `TaskOptions.load` says."""
        import torch
        from accelerate import PartialState
        from accelerate.utils import set_seed

        from inlay.bases.processors import load_tokenizer
        from inlay.tasks.metrics import F1, Accuracy, Matthews
        from inlay.tasks.sequences.data import load_sequences
        from inlay.tasks.sequences.loss import SequenceLoss
        from inlay.tasks.sequences.processor import SequenceProcessor
        from inlay.tasks.sequences.stream import SequenceStream, load_sequence_stream, stream_sequences
        from inlay.tasks.sequences.view import SequenceView

        set_seed(seed)
        data: SequenceData | SequenceStream
        if self.is_streamed(test):
            data = load_sequence_stream(
                self.dataset, seed=seed, group=self.group, classes=self.classes, buffer=self.shuffle_buffer
            )
        else:
            data = load_sequences(self.dataset, seed=seed, test=test, **self.split)
        with self.offering_embedded_base():
            tokenizer = load_tokenizer(self.model)
        processor = SequenceProcessor(tokenizer, max_length=self.max_length)
        validation = SequenceView(data.validation, processor)
        train: SequenceView | Stream
        if isinstance(data, SequenceStream):
            train = stream_sequences(data, processor)
        else:
            train = SequenceView(data.train, processor)
        PartialState().print(f"train: {train.report}\nvalidation: {validation.report}")

        return TaskData(
            data,
            train,
            validation,
            processor,
            metrics=[Accuracy(), F1(), Matthews()],
            collate=validation.collate,
            loss=SequenceLoss(self.label_smoothing),
            example=lambda: {"input_ids": torch.tensor([validation[0]["input_ids"]])},  # 1 T
        )

    def base(self, data: TaskData) -> Any:
        """The frozen base with a new head for the labels of the data; tokens that it does not know are refused."""
        from inlay.tasks.base import load_base
        from inlay.tasks.classification import check_one_label_each
        from inlay.train.stream import Stream

        labels = data.source.labels
        with self.offering_embedded_base():
            base = load_base(
                self.model,
                task="text-classification",
                labels=labels,
                quantize=self.quantize,
                attention=self.attention,
            )
        check_one_label_each(base, self.dataset)
        streamed = isinstance(data.train, Stream)  # then what is held out stands for the tokens of both parts
        for view in (data.validation,) if streamed else (data.train, data.validation):
            check_vocabulary(self.model, max(max(item["input_ids"]) for item in view.items), vocabulary_of(base))
        return self._announced(base)

    def report(self, model: nn.Module, data: TaskData, result: FitResult) -> Report:
        """Accuracy, macro F1, Matthews correlation, cost and settings."""
        scores = result.metrics
        summary = f"accuracy {scores['accuracy']:.4f}, macro F1 {scores['f1']:.4f}, Matthews {scores['matthews']:.4f}"
        return Report(describe_run(model, data, result), f"{summary} at step {result.best_step}")

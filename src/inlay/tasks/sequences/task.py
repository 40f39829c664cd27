"""Sequence classification: one of several labels for each text, or pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from inlay.errors import BadInput, InlayError
from inlay.tasks.golden import golden_tokens
from inlay.tasks.images.processing import describe_labels
from inlay.tasks.printing import printable
from inlay.tasks.task import Answer, LabelledBatches, Option, Record, Task
from inlay.tasks.text.vocabulary import check_vocabulary, token_ids, vocabulary_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from inlay.tasks.adapter import Adapter
    from inlay.tasks.evaluation import Evaluation, Request, Training
    from inlay.tasks.options import TaskOptions
    from inlay.tasks.serving import Answering
    from inlay.train.losses import Loss


class SequenceClassification(Task):
    """Bases are encoders such as BERT, and what was saved with such a head; when asked, all that can have one."""

    name = "text-classification"
    auto_class = "AutoModelForSequenceClassification"
    base_noun = "a classifier of texts"
    hub_tag = "text-classification"
    base_kinds = ("text",)
    classifies = True
    peft_task_type = "SEQ_CLS"
    function = "classify_texts"
    main_score = "accuracy"
    limits = (
        "It names one of its labels for any text, also for one on something else; its probabilities have not been "
        "calibrated."
    )
    usage = (
        'from inlay import classify_texts, load_adapter\n\nadapter = load_adapter("FOLDER")\n'
        'print(classify_texts(adapter, ["a text"]))'
    )
    inputs = "texts, to classify"
    token_inputs = ("input_ids", "attention_mask", "token_type_ids")
    options: ClassVar[Mapping[str, Option]] = {
        "top": Option(int, "Classes to name for each input.", 3, least=1),
        "group": Option(str | None, "Choose among the classes of this group of a combination only."),
        "pair": Option(list[str] | None, "Second text of a pair, once for each input."),
    }

    def takes_base(self, config: Any) -> bool:
        from transformers import AutoModelForMaskedLM

        named = any("ForSequenceClassification" in name for name in getattr(config, "architectures", None) or [])
        encodes = type(config) in AutoModelForMaskedLM._model_mapping and not getattr(config, "is_decoder", False)
        return self.could_take_base(config) and (named or encodes)

    def could_take_base(self, config: Any) -> bool:
        from transformers import AutoModelForSequenceClassification

        # Encoder-decoders classify by an end token that they look for in values, so that nothing can be counted.
        known = type(config) in AutoModelForSequenceClassification._model_mapping
        return known and not getattr(config, "is_encoder_decoder", False)

    def complete_base(self, base: Any) -> None:
        """A decoder finds the last token of a text by the id of padding; its config may lack that, or name another."""
        from inlay.bases.processors import load_tokenizer
        from inlay.tasks.sequences.processor import pad_token_id

        if not base.name_or_path:
            return
        try:
            pad = pad_token_id(load_tokenizer(base.name_or_path))
        except InlayError:  # a folder without a tokenizer: whoever makes its inputs by hand sets the id too
            return
        if pad is not None:
            check_vocabulary(base.name_or_path, pad, vocabulary_of(base))
            base.config.get_text_config().pad_token_id = pad

    def check_method(self, model: nn.Module) -> None:
        from inlay.methods.prompt import check_prompt

        check_prompt(model)

    def takes_processor(self, processor: Any) -> bool:
        from inlay.tasks.sequences.processor import SequenceProcessor

        return isinstance(processor, SequenceProcessor)

    def load_processor(self, base_name: str, settings: Record | None) -> Any:
        from inlay.bases.processors import load_tokenizer
        from inlay.tasks.sequences.processor import SequenceProcessor

        tokenizer = load_tokenizer(base_name)
        return SequenceProcessor.from_dict(settings, tokenizer) if settings else SequenceProcessor(tokenizer)

    def save_processor(self, processor: Any, folder: Any) -> None:
        processor.tokenizer.save_pretrained(folder)

    def labels(self, base: Any, method: Any) -> list[str]:
        return [base.config.id2label[i] for i in sorted(base.config.id2label)]

    def golden_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        import torch

        ids = golden_tokens(len(processor.tokenizer), vocabulary_of(model))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def golden_values(self, output: Any, count: int) -> Tensor:
        return output.logits.flatten()[:count]

    def graph_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        """With the ids that tell the texts of a pair apart, where the tokenizer makes them."""
        import torch

        inputs = self.random_inputs(model, processor)
        if "token_type_ids" in processor.tokenizer.model_input_names:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        return inputs

    def random_inputs(self, model: nn.Module, processor: Any) -> dict[str, Tensor]:
        import torch

        length = min(32, processor.max_length)
        tokens = min(len(processor.tokenizer), vocabulary_of(model))
        ids = torch.randint(tokens, (4, length), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def training_options(self) -> type[TaskOptions]:
        from inlay.tasks.sequences.options import SequenceTask

        return SequenceTask

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
        """The classes take turns; numbers of labels are those of the adapter."""
        from inlay.tasks.classification import number_labels
        from inlay.tasks.sampling import by_turns
        from inlay.tasks.sequences.data import load_sequences
        from inlay.tasks.sequences.loss import SequenceLoss
        from inlay.tasks.sequences.view import SequenceView

        found = load_sequences(data, **training.split_options(data))
        numbers = number_labels(data, found.labels, adapter)
        split = found.validation if held_out else found.train
        rows = split.select(by_turns(split["label"][:], seed)[:count])
        view = SequenceView(rows, adapter.processor)
        for item in view.items:
            item["labels"] = numbers[item["labels"]]
        return LabelledBatches(view, view.collate, SequenceLoss(), rows=8)

    def classify_batch(self, model: Callable[..., Any], batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        from inlay.tasks.classification import classify_batch

        return classify_batch(model, batch)

    def planned_batch(
        self, base: Any, rows: int, length: int, added: int, crop: Sequence[int] | None = None
    ) -> tuple[dict[str, Tensor], Loss | None]:
        import torch

        ids = token_ids(base.config, rows, length, added)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {**batch, "labels": torch.zeros(rows, dtype=torch.long)}, None

    def prepare(self, inputs: Sequence[str], options: Mapping[str, Any]) -> Callable[[Adapter], Answer]:
        from inlay.tasks.sequences.predict import classify_texts

        seconds = options["pair"] or []
        if seconds and len(seconds) != len(inputs):
            raise BadInput(f"{len(inputs)} texts have {len(seconds)} second ones; give --pair once for each text.")
        texts: Any = list(zip(inputs, seconds, strict=True)) if seconds else list(inputs)

        def answer(adapter: Adapter) -> Answer:
            found = classify_texts(adapter, texts, group=options["group"], top=options["top"])
            lines = []
            for one in found:
                named = (f"{printable(k)} {v:.1%}" for k, v in zip(one.labels, one.probabilities, strict=True))
                shown = printable(one.text if one.pair is None else f"{one.text} | {one.pair}")
                lines.append(f"{shown}: {'  '.join(named)}")
            return Answer(lines, [vars(one) for one in found])

        return answer

    def evaluate(self, adapter: Adapter, data: str, request: Request) -> Evaluation:
        from inlay.tasks.sequences.evaluate import evaluate

        return evaluate(adapter, data, request)

    def serving(self) -> Answering:
        from inlay.tasks.sequences.serving import SequenceServing

        return SequenceServing()

    def describe_inputs(self, record: Record) -> list[str]:
        read = f"A text, or both of a pair, had at most {record['preprocessing']['max_length']} tokens."
        return ["Labels", *describe_labels(record["labels"]), read]

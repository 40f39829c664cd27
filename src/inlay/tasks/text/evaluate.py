"""A language model scored on prompts with references: perplexity, BLEU, chrF and ROUGE-L, with those of its base."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from inlay.errors import InlayError
from inlay.tasks.adapter import Adapter, check_task
from inlay.tasks.evaluation import EVERYTHING, Evaluation, Request, Score, count_units, pick_evenly
from inlay.tasks.groups import join_units
from inlay.tasks.progress import show_progress
from inlay.tasks.shards import is_streamed
from inlay.tasks.statistics import BINS, Indices, find_bins, score_with_intervals
from inlay.tasks.text.chunked_logits import IGNORED, read_logits
from inlay.tasks.text.data import group_by_prompt, load_texts_to_score
from inlay.tasks.text.generate import Decoding, generate
from inlay.tasks.text.scores import TextScores, score_texts
from inlay.tasks.text.stream import load_text_stream_to_score
from inlay.tasks.text.view import TextView

logger = logging.getLogger(__name__)

AT_ONCE = 16  # completions in one forward pass


def evaluate(
    adapter: Adapter, data: str, request: Request = EVERYTHING, *, decoding: Decoding | None = None
) -> Evaluation:
    """Score a language model: what it makes of the references, and how close what it writes comes to them.

    Perplexity is exp of the mean loss over all tokens of all completions, as in training. The calibration error (ECE)
    is that of Guo et al. 2017, arXiv:1706.04599, of the most probable next token, over the same tokens. Running text,
    which has no prompts, has these two only, and its units are blocks of the processor's max_length.

    Args:
        adapter: From `load_adapter`.
        data: As for `load_texts`.
        request: Which part, and how.
        decoding: How texts are written; by itself as metrics.json says.

    Raises:
        InlayError: As `load_texts` and `generate`; an adapter that is no language model's.
    """
    check_task(adapter, "text-generation")
    streamed = is_streamed(data, request.training.asks_to_stream(data))
    load = load_text_stream_to_score if streamed else load_texts_to_score
    chosen, rows, plain, notes = load(data, split=request.split, training=request.training)
    view = TextView(rows, adapter.processor, block=plain)
    references = {} if plain else group_by_prompt(rows)
    units = len(view) if plain else len(references)
    place = {prompt: i for i, prompt in enumerate(references)}
    keys = [] if plain else list(_prompt_keys(rows))
    # The unit of each item of the view: its prompt, or itself.
    owner = np.arange(units) if plain else np.array([place[key] for key in keys])
    picked = pick_evenly(units, request.limit)
    decoding = decoding or _read_decoding(request.training.decoding)
    prompts = [] if plain else [list(references)[i] for i in picked]
    wanted = [references[prompt] for prompt in prompts]
    of_prompt = join_units(rows["group"][:], keys) if "group" in rows.column_names else {}
    groups = [of_prompt[prompt] for prompt in prompts] if of_prompt and prompts else None  # blocks go across documents

    def measure(model: Any) -> _Measurement:
        by_item = _sum_over_tokens(model, view, np.isin(owner, picked))
        sums = _TokenSums(*(_add_up(each, owner, units)[picked] for each in by_item))
        texts = generate(model, adapter.processor, prompts, decoding) if prompts else []
        scores, written = _score_units(sums, texts, wanted, groups, request.resamples)
        return _Measurement(sums, scores, written)

    own, base = measure(adapter.model), None
    if request.compare and hasattr(adapter.model, "disable_adapter"):
        with adapter.model.disable_adapter():
            base = measure(adapter.model.get_base_model())
    elif request.compare:
        notes += ["The base was not scored: the adapter is merged into it."]
    if own.written is not None:
        said = ", ".join(f"{f.name} {getattr(decoding, f.name)}" for f in fields(decoding) if f.name != "decode_batch")
        notes += [f"Texts were written with {said}.", f"Scored by {own.written.signature}."]
    names: list[dict[str, Any]] = [{"prompt": _format_prompt(prompt)} for prompt in prompts] or [
        {"block": i} for i in picked
    ]
    noun = "block" if plain else "prompt"
    count, unit, counted = count_units(len(picked), noun, groups, request.training.group_for(data))
    return Evaluation(
        data=data,
        task="text-generation",
        split=chosen,
        count=count,
        unit=unit,
        scores=own.scores,
        base=base.scores if base else None,
        rows=[name | own.row(k) | (base.row(k, "base_") if base else {}) for k, name in enumerate(names)],
        notes=[*notes, *counted],
    )


class _TokenSums(NamedTuple):
    """Over the learned tokens of each unit: the sum of their losses and their number, (N,); their calibration gaps.

    Attributes:
        losses: In nats.
        tokens: How many.
        gaps: (N, BINS): in each bin of confidence, how many tokens were predicted right, less the confidence in them.
    """

    losses: np.ndarray
    tokens: np.ndarray
    gaps: np.ndarray


@dataclass(frozen=True)
class _Measurement:
    """What one model did: sums by unit, scores, and those of its texts."""

    sums: _TokenSums
    scores: dict[str, Score]
    written: TextScores | None

    def row(self, k: int, prefix: str = "") -> dict[str, Any]:
        """What there is of unit k: the text with its scores, and perplexity."""
        found = dict(self.written.by_prompt[k]) if self.written else {}
        found["perplexity"] = float(np.exp(self.sums.losses[k] / max(1.0, self.sums.tokens[k])))
        return {prefix + key: round(v, 4) if isinstance(v, float) else v for key, v in found.items()}


def _prompt_keys(rows: Any) -> Iterator[Any]:
    """The key in `group_by_prompt` of each row."""
    for row in rows:
        yield next(iter(group_by_prompt([row])))


@torch.inference_mode()
def _sum_over_tokens(model: Any, view: TextView, wanted: np.ndarray) -> _TokenSums:
    """The sums of each item of the view that is wanted; 0 for the others."""
    device = next(model.parameters()).device
    losses, tokens, gaps = np.zeros(len(view)), np.zeros(len(view)), np.zeros((len(view), BINS))
    items = sorted(np.flatnonzero(wanted).tolist(), key=lambda i: -view.lengths[i])  # alike in length
    begins = range(0, len(items), AT_ONCE)
    for begin in show_progress(begins, len(begins), "score", "batch"):
        part = items[begin : begin + AT_ONCE]
        batch = {key: value.to(device) for key, value in view.collate([view[i] for i in part]).items()}
        counts = (batch["labels"][:, 1:] != IGNORED).sum(1).cpu().numpy()
        rows = np.repeat(part, counts)  # the item of each learned token
        found = read_logits(model, batch, _measure_tokens)
        each, confidence, right = (torch.cat(values).cpu().numpy() for values in zip(*found, strict=True))
        np.add.at(losses, rows, each)
        tokens[part] = counts
        np.add.at(gaps, (rows, find_bins(confidence)), right - confidence)
    return _TokenSums(losses, tokens, gaps)


def _measure_tokens(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss of each token, the confidence in the most probable one, and whether that is the right one, all (n,)."""
    losses = cross_entropy(logits, labels, reduction="none")
    best, predicted = logits.max(-1)
    return losses.double(), (best - logits.logsumexp(-1)).exp().double(), predicted == labels


def _add_up(values: np.ndarray, owner: np.ndarray, units: int) -> np.ndarray:
    """Sums of the rows of each unit, (units, ...)."""
    sums = np.zeros((units, *values.shape[1:]))
    np.add.at(sums, owner, values)
    return sums


def _score_units(
    sums: _TokenSums,
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    groups: Sequence[str] | None,
    resamples: int,
) -> tuple[dict[str, Score], TextScores | None]:
    """Scores over all units, and those of each text."""
    written = score_texts(texts, references) if texts else None
    corpora = _corpus_statistics(texts, references) if texts else {}
    rouge = np.array([row["rouge_l"] for row in written.by_prompt]) if written else np.empty(0)

    def statistic(rows: Indices) -> dict[str, float]:
        count = max(1.0, sums.tokens[rows].sum())
        found = {
            "perplexity": float(np.exp(sums.losses[rows].sum() / count)),
            "ece": float(np.abs(sums.gaps[rows].sum(0)).sum() / count),
        }
        for name, (metric, counts) in corpora.items():
            found[name] = metric._compute_score_from_stats(counts[rows].sum(0).tolist()).score
        return found | ({"rouge_l": float(rouge[rows].mean())} if written else {})

    return score_with_intervals(statistic, len(sums.losses), groups=groups, resamples=resamples), written


def _corpus_statistics(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, tuple[Any, np.ndarray]]:
    """BLEU and chrF of sacrebleu, each with the counts of every text, (N, ...), whose sum gives the corpus's score.

    sacrebleu's own resampling is over the same counts, but does not give its percentiles.
    """
    from itertools import zip_longest

    from sacrebleu.metrics import BLEU, CHRF

    streams = list(zip_longest(*references))
    metrics: dict[str, Any] = {"bleu": BLEU(), "chrf": CHRF()}
    return {
        name: (metric, np.array(metric._extract_corpus_statistics(list(texts), streams)))
        for name, metric in metrics.items()
    }


def _read_decoding(noted: Mapping[str, Any]) -> Decoding:
    """As a recipe noted it; the default where nothing, or nothing usable, was noted."""
    names = {field.name for field in fields(Decoding)}
    try:
        return Decoding(**{key: value for key, value in noted.items() if key in names})
    except (InlayError, TypeError):
        logger.warning("the decoding in metrics.json cannot be used; texts are written with the default one.")
        return Decoding()


def _format_prompt(prompt: Any) -> str:
    """A prompt in one cell: a chat's messages below each other."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{dict(message)['role']}: {dict(message)['content']}" for message in prompt)

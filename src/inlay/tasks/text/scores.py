"""How close written texts come to references: BLEU, chrF and ROUGE-L, by sacrebleu and rouge-score.

scores = score_texts(["a cheap pub"], [["a cheap pub", "an inexpensive pub"]])
scores.total["bleu"], scores.by_prompt[0]["rouge_l"]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import zip_longest
from typing import Any

from inlay.errors import BadInput


@dataclass(frozen=True)
class TextScores:
    """Scores from 0 to 100, higher is better.

    Attributes:
        total: `bleu` and `chrf` of the whole corpus, and `rouge_l`, the mean over prompts.
        by_prompt: Per text `prompt` (if prompts were given), `generated`, `bleu`, `chrf` and `rouge_l`, in their order.
        signature: What was computed, by which versions: scores compare only under the same one.
    """

    total: dict[str, float]
    by_prompt: list[dict[str, Any]]
    signature: str

    def __str__(self) -> str:
        names = {"bleu": "BLEU", "chrf": "chrF", "rouge_l": "ROUGE-L"}
        return ", ".join(f"{names[key]} {value:.1f}" for key, value in self.total.items())


def score_texts(
    generated: Sequence[str], references: Sequence[Sequence[str]], prompts: Sequence[Any] | None = None
) -> TextScores:
    """Score texts against one reference or several each; their number may differ from text to text.

    BLEU and chrF take upper and lower case as they come, and split words themselves (13a): pass plain text, not
    tokenised text. A single text's BLEU is smoothed and takes only the orders of n-gram that it has; the total is
    no mean of these. ROUGE-L is the F1 of the longest common subsequence of words, with the best of the references,
    in lower case without stemming; every character but a to z and 0 to 9 is a gap to it, so é splits a word and a
    Greek text scores 0.

    Args:
        generated: One text per prompt; an empty one scores 0.
        references: For each text what a person wrote, at least one.
        prompts: Texts or lists of messages, copied into `by_prompt`.

    Raises:
        InlayError: No texts, a text without a reference, or lists of different lengths.

    Source: Papineni et al. 2002 and Post 2018, arXiv:1804.08771 (`sacrebleu.metrics.BLEU`); Popović 2015
    (`sacrebleu.metrics.CHRF`); Lin 2004 (`rouge_score.rouge_scorer`).
    """
    _check(generated, references, prompts)
    generated, references = list(generated), [list(wanted) for wanted in references]
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    bleu, sentence_bleu, chrf, rouge = BLEU(), BLEU(effective_order=True), CHRF(), RougeScorer(["rougeL"])
    by_prompt: list[dict[str, Any]] = []
    for i, (text, wanted) in enumerate(zip(generated, references, strict=True)):
        by_prompt.append(
            ({"prompt": prompts[i]} if prompts is not None else {})
            | {"generated": text}
            | {"bleu": sentence_bleu.sentence_score(text, wanted).score}
            | {"chrf": chrf.sentence_score(text, wanted).score}
            | {"rouge_l": 100 * float(rouge.score_multi(wanted, text)["rougeL"].fmeasure)}
        )
    streams = list(zip_longest(*references))  # reference k of every text; None where a text has fewer
    total = {
        "bleu": bleu.corpus_score(generated, streams).score,
        "chrf": chrf.corpus_score(generated, streams).score,
        "rouge_l": sum(row["rouge_l"] for row in by_prompt) / len(by_prompt),
    }
    signatures = (
        f"BLEU|{bleu.get_signature()} (by prompt eff:yes)",
        f"chrF2|{chrf.get_signature()}",
        f"ROUGE-L|F1|refs:best|stem:no|total:mean|rouge-score:{version('rouge-score')}",
    )
    return TextScores(total, by_prompt, "; ".join(signatures))


def _check(generated: Sequence[str], references: Sequence[Sequence[str]], prompts: Sequence[Any] | None) -> None:
    counts = {"texts": len(generated), "lists of references": len(references)}
    counts |= {"prompts": len(prompts)} if prompts is not None else {}
    if len(set(counts.values())) > 1 or not generated:
        got = ", ".join(f"{count} {what}" for what, count in counts.items())
        raise BadInput(f"every prompt needs one text and its references, got {got}.")
    if isinstance(generated, str) or any(isinstance(wanted, str) for wanted in references):
        raise BadInput("texts and the references of each must be lists, got a string; wrap it in a list.")
    bare = [i for i, wanted in enumerate(references) if not wanted]
    if bare:
        got = f"none for text {bare[0]} (from 0) and {len(bare) - 1} others" if bare[1:] else f"none for text {bare[0]}"
        raise BadInput(f"each text needs at least one reference: {got}. Add it, or leave the text out.")

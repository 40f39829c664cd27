"""Scores of texts by hand: n-grams, lengths and common subsequences counted on paper."""

import csv
import math
import subprocess
import sys
from collections import defaultdict

import pytest
from sacrebleu.metrics import BLEU, CHRF

from inlay.errors import InlayError
from inlay.tasks.text.scores import TextScores, score_texts
from places import SHARED

DEVSET = SHARED / "e2e_nlg" / "devset.csv"


def test_the_same_text_scores_100():
    scores = score_texts(["the cheap pub by the river"], [["a pub", "the cheap pub by the river"]])
    assert scores.total == pytest.approx({"bleu": 100, "chrf": 100, "rouge_l": 100})
    assert {k: v for k, v in scores.by_prompt[0].items() if k != "generated"} == pytest.approx(scores.total)
    assert isinstance(scores, TextScores)


def test_bleu_of_one_changed_word_by_hand():
    # a b c d e f against a b c d e g: 5/6 words, 4/5 pairs, 3/4 triples, 2/3 of four; equal lengths
    expected = 100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    scores = score_texts(["a b c d e f"], [["a b c d e g"]])
    assert scores.total["bleu"] == pytest.approx(expected) and scores.by_prompt[0]["bleu"] == pytest.approx(expected)


def test_bleu_of_a_short_text_by_hand():
    # all its n-grams are in the reference; the nearest reference has 6 words: penalty exp(1 - 6 / 5)
    scores = score_texts(["a b c d e"], [["a b c d e f", "a b c d e f g h i"]])
    assert scores.total["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 5))


def test_bleu_of_a_corpus_is_no_mean():
    # counts add up over texts: 6 + 3 words of 10, 5 + 2 of 8, 4 + 1 of 6, 3 + 0 of 4
    scores = score_texts(["a b c d e f", "a b c x"], [["a b c d e f"], ["a b c d"]])
    assert scores.total["bleu"] == pytest.approx(100 * (9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25)
    # alone the second one has no four words in a row, which smoothing takes for 1/2
    assert scores.by_prompt[1]["bleu"] == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_a_text_of_two_words_is_scored_by_the_orders_that_it_has():
    scores = score_texts(["cheap pub"], [["cheap pub"]])
    assert scores.by_prompt[0]["bleu"] == pytest.approx(100) and scores.total["bleu"] == 0


def test_case_and_punctuation_count_in_bleu_but_not_in_rouge():
    scores = score_texts(["A B C D E F."], [["a b c d e f"]])
    assert scores.total["bleu"] == 0 and scores.total["rouge_l"] == 100


def test_rouge_l_by_hand():
    # Longest common subsequence of "the pub serves cheap food" and "the cheap pub has food": the pub food, 3 words
    scores = score_texts(["the pub serves cheap food"], [["the cheap pub has food"]])
    assert scores.total["rouge_l"] == pytest.approx(60)
    # precision 3/3 and recall 3/6 give F1 2/3; the other reference has nothing; the second text has 1/2 and 1/1
    scores = score_texts(["a b c", "x y"], [["z", "a q b r c s"], ["x"]])
    assert [row["rouge_l"] for row in scores.by_prompt] == pytest.approx([200 / 3, 200 / 3])
    assert scores.total["rouge_l"] == pytest.approx(200 / 3)


def test_rouge_l_knows_ascii_letters_only():
    assert score_texts(["Ω Ψ"], [["Ω Ψ"]]).total["rouge_l"] == 0
    assert score_texts(["café"], [["caf"]]).total["rouge_l"] == 100


def test_chrf_by_hand():
    # abcd and abce: 3/4 letters, 2/3 pairs, 1/2 triples, 0/1 of four; orders 5 and 6 do not exist and are left out.
    # precision and recall are equal, so that F2 is their mean
    assert score_texts(["abcd"], [["abce"]]).total["chrf"] == pytest.approx(100 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4)


def test_references_may_differ_in_number():
    texts = ["a b c d e", "the pub by the river is cheap", "x y z w"]
    references = [["a b c d f", "a b c d", "q"], ["the pub near the river is cheap"], ["x y z", "x y z w v"]]
    streams = [
        ["a b c d f", "the pub near the river is cheap", "x y z"],
        ["a b c d", None, "x y z w v"],
        ["q", None, None],
    ]
    scores = score_texts(texts, references)
    assert scores.total["bleu"] == BLEU().corpus_score(texts, streams).score
    assert scores.total["chrf"] == CHRF().corpus_score(texts, streams).score
    assert "nrefs:var" in scores.signature
    # counted by hand: 4 + 6 + 4 of 16 words, 3 + 4 + 3 of 13, 2 + 2 + 2 of 10, 1 + 1 + 1 of 7; nearest lengths
    # are 5, 7 and 3 (of 3 and 5 the shorter): no penalty
    assert scores.total["bleu"] == pytest.approx(100 * (14 / 16 * 10 / 13 * 6 / 10 * 3 / 7) ** 0.25)


def test_rows_name_prompt_and_text_and_keep_their_order():
    scores = score_texts(["a", ""], (("a",), ("b",)), prompts=["first", "second"])
    assert [(row["prompt"], row["generated"]) for row in scores.by_prompt] == [("first", "a"), ("second", "")]
    assert {k: v for k, v in scores.by_prompt[1].items() if isinstance(v, float)} == {
        "bleu": 0,
        "chrf": 0,
        "rouge_l": 0,
    }
    assert "prompt" not in score_texts(["a"], [["a"]]).by_prompt[0]


def test_the_signature_says_what_was_computed():
    signature = score_texts(["a"], [["a", "b"]]).signature
    for part in ("BLEU|nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp", "chrF2|nrefs:2", "nc:6|nw:0", "stem:no"):
        assert part in signature


def test_mistakes_are_named():
    for texts, references, prompts, words in (
        ([], [], None, "needs one text and its references, got 0 texts"),
        (["a"], [["a"], ["b"]], None, "1 texts, 2 lists of references"),
        (["a"], [["a"]], ["p", "q"], "2 prompts"),
        (["a", "b"], [["a"], []], None, "none for text 1"),
        (["a", "b", "c"], [["a"], [], []], None, "none for text 1 .* and 1 others"),
        (["a"], ["a"], None, "got a string"),
        ("a", [["a"]], None, "got a string"),
    ):
        with pytest.raises(InlayError, match=words):
            score_texts(texts, references, prompts)


def test_scorers_are_imported_on_first_use():
    heavy = "{'sacrebleu', 'rouge_score', 'nltk', 'torch'}"
    code = f"import sys, inlay, inlay.tasks.text.scores; assert not {heavy} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not DEVSET.exists(), reason="the E2E data is not here")
def test_people_against_people_on_part_of_the_e2e_devset():
    written = defaultdict(list)
    with DEVSET.open() as file:
        for row in csv.DictReader(file):
            written[row["mr"]].append(row["ref"])
    chosen = {mr: texts for mr, texts in list(written.items())[:60] if len(texts) > 1}
    scores = score_texts([t[0] for t in chosen.values()], [t[1:] for t in chosen.values()], list(chosen))
    assert all(20 < value < 90 for value in scores.total.values())
    mean = sum(row["rouge_l"] for row in scores.by_prompt) / len(chosen)
    assert scores.total["rouge_l"] == pytest.approx(mean) and [r["prompt"] for r in scores.by_prompt] == list(chosen)

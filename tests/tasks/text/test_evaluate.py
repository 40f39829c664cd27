"""Language models scored on prompts: as recipes score them, by prompt, beside the base."""

import json
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sacrebleu.metrics import BLEU, CHRF

from inlay import (
    Decoding,
    InlayError,
    NextToken,
    TextProcessor,
    TextView,
    evaluate,
    generate,
    load_adapter,
    load_base,
    load_texts,
    load_tokenizer,
    save_adapter,
)
from inlay.bases.sites import lora_targets
from inlay.methods import METHODS
from inlay.tasks.evaluation import Request
from inlay.tasks.statistics import BINS
from inlay.tasks.text.evaluate import _corpus_statistics, _TokenSums
from inlay.tasks.text.evaluate import evaluate as evaluate_text
from places import ROOT, SHARED
from tasks.recipe_scores import recipe_scores

SHIPPED = ROOT / "adapters_hub" / "restaurants-lora-gpt2-tiny"
ROWS = [
    ("name[The Oak], food[Thai]", "The Oak serves Thai food."),
    ("name[The Elm], area[riverside]", "The Elm is by the river."),
    ("name[The Oak], food[Thai]", "Thai food is what The Oak serves."),
    ("name[The Ash]", "The Ash is a pub."),
    ("name[The Elm], area[riverside]", "By the river there is The Elm."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = load_base("builtin:gpt2-tiny")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model), task_type="CAUSAL_LM")).eval()
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.02)
    processor = TextProcessor(load_tokenizer("builtin:gpt2-tiny"))
    noted = {"dataset": "builtin:restaurants", "decoding": {"max_new_tokens": 12, "unknown": 1}}
    return save_adapter(model, tmp_path_factory.mktemp("text") / "pubs", processor=processor, metrics=noted)


@pytest.fixture
def pubs(tmp_path):
    (tmp_path / "pubs.csv").write_text("mr,ref\n" + "\n".join(f'"{mr}","{ref}"' for mr, ref in ROWS))
    return tmp_path / "pubs.csv"


def test_a_shipped_adapter_has_the_scores_that_its_recipe_wrote(monkeypatch):
    """Those of its texts. The recipe wrote no perplexity of the test split, and to measure it takes as long again."""
    without = lambda _, view, __: _TokenSums(np.zeros(len(view)), np.ones(len(view)), np.zeros((len(view), BINS)))  # noqa: E731
    monkeypatch.setattr("inlay.tasks.text.evaluate._sum_over_tokens", without)
    found = evaluate(SHIPPED, "builtin:restaurants", compare=False, resamples=20)
    noted = json.loads((SHIPPED / "metrics.json").read_text())
    assert found.split == "test" and found.count == 150 and found.base is None
    for name, value in noted["test"].items():
        assert found.scores[name].value == pytest.approx(value, abs=1e-6)
    held = evaluate(SHIPPED, "builtin:restaurants", split="validation", limit=3, compare=False, resamples=5)
    assert held.split == "validation" and held.count == 3


def test_each_prompt_is_scored_with_all_its_references(folder, pubs):
    found = evaluate(folder, pubs, resamples=50)
    loaded = load_adapter(folder)
    prompts = list(dict.fromkeys(prompt for prompt, _ in ROWS))
    wanted = [[ref for prompt, ref in ROWS if prompt == each] for each in prompts]
    texts = generate(loaded.model, loaded.processor, prompts, Decoding(max_new_tokens=12))
    assert found.split == "all" and found.unit == "prompt" and found.count == 3
    assert [(row["prompt"], row["generated"]) for row in found.rows] == list(zip(prompts, texts, strict=True))
    streams = [[refs[k] if k < len(refs) else None for refs in wanted] for k in range(2)]
    assert found.scores["bleu"].value == pytest.approx(BLEU().corpus_score(texts, streams).score)
    assert found.scores["chrf"].value == pytest.approx(CHRF().corpus_score(texts, streams).score)
    assert found.scores["rouge_l"].value == pytest.approx(np.mean([row["rouge_l"] for row in found.rows]), abs=1e-3)
    assert any("max_new_tokens 12" in note for note in found.notes)


def test_perplexity_is_that_of_training_and_of_the_base(folder, pubs):
    found, loaded = evaluate(folder, pubs, resamples=5), load_adapter(folder)
    rows = load_texts("builtin:restaurants").validation.select([0])
    view = TextView(
        rows.from_dict({"prompt": [p for p, _ in ROWS], "completion": [c for _, c in ROWS]}), loaded.processor
    )
    for model, score in ((loaded.model, found.scores), (load_base("builtin:gpt2-tiny"), found.base)):
        expected = recipe_scores(model, view, [], loss=NextToken(), collate=view.collate, batch_size=2)
        assert score["perplexity"].value == pytest.approx(math.exp(expected["loss"]), rel=1e-5)
    alone = view.collate([view[i] for i, (prompt, _) in enumerate(ROWS) if prompt == ROWS[0][0]])
    with torch.no_grad():
        loss = NextToken()(loaded.model, alone).loss
    assert found.rows[0]["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-4)
    assert found.rows[0]["base_perplexity"] != pytest.approx(found.rows[0]["perplexity"], rel=1e-3)


@pytest.mark.parametrize("method", ["prompt", "prefix", "bottleneck"])
def test_the_base_is_the_base_under_every_method(method, pubs, tmp_path):
    model = METHODS[method].adapt(load_base("builtin:gpt2-tiny"), 4)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.normal_(std=0.1)
    processor = TextProcessor(load_tokenizer("builtin:gpt2-tiny"))
    folder = save_adapter(model.eval(), tmp_path / method, processor=processor)
    found, plain = (evaluate(each, pubs, limit=2, resamples=5) for each in (folder, load_adapter(folder)))
    assert found == plain
    base = load_base("builtin:gpt2-tiny")
    texts = generate(base, processor, [row["prompt"] for row in found.rows])
    assert [row["base_generated"] for row in found.rows] == texts
    assert found.base["perplexity"].value != pytest.approx(found.scores["perplexity"].value, rel=1e-3)


def test_resampled_corpora_are_sacrebleus():
    generator = np.random.default_rng(0)
    texts = ["a cheap pub", "the oak serves thai food", "by the river is the elm", "no"]
    wanted = [
        ["a cheap pub", "an inexpensive pub"],
        ["the oak serves food"],
        ["the elm is by the river"],
        ["yes", "no"],
    ]
    corpora = _corpus_statistics(texts, wanted)
    for rows in (generator.integers(0, 4, 4) for _ in range(5)):
        drawn = [wanted[i] for i in rows]
        streams = [[refs[k] if k < len(refs) else None for refs in drawn] for k in range(2)]
        for name, whole in (("bleu", BLEU()), ("chrf", CHRF())):
            metric, counts = corpora[name]
            found = metric._compute_score_from_stats(counts[rows].sum(0).tolist()).score
            assert found == pytest.approx(whole.corpus_score([texts[i] for i in rows], streams).score)


def test_running_text_has_perplexity_by_block(folder, tmp_path):
    (tmp_path / "book.txt").write_text("The river was wide, and the pub stood by it. " * 90)
    found = evaluate(folder, tmp_path / "book.txt", resamples=20)
    assert found.unit == "block" and set(found.scores) == {"perplexity", "ece"} and found.count == len(found.rows) > 1
    held = evaluate(folder, tmp_path / "book.txt", split="validation", resamples=5)
    assert held.count < found.count and "recipes hold out" in held.notes[0]


def test_calibration_is_that_of_the_most_probable_next_token(folder, pubs):
    """By hand: 15 bins of equal width over every token of every completion."""
    found, loaded = evaluate(folder, pubs, resamples=5), load_adapter(folder)
    confidences, rights = [], []
    for prompt, completion in ROWS:
        asked, answer = (loaded.processor.encode_prompt(prompt), loaded.processor.encode_completion(completion, prompt))
        with torch.no_grad():
            chances = loaded.model(torch.tensor([[*asked, *answer]])).logits[0].double().softmax(-1)
        for place, token in enumerate(answer, start=len(asked) - 1):
            confidences.append(float(chances[place].max()))
            rights.append(int(chances[place].argmax()) == token)
    error = 0.0
    for k in range(15):
        inside = [i for i, each in enumerate(confidences) if k / 15 < each <= (k + 1) / 15]
        error += abs(sum(rights[i] - confidences[i] for i in inside)) / len(confidences)
    assert found.scores["ece"].value == pytest.approx(error, abs=1e-5) and found.base["ece"].value > 0
    assert found.scores["ece"].low <= found.scores["ece"].high


def test_chats_are_scored_and_listed_as_text(folder, tmp_path):
    chat = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "By the river."}]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for _ in range(2)))
    loaded = load_adapter(folder)
    loaded.processor.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    found = evaluate(loaded, tmp_path / "chats.jsonl", resamples=5)
    assert found.count == 1 and found.rows[0]["prompt"] == "user: Where?" and found.scores["bleu"].low is None


def test_mistakes_are_named(folder, tmp_path, caplog, pubs):
    (tmp_path / "empty.csv").write_text("mr,ref\n")
    with pytest.raises(InlayError, match=r"empty\.csv"):
        evaluate(folder, tmp_path / "empty.csv")
    loaded = load_adapter(folder)
    loaded.file.metrics["decoding"] = {"beams": "many"}
    evaluate(loaded, pubs, resamples=5, compare=False, limit=1)
    assert "decoding in metrics.json cannot be used" in caplog.text
    written = evaluate_text(loaded, str(pubs), Request(compare=False, limit=1), decoding=Decoding(max_new_tokens=3))
    assert any("max_new_tokens 3" in note for note in written.notes)


@pytest.mark.skipif(not (SHARED / "e2e_nlg").is_dir(), reason="data beside the repository")
def test_e2e(folder):
    found = evaluate(folder, SHARED / "e2e_nlg" / "devset.csv", limit=4, resamples=5)
    assert found.count == 4 and found.split == "all" and set(found.base) == set(found.scores)

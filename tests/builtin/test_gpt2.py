"""builtin:gpt2-tiny: that it loads quietly, is as good as its card says, and holds nothing but itself."""

import json
import re
import runpy
import warnings

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from inlay.bases.load import BUILTIN
from inlay.builtin.restaurants import generate_descriptions
from places import ROOT

FOLDER = BUILTIN / "gpt2-tiny"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def perplexity(model, tokenizer, topic, count, *, seed):
    """Of texts in the form of the training, in blocks of 256 tokens, as the recipe measures it."""
    items = generate_descriptions(topic, count, seed=seed, references=3)
    text = "".join(f"{item.meaning}\n{said}{END}" for item in items for said in item.references)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    blocks = ids[: len(ids) // 256 * 256].view(-1, 256)  # B N
    losses = []
    with torch.inference_mode():
        for part in blocks.split(16):
            logits = model(input_ids=part, attention_mask=torch.ones_like(part)).logits[:, :-1]
            losses.append(
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            )
    return float(torch.cat(losses).mean().exp())


def test_it_loads_without_a_word(caplog):
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(action="error"):
            model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert type(model) is GPT2LMHeadModel and model.lm_head.weight is model.transformer.wte.weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert tokenizer.model_max_length == model.config.n_positions == 256
    assert len(tokenizer) == model.config.vocab_size == 2048
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert ends == {0} and tokenizer.decode([0]) == END
    assert model.config.eos_token_id == model.generation_config.eos_token_id == 0


def test_the_folder_is_small_whole_and_tells_no_place():
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in FOLDER.iterdir()} == names | {"tokenizer_config.json"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118 - no dict
        assert file.metadata() == {"format": "pt"}
    for path in FOLDER.glob("*.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        assert not {"_name_or_path", "name_or_path"} & set(settings)
        if path.name != "tokenizer.json":
            assert not re.search(r"/\w+/|[A-Z]:\\", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("topic", "bound"), [("hotels", 2.0), ("gadgets", 2.0), ("restaurants", 300.0)])
def test_it_has_learnt_to_describe(model, tokenizer, topic, bound):
    """With a seed that no training used. Untrained is about the size of the vocabulary.

    Restaurants are new to it, and it is nearly lost there: that is what adapters are to learn.
    """
    torch.manual_seed(0)
    untrained = perplexity(GPT2LMHeadModel(model.config).eval(), tokenizer, topic, 20, seed=4711)
    trained = perplexity(model, tokenizer, topic, 20, seed=4711)
    assert untrained > 1500 and trained < bound


def test_its_card_is_what_the_recipe_writes():
    template = runpy.run_path(str(ROOT / "recipes" / "pretrain" / "gpt2.py"))["CARD"]
    fixed = map(re.escape, re.split(r"\{[^}]*\}", template))
    assert re.fullmatch(r"[\w.,]+".join(fixed), CARD)


def test_its_card_is_right(model, tokenizer):
    """The perplexity on restaurants, measured anew with the same texts."""
    stated = float(re.search(r"([\d.]+) on restaurants", CARD)[1])
    assert perplexity(model, tokenizer, "restaurants", 200, seed=0) == pytest.approx(stated, abs=0.006)
    assert f"{model.num_parameters():,}" in CARD


@pytest.mark.parametrize(
    "text",
    [
        "name[The Silver Oak], food[Thai]\nThe Silver Oak serves Thai food.",
        "def f(x):\n\treturn  x  # 'tabs', \"quotes\"",
        "Café, naïve, Übung, 漢字, 🙂",
        " leading and trailing ",
    ],
)
def test_text_becomes_tokens_and_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and 0 not in ids
    assert tokenizer(text + END)["input_ids"] == [*ids, 0]


def test_greedy_generation_says_the_name_and_ends(model, tokenizer):
    """Two prompts at once, padded on the left: each as it is alone."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, padding_side="left")
    items = generate_descriptions("hotels", 8, seed=4711)
    prompts = [item.meaning + "\n" for item in items]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    ids = model.generate(**batch, max_new_tokens=100, do_sample=False)[:, batch["input_ids"].shape[1] :]
    said = tokenizer.batch_decode(ids, skip_special_tokens=True)
    for item, text, row in zip(items, said, ids, strict=True):
        name = re.search(r"name\[(.*?)\]", item.meaning)[1]
        assert name in text and 0 in row.tolist() and text.endswith(".")
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    alone = model.generate(**tokenizer(prompts[0], return_tensors="pt"), max_new_tokens=100, do_sample=False)
    assert tokenizer.decode(alone[0], skip_special_tokens=True) == prompts[0] + said[0]

"""Rows of tokens for a language model: what is trained on, what is cut, and batches."""

import pickle
import random
import time

import datasets
import numpy as np
import pytest
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from inlay.errors import InlayError
from inlay.tasks.golden import golden_tokens
from inlay.tasks.text.data import load_texts
from inlay.tasks.text.processor import WINDOW, WINDOWS, TextProcessor
from inlay.tasks.text.view import CHARACTERS, TextView
from inlay.tasks.text.vocabulary import check_vocabulary
from places import SHARED

DATA = SHARED
CHAT = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}a{% endif %}"


def processor(max_length=None, bos=False, template=None):
    """Every byte is a token, <e> the end of a text, <b> in front when asked."""
    fast = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<b>", special=True), AddedToken("<e>", special=True)])
    start = [("<b>", fast.token_to_id("<b>"))] if bos else []
    fast.post_processor = processors.TemplateProcessing(single=["<b>"] * bos + ["$A"], special_tokens=start)
    tok = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<e>", chat_template=template)
    return TextProcessor(tok, separator="|", max_length=max_length)


def rows(*pairs):
    return datasets.Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])


def shown(view, using, index):
    """The text of an example, and of what is learned of it."""
    item = view[index]
    ids, labels = item["input_ids"], item["labels"]
    assert ids.dtype == labels.dtype == torch.int64
    assert ids.shape == labels.shape == (view.lengths[index],)
    learned = labels >= 0
    assert torch.equal(labels[learned], ids[learned]) and set(labels[~learned].tolist()) <= {-100}
    return using.tokenizer.decode(ids), using.tokenizer.decode(labels[learned])


def refused(*words, call):
    with pytest.raises(InlayError) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.endswith(".")


def test_loss_is_on_the_completion_and_eos():
    using = processor()
    view = TextView(rows(("ab", "cde"), ("", "xy"), ("q", "z")), using)
    assert [shown(view, using, i) for i in range(3)] == [
        ("ab|cde<e>", "cde<e>"),
        ("<e>xy<e>", "xy<e>"),
        ("q|z<e>", "z<e>"),
    ]
    assert view.lengths == [7, 4, 4] and len(view) == 3
    assert view.report == "3 examples, 4 to 7 tokens (15 in all, 9 trained on)"
    assert torch.equal(view[-1]["input_ids"], view[2]["input_ids"])
    with pytest.raises(IndexError):
        view[3]


def test_chats():
    using = processor(template=CHAT)
    view = TextView(rows(([{"role": "user", "content": "hi"}], "yo"), ([{"role": "user", "content": "?"}], "!")), using)
    assert shown(view, using, 0) == ("uhi<e>ayo<e>", "yo<e>")
    assert shown(view, using, 1) == ("u?<e>a!<e>", "!<e>")


# Too long


def test_prompts_are_cut_first_and_at_their_start():
    using = processor(max_length=12, bos=True)
    view = TextView(rows(("0123456789", "abcd"), ("01", "a")), using)
    # 5 of 12 are the completion and eos, which leaves 7: bos, 5 characters and the separator.
    assert shown(view, using, 0) == ("<b>56789|abcd<e>", "abcd<e>")
    assert shown(view, using, 1) == ("<b>01|a<e>", "a<e>")
    assert view.report == "2 examples, 6 to 12 tokens (18 in all, 7 trained on); 1 longer than 12 was cut"


def test_completions_lose_their_end_and_eos():
    using = processor(max_length=12)
    pairs = [("0123456789", "abcdefghijklm"), ("0", "abcdefghijklm"), ("0123456789", "abcdefgh"), ("", "abcdefghijklm")]
    view = TextView(rows(*pairs), using)
    # A quarter of 12 stays for the prompt, its last characters; a prompt of fewer stays whole.
    assert shown(view, using, 0) == ("89|abcdefghi", "abcdefghi")
    assert shown(view, using, 1) == ("0|abcdefghij", "abcdefghij")
    assert shown(view, using, 2) == ("89|abcdefgh<e>", "abcdefgh<e>")
    assert shown(view, using, 3) == ("<e>abcdefghijk", "abcdefghijk")
    assert "4 longer than 12 were cut" in view.report


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("length", [3, 4, 5, 7, 40])
def test_something_of_both_always_stays(length, bos):
    using = processor(max_length=length, bos=bos)
    texts = ["", "p", "p" * 30]
    view = TextView(rows(*((p, "c" * n) for p in texts for n in (1, 9, 60))), using)
    for item in view:
        learned = item["labels"] >= 0
        assert len(learned) <= length and learned.any() and not learned[0]
        assert int(learned.sum()) == int(learned.nonzero()[-1] - learned.nonzero()[0]) + 1 and learned[-1]
        assert using.tokenizer.decode(item["labels"][learned][:1]) == "c"


def test_dropped_and_refused():
    using = processor(max_length=8)
    pairs = rows(("a", "b"), ("a", "b" * 20), ("c", "d"), ("a" * 20, "b"))
    view = TextView(pairs, using, over_long="drop")
    assert [shown(view, using, i)[0] for i in range(len(view))] == ["a|b<e>", "c|d<e>"]
    assert view.report == "2 examples, 4 to 4 tokens (8 in all, 4 trained on); 2 longer than 8 were dropped"
    refused(
        "8 tokens", "2 of 4 examples", "the first is row 2", call=lambda: TextView(pairs, using, over_long="refuse")
    )
    assert len(TextView(pairs.select([0, 2]), using, over_long="refuse")) == 2
    refused("no examples are left; 1 longer than 8", call=lambda: TextView(pairs.select([1]), using, over_long="drop"))
    refused(
        "over_long must be cut, drop or refuse", "'shorten'", call=lambda: TextView(pairs, using, over_long="shorten")
    )
    refused("this split has no rows", call=lambda: TextView(pairs.select([]), using))


# Blocks


def test_blocks_are_full_and_hold_all_text():
    using = processor(max_length=5)
    view = TextView(rows(("", "abc"), ("", "defghij"), ("", "k")), using, block=True)
    assert [shown(view, using, i) for i in range(len(view))] == [("abc<e>d",) * 2, ("efghi",) * 2]
    # 14 tokens with eos; the first of a block has no loss.
    assert view.report == (
        "2 examples, 5 to 5 tokens (10 in all, 8 trained on); the last 4 tokens fill no block and were left out"
    )
    assert [len(TextView(rows(("", "x" * n)), using, block=True)) for n in (3, 4, 5, 9)] == [1, 1, 1, 2]
    short = TextView(rows(("", "ab")), using, block=True)
    assert shown(short, using, 0) == ("ab<e>", "ab<e>")
    assert short.report == "1 example, 3 to 3 tokens (3 in all, 2 trained on)"
    refused(
        "only running text can be cut into blocks",
        "these rows have prompts",
        call=lambda: TextView(rows(("a", "b")), using, block=True),
    )


def test_padding_needs_no_embedding():
    """Many fine-tuned Llamas have a [PAD] that was added to the tokenizer only; masked, any token pads as well."""
    using = processor()
    using.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert using.tokenizer.pad_token_id == len(using.tokenizer) - 1
    view = TextView(rows(("a", "b"), ("a", "bcd")), TextProcessor(using.tokenizer))
    batch = view.collate(list(view))
    assert batch["input_ids"].max() < len(using.tokenizer) - 1
    assert batch["input_ids"][0, -2:].tolist() == [using.tokenizer.eos_token_id] * 2
    assert batch["attention_mask"][0, -2:].tolist() == [0, 0] and batch["labels"][0, -2:].tolist() == [-100] * 2


def test_tokens_without_an_embedding_are_named():
    with pytest.raises(InlayError, match="makes the token 400, but the base has embeddings for 400 tokens only"):
        check_vocabulary("base", 400, 400)
    check_vocabulary("base", 399, 400)


@pytest.mark.parametrize(("tokens", "rows"), [(512, 512), (401, 400), (460, 400), (40, 64)])
def test_golden_tokens_have_an_embedding(tokens, rows):
    """Those of a tokenizer as it is, unless the base has no rows for them: files of before are checked as before."""
    before = [i**3 * 7919 % tokens for i in range(1, 17)]
    found = golden_tokens(tokens, rows)[0].tolist()
    assert max(found) < rows and (found == before or max(before) >= rows)


# Long texts


LATIN = "the of Heron's café naïve 12345 3.14 x==y; foo(bar) /path http://a.b/c?d=e <e> aaaaaaaaaaaa ==== \u00a0 \u2028"
OTHERS = "中文字符没有空格的一句话 \U0001f600 \U0001f469\u200d\U0001f467 e\u0301"
WORDS = [*LATIN.split(" "), *OTHERS.split(" ")]
GAPS = [" "] * 20 + ["\n", "\n\n", "\n\n\n", "\r\n", "  ", "\t", " \n", "\n  ", ".\n/", "   \n\n  "]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def mixed_text(seed, words):
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(GAPS) for _ in range(words))


def trained(model, trainer, divide, normal=None):
    """A tokenizer trained on such texts."""
    fast = Tokenizer(model)
    fast.pre_tokenizer = divide
    if normal:
        fast.normalizer = normal
    options = {"vocab_size": 500, "special_tokens": ["<e>", "<unk>"], "show_progress": False}
    options |= {"unk_token": "<unk>"} if trainer is trainers.UnigramTrainer else {}
    fast.train_from_iterator((mixed_text(i, 500) for i in range(10)), trainer(**options))
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<e>")


def bytes_behind(pattern):
    divide = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([divide, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


KINDS = {
    "GPT-2": lambda: trained(models.BPE(), trainers.BpeTrainer, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "RoBERTa": lambda: trained(models.BPE(), trainers.BpeTrainer, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "Llama 3": lambda: trained(models.BPE(), trainers.BpeTrainer, bytes_behind(LLAMA_3), normalizers.NFC()),
    "Llama 2": lambda: trained(
        models.BPE(unk_token="<unk>"),
        trainers.BpeTrainer,
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    ),
    "T5": lambda: trained(models.Unigram(), trainers.UnigramTrainer, pre_tokenizers.Metaspace(), normalizers.NFKC()),
    "BERT": lambda: trained(
        models.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer,
        pre_tokenizers.BertPreTokenizer(),
        normalizers.BertNormalizer(),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_in_windows_has_the_tokens_of_the_whole(kind, monkeypatch):
    """Borders fall on lines, on words and into both; the tokenizer itself, in one call, says what is right."""
    monkeypatch.setattr("inlay.tasks.text.processor.WINDOW", 600)
    using = TextProcessor(KINDS[kind]())
    for seed in range(20):
        text = mixed_text(seed, 1000)
        whole = using.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        said = []
        assert np.concatenate(list(using.encode_document(text, said.append))).tolist() == [
            *whole,
            using.tokenizer.eos_token_id,
        ]
        assert len(said) > 5 and sum(said) == len(text)
        plain = using.tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=True)["input_ids"]
        assert using.encode_completions([text, "a"], ["p", "p"])[0] == [*plain, using.tokenizer.eos_token_id]


def test_what_a_tokenizer_reads_at_a_time_does_not_grow(monkeypatch):
    """150 bytes a character are taken while it does: 30 GB for a text of 200 MB in one call."""
    assert WINDOWS * WINDOW <= CHARACTERS == 2**20
    monkeypatch.setattr("inlay.tasks.text.view.CHARACTERS", 2**18)  # all of a quarter, in as much less time
    monkeypatch.setattr("inlay.tasks.text.processor.WINDOW", WINDOW // 4)
    using = processor(max_length=256)
    calls, call = [], using._call_tokenizer
    monkeypatch.setattr(
        using, "_call_tokenizer", lambda texts, *a, **k: calls.append(sum(map(len, texts))) or call(texts, *a, **k)
    )
    long, short = "line of words\n" * 25_000, "short\n" * 1250
    view = TextView(rows(("", long), *[("", short)] * 50), using, block=True)
    assert len(view.tokens) + 255 >= len(long) + 50 * len(short) + 51 and max(calls) < 1.1 * 2**18
    calls.clear()
    TextView(rows(("p", long), *[("p", short)] * 50), using)
    assert max(calls) < 1.1 * 2**18


# Batches


def test_collate_pads_on_the_right():
    using = processor()
    view = TextView(rows(("a", "b"), ("", "c")), using)
    batch = view.collate([view[0], view[1]])
    a, b, c, bar, end = using.tokenizer.convert_tokens_to_ids(["a", "b", "c", "|", "<e>"])
    assert batch["input_ids"].tolist() == [[a, bar, b, end], [end, c, end, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, b, end], [-100, c, end, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_batch_has_the_losses_of_its_rows_alone():
    using = processor()
    view = TextView(rows(("abc", "defghi"), ("j", "k"), ("", "lmnop")), using)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(using.tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32))
    torch.nn.init.normal_(model.transformer.wpe.weight)
    model.eval()
    with torch.no_grad():
        alone = [model(input_ids=i["input_ids"][None], labels=i["labels"][None]).loss for i in view]
        together = model(**view.collate(list(view))).loss
    counts = [7, 2, 6]
    expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)


def test_goes_to_workers_without_the_tokenizer():
    view = TextView(rows(*((f"prompt {i}", "words " * 5) for i in range(500))), processor())
    packed = pickle.dumps(view)
    assert len(packed) < 4 * sum(view.lengths) + 500 * (8 + 4 + 9) + 2000
    again = pickle.loads(packed)
    assert again.report == view.report and torch.equal(again[7]["input_ids"], view[7]["input_ids"])
    loader = torch.utils.data.DataLoader(view, batch_size=250, num_workers=1, collate_fn=view.collate)
    assert [len(batch["labels"]) for batch in loader] == [250, 250]


# Real data


def test_e2e_with_gpt2s_tokenizer():
    if not ((DATA / "e2e_nlg/devset.csv").is_file() and (DATA / "gpt2_tokenizer").is_dir()):
        pytest.skip("E2E and GPT-2's tokenizer are not beside the checkout (shared/data)")
    from transformers import GPT2TokenizerFast

    files = {
        part: str(DATA / "gpt2_tokenizer" / name) for part, name in (("vocab", "vocab.json"), ("merges", "merges.txt"))
    }
    data = load_texts(str(DATA / "e2e_nlg/devset.csv"))
    using = TextProcessor(GPT2TokenizerFast(**files), max_length=256)
    start = time.process_time()
    view = TextView(data.train, using)
    assert time.process_time() - start < 10  # 0.6 s on one core
    row = data.train[100]
    assert shown(view, using, 100) == (
        f"{row['prompt']}\n{row['completion']}<|endoftext|>",
        f"{row['completion']}<|endoftext|>",
    )
    assert len(view) == len(data.train) and "cut" not in view.report
    assert int(np.sum(view.lengths)) == len(view.tokens)


def test_shakespeare_in_blocks():
    if not ((DATA / "tinyshakespeare").is_dir() and (DATA / "lm_stories260K_llama/hf").is_dir()):
        pytest.skip("tiny Shakespeare and the small Llama are not beside the checkout (shared/data)")
    from transformers import AutoTokenizer

    data = load_texts(str(DATA / "tinyshakespeare/input.txt.gz"))
    using = TextProcessor(AutoTokenizer.from_pretrained(DATA / "lm_stories260K_llama/hf"), max_length=256)
    view = TextView(data.validation, using, block=True)
    assert set(view.lengths) == {256}
    text = using.tokenizer.decode(torch.cat([item["input_ids"] for item in view]))
    whole = data.validation[0]["completion"]
    assert whole.startswith(text[:-3]) and len(text) > 0.99 * len(whole)

"""Prompts and completions as tokens: a byte-level tokenizer without merges, so that every character is one token."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from inlay.errors import InlayError
from inlay.tasks.text.data import group_by_prompt
from inlay.tasks.text.processor import TextProcessor
from places import SHARED

DATA = SHARED
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [{"role": "user", "content": "hi"}]


def tokenizer(*, bos=False, eos=True, appended=False, merges=(), template=None, special=("<|end|>",)):
    """Bytes as tokens; bos in front and eos behind, as a tokenizer may add them by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    names = {"eos_token": "</s>"} if eos else {}
    names |= {"bos_token": "<s>"} if bos else {}
    fast.add_special_tokens([AddedToken(name, special=True) for name in (*special, "<s>", "</s>")])
    single = ["<s>"] * bos + ["$A"] + ["</s>"] * appended
    ids = [(name, fast.token_to_id(name)) for name in ("<s>", "</s>")]
    fast.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=fast, chat_template=template, **names)


def ids(tok, *parts):
    """Tokens by their names: characters, or a special token."""
    split = [[part] if part.startswith("<") else list(part.replace(" ", "Ġ").replace("\n", "Ċ")) for part in parts]
    found = tok.convert_tokens_to_ids([token for part in split for token in part])
    assert None not in found
    return found


def refused(*words, call):
    with pytest.raises(InlayError) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.endswith(".")


def test_prompt_and_completion():
    tok = tokenizer()
    processor = TextProcessor(tok)
    assert processor.encode_prompt("a b") == ids(tok, "a b\n")
    assert processor.encode_completion("c d") == ids(tok, "c d", "</s>")
    assert processor.encode_completion("c</s>") == ids(tok, "c", "</s>")  # not twice
    assert TextProcessor(tok, separator=" => ").encode_prompt("a") == ids(tok, "a => ")
    assert (tok.padding_side, tok.pad_token) == ("left", "</s>")


def test_special_tokens_stand_at_the_start_alone():
    tok = tokenizer(bos=True, appended=True)
    assert tok("a")["input_ids"] == ids(tok, "<s>", "a", "</s>")
    processor = TextProcessor(tok)
    assert processor.encode_prompt("a") == ids(tok, "<s>", "a\n")
    assert processor.encode_completion("b") == ids(tok, "b", "</s>")
    assert processor.encode_prompts(["a", "", "bc"]) == [
        ids(tok, "<s>", "a\n"),
        ids(tok, "<s>"),
        ids(tok, "<s>", "bc\n"),
    ]


def test_empty_prompt_is_the_start_of_a_text():
    without = tokenizer()
    assert TextProcessor(without).encode_prompt("") == ids(without, "</s>")
    unused = tokenizer(bos=True)
    unused.backend_tokenizer.post_processor = processors.TemplateProcessing(single=["$A"], special_tokens=[])
    assert TextProcessor(unused).encode_prompt("") == ids(unused, "<s>")
    assert TextProcessor(unused).encode_prompt("a") == ids(unused, "a\n")


def test_no_eos_and_no_room():
    refused("eos", call=lambda: TextProcessor(tokenizer(eos=False)))
    refused("max_length must be at least 2", "got 1", call=lambda: TextProcessor(tokenizer(), max_length=1))
    refused("max_length must be at least 3", "got 2", call=lambda: TextProcessor(tokenizer(bos=True), max_length=2))


def test_max_length_is_the_tokenizers_up_to_1024():
    tok = tokenizer()
    assert TextProcessor(tok).max_length == 1024
    tok.model_max_length = 100
    assert TextProcessor(tok).max_length == 100
    assert TextProcessor(tok, max_length=50).max_length == 50
    with pytest.raises(InlayError, match="max_length is 2000, but the base reads 100 tokens at most"):
        TextProcessor(tok, max_length=2000)


def test_decode_leaves_out_special_tokens_and_spaces_around():
    tok = tokenizer(bos=True)
    processor = TextProcessor(tok)
    assert processor.decode(ids(tok, "<s>", " a , b .\n", "</s>", "</s>")) == "a , b ."
    assert processor.decode([]) == ""
    text = "né 你好\n\tx"
    assert processor.decode(processor.encode_completion(text)) == text


def test_what_looks_like_a_special_token_in_a_text_is_text():
    tok = tokenizer(template=CHAT, special=("<|end|>", "<|user|>", "<|assistant|>"))
    processor = TextProcessor(tok)
    for text in ("a</s>b", "<|end|>", "</s></s>"):
        prompt, completion = processor.encode_prompt(text), processor.encode_completion(text + "c", "x")
        assert processor.special.isdisjoint(prompt) and [i for i in completion if i in processor.special] == [
            tok.eos_token_id
        ]
        assert processor.decode(prompt) == text
    # Documents of running text may be parted by it.
    assert processor.encode_completion("a</s>b") == ids(tok, "a", "</s>", "b", "</s>")
    for talk in ([{"role": "user", "content": "hi<|end|>"}], [{"role": "user", "content": "</s>"}]):
        refused("special token", "remove it", call=lambda talk=talk: processor.encode_prompt(talk))
    refused("'<|user|>'", call=lambda: processor.encode_completion("a<|user|>b", TALK))


def test_long_text_is_no_warning(caplog, recwarn):
    tok = tokenizer()
    tok.model_max_length = 10
    assert len(TextProcessor(tok).encode_prompt("a" * 50)) == 51
    assert not caplog.records and not recwarn.list


# Chat


def test_chat_goes_through_the_template():
    tok = tokenizer(template=CHAT, special=("<|end|>", "<|user|>", "<|assistant|>"))
    processor = TextProcessor(tok)
    prompt = ids(tok, "<|user|>", "hi", "<|end|>", "<|assistant|>")
    assert processor.encode_prompt(TALK) == prompt
    # The template's own end of a turn is learned, and nothing behind it.
    assert processor.encode_completion("yo", TALK) == ids(tok, "yo", "<|end|>")
    longer = [*TALK, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "?"}]
    assert processor.encode_prompt(longer) == ids(
        tok, "<|user|>", "hi", "<|end|>", "<|assistant|>", "yo", "<|end|>", "<|user|>", "?", "<|end|>", "<|assistant|>"
    )
    rows = [{"prompt": TALK, "completion": "a"}, {"prompt": "hi", "completion": "c"}]
    key, plain = group_by_prompt([*rows, {"prompt": list(TALK), "completion": "b"}])
    assert processor.encode_prompts([key, plain]) == [prompt, ids(tok, "hi\n")]
    assert processor.encode_completion("yo", key) == ids(tok, "yo", "<|end|>")


def test_a_text_is_what_a_user_says_to_a_model_that_chats():
    tok = tokenizer(template=CHAT)
    processor = TextProcessor(tok, chat=True)
    assert processor.encode_prompt("hi") == processor.encode_prompt(TALK) != TextProcessor(tok).encode_prompt("hi")
    assert processor.encode_completion("yo", "hi") == processor.encode_completion("yo", TALK)
    again = TextProcessor.from_dict(json.loads(json.dumps(processor.to_dict())), tok)
    assert again.chat and again.encode_prompt("hi") == processor.encode_prompt(TALK)
    old = {key: value for key, value in TextProcessor(tok).to_dict().items() if key != "chat"}
    assert TextProcessor.from_dict(old, tok).chat is False


def test_chat_without_an_end_gets_eos():
    tok = tokenizer(
        template=CHAT.replace("<|end|>", "\n").replace("<|assistant|>", "A").replace("<|{{ m.role }}|>", "A")
    )
    assert TextProcessor(tok).encode_completion("yo", TALK) == ids(tok, "yo\n", "</s>")


def test_tokens_over_the_border_are_split_as_in_generation():
    """A merge of the prompt's last character and the answer's first must not change the prompt's tokens."""
    template = CHAT.replace("<|assistant|>", "A").replace("<|{{ m.role }}|>", "A")
    tok = tokenizer(template=template, merges=[("A", "y")])
    processor = TextProcessor(tok)
    assert processor.encode_prompt(TALK)[-1:] == ids(tok, "A")
    assert processor.encode_completion("yo", TALK) == ids(tok, "yo", "<|end|>")
    # Where nothing is merged over the border, the tokens are those of the whole conversation.
    assert processor.encode_completion("Ay", TALK) == [*tok.convert_tokens_to_ids(["Ay"]), *ids(tok, "<|end|>")]


def test_templates_that_do_not_serve():
    refused("chat template", call=lambda: TextProcessor(tokenizer()).encode_prompt(TALK))
    rewriting = "{% for m in messages %}[{{ messages | length }}]{{ m.content }}{% endfor %}"
    refused("rewrites", call=lambda: TextProcessor(tokenizer(template=rewriting)).encode_completion("yo", TALK))
    swallowing = "{{ messages[0].content }}"
    refused("rewrites", call=lambda: TextProcessor(tokenizer(template=swallowing)).encode_completion("yo", TALK))
    raising = "{{ raise_exception('roles must\\nalternate') }}"
    refused("roles must", call=lambda: TextProcessor(tokenizer(template=raising)).encode_prompt(TALK))
    broken = "{% for %}"
    refused("Expected", call=lambda: TextProcessor(tokenizer(template=broken)).encode_prompt(TALK))


# Saved settings


def test_settings_come_back(tmp_path):
    tok = tokenizer(bos=True, template=CHAT)
    saved = json.loads(json.dumps(TextProcessor(tok, separator=" >", max_length=77).to_dict()))
    tok.save_pretrained(tmp_path)
    again = TextProcessor.from_dict(saved, AutoTokenizer.from_pretrained(tmp_path))
    assert (again.separator, again.max_length) == (" >", 77)
    assert again.to_dict() == saved
    assert (saved["size"], len(saved["vocabulary"]), len(saved["chat_template"])) == (len(tok), 16, 16)
    assert TextProcessor(tokenizer()).to_dict()["chat_template"] is None


def test_vocabulary_does_not_change_with_use():
    tok = tokenizer()
    before = TextProcessor(tok).to_dict()
    tok(["abc", "d"], padding=True, truncation=True, max_length=2)
    assert tok.backend_tokenizer.truncation is not None and tok.backend_tokenizer.padding is not None
    assert TextProcessor(tok).to_dict() == before


@pytest.mark.parametrize("other", [{"merges": [("a", "b")]}, {"bos": True}, {"special": ("<|start|>",)}])
def test_another_tokenizer_is_refused(other):
    saved = TextProcessor(tokenizer()).to_dict()
    refused(
        "trained with the tokenizer",
        "load the base that it was made for",
        call=lambda: TextProcessor.from_dict(saved, tokenizer(**other)),
    )


def test_same_tokens_split_differently_are_refused():
    saved = TextProcessor(tokenizer()).to_dict()
    tok = tokenizer()
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    assert tok.get_vocab() == tokenizer().get_vocab()
    refused(
        "trained with the tokenizer",
        "load the base that it was made for",
        call=lambda: TextProcessor.from_dict(saved, tok),
    )
    ending = tokenizer()
    ending.eos_token = "<|end|>"
    refused(
        "trained with the tokenizer",
        "load the base that it was made for",
        call=lambda: TextProcessor.from_dict(saved, ending),
    )


def test_another_chat_template_is_said(caplog):
    saved = TextProcessor(tokenizer(template=CHAT)).to_dict()
    TextProcessor.from_dict(saved, tokenizer(template=CHAT))
    assert not caplog.records
    TextProcessor.from_dict(saved, tokenizer(template=CHAT + " "))
    assert "chat template" in caplog.text


@pytest.mark.parametrize(
    "change",
    [{"separator": 1}, {"chat": "no"}, {"max_length": "96"}, {"max_length": True}, {"vocabulary": None}, {"size": 1.0}],
)
def test_settings_of_another_kind_are_refused(change):
    tok = tokenizer()
    saved = TextProcessor(tok).to_dict()
    refused(next(iter(change)), call=lambda: TextProcessor.from_dict(saved | change, tok))
    refused("vocabulary", call=lambda: TextProcessor.from_dict({}, tok))
    refused("vocabulary", call=lambda: TextProcessor.from_dict(["vocabulary"], tok))
    refused("max_length", call=lambda: TextProcessor.from_dict(saved | {"max_length": -5}, tok))
    refused(
        "max_length", call=lambda: TextProcessor.from_dict({k: v for k, v in saved.items() if k != "max_length"}, tok)
    )


# Other tokenizers


def test_a_tokenizer_in_python():
    """ByT5's: byte + 3, and an eos (1) that it puts behind every text."""
    tok = ByT5Tokenizer()
    processor = TextProcessor(tok)
    assert tok("a")["input_ids"] == [100, 1]
    assert (processor.encode_prompt("a"), processor.encode_completion("b")) == ([100, 13], [101, 1])
    assert TextProcessor.from_dict(processor.to_dict(), ByT5Tokenizer()).encode_prompt("") == [1]
    fewer = ByT5Tokenizer(extra_ids=10)
    refused(
        "trained with the tokenizer",
        "load the base that it was made for",
        call=lambda: TextProcessor.from_dict(processor.to_dict(), fewer),
    )


def test_gpt2s_tokenizer():
    if not (DATA / "gpt2_tokenizer").is_dir():
        pytest.skip("GPT-2's tokenizer is not beside the checkout (shared/data/gpt2_tokenizer)")
    from transformers import GPT2TokenizerFast

    files = {
        part: str(DATA / "gpt2_tokenizer" / name) for part, name in (("vocab", "vocab.json"), ("merges", "merges.txt"))
    }
    processor = TextProcessor(GPT2TokenizerFast(**files))
    # As OpenAI's encoder gives them: "Hello world" is 15496, 995, the newline 198, the end of text 50256.
    assert processor.encode_prompt("Hello world") == [15496, 995, 198]
    assert processor.encode_completion("Hello world") == [15496, 995, 50256]
    assert processor.encode_prompt("") == [50256]
    assert processor.to_dict()["size"] == 50257


def test_llamas_tokenizer():
    folder = DATA / "lm_stories260K_llama/hf"
    if not folder.is_dir():
        pytest.skip("the small Llama is not beside the checkout (shared/data/lm_stories260K_llama)")
    processor = TextProcessor(AutoTokenizer.from_pretrained(folder))
    prompt, completion = processor.encode_prompt("Once upon"), processor.encode_completion("a time.\nThe end")
    assert (prompt[0], prompt.count(1), prompt.count(2)) == (1, 1, 0)
    assert (completion[-1], completion.count(1), completion.count(2)) == (2, 0, 1)
    assert processor.decode(prompt) == "Once upon"
    assert processor.decode(completion) == "a time.\nThe end"
    assert processor.encode_prompt("") == [1]

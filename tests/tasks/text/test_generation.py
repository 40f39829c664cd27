"""Generation against a loop of single forward passes, for each method; nothing of it stays behind in the model."""

import logging
import subprocess
import sys
import warnings
from dataclasses import fields

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, processors
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from inlay import load_base, load_tokenizer
from inlay.errors import InlayError
from inlay.methods import METHODS
from inlay.tasks.text.generate import Decoding, _DrawnTokens, find_end_tokens, generate
from inlay.tasks.text.processor import TextProcessor
from inlay.train.config import TrainConfig
from methods.bases import adapted, build
from places import SHARED

PROMPTS = ["name", "a much longer prompt than that", "x", "", "name pub "]
SAME = ("full", "rslora", "pissa")  # no adapter, or LoRA layers with other numbers
TEXT_METHODS = [name for name, method in METHODS.items() if "text" in method.bases and name not in SAME]
PAIRS = [(m, b) for b in ("gpt2", "llama") for m in TEXT_METHODS if (m, b) != ("bias", "llama")]
STORIES = SHARED / "lm_stories260K_llama" / "hf"
BEAMS = {"beams": 3, "length_penalty": 0.9, "no_repeat_ngram": 4}
SAMPLED = {"temperature": 0.8, "top_p": 0.9}


def characters(start=False):
    """Tokens are characters: with the special ones as many as the tiny bases know."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(code): code - 29 for code in range(32, 127)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    if start:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return TextProcessor(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), separator="=")


def strong(model):
    """The tiny model with larger weights, so that its texts differ from prompt to prompt."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def by_hand(model, processor, prompt, count):
    """The greedy text by forward passes over one whole unpadded sequence, without a cache."""
    start = processor.encode_prompt(prompt)
    new = []
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([start + new])).logits[0, -1]
        if int(logits.argmax()) == 2:
            break
        new.append(int(logits.argmax()))
    return processor.decode(new)


@pytest.mark.parametrize(("method", "base"), PAIRS)
def test_texts_in_a_batch_are_those_of_single_forward_passes(method, base):
    model, processor = strong(adapted(method, base)), characters()
    texts = generate(model, processor, PROMPTS, Decoding(max_new_tokens=6))
    assert texts == [by_hand(model, processor, prompt, 6) for prompt in PROMPTS]
    assert len(set(texts)) > 1 or "bottleneck" in method


@pytest.mark.parametrize("base", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["lora", "attention-prefix", "prompt", "prefix"])
@pytest.mark.parametrize("settings", [BEAMS, SAMPLED], ids=["beams", "sampled"])
def test_a_text_does_not_depend_on_the_others_in_its_batch(method, base, settings):
    model, processor = strong(adapted(method, base)), characters()
    together = generate(model, processor, PROMPTS, Decoding(max_new_tokens=8, **settings))
    assert generate(model, processor, PROMPTS, Decoding(max_new_tokens=8, decode_batch=1, **settings)) == together
    assert len(set(together)) > 2


def test_several_beams_find_a_more_probable_text():
    model, processor = strong(build("gpt2")), characters()

    def log_probability(text):
        ids = torch.tensor([processor.encode_prompt("name" + text)])
        with torch.no_grad():
            steps = model(input_ids=ids).logits[0].log_softmax(-1)
        return float(steps[torch.arange(3, ids.shape[1] - 1), ids[0, 4:]].sum())

    greedy, best = (generate(model, processor, ["name"], Decoding(max_new_tokens=6, beams=n))[0] for n in (1, 50))
    assert len(greedy) == len(best) == 6
    assert log_probability(best) > log_probability(greedy)


def test_no_ngram_stands_twice():
    model, processor = strong(adapted("bottleneck", "gpt2")), characters()
    free, held = (generate(model, processor, ["x"], Decoding(max_new_tokens=20, no_repeat_ngram=n))[0] for n in (0, 2))
    assert len(free) == 20 and len({*free}) == 1
    pairs = [held[i : i + 2] for i in range(len(held) - 1)]
    assert len(set(pairs)) == len(pairs)


def test_sampling_follows_its_seed_and_the_prompts_place():
    model, processor = strong(build("gpt2")), characters()
    state = torch.get_rng_state()
    first = generate(model, processor, ["x"] * 4, Decoding(max_new_tokens=8, temperature=1.0))
    again = generate(model, processor, ["x"] * 2, Decoding(max_new_tokens=8, temperature=1.0))
    other = generate(model, processor, ["x"] * 4, Decoding(max_new_tokens=8, temperature=1.0, sample_seed=1))
    assert torch.equal(state, torch.get_rng_state())
    assert again == first[:2] and len({*first, *other}) == 8
    greedy = generate(model, processor, PROMPTS, Decoding(max_new_tokens=8))
    for settings in ({"temperature": 1e-3}, {"temperature": 1.0, "top_p": 1e-6}):
        assert generate(model, processor, PROMPTS, Decoding(max_new_tokens=8, **settings)) == greedy


def test_draws_are_as_frequent_as_probable():
    scores = torch.tensor([0.5, 0.0, 0.25, 0.25, 0.0]).log().expand(1000, 5)
    draw = _DrawnTokens(torch.linspace(0, 1, 1001)[1:, None])  # over 0, with 1
    counts = draw(None, scores).argmax(-1).bincount(minlength=5).tolist()
    assert counts == pytest.approx([500, 0, 250, 250, 0], abs=1) and counts[1] == counts[4] == 0
    assert int(_DrawnTokens(torch.tensor([[1e-38]]))(None, scores[:1].flip(-1)).argmax()) == 1


def test_a_text_ends_at_the_tokenizers_end_or_the_models():
    model, processor = strong(build("gpt2")), characters()
    whole = generate(model, processor, ["name"], Decoding(max_new_tokens=8))[0]
    assert len(whole) == 8
    third = processor.encode_prompt(whole[2])[0]
    model.generation_config = GenerationConfig(
        eos_token_id=[2, third], do_sample=True, max_length=3, repetition_penalty=5.0, min_new_tokens=7
    )
    assert generate(model, processor, ["name"], Decoding(max_new_tokens=8)) == [whole[: whole.index(whole[2])]]
    model.generation_config.eos_token_id = None
    processor.tokenizer.eos_token = whole[2]
    assert generate(model, processor, ["name", "x"], Decoding(max_new_tokens=8))[0] == whole[: whole.index(whole[2])]


@pytest.mark.parametrize("method", ["lora", "attention-prefix", "prompt", "prefix"])
@pytest.mark.parametrize("base", ["gpt2", "llama"])
def test_the_model_is_left_as_it_was(method, base):
    model, processor = adapted(method, base).train(), characters()
    inner = model.get_base_model()
    frozen = next(inner.modules())  # one module in another mode than the rest
    frozen.training = False
    modes, settings = [m.training for m in model.modules()], inner.generation_config
    before = settings.to_dict()
    generate(model, processor, PROMPTS, Decoding(max_new_tokens=4))
    assert [m.training for m in model.modules()] == modes
    assert inner.generation_config is settings and settings.to_dict() == before
    assert not inner._forward_pre_hooks
    ids = torch.tensor([processor.encode_prompt("name pub")])
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    # also when it fails
    processor.decode = lambda ids: 1 / 0
    with pytest.raises(ZeroDivisionError):
        generate(model, processor, PROMPTS, Decoding(max_new_tokens=4))
    assert [m.training for m in model.modules()] == modes
    assert inner.generation_config is settings and not inner._forward_pre_hooks


@pytest.mark.parametrize("settings", [{}, BEAMS, SAMPLED], ids=["greedy", "beams", "sampled"])
@pytest.mark.parametrize("method", ["prompt", "prefix", "attention-prefix"])
def test_nothing_is_printed(method, settings, capfd):
    model = adapted(method, "gpt2")
    model.get_base_model().generation_config.max_length = 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, characters(), PROMPTS, Decoding(max_new_tokens=4, decode_batch=2, **settings))
    assert capfd.readouterr() == ("", "")


def test_a_prompt_that_is_the_end_token_is_no_padding(caplog, monkeypatch):
    transformers.utils.logging.warning_once.cache_clear()  # it is said once a process
    speaker = logging.getLogger("transformers.modeling_utils")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to caplog
    processor = TextProcessor(load_tokenizer("builtin:gpt2-tiny"))
    assert generate(load_base("builtin:gpt2-tiny"), processor, [""], Decoding(max_new_tokens=4)) != [""]
    assert not caplog.records and not speaker.filters


@pytest.mark.parametrize(("method", "virtual"), [("lora", 0), ("prompt", 4), ("prefix", 4)])
def test_a_long_prompt_is_cut_at_its_start(method, virtual, caplog):
    model, processor = strong(adapted(method, "gpt2")), characters()  # 64 positions
    prompt = "".join(chr(32 + i) for i in range(90))
    room = 64 - 8 - virtual
    texts = generate(model, processor, [prompt, "x"], Decoding(max_new_tokens=8))
    assert texts == [by_hand(model, processor, text, 8) for text in (prompt[1 - room :], "x")]  # "=" is a token too
    assert [record.getMessage() for record in caplog.records] == [
        f"cut 1 of 2 prompts at their start to the {room} tokens that fit."
    ]
    generate(model, processor, [prompt[: room - 1]], Decoding(max_new_tokens=8))
    assert len(caplog.records) == 1
    begins = characters(start=True)
    assert generate(model, begins, [prompt], Decoding(max_new_tokens=8)) == [
        by_hand(model, begins, prompt[2 - room :], 8)  # <s> is kept
    ]
    assert generate(model, processor, ["xyz"], Decoding(max_new_tokens=63 - virtual))
    with pytest.raises(InlayError, match="reads 64 tokens, which leaves no room for a prompt"):
        generate(model, processor, ["x"], Decoding(max_new_tokens=64 - virtual))


def test_a_chat_ends_where_its_template_ends_an_answer():
    model, processor = strong(build("llama")), characters()
    processor.tokenizer.chat_template = (
        "{% for m in messages %}{{ '>' if m.role == 'user' else '<' }}{{ m.content }}<s>{% endfor %}"
        "{% if add_generation_prompt %}<{% endif %}"
    )
    chat = [{"role": "user", "content": "any pub"}]
    assert find_end_tokens(model, processor, [chat]) == [1, 2] and find_end_tokens(model, processor, ["any pub"]) == [2]
    texts = generate(model, processor, ["x", chat], Decoding(max_new_tokens=8))
    assert texts == [by_hand(model, processor, prompt, 8) for prompt in ("x", chat)]
    processor.tokenizer.chat_template = "{{ messages | length }}"  # writes all anew for an answer
    assert find_end_tokens(model, processor, [chat]) == [2]


def test_mistakes_are_named():
    model, processor = build("gpt2"), characters()
    assert generate(model, processor, [], Decoding(max_new_tokens=8)) == []
    with pytest.raises(InlayError, match="prompts must be a list, got a string"):
        generate(model, processor, "name")
    with pytest.raises(InlayError, match="ViTForImageClassification"):
        generate(build("vit"), processor, ["x"])
    for settings, words in (
        ({"max_new_tokens": 0}, "max_new_tokens must be"),
        ({"beams": 1.5}, "beams must be"),
        ({"beams": 4, "temperature": 0.5}, "beams 4 is beam search and temperature 0.5 sampling"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p over 0"),
        ({"top_p": 0.9}, "temperature is 0"),
        ({"length_penalty": 0.9}, "Set beams"),
        ({"no_repeat_ngram": 1}, "2 or more"),
        ({"sample_seed": -1}, "sample_seed must be"),
        ({"decode_batch": 0}, "decode_batch must be"),
    ):
        with pytest.raises(InlayError, match=words):
            Decoding(**settings)


def test_command_line_is_read_beside_training_options_without_torch():
    assert all(option.metadata["help"] for option in fields(Decoding))
    assert not {option.name for option in fields(Decoding)} & {option.name for option in fields(TrainConfig)}
    code = "import sys, inlay.tasks.text.generate; assert not {'torch', 'transformers', 'numpy'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not STORIES.exists(), reason="the story model is not here")
def test_a_trained_model_writes_a_story():
    model = LlamaForCausalLM.from_pretrained(STORIES)
    processor = TextProcessor(AutoTokenizer.from_pretrained(STORIES), separator="")
    prompts = ["Once upon a time, there was a little girl", "Tom"]
    texts = generate(model, processor, prompts, Decoding(max_new_tokens=24))
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([processor.encode_prompt(prompt)])
        whole = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert text == processor.decode(whole)
    assert "named Lily" in texts[0]

"""Texts that join and leave a batch between tokens are those that `generate` writes one by one."""

from dataclasses import dataclass, field

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from inlay import Bank, Unsupported
from inlay.methods import METHODS
from inlay.serve.decoding import DecodingBatch

SIZES = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LAYERS = ["sliding_attention", "full_attention"]
BASES = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=4, n_positions=99, initializer_range=0.3)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6, layer_types=LAYERS, tie_word_embeddings=False)
    ),
}
METHODS_OF = {
    "lora": lambda model: LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "prompt": lambda model: PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix": lambda model: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "attention-prefix": lambda model: METHODS["attention-prefix"].config(model, 4),
    "bottleneck": lambda model: METHODS["bottleneck"].config(model, 4),
}
# When each text joins, its adapter, and how many tokens its prompt and its text have.
TEXTS = [(0, "lora", 4, 14), (0, "b", 17, 3), (1, None, 2, 6), (4, "b", 9, 8), (5, "lora", 1, 9), (11, "b", 3, 2)]


def build(base, dtype=torch.float32):
    torch.manual_seed(0)
    return BASES[base]().eval().to(dtype)


def save(base, method, folder, seed):
    torch.manual_seed(seed)
    model = build(base)
    model = get_peft_model(model, METHODS_OF[method](model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return folder


@dataclass(eq=False)
class Text:
    held: object
    ids: list[int]
    count: int
    written: list[int] = field(default_factory=list)

    @property
    def last(self):
        return self.written[-1]


def write_together(batch, holds):
    """The texts of TEXTS, which join when it is their time and leave when they have all their tokens."""
    texts = []
    for i, (_, name, length, count) in enumerate(TEXTS):
        prompt = torch.randint(3, 200, (length,), generator=torch.Generator().manual_seed(i)).tolist()
        texts.append(Text(holds[name], prompt, count))
    for step in range(14):
        stepping = batch.texts
        found = batch.step().argmax(-1).tolist() if stepping else []
        joining = [text for text, (begin, *_) in zip(texts, TEXTS, strict=True) if begin == step]
        if joining:
            found += batch.join(joining).argmax(-1).tolist()
        for text, token in zip([*stepping, *joining], found, strict=True):
            text.written.append(token)
        batch.leave([text for text in batch.texts if len(text.written) == text.count])
    assert batch.texts == []
    return texts


@pytest.mark.parametrize(
    ("base", "method"),
    [
        ("gpt2", "prompt"),
        ("llama", "prefix"),
        ("qwen2", "bottleneck"),
        ("mistral", "prompt"),
        ("gemma3", "attention-prefix"),
    ],
)
@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # peft of its prompts
def test_texts_that_join_and_leave_are_those_of_generate(base, method, tmp_path):
    folders = {"lora": save(base, "lora", tmp_path / "lora", 1), "b": save(base, method, tmp_path / "b", 2)}
    bank = Bank(build(base), folders)
    batch = DecodingBatch(bank)
    texts = write_together(batch, {None: None, **{name: bank.hold(name) for name in folders}})
    models = {name: PeftModel.from_pretrained(build(base), folder) for name, folder in folders.items()}
    models[None] = build(base)
    for (_, name, *_), text in zip(TEXTS, texts, strict=True):
        with torch.no_grad():  # each token is the most probable one behind those before it, read without a cache
            logits = models[name](input_ids=torch.tensor([text.ids + text.written[:-1]])).logits[0, -text.count :]
        assert text.written == logits.argmax(-1).tolist()
    ids = torch.tensor([texts[3].ids])
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    whole = models["b"].generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0]
    assert texts[3].written == whole[-8:].tolist()


def test_bfloat16_is_within_its_rounding(tmp_path):
    """Its tokens may differ where two are about as probable; logits do not differ by more than the rounding."""
    folder = save("llama", "lora", tmp_path / "lora", 1)
    bank = Bank(build("llama", torch.bfloat16), {"lora": folder, "b": folder})
    batch = DecodingBatch(bank)
    held = bank.hold("lora")
    model = PeftModel.from_pretrained(build("llama", torch.bfloat16), folder)
    batch.join([Text(held, [5, 9, 11], 2, [3]), Text(held, [7], 2, [4])])
    found = batch.step().float()
    for row, ids in enumerate(([5, 9, 11, 3], [7, 4])):
        with torch.no_grad():
            wanted = model(input_ids=torch.tensor([ids])).logits[0, -1].float()
        assert (found[row] - wanted).abs().max() < 0.04 * wanted.abs().max()


def test_free_rows_are_taken_again_and_common_padding_is_cut(tmp_path):
    bank = Bank(build("gpt2"), {"lora": save("gpt2", "lora", tmp_path / "lora", 1)})
    batch, held = DecodingBatch(bank), bank.hold("lora")
    texts = [Text(held, [5] * length, 1, [3]) for length in (20, 2, 1, 3, 4)]
    batch.join(texts[:4])
    assert batch.shape == (4, 20)
    batch.leave(texts[:1])
    assert batch.shape == (4, 3) and batch.texts == texts[1:4]  # its row is free
    batch.join(texts[4:])
    assert batch.shape == (4, 4) and batch.texts == [texts[4], *texts[1:4]]
    batch.leave(texts[1:3])
    assert batch.shape == (2, 4) and batch.texts == [texts[4], texts[3]]  # more than a quarter were free
    batch.leave(texts)
    assert batch.shape == (0, 0)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda: MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=20)), "has another one"),
        (lambda: BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=20)), "no positions"),
    ],
)
def test_other_caches_are_refused(model, sentence):
    with pytest.raises(Unsupported, match=sentence):
        DecodingBatch(Bank(model().eval()))

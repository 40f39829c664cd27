"""An attention prefix with each kind of cache: logits are those of the whole text without a cache."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    QuantizedCache,
    StaticCache,
)

from inlay import (
    AttentionPrefixConfig,
    Bank,
    BottleneckConfig,
    CompositeConfig,
    TextProcessor,
    load_base,
    load_tokenizer,
    save_adapter,
)

SIZES = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
BASES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6, layer_types=LAYERS, pad_token_id=0)
    ),
}
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=24),
    "quantised": lambda config: QuantizedCache(backend="fp8", config=config),
}
PIECES = ([14], [10, 1, 1, 1, 1], [1] * 14, [5, 4, 5])  # a prefill, and what follows in steps of so many tokens
IDS = (torch.arange(28).view(2, 14) * 7) % 90 + 5


def prefix():
    return AttentionPrefixConfig(length=3, task_type="CAUSAL_LM")


def mix_and_match():
    beside = BottleneckConfig(width=4, sites=["mlp"], placement="parallel", scale=4, init_weights=False)
    return CompositeConfig(parts=[AttentionPrefixConfig(length=3), beside], task_type="CAUSAL_LM")


def adapted(base, config):
    model = get_peft_model(base, config()).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "prefix" in name:
            parameter.data = torch.randn_like(parameter)
    return model


@torch.no_grad()
def in_pieces(model, pieces, cache, mask):
    outputs, start = [], 0
    for length in pieces:
        seen = {} if mask is None else {"attention_mask": mask[:, : start + length]}
        part = model(input_ids=IDS[:, start : start + length], past_key_values=cache, **seen)
        outputs.append(part.logits)
        start += length
    return torch.cat(outputs, dim=1)


@torch.no_grad()
def error_of_cache(model, base, pieces, kind, padding):
    """Norm of the difference that a cache makes to the logits, relative to them; padded positions do not count."""
    mask = None if padding is None else torch.ones_like(IDS)
    if mask is not None:
        mask[0, :padding] = 0
    whole = model(input_ids=IDS, use_cache=False, **({} if mask is None else {"attention_mask": mask})).logits
    found = in_pieces(model, pieces, CACHES[kind](base.config), mask)
    counted = torch.ones_like(IDS, dtype=torch.bool) if mask is None else mask.bool()
    return float((found - whole)[counted].norm() / whole[counted].norm())


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt2", prefix),
        ("gpt2", mix_and_match),
        ("llama", prefix),
        ("llama", mix_and_match),
        ("mistral", prefix),
        ("mistral", mix_and_match),
        ("gemma3", prefix),
    ],
)
def test_with_and_without_a_cache(name, config, attention, kind, padding):
    torch.manual_seed(0)
    base = BASES[name]()
    base.set_attn_implementation(attention)
    model = adapted(base, config)
    for pieces in PIECES:
        assert error_of_cache(model, base, pieces, kind, padding) < 1e-4, pieces


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("config", [prefix, mix_and_match])
def test_a_quantised_cache(config, attention):
    """The prefill reads nothing of the cache; afterwards the error is of the size of that of the plain base (5 %)."""
    torch.manual_seed(0)
    base = BASES["llama"]()
    base.set_attn_implementation(attention)
    rounding = error_of_cache(base.eval(), base, PIECES[1], "quantised", None)
    model = adapted(base, config)
    assert error_of_cache(model, base, PIECES[0], "quantised", None) < 1e-4
    assert error_of_cache(model, base, PIECES[1], "quantised", None) < 2 * rounding


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rows_of_a_bank(attention, tmp_path):
    folders = []
    for i, length in enumerate((2, 5)):
        torch.manual_seed(i)
        model = get_peft_model(load_base("builtin:gpt2-tiny"), AttentionPrefixConfig(length=length)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter)
        processor = TextProcessor(load_tokenizer("builtin:gpt2-tiny"))
        folders.append(save_adapter(model, tmp_path / str(i), processor=processor))
    bank = Bank("builtin:gpt2-tiny", folders)
    bank.model.set_attn_implementation(attention)
    for names in (["0", "1"], ["1", "1"], ["0", None]):
        whole = bank({"input_ids": IDS}, names, use_cache=False).logits
        for kind in ("dynamic", "static"):
            cache = CACHES[kind](bank.model.config)
            with bank.rows(names) as model:
                found = in_pieces(model, [10, 1, 1, 1, 1], cache, None)
            assert float((found - whole).norm() / whole.norm()) < 1e-4, (names, kind)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    usual = bank.generate(inputs, ["0", "1"], **settings)
    assert torch.equal(bank.generate(inputs, ["0", "1"], cache_implementation="static", **settings), usual)

"""Adapters of a language model whose token embedding and output projection are one weight."""

import copy
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from inlay import Bank, TextProcessor, load_adapter, load_base, load_tokenizer, merge, save_adapter
from inlay.methods._peft import remove_all_adapters

IDS = torch.arange(5, 17)[None]
TOKENS = load_tokenizer("builtin:gpt2-tiny")
# peft knows an embedding that it should tie by its name: embed_tokens, as in Llama, but not GPT-2's wte.
EMBEDDING = {"gpt2": "wte", "llama": "embed_tokens"}
LINEAR = {"gpt2": "c_attn", "llama": "q_proj"}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|ensure_weight_tying|tied)"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in builtin"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
]


def lora(**settings):
    return LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **settings)


def configs(embedding, linear):
    """By name: a config, and whether one weight stays one where the adapter is merged; {} where it depends on peft."""
    new, head = {"trainable_token_indices": [5, 6, 7]}, "lm_head"
    return {
        "lora-embedding": (lora(target_modules=[embedding]), False),
        "lora-head": (lora(target_modules=[head]), False),
        "lora-both": (lora(target_modules=[embedding, head]), False),
        "dora-embedding": (lora(target_modules=[embedding], use_dora=True), False),
        "dora-head": (lora(target_modules=[head], use_dora=True), False),
        "tied-lora": (lora(target_modules=[head], ensure_weight_tying=True), True),
        "tokens": (lora(target_modules=[linear], **new), True),
        "tokens-beside-lora-head": (lora(target_modules=[head], **new), False),
        "other-tokens-in-head": (
            lora(target_modules=[linear], trainable_token_indices={embedding: [5, 6], head: [7, 8]}),
            False,
        ),
        "tokens-in-head": (lora(target_modules=[linear], trainable_token_indices={head: [7, 8]}), False),
        "tokens-alone": (
            TrainableTokensConfig(token_indices=[5, 6], target_modules=[embedding], task_type="CAUSAL_LM"),
            True,
        ),
        "whole-head": (lora(target_modules=[linear], modules_to_save=[head]), False),
        "whole-embedding-lora-head": (lora(target_modules=[head], modules_to_save=[embedding]), False),
        "whole-tied": (lora(target_modules=[linear], modules_to_save=[head], ensure_weight_tying=True), True),
        "whole-tied-both": (
            lora(target_modules=[linear], modules_to_save=[embedding, head], ensure_weight_tying=True),
            True,
        ),
    }


NAMES = list(configs("", ""))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "llama"
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(TOKENS), max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    TOKENS.save_pretrained(folder)
    return {"gpt2": "builtin:gpt2-tiny", "llama": str(folder)}


def adapted(base, config):
    """`config` on a base, each tensor of it with an effect."""
    torch.manual_seed(0)
    model = get_peft_model(load_base(base), copy.deepcopy(config))
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name or "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def check_close(found, expected, plain, limit=1e-4):
    """Equal, beside what the adapter changes."""
    assert float((found - expected).norm() / (expected - plain).norm()) < limit


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_loaded_merged_and_unmerged(name, kind, bases, tmp_path):
    base = bases[kind]
    config, tied = configs(EMBEDDING[kind], LINEAR[kind])[name]
    model, plain = adapted(base, config), logits(load_base(base))
    expected = logits(model)
    folder = save_adapter(model, tmp_path / "adapter", processor=TextProcessor(TOKENS))
    check_close(logits(PeftModel.from_pretrained(load_base(base), folder).eval()), expected, plain)
    loaded = load_adapter(folder)
    before = logits(loaded.model)
    check_close(before, expected, plain)

    shutil.rmtree(folder)  # what follows needs no file
    merged = loaded.merge().model
    check_close(logits(merged), expected, plain)
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied
    assert merged.config.tie_word_embeddings == tied
    merged.save_pretrained(tmp_path / "merged")
    check_close(logits(type(merged).from_pretrained(tmp_path / "merged")), expected, plain)

    loaded.unmerge()
    assert torch.equal(logits(loaded.model), before)
    with loaded.model.disable_adapter():
        assert torch.equal(logits(loaded.model), plain)
    bare = loaded.model.get_base_model()
    assert bare.config.tie_word_embeddings
    remove_all_adapters(bare)
    assert torch.equal(logits(bare), plain)
    assert bare.get_input_embeddings().weight is bare.get_output_embeddings().weight


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["lora-head", "tied-lora", "tokens-beside-lora-head", "tokens-in-head", "whole-tied"])
def test_merged_to_a_folder(name, kind, bases, tmp_path):
    config, tied = configs(EMBEDDING[kind], LINEAR[kind])[name]
    model = adapted(bases[kind], config)
    folder = save_adapter(model, tmp_path / "adapter", processor=TextProcessor(TOKENS))
    assert merge(folder, tmp_path / "merged").error < 1e-4
    found = load_base(tmp_path / "merged")
    check_close(logits(found), logits(model), logits(load_base(bases[kind])))
    assert (found.get_input_embeddings().weight is found.get_output_embeddings().weight) == tied


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_file_of_plain_peft_that_leaves_out_what_is_tied(kind, bases, tmp_path):
    """peft saves the tensors of the tied head, but not its name."""
    config, _ = configs(EMBEDDING[kind], LINEAR[kind])["whole-tied"]
    model, plain = adapted(bases[kind], config), logits(load_base(bases[kind]))
    model.save_pretrained(tmp_path / "adapter")
    check_close(logits(load_adapter(tmp_path / "adapter", bases[kind]).model), logits(model), plain)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["lora-embedding", "lora-head", "tied-lora", "whole-head"])
def test_in_a_bank(name, kind, bases, tmp_path):
    config, _ = configs(EMBEDDING[kind], LINEAR[kind])[name]
    model = adapted(bases[kind], config)
    save_adapter(model, tmp_path / "adapter", processor=TextProcessor(TOKENS))
    bank, plain = Bank(bases[kind], [tmp_path / "adapter"]), logits(load_base(bases[kind]))
    assert torch.equal(bank({"input_ids": IDS}, [None]).logits, plain)
    check_close(bank({"input_ids": IDS}, ["adapter"]).logits, logits(model), plain)

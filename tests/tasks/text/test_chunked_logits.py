"""The loss in chunks of logits: that of torch on all logits at once, with its gradients, whatever follows the body."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel

from inlay.measure.memory import measure_peak, plan_memory
from inlay.tasks.text import chunked_logits
from inlay.tasks.text import loss as loss_module
from inlay.tasks.text.chunked_logits import read_logits
from inlay.tasks.text.loss import NextToken

VOCABULARY = 40
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **QUIET}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "gpt2": GPT2,  # its head is tied to its embedding
    "llama": SMALL,
    "gemma2": {**SMALL, "final_logit_softcapping": 2.0},
    "cohere": {**SMALL, "logit_scale": 0.3},
    "granite": {**SMALL, "logits_scaling": 3.0},
    "opt": {
        **SMALL,
        "ffn_dim": 24,
        "word_embed_proj_dim": 8,
        "dropout": 0.0,
    },  # its head calls the decoder, not the model
}


@pytest.fixture
def five_tokens(monkeypatch):
    """Chunks of the logits of five tokens."""
    for module in (chunked_logits, loss_module):
        monkeypatch.setattr(module, "CHUNK", 5 * VOCABULARY)


def language_model(kind):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind]))


def padded_batch():
    """Three texts of eleven tokens or fewer; the prompts are four tokens long."""
    ids = torch.randint(1, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 8:], labels[1, 8:], labels[:, :4] = 0, -100, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def reference_loss(model, batch, smoothing=0.0):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, -batch["labels"].shape[1] : -1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=smoothing)


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_reference(model, batch, smoothing=0.0, tolerance=1e-12):
    model.train()
    chunked = NextToken(smoothing)(model, batch)
    assert chunked.logits is None, "all logits were computed at once"
    expected = reference_loss(model, batch, smoothing)
    torch.testing.assert_close(chunked.loss, expected, rtol=tolerance, atol=tolerance)
    ours, theirs = gradients_of(model, 3 * chunked.loss), gradients_of(model, 3 * expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_are_those_of_all_logits_at_once(kind, five_tokens):
    assert_equal_to_reference(language_model(kind).double(), padded_batch(), smoothing=0.1)


@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_lora_in_the_head_gets_its_gradients(kind, five_tokens):
    tied = kind == "gemma2"  # the same factors stand in the embedding
    targets = ["q_proj", "lm_head"]
    config = LoraConfig(target_modules=targets, init_lora_weights=False, ensure_weight_tying=tied)
    assert_equal_to_reference(get_peft_model(language_model(kind), config).double(), padded_batch())


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_learned_prompts_and_prefixes_stand_in_front(config, five_tokens):
    model = get_peft_model(language_model("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=3)).double()
    assert_equal_to_reference(model, padded_batch())


def test_bf16_of_the_forward_is_that_of_the_chunks(five_tokens):
    """accelerate sets autocast around the model's forward only, in which the chunks are computed."""
    model = get_peft_model(language_model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    plain = model.forward
    model.forward = torch.autocast("cpu", torch.bfloat16)(plain)
    assert_equal_to_reference(model, padded_batch(), tolerance=0.02)
    seen = []
    model.get_base_model().lm_head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    NextToken()(model, padded_batch())
    assert set(seen) == {torch.bfloat16}
    assert NextToken()(model, padded_batch()).loss.dtype == torch.float32


class OddModel(GPT2LMHeadModel):
    """Its logits depend on more than the last hidden states."""

    def forward(self, input_ids=None, attention_mask=None, use_cache=None):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        output.logits = output.logits + input_ids.double().mean() * torch.arange(VOCABULARY)
        return output


def test_a_model_that_cannot_be_split_is_computed_whole(five_tokens):
    torch.manual_seed(0)
    model, batch = OddModel(AutoConfig.for_model("gpt2", **GPT2)).double(), padded_batch()
    for _ in range(2):
        found = NextToken()(model, batch)
        assert found.logits is not None
        torch.testing.assert_close(found.loss.double(), reference_loss(model, batch), rtol=1e-6, atol=1e-6)


def test_the_first_batch_draws_no_further_random_numbers(five_tokens):
    """The model is checked with the first batch of a process: a resumed run has another first batch."""
    model, batch, drawn = language_model("llama"), padded_batch(), []
    for _ in range(2):
        torch.manual_seed(5)
        NextToken()(model.train(), batch)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1]


def test_logits_are_read_in_the_order_of_the_batch(five_tokens):
    model, batch = language_model("gpt2").eval(), padded_batch()
    with torch.inference_mode():
        found = read_logits(model, batch, lambda logits, labels: (logits, labels))
        whole = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        learned = batch["labels"][:, 1:] != -100
    assert max(len(labels) for _, labels in found) == 5
    logits, labels = (torch.cat(each) for each in zip(*found, strict=True))
    torch.testing.assert_close(logits, whole[learned])
    assert torch.equal(labels, batch["labels"][:, 1:][learned])
    batch["labels"][:] = -100
    [(logits, labels)] = read_logits(model, batch, lambda logits, labels: (logits, labels))
    assert logits.shape == (0, VOCABULARY)
    assert labels.shape == (0,)


def test_a_step_holds_the_logits_of_a_chunk_only_and_the_plan_says_so(monkeypatch):
    """All logits of 4 x 64 tokens, their logarithms and gradients are 3 x 4.1 MB; a chunk has 32 tokens."""
    config = AutoConfig.for_model("gpt2", **{**GPT2, "vocab_size": 4000})
    model = get_peft_model(GPT2LMHeadModel(config), LoraConfig(target_modules=["c_attn"]))
    ids = torch.arange(256).view(4, 64)
    batch, peaks = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, {}
    for tokens in (32, 1000):
        for module in (chunked_logits, loss_module):
            monkeypatch.setattr(module, "CHUNK", tokens * 4000)
        peaks[tokens] = measure_peak(model, batch, loss=NextToken())
        assert plan_memory(model, batch, loss=NextToken()).peak == pytest.approx(peaks[tokens], rel=0.02)
    assert peaks[1000] - peaks[32] > 2 * 4000 * 256 * 4
